# SPDX-License-Identifier: Apache-2.0
"""Ends for a chain of stages that is tested without the stages behind it."""

from __future__ import annotations

from imagecache_lib.ingest.stream import Content
from imagecache_lib.store.reservations import Reservation


class Collected:
    """A consumer that keeps the pieces it gets."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        self.pieces.append(chunk)

    def finish(self) -> Content:
        return Content("raw", "raw", sum(map(len, self.pieces)))

    def close(self) -> None:
        pass


class Counted:
    """A consumer that forgets the pieces it gets, but how many bytes they had."""

    def __init__(self) -> None:
        self.taken = 0

    def feed(self, chunk: bytes) -> None:
        self.taken += len(chunk)

    def finish(self) -> Content:
        return Content("raw", "raw", self.taken)

    def close(self) -> None:
        pass


class EndlessRoom(Reservation):
    """A reservation on a filesystem that has room for everything; it keeps what was asked for."""

    def __init__(self) -> None:
        self.amounts: list[int] = []

    @property
    def reserved(self) -> int:
        return max(self.amounts, default=0)

    def raise_to(self, needed: int) -> None:
        self.amounts.append(needed)
