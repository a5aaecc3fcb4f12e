# SPDX-License-Identifier: Apache-2.0
"""What happened, as small typed values for observers: logging, metrics, notifications.

An observer is any callable that takes an :class:`Event`. It is called in the thread in which the thing
happened, and should be quick. What it raises is logged and goes no further.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable

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


def log_observer(event: Event) -> None:
    """Tell stdlib logging: one INFO line per image fetched, adopted or evicted, none per hit."""
    match event:
        case Fetched(received=received, allocated=allocated, seconds=seconds):
            rate = received / seconds / 2**20 if seconds else 0.0
            LOG.info(
                "Image %s fetched as %s: %d bytes in %.1f s (%.0f MiB/s), %d bytes on disk",
                event.image_id, event.name, received, seconds, rate, allocated,
            )  # fmt: skip
        case Evicted(reason=reason, allocated=allocated):
            LOG.info("Base image %s evicted, %d bytes: %s", event.name, allocated, reason)
        case Adopted():
            LOG.info("Base image %s of image %s adopted", event.name, event.image_id)
        case Rejected(reason=reason):
            LOG.warning("Image %s rejected: %s", event.image_id, reason)
        case Bypassed(reason=reason):
            LOG.warning("Image %s served around the cache: %s", event.image_id, reason)
        case Damaged(detail=detail, stays=None):
            LOG.error("Base image %s was damaged on disk, and is evicted: %s", event.name, detail)
        case Damaged(detail=detail, stays=stays):
            LOG.error(
                "Base image %s is damaged on disk, and disks may read wrong bytes: %s. It stays: %s",
                event.name, detail, stays,
            )  # fmt: skip
        case NotCloned(reason=reason):
            LOG.warning("Image %s is fetched, since it cannot be cloned: %s", event.image_id, reason)
        case Recovered(what=what):
            LOG.info("Base image %s: %s", event.name, what)
        case _:
            LOG.debug("%r", event)
