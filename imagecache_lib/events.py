# SPDX-License-Identifier: Apache-2.0
"""What happened, as small typed values for observers: logging, metrics, notifications.

An observer is any callable that takes an :class:`Event`. It is called in the thread in which the thing
happened, and should be quick. What it raises is logged and goes no further.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Self

from imagecache_lib import errors

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something happened to a base image.

    :param name: the base's name in the cache.
    :param image_id: the image's id, where it is known.
    """

    #: How much it matters, as one of logging's levels. From INFO on, it is told in notifications.
    level: ClassVar[int] = logging.DEBUG
    #: Name and description of the metric that counts it, or None if no metric does.
    counter: ClassVar[tuple[str, str] | None] = None

    name: str
    image_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Hit(Event):
    """A base image was asked for, and the one in the cache serves."""

    counter = ("hits", "Times that a base image was wanted and there")


@dataclasses.dataclass(frozen=True)
class Miss(Event):
    """A base image was asked for, and the cache has none that serves.

    :param reason: why, as a clause.
    """

    counter = ("misses", "Times that a base image was wanted and not there, or not fit")

    reason: str = "it is not in the cache"


@dataclasses.dataclass(frozen=True)
class Progress(Event):
    """More data of an image arrived.

    :param received: bytes so far.
    :param total: bytes in all, if that is known.
    """

    received: int = 0
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class Waiting(Event):
    """A base image was asked for, and another request fetches or makes it: this one waits for that.

    It is told anew as the other one gets on.

    :param host: the host where the other one is.
    :param pid: id of the process there.
    :param received: bytes that arrived so far.
    :param total: bytes in all, if that is known.
    """

    host: str = ""
    pid: int = 0
    received: int = 0
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class Fetched(Event):
    """An image's data arrived, was checked and is complete.

    :param received: bytes that came over the wire.
    :param allocated: bytes it takes on disk.
    :param seconds: from the first request to the last byte on disk.
    """

    level = logging.INFO

    received: int = 0
    allocated: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Copied(Event):
    """An image was not fetched, since another one in the cache has the same content.

    :param origin: the other one's base.
    :param shared: they share their extents, and the copy takes no space.
    """

    level = logging.INFO
    counter = ("copied", "Base images made from another one that has the same content")

    origin: str = ""
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class Published(Event):
    """A base image was given its name in the cache."""

    level = logging.INFO
    counter = ("published", "Base images that got their name")


@dataclasses.dataclass(frozen=True)
class Adopted(Event):
    """A base image that another program had made passed its check before its first use here."""

    level = logging.INFO
    counter = ("adopted", "Base images of another program that passed their check")


@dataclasses.dataclass(frozen=True)
class Bypassed(Event):
    """A request was served around the cache, since the base there does not fit it and is in use.

    :param reason: why it does not fit, as a clause.
    """

    level = logging.WARNING
    counter = ("bypassed", "Requests served around the cache")

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class NotCloned(Event):
    """The storage clones images, and could not clone this one: it is fetched and copied instead.

    :param reason: why, as a clause.
    """

    level = logging.WARNING
    counter = ("not_cloned", "Images that the storage could not clone")

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Rejected(Event):
    """An image was refused for good: by all of its sources, of which none gives what can be a disk here.

    What one source gives may be refused and the next one's taken: that is no rejection of the image.

    :param reason: why, as a clause.
    """

    level = logging.WARNING
    counter = ("rejected", "Images refused for good")

    reason: str = ""


#: Why a fetch failed, in one word, by error; the first that fits.
_FAILURES: tuple[tuple[type[errors.ImageCacheError], str], ...] = (
    (errors.ImageNotFound, "not_found"),
    (errors.ImageRejected, "rejected"),
    (errors.SourceError, "source"),
    (errors.NoSpaceError, "no_space"),
    (errors.DiskTooSmallError, "too_small"),
    (errors.LockTimeoutError, "deadline"),
    (errors.CancelledError, "cancelled"),
    (errors.ConfigError, "config"),
    (errors.ImageCacheError, "storage"),
)


