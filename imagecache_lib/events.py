# SPDX-License-Identifier: Apache-2.0
"""What happened, as small typed values for observers: logging, metrics, notifications.

An observer is any callable that takes an :class:`Event`. It is called in the thread in which the thing
happened, and should be quick. What it raises is logged and goes no further.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Sequence

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something happened to a base image.

    :param name: the base's name in the cache.
    :param image_id: the image's id, where it is known.
    """

    name: str
    image_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Hit(Event):
    """A base was wanted and there."""


@dataclasses.dataclass(frozen=True)
class Miss(Event):
    """A base was wanted and not there, or not fit.

    :param reason: why, as a clause.
    """

    reason: str = "it is not in the cache"


@dataclasses.dataclass(frozen=True)
class Progress(Event):
    """More of an image arrived.

    :param received: bytes so far.
    :param total: bytes in all, if that is known.
    """

    received: int = 0
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class Fetched(Event):
    """An image's data arrived, was checked and is complete.

    :param received: bytes that came over the wire.
    :param allocated: bytes it takes on disk.
    :param seconds: from the first request to the last byte on disk.
    """

    received: int = 0
    allocated: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Copied(Event):
    """An image was not fetched, since another one in the cache has the same content.

    :param origin: the other one's base.
    :param shared: they share their extents, and the copy takes no space.
    """

    origin: str = ""
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class Published(Event):
    """A base got its name."""


@dataclasses.dataclass(frozen=True)
class Adopted(Event):
    """A base that somebody else had made passed its check before its first use here."""


@dataclasses.dataclass(frozen=True)
class Bypassed(Event):
    """A request was served around the cache, since the base there does not fit it and is in use.

    :param reason: why it does not fit, as a clause.
    """

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class NotCloned(Event):
    """The storage clones images, and could not clone this one: it is fetched and copied instead.

    :param reason: why, as a clause.
    """

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Rejected(Event):
    """An image was refused for good.

    :param reason: why, as a clause.
    """

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Evicted(Event):
    """A base was removed.

    :param reason: why, as a clause.
    :param allocated: bytes that it took on disk.
    """

    reason: str = ""
    allocated: int = 0


@dataclasses.dataclass(frozen=True)
class Recovered(Event):
    """Something that a crash left behind was put right.

    :param what: what was done, as a clause.
    """

    what: str = ""


@dataclasses.dataclass(frozen=True)
class Damaged(Event):
    """A scrub found that the disk changed a base. Nobody else is served from it.

    :param detail: where, as a clause.
    :param stays: why it was not evicted, as a clause: who may be reading wrong bytes. None: it was.
    """

    detail: str = ""
    stays: str | None = None


@dataclasses.dataclass(frozen=True)
class PassFinished(Event):
    """A pass over the whole cache ended. Its name is empty.

    :param kept: how many bases are there.
    :param allocated: bytes that they take on disk.
    :param evicted: how many went.
    :param reclaimed: bytes that these took on disk.
    :param problems: what needs an operator, a sentence each, the worst first.
    """

    kept: int = 0
    allocated: int = 0
    evicted: int = 0
    reclaimed: int = 0
    problems: tuple[str, ...] = ()


Observer = Callable[[Event], None]


class Observers:
    """Calls every observer, and lets none of them do harm."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = tuple(observers)

    def __call__(self, event: Event) -> None:
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                LOG.exception("An observer failed on %r", event)


#: More faults than this are not remembered; the one that was seen the longest time ago is told again.
_REMEMBERED = 1024


class LogObserver:
    """Tells stdlib logging: one INFO line per image fetched, adopted or evicted, none per hit.

    A fault that repeats is one WARNING until its state changes: its reason is another, the base was made anew
    or evicted, or a pass no longer finds the problem. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._told: collections.OrderedDict[tuple[str, str], str] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        match event:
            case Fetched(received=received, allocated=allocated, seconds=seconds):
                rate = received / seconds / 2**20 if seconds else 0.0
                LOG.info(
                    "Image %s fetched as %s: %d bytes in %.1f s (%.0f MiB/s), %d bytes on disk",
                    event.image_id, event.name, received, seconds, rate, allocated,
                )  # fmt: skip
            case Copied(origin=origin):
                LOG.info(
                    "Image %s made as %s from %s, which has its content", event.image_id, event.name, origin
                )
            case Published():
                self._over(event, Rejected, Bypassed, Damaged)
            case Evicted(reason=reason, allocated=allocated):
                LOG.info("Base image %s evicted, %d bytes: %s", event.name, allocated, reason)
                self._over(event, Bypassed, Damaged, NotCloned)
            case Adopted():
                LOG.info("Base image %s of image %s adopted", event.name, event.image_id)
                self._over(event, Bypassed)
            case Recovered(what=what):
                LOG.info("Base image %s: %s", event.name, what)
            case PassFinished(problems=problems):
                self._tell_problems(problems)
            case Rejected() | Bypassed() | NotCloned() | Damaged():
                self._tell_fault(event)
            case _:
                LOG.debug("%r", event)

    def _tell_fault(self, event: Rejected | Bypassed | NotCloned | Damaged) -> None:
        level, text = _fault(event)
        known = self._is_known(type(event).__name__, event.name, text)
        LOG.log(logging.DEBUG if known else level, "%s", text)

    def _tell_problems(self, problems: Sequence[str]) -> None:
        for problem in problems:
            known = self._is_known(PassFinished.__name__, problem, problem)
            LOG.log(logging.DEBUG if known else logging.WARNING, "%s", problem)
        with self._lock:
            for kind, what in list(self._told):
                if kind == PassFinished.__name__ and what not in problems:
                    del self._told[kind, what]

    def _is_known(self, kind: str, what: str, text: str) -> bool:
        with self._lock:
            known = self._told.get((kind, what)) == text
            self._told[kind, what] = text
            self._told.move_to_end((kind, what))
            if len(self._told) > _REMEMBERED:
                self._told.popitem(last=False)
            return known

    def _over(self, event: Event, *faults: type[Event]) -> None:
        with self._lock:
            for fault in faults:
                self._told.pop((fault.__name__, event.name), None)


def _fault(event: Rejected | Bypassed | NotCloned | Damaged) -> tuple[int, str]:
    """Return how bad it is, and a sentence about it."""
    match event:
        case Rejected(reason=reason):
            return logging.WARNING, f"Image {event.image_id} rejected: {reason}"
        case Bypassed(reason=reason):
            return logging.WARNING, f"Image {event.image_id} served around the cache: {reason}"
        case NotCloned(reason=reason):
            return logging.WARNING, f"Image {event.image_id} is fetched, since it cannot be cloned: {reason}"
        case Damaged(detail=detail, stays=None):
            return logging.ERROR, f"Base image {event.name} was damaged on disk, and is evicted: {detail}"
        case Damaged(detail=detail, stays=stays):
            return logging.ERROR, (
                f"Base image {event.name} is damaged on disk, and disks may read wrong bytes: {detail}."
                f" It stays: {stays}"
            )
