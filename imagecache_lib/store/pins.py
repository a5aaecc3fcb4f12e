# SPDX-License-Identifier: Apache-2.0
"""Pins: a base that must stay although no instance uses it yet. A file that cannot be read keeps the base.

Each owner's pin of a base is a file of its own, ``pins/<name>/<sha1(owner)>.json``, which is made, replaced
and removed in one step: no lock is needed to keep two owners apart. The form of earlier releases, one file
``pins/<name>.json`` for all owners, is read too, as :mod:`imagecache_lib.store.layout` says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re

from imagecache_lib import dates, errors
from imagecache_lib.store import layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable, locks
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

#: The lock under which the files of the earlier form are changed, by every release.
LOCK = "imagecache-pins"

#: Owner of a pin that stands for those that a torn file may have held.
UNREADABLE = "an unreadable pin file"

#: Owner, in a file of the earlier form, of the one pin that stands for all in the base's directory.
STAND_IN = "a later release"

_FILE = re.compile(r"[0-9a-f]{40}\.json")

#: What tells in a file when a pin ends. A truth value tells nothing, and Python takes it for a number.
_ENDS = (int, float, type(None))

#: How often the directory for a new pin may be removed from under it, with another owner's last pin.
_MOST_TURNS = 100


@dataclasses.dataclass(frozen=True)
class Pin:
    """An owner's wish that a base stays.

    :param owner: who wishes it. An owner has one pin on a base at most.
    :param expires: when the pin ends, in epoch seconds of the filesystem's clock, or None if it holds until
        it is removed.
    """

    owner: str
    expires: float | None = None

    def is_over(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


@dataclasses.dataclass(frozen=True)
class PinFile:
    """Pins of one base: one owner's, or in the earlier form all. Listings name the image by ``image_id``."""

    image_id: str
    pins: tuple[Pin, ...]

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"