@dataclasses.dataclass(frozen=True)
class FetchFailed(Event):
    """A base image was to be fetched or made, and was not. Its caller gets an error that says the same.

    :param kind: why in one word, one of :attr:`KINDS`.
    :param reason: why, as a clause.
    """

    #: Every value of ``kind``.
    KINDS: ClassVar[tuple[str, ...]] = tuple(kind for _error, kind in _FAILURES)

    kind: str = "storage"
    reason: str = ""

    @classmethod
    def of(cls, name: str, image_id: str | None, error: errors.ImageCacheError) -> Self:
        """Return the event for an error that ended a fetch."""
        kind = next(kind for wanted, kind in _FAILURES if isinstance(error, wanted))
        return cls(name, image_id, kind=kind, reason=error.cause)


@dataclasses.dataclass(frozen=True)
class MovedToTrash(Event):
    """A base image lost its name. It lies in the trash until all who share the cache have looked.

    :param reason: why, as a clause.
    """

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Restored(Event):
    """A base image got its name back from the trash.

    :param reason: who needed it, as a clause.
    """

    level = logging.INFO
    counter = ("restored", "Base images that got their name back before they were removed")

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Forgotten(Event):
    """An operator said that disks which refer to a base image are gone for good.

    :param reason: which disks, as a clause.
    """

    level = logging.INFO

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Unreferenced(Event):
    """A pass found that the last disk which referred to a base image was removed. The base ages from now on.

    :param reason: which disk, and what proves it, as a clause.
    """

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Evicted(Event):
    """A base image was removed from the cache.

    :param reason: why, as a clause.
    :param allocated: bytes that it took on disk.
    """

    level = logging.INFO

    reason: str = ""
    allocated: int = 0


@dataclasses.dataclass(frozen=True)
class Recovered(Event):
    """The cache repaired what a crash had left.

    :param what: what was done, as a clause.
    """

    level = logging.INFO
    counter = ("recovered", "Leftovers of crashes put right")

    what: str = ""


@dataclasses.dataclass(frozen=True)
class Damaged(Event):
    """A scrub found that a base's content on disk is not what was written. No new disk is made from it.

    :param detail: where, as a clause.
    :param stays: why the base was not evicted, as a clause: which disks may read wrong bytes. None if it was
        evicted.
    """

    level = logging.ERROR
    counter = ("damaged", "Base images that the disk changed")

    detail: str = ""
    stays: str | None = None


@dataclasses.dataclass(frozen=True)
class PassFinished(Event):
    """A pass over the whole cache ended. Its ``name`` is empty.

    :param kept: number of base images that stayed.
    :param allocated: bytes that these take on disk.
    :param evicted: number of base images that were evicted.
    :param reclaimed: bytes that those took on disk.
    :param problems: what needs an operator, a sentence each, the worst first.
    """

    level = logging.INFO

    kept: int = 0
    allocated: int = 0
    evicted: int = 0
    reclaimed: int = 0
    problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Surveyed(Event):
    """A command or a pass looked at the whole cache. Its ``name`` is empty. All sizes are bytes.

    :param size: of the filesystem.
    :param free: what an unprivileged process may still allocate of it.
    :param reserved: promised to images in flight and not allocated yet.
    :param allocated: on disk, by what keeps it.
    :param images: number of base images by what keeps them.
    :param damaged: number of base images that a scrub found damaged.
    :param last_scrub: when a scrub of the whole cache last ended, in epoch seconds, or None if none did.
    """

    size: int = 0
    free: int = 0
    reserved: int = 0
    allocated: Mapping[str, int] = dataclasses.field(default_factory=dict)
    images: Mapping[str, int] = dataclasses.field(default_factory=dict)
    damaged: int = 0
    last_scrub: float | None = None


#: Every kind of event.
KINDS: tuple[type[Event], ...] = (
    Hit,
    Miss,
    Progress,
    Waiting,
    Fetched,
    Copied,
    Published,
    Adopted,
    Bypassed,
    NotCloned,
    Rejected,
    FetchFailed,
    MovedToTrash,
    Restored,
    Forgotten,
    Unreferenced,
    Evicted,
    Recovered,
    Damaged,
    PassFinished,
    Surveyed,
)

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
