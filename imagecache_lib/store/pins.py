# SPDX-License-Identifier: Apache-2.0
"""Pins: a base that must stay although nobody uses it yet. What cannot be read keeps the base."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator

from imagecache_lib import dates
from imagecache_lib.store import layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable, locks
from imagecache_lib.system.translate import translated

#: One lock for all pin files: they are changed seldom and for microseconds.
LOCK = "imagecache-pins"


#: Owner of a pin that stands for those that a torn file may have held.
UNREADABLE = "an unreadable pin file"


@dataclasses.dataclass(frozen=True)
class Pin:
    """Somebody's wish that a base stays.

    :param owner: who wishes it. An owner has one pin on a base at most.
    :param expires: epoch seconds of the filesystem's clock. None: until it is taken away.
    """

    owner: str
    expires: float | None = None

    def is_over(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


@dataclasses.dataclass(frozen=True)
class PinFile:
    """All pins of one base. ``image_id`` is kept so that listings can name the image."""

    image_id: str
    pins: tuple[Pin, ...]

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"


def parse(data: bytes) -> PinFile | None:
    """Return the pins in ``data``. None for anything torn or unknown, which then pins for ever."""
    try:
        fields = json.loads(data)
        image_id = fields["image_id"]
        found = tuple(Pin(each["owner"], each["expires"]) for each in fields["pins"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    known = isinstance(image_id, str) and all(
        isinstance(pin.owner, str) and isinstance(pin.expires, int | float | None) for pin in found
    )
    return PinFile(image_id, found) if known else None


def add(cache: CacheStore, name: str, image_id: str, pin: Pin) -> Pin | None:
    """Pin a base, whether it is there or not. Returns the owner's earlier pin, whose place it takes."""
    with _changing(cache):
        before = _read(cache, name)
        others = tuple(each for each in before if each.owner != pin.owner)
        _write(cache, name, PinFile(image_id, (*others, pin)))
        return next((each for each in before if each.owner == pin.owner), None)


def take_back(cache: CacheStore, name: str, image_id: str, pin: Pin, earlier: Pin | None) -> None:
    """Undo :func:`add`, unless the owner pinned the base anew since.

    :param earlier: as :func:`add` returned it.
    """
    with _changing(cache):
        before = _read(cache, name)
        if pin in before:
            others = tuple(each for each in before if each != pin)
            _write(cache, name, PinFile(image_id, others if earlier is None else (*others, earlier)))


def remove(cache: CacheStore, name: str, image_id: str, owner: str) -> bool:
    """Take an owner's pin away. True: there was one."""
    with _changing(cache):
        before = _read(cache, name)
        after = tuple(each for each in before if each.owner != owner)
        _write(cache, name, PinFile(image_id, after))
        return len(after) != len(before)


def reason(cache: CacheStore, name: str, now: float) -> str | None:
    """Return who pins a base and until when, as a clause. None: nobody does."""
    try:
        data = durable.read_file(cache.layout.pin(name))
    except OSError as error:
        return f"its pins cannot be read: {error.strerror}; see {cache.layout.pin(name)}"
    if data is None:
        return None
    found = parse(data)
    if found is None:
        return f"its pins are unreadable; remove {cache.layout.pin(name)} if they are not wanted"
    holding = [pin for pin in found.pins if not pin.is_over(now)]
    if not holding:
        return None
    return "pinned by " + ", ".join(
        f"{pin.owner} until {dates.date(pin.expires)}" if pin.expires is not None else pin.owner
        for pin in holding
    )


def read(cache: CacheStore, name: str) -> PinFile | None:
    """Return the pins of a base, for a listing. None: there are none, or they cannot be read."""
    try:
        data = durable.read_file(cache.layout.pin(name))
    except OSError:
        return None
    return parse(data) if data is not None else None


def names(cache: CacheStore) -> list[str]:
    """Return the names of all bases that have a pin file."""
    try:
        entries = os.listdir(cache.layout.pins)
    except FileNotFoundError:
        return []
    return [
        name
        for entry in entries
        if entry.endswith(".json")
        and layout.classify(name := entry.removesuffix(".json")) is not layout.Kind.UNKNOWN
    ]


@contextlib.contextmanager
def _changing(cache: CacheStore) -> Iterator[None]:
    with (
        locks.waiting(
            cache.layout.lock(LOCK),
            shared=False,
            host=cache.host,
            patience=cache.config.lock_timeout,
        ),
        translated(cache.layout.pins),
    ):
        yield


def _read(cache: CacheStore, name: str) -> tuple[Pin, ...]:
    try:
        data = durable.read_file(cache.layout.pin(name))
    except OSError:
        return (Pin(UNREADABLE),)
    if data is None:
        return ()
    found = parse(data)
    # Whoever pinned it must not lose that by somebody else's writing over what is torn.
    return found.pins if found is not None else (Pin(UNREADABLE),)


def _write(cache: CacheStore, name: str, pins: PinFile) -> None:
    if pins.pins:
        durable.write_file(cache.layout.pin(name), pins.to_json())
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(cache.layout.pin(name))
