# SPDX-License-Identifier: Apache-2.0
"""An observer that writes what happens to images to stdlib logging."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Sequence

from imagecache_lib import dates
from imagecache_lib.events import (
    Adopted,
    Bypassed,
    Copied,
    Damaged,
    Event,
    Evicted,
    Fetched,
    NotCloned,
    PassFinished,
    Published,
    Recovered,
    Rejected,
)
from imagecache_lib.system import threads

LOG = logging.getLogger(__name__)

#: More faults than this are not remembered: the one that was seen the longest time ago is logged again.
_REMEMBERED = 1024


class LogObserver:
    """Logs events with stdlib logging: one INFO line per image fetched, adopted or evicted, none per hit.

    A fault that repeats is one WARNING until its state changes: its reason is another, the base was made anew
    or evicted, or a pass no longer finds the problem. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._told: collections.OrderedDict[tuple[str, str], str] = collections.OrderedDict()
        self._lock = threads.lock()

    def __call__(self, event: Event) -> None:
        match event:
            case Fetched(received=received, allocated=allocated, seconds=seconds):
                LOG.info(
                    "Image %s fetched as %s: %s in %.1f s (%s/s), %s on disk",
                    event.image_id,
                    event.name,
                    dates.size(received),
                    seconds,
                    dates.size(received / seconds if seconds else 0.0),
                    dates.size(allocated),
                )
            case Copied(origin=origin):
                LOG.info(
                    "Image %s made as %s from %s, which has its content", event.image_id, event.name, origin
                )
            case Published():
                self._over(event, Rejected, Bypassed, Damaged)
            case Evicted(reason=reason, allocated=allocated):
                LOG.info("Base image %s evicted, %s: %s", event.name, dates.size(allocated), reason)
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
                if LOG.isEnabledFor(logging.DEBUG):
                    LOG.debug("%s", _in_words(event))

    def _tell_fault(self, event: Rejected | Bypassed | NotCloned | Damaged) -> None:
        text = _fault(event)
        known = self._is_known(type(event).__name__, event.name, text)
        LOG.log(logging.DEBUG if known else event.level, "%s", text)

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


def _in_words(event: Event) -> str:
    """Return any event as a clause, with what it knows."""
    kind = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in type(event).__name__)
    facts = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    known = [f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value not in (None, ())]
    return f"{kind.strip().capitalize()}: {', '.join(known)}"


def _fault(event: Rejected | Bypassed | NotCloned | Damaged) -> str:
    """Return a sentence about a fault."""
    match event:
        case Rejected(reason=reason):
            return f"Image {event.image_id} rejected: {reason}"
        case Bypassed(reason=reason):
            return f"Image {event.image_id} served around the cache: {reason}"
        case NotCloned(reason=reason):
            return f"Image {event.image_id} is fetched, since it cannot be cloned: {reason}"
        case Damaged(detail=detail, stays=None):
            return f"Base image {event.name} was damaged on disk, and is evicted: {detail}"
        case Damaged(detail=detail, stays=stays):
            return (
                f"Base image {event.name} is damaged on disk, and disks may read wrong bytes: {detail}."
                f" It stays: {stays}"
            )
