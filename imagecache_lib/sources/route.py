# SPDX-License-Identifier: Apache-2.0
"""Whom a host asks for the bytes of images, which changes while it does. No I/O."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Sequence

#: What stands for the image service among those who send bytes. No host has such a name.
ORIGIN = ""

#: As many hosts are remembered that passed on wrong bytes.
_MOST_WRONG = 16


@dataclasses.dataclass(frozen=True)
class RouteState:
    """How a host gets on along its route.

    :param parent: the host that sends it bytes now, :data:`ORIGIN` for the image service, or None if there is
        none.
    :param wants_origin: no parent serves it, and it waits for leave to ask the image service.
    :param wrong: hosts that sent bytes which are not the image's.
    :param mismatched: an image that it received was not what its digest says, and it cannot tell which host
        sent the wrong bytes.
    """

    parent: str | None = None
    wants_origin: bool = False
    wrong: tuple[str, ...] = ()
    mismatched: bool = False


class Route:
    """The route of one task. One side sets it, the other follows it and tells how that goes. Thread-safe.

    :param parents: names of hosts to ask, the nearest first.
    :param origin: whether the image service may be asked when none of them serves.
    """

    def __init__(self, parents: Sequence[str] = (), *, origin: bool = True) -> None:
        self._changed = threading.Condition()
        self._parents = tuple(parents)
        self._origin = origin
        self._version = 0
        self._state = RouteState()

    @property
    def parents(self) -> tuple[str, ...]:
        return self._parents

    @property
    def origin(self) -> bool:
        return self._origin

    @property
    def version(self) -> int:
        """Counts the changes."""
        return self._version

    @property
    def state(self) -> RouteState:
        return self._state

    def change(self, parents: Sequence[str], *, origin: bool) -> None:
        """Ask others from now on."""
        with self._changed:
            if (tuple(parents), origin) != (self._parents, self._origin):
                self._parents, self._origin = tuple(parents), origin
                self._version += 1
                self._changed.notify_all()

    def wait(self, version: int, seconds: float) -> None:
        """Wait until the route is another than that version, at most so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, seconds)

    def follows(self, parent: str | None, *, wants_origin: bool = False) -> None:
        """Tell who sends bytes now."""
        with self._changed:
            self._state = dataclasses.replace(self._state, parent=parent, wants_origin=wants_origin)

    def blame(self, host: str) -> None:
        """Tell that a host sent wrong bytes."""
        with self._changed:
            if host not in self._state.wrong:
                wrong = (*self._state.wrong, host)[-_MOST_WRONG:]
                self._state = dataclasses.replace(self._state, wrong=wrong)

    def mismatched(self) -> None:
        """Tell that an image was not what its digest says, and that it is not known who sent wrong bytes."""
        with self._changed:
            self._state = dataclasses.replace(self._state, mismatched=True)

    def acquit(self) -> None:
        """Take back all that was told of wrong bytes: the images are fetched anew."""
        with self._changed:
            self._state = dataclasses.replace(self._state, wrong=(), mismatched=False)

    def forgive(self, hosts: Collection[str]) -> None:
        """Take back that hosts sent wrong bytes."""
        with self._changed:
            wrong = tuple(host for host in self._state.wrong if host not in hosts)
            self._state = dataclasses.replace(self._state, wrong=wrong)
