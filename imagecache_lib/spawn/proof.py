# SPDX-License-Identifier: Apache-2.0
"""Proving a base that is in use by a copy of its image that was verified on its way.

A signature is verified over an image's bytes as they arrive, and a base that arrived without that, or that
another program made, cannot be replaced while disks refer to it. Each request for a verified one would get a
private copy, for ever. The first such copy is compared with the base: if both hold the same bytes, what is
known of the one holds for the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os

from imagecache_lib.ingest.producer import BaseRequest
from imagecache_lib.store import base_attributes, evidence
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.stage import SealedStage
from imagecache_lib.system import durable, sparse
from imagecache_lib.system.translate import translated

_PIECE = 2**20


def is_possible(cache: CacheStore, request: BaseRequest) -> bool:
    """Whether a base is there that lacks a verified signature and nothing else.

    A file that can carry no id is none: its record would not be believed to vouch for it.

    :raises NoSpaceError, BackendError, CacheEntryError: the base cannot be read.
    """
    with translated(cache.layout.base(request.name)):
        opened = cache.open_base(request.name)
        if opened is None:
            return False
        with contextlib.closing(opened):
            record = cache.record_of(opened)
            return (
                record is not None
                and bool(base_attributes.read_id(opened.fd))
                and evidence.lacks_signature_only(record, request.requirements)
            )


def prove(cache: CacheStore, request: BaseRequest, copy: SealedStage) -> bool:
    """Give the base of a request the evidence of a private copy. Returns False if their bytes differ.

    :param copy: stays the caller's.
    :raises CancelledError, LockTimeoutError: the caller no longer waits.
    :raises NoSpaceError, BackendError, CacheEntryError: the filesystem failed.
    """
    with translated(cache.layout.base(request.name)):
        opened = cache.open_base(request.name)
        if opened is None:
            return False
        with contextlib.closing(opened):
            known = cache.record_of(opened)
            if known is None or not _same_bytes(opened, copy, request):
                return False
            os.fsync(opened.fd)
            durable.sync_directory(cache.layout.base_path)
            if not opened.is_current():
                return False
            sums = copy.stage.checksums.to_bytes(known.base_id)
            durable.write_file(cache.layout.sums(request.name), sums)
            cache.write_record(_proven(known, copy.record))
            return True


def _proven(known: evidence.Record, copy: evidence.Record) -> evidence.Record:
    # A copy that was fetched as a plain file was not inspected, and what the base passed still holds.
    inspected = copy if copy.inspected is not None else known
    return dataclasses.replace(
        inspected,
        base_id=known.base_id,
        inode=known.inode,
        size=known.size,
        origin=evidence.Origin.FETCHED,
        digest=copy.digest,
        digest_checked=copy.digest_checked,
        certificates=copy.certificates,
        signed_by=copy.signed_by,
    )


def _same_bytes(base: OpenBase, copy: SealedStage, request: BaseRequest) -> bool:
    one, other = base.fd, copy.stage.fd
    if base.stat.st_size != os.fstat(other).st_size:
        return False
    position = 0
    for start, end in sorted((*sparse.data_extents(one), *sparse.data_extents(other))):
        position = max(position, start)
        while position < end:
            request.waiter.check()
            piece = min(_PIECE, end - position)
            if os.pread(one, piece, position) != os.pread(other, piece, position):
                return False
            position += piece
    return True
