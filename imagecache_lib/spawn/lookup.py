# SPDX-License-Identifier: Apache-2.0
"""Looking whether the base image that lies in the cache serves a request."""

from __future__ import annotations

import contextlib
import dataclasses

from imagecache_lib.ingest.producer import BaseRequest
from imagecache_lib.store import evidence, publish
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.evidence import Unmet
from imagecache_lib.system.translate import translated

_UNWITNESSED = Unmet("it carries no record of how it was made", can_recheck=True)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A base image that serves.

    :param opened: its file, the caller's to close.
    :param record: its evidence.
    """

    opened: OpenBase
    record: evidence.Record


def look(cache: CacheStore, request: BaseRequest) -> Fit | Unmet | None:
    """Return the base that serves a request, or why the one in the cache does not, or None if there is none.

    :raises NoSpaceError, BackendError: the filesystem failed.
    :raises CacheEntryError: something that is no regular file has the base's name.
    """
    with translated(cache.layout.base(request.name)):
        opened = cache.open_base(request.name)
    return judge(cache, opened, request)


def judge(cache: CacheStore, opened: OpenBase | None, request: BaseRequest) -> Fit | Unmet | None:
    """Return the fit if a file serves a request, else why it does not, or None if there is no file.

    A file that does not serve is closed.
    """
    if opened is None:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(opened.close)
        if (unmet := request.producer.unmet(opened)) is not None:
            return unmet
        with translated(opened.path):
            record = cache.record_of(opened) or publish.finish(cache, opened)
        unmet = _UNWITNESSED if record is None else evidence.unmet(record, request.requirements)
        if record is None or unmet is not None:
            return unmet
        stack.pop_all()  # it stays open
        return Fit(opened, record)


def is_there(cache: CacheStore, request: BaseRequest) -> bool:
    """Whether a base image is there that serves. Cheap, and repairs nothing.

    :raises NoSpaceError, BackendError, CacheEntryError: as :func:`look`.
    """
    with translated(cache.layout.base(request.name)):
        record = cache.evidence_of(request.name)
    return record is not None and evidence.unmet(record, request.requirements) is None