def parse(data: bytes) -> PinFile | None:
    """Return the pins in ``data``. Returns None for anything torn or unknown, which then pins for ever."""
    try:
        fields = json.loads(data)
        image_id = fields["image_id"]
        found = tuple(Pin(each["owner"], each["expires"]) for each in fields["pins"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    known = isinstance(image_id, str) and all(
        isinstance(pin.owner, str) and type(pin.expires) in _ENDS for pin in found
    )
    return PinFile(image_id, found) if known else None


def add(cache: CacheStore, name: str, image_id: str, pin: Pin, *, waiter: Waiter | None = None) -> Pin | None:
    """Pin a base, whether it is there or not. Returns the owner's earlier pin, whose place it takes.

    :param waiter: the caller that waits, or None for one that waits as long as it takes.
    :raises CancelledError, LockTimeoutError: the waiter no longer waits; there is no pin.
    :raises ConfigError: the owner is no text, or the end no number: a file with that would be torn.
    """
    _require_owner(pin.owner)
    if pin.expires is not None and not _is_time(pin.expires):
        raise errors.ConfigError(
            f"a pin cannot end at {errors.shown(pin.expires)}", next_step="give epoch seconds, or None"
        )
    maker = Maker()
    with translated(cache.layout.pins):
        earlier = _pin_of(cache, name, pin.owner)
        try:
            _write(cache, name, image_id, pin)
            _show_earlier_releases(cache, name, image_id, waiter=waiter)
        except BaseException:
            # The caller learns of no pin and would never take it away. An interrupt may come as it is synced.
            with contextlib.suppress(OSError):
                if maker.is_here:
                    _restore(cache, name, image_id, pin.owner, earlier)
            raise
        return earlier


def _restore(cache: CacheStore, name: str, image_id: str, owner: str, earlier: Pin | None) -> None:
    """Let an owner's pin on a base be what it was."""
    if earlier is not None:
        _write(cache, name, image_id, earlier)
    else:
        _remove(cache, name, owner)


def _require_owner(owner: object) -> None:
    if not isinstance(owner, str) or not owner or not _is_unicode(owner):
        raise errors.ConfigError(
            f"{errors.shown(owner)} can own no pin",
            next_step="name the owner by non-empty text in valid Unicode",
        )


def _is_time(expires: object) -> bool:
    # A larger integer is no date that anybody has, and Python writes none of more than 4,300 digits.
    return type(expires) is float or (type(expires) is int and abs(expires) < 2**1024)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def take_back(
    cache: CacheStore,
    name: str,
    image_id: str,
    pin: Pin,
    earlier: Pin | None,
    *,
    waiter: Waiter | None = None,
) -> None:
    """Undo :func:`add`, unless the owner pinned the base anew since.

    :param earlier: as :func:`add` returned it.
    :param waiter: as :func:`add` takes it.
    """
    with translated(cache.layout.pins):
        if _pin_of(cache, name, pin.owner) != pin:
            return
        _restore(cache, name, image_id, pin.owner, earlier)
        # What cannot be put right for a caller that no longer waits is, in a later pass.
        with contextlib.suppress(errors.CancelledError, errors.LockTimeoutError):
            _show_earlier_releases(cache, name, image_id, waiter=waiter)


def remove(cache: CacheStore, name: str, image_id: str, owner: str) -> bool:
    """Take an owner's pin away. Returns whether there was one.

    :raises ConfigError: the owner is no text.
    """
    _require_owner(owner)
    with translated(cache.layout.pins):
        there = _pin_of(cache, name, owner) is not None
        _remove(cache, name, owner)
        _show_earlier_releases(cache, name, image_id, without=owner)
        return there


def read(cache: CacheStore, name: str) -> PinFile | None:
    """Return all pins of a base, expired ones included. Returns None if there are none.

    What cannot be read counts as a pin of :data:`UNREADABLE`.
    """
    found = [held for _path, held in _files(cache, name)]
    if not found:
        return None
    pins = {pin.owner: pin for each in reversed(found) for pin in each.pins}
    image_id = next((each.image_id for each in found if each.image_id), "")
    return PinFile(image_id, tuple(pins[owner] for owner in sorted(pins)))


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A base has pins that hold. ``reason`` describes them, as a clause."""

    reason: str


def look(cache: CacheStore, name: str, now: float) -> Pinned | None:
    """Return the unexpired pins of a base. Returns None if there are none.

    A pin file that cannot be read counts as a pin.
    """
    for path, held in _files(cache, name):
        if path == cache.layout.pins_of(name):
            return Pinned(f"its pins cannot be read; make {path} a directory that can be, or remove it")
        if held.pins == (Pin(UNREADABLE),):
            return Pinned(f"its pins are unreadable; remove {path} if they are not wanted")
    known = read(cache, name)
    holding = [pin for pin in known.pins if not pin.is_over(now)] if known is not None else []
    if not holding:
        return None
    owners = (
        f"{pin.owner} until {dates.date(pin.expires)}" if pin.expires is not None else pin.owner
        for pin in holding
    )
    return Pinned(f"pinned by {', '.join(owners)}")


def names(cache: CacheStore) -> list[str]:
    """Return the names of all bases that may have a pin."""
    try:
        entries = os.listdir(cache.layout.pins)
    except FileNotFoundError:
        return []
    found = {entry.removesuffix(".json") for entry in entries}
    return sorted(name for name in found if layout.classify(name) is not layout.Kind.UNKNOWN)


def _files(cache: CacheStore, name: str) -> list[tuple[str, PinFile]]:
    """Return the files that pin a base, with their pins: those of one owner first, which count more.

    A directory that cannot be listed, or something else in its place, may hold any owner's.
    """
    directory = cache.layout.pins_of(name)
    found: list[tuple[str, PinFile | None]] = []
    try:
        entries = sorted(entry for entry in os.listdir(directory) if _FILE.fullmatch(entry))
    except OSError as error:
        entries = []
        # So says the kernel also of a link there that leads nowhere.
        if not isinstance(error, FileNotFoundError) or os.path.lexists(directory):
            found.append((directory, PinFile("", (Pin(UNREADABLE),))))
    found += [(path, _load(path)) for path in (os.path.join(directory, entry) for entry in entries)]
    former = cache.layout.former_pins(name)
    held = _load(former)
    if held is not None:
        others = tuple(pin for pin in held.pins if pin.owner != STAND_IN)
        found.append((former, dataclasses.replace(held, pins=others)))
    return [(path, held) for path, held in found if held is not None and held.pins]


def _load(path: str) -> PinFile | None:
    """Return the pins in a file, or None if there is no such file.

    A file that cannot be read or parsed holds a pin of :data:`UNREADABLE`.
    """
    try:
        data = durable.read_file(path)
    except OSError:
        data = b""  # it may pin
    if data is None:
        if not os.path.lexists(path):
            return None
        data = b""  # an entry that is no regular file may be meant as a pin
    return parse(data) or PinFile("", (Pin(UNREADABLE),))


def _pin_of(cache: CacheStore, name: str, owner: str) -> Pin | None:
    found = read(cache, name)
    return next((pin for pin in found.pins if pin.owner == owner), None) if found is not None else None


def _write(cache: CacheStore, name: str, image_id: str, pin: Pin) -> None:
    data = PinFile(image_id, (pin,)).to_json()
    directory = cache.layout.pins_of(name)
    for turn in range(_MOST_TURNS):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, layout.PRIVATE_DIR_MODE)
        try:
            durable.write_file(cache.layout.pin(name, pin.owner), data)
        except FileNotFoundError:
            if turn == _MOST_TURNS - 1:
                raise
            continue
        durable.sync_directory(cache.layout.pins)
        return


def _remove(cache: CacheStore, name: str, owner: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(cache.layout.pin(name, owner))
        durable.sync_directory(cache.layout.pins_of(name))
    with contextlib.suppress(OSError):  # others' pins are in it
        os.rmdir(cache.layout.pins_of(name))


def sweep(cache: CacheStore, *, now: float) -> None:
    """Remove pins that ended, and the directories that a crash left empty.

    The pin that stands for such a directory in the file of earlier releases is removed too: it would keep the
    base for ever.
    """
    for name in names(cache):
        directory = cache.layout.pins_of(name)
        with contextlib.suppress(OSError):
            _sweep_ended(cache, name, now - cache.config.stage_idle_seconds)
        with contextlib.suppress(OSError):
            if now - os.stat(directory).st_mtime >= cache.config.stage_idle_seconds:
                os.rmdir(directory)  # a writer whose directory goes makes it anew
        # What cannot be put right now is, in a later pass.
        with contextlib.suppress(OSError, errors.BackendError):
            held = _load(cache.layout.former_pins(name))
            if held is not None:
                _show_earlier_releases(cache, name, held.image_id)


def _sweep_ended(cache: CacheStore, name: str, before: float) -> None:
    """Remove a base's pins that ended before a moment in epoch seconds.

    An owner may renew a pin at this very moment, so that it is renamed first, to a name that still pins and
    that no owner writes to, and looked at again. A crash in between leaves that name, from which a pin that
    holds gets its own back here.
    """
    directory = cache.layout.pins_of(name)
    former = _load(cache.layout.former_pins(name)) or PinFile("", ())
    hidden = {pin.owner for pin in former.pins}  # by the owner's pin here
    for entry in os.listdir(directory):
        path = os.path.join(directory, entry)
        held = _load(path) if _FILE.fullmatch(entry) else None
        if held is None or hidden.intersection([UNREADABLE, *(pin.owner for pin in held.pins)]):
            continue
        if held.pins == (Pin(UNREADABLE),) or not held.pins:
            continue
        if not _ended(held, before) and path == cache.layout.pin(name, held.pins[0].owner):
            continue
        aside = os.path.join(directory, f"{durable.new_id()}{durable.new_id()[:8]}.json")
        os.rename(path, aside)
        held = _load(aside)
        if held is None or held.pins == (Pin(UNREADABLE),):
            continue
        if not _ended(held, before):
            with contextlib.suppress(FileExistsError):  # renewed once more
                os.link(aside, cache.layout.pin(name, held.pins[0].owner))
                durable.sync_directory(directory)
        os.unlink(aside)
    os.rmdir(directory)


def _ended(held: PinFile, before: float) -> bool:
    return all(pin.is_over(before) for pin in held.pins)


def _show_earlier_releases(
    cache: CacheStore,
    name: str,
    image_id: str,
    *,
    without: str | None = None,
    waiter: Waiter | None = None,
) -> None:
    """Keep one pin in the file that earlier releases read as long as there are pins in the directory.

    :param without: an owner whose pin in that file goes.
    :param waiter: the caller that waits, or None for one that waits as long as it takes.
    """
    path = cache.layout.former_pins(name)
    if _is_shown(path, cache.layout.pins_of(name), without):
        return
    with locks.waiting(
        cache.layout.lock(LOCK),
        shared=False,
        host=cache.host,
        stall_timeout=cache.config.lock_timeout,
        waiter=waiter,
    ):
        held = _load(path)
        if held is not None and held.pins == (Pin(UNREADABLE),):
            return  # it keeps the base for every release, and what was in it must not be lost
        others = held.pins if held is not None else ()
        kept = tuple(pin for pin in others if pin.owner not in (STAND_IN, without))
        if os.path.lexists(cache.layout.pins_of(name)):
            kept = (*kept, Pin(STAND_IN))
        if kept:
            durable.write_file(path, PinFile(image_id, kept).to_json())
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _is_shown(path: str, directory: str, without: str | None) -> bool:
    """Whether that file needs no change. The fewer there are, the less can get lost where no locks work."""
    held = _load(path)
    owners = {pin.owner for pin in held.pins} if held is not None else set()
    return (STAND_IN in owners) == os.path.lexists(directory) and without not in owners
