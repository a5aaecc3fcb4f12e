# SPDX-License-Identifier: Apache-2.0
"""Giving a complete stage file its name, and finishing what a crash interrupted while that was done."""

from __future__ import annotations

import os

from imagecache_lib.store import base_attributes, checksums, evidence, pieces, trash
from imagecache_lib.store import stage as stages
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.stage import SealedStage, Stage, StageGone
from imagecache_lib.system import durable
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated


def publish(sealed: SealedStage, cache: CacheStore) -> bool:
    """Link a stage file to its base name.

    Returns True if the base is the stage's file now, and False if another base has the name: that one stays.

    A name is never replaced: link(2) fails where rename(2) would overwrite.

    :raises StageGone: the stage was swept away; nothing was published.
    :raises NoSpaceError, BackendError: the filesystem failed. If that was after the link, the base stays,
        whole and durable, and the stage beside it, so that its next user can finish.
    """
    stage = sealed.stage
    base = cache.layout.base(stage.name)
    unrecorded = False
    try:
        with translated(base):
            cache.host.trace(TracePoint.PUBLISH_BEGIN)
            # Overlays may refer to what is being evicted: it gets its name back, and stays.
            trash.cancel_evictions(cache, stage.name)
            cache.host.trace(TracePoint.PUBLISH_LINK)
            if not _link(stage, base):
                return False
            unrecorded = True
            cache.host.trace(TracePoint.PUBLISH_LINKED)
            durable.sync_directory(cache.layout.base_path)
            cache.host.trace(TracePoint.PUBLISH_SYNCED)
            _write_evidence(cache, stage.id, sealed.record)
            unrecorded = False
            cache.host.trace(TracePoint.PUBLISH_RECORDED)
        return True
    finally:
        if unrecorded:
            stage.leave()
        else:
            stage.discard()


def _link(stage: Stage, base: str) -> bool:
    try:
        os.link(stage.path, base, follow_symlinks=False)
    except FileExistsError:
        # An NFS client whose request was answered, and the answer lost, asks again and is told this.
        try:
            return os.path.samestat(os.stat(base, follow_symlinks=False), os.fstat(stage.fd))
        except FileNotFoundError:
            return False  # evicted since: the caller looks again
    except FileNotFoundError as error:
        raise StageGone from error
    return True


def _write_evidence(cache: CacheStore, stage_id: str, record: evidence.Record) -> None:
    """Put checksums, hashes and record in their places, the record last: it says that all is there."""
    where = cache.layout
    for staged, final, limit in (
        (where.stage_sums(stage_id), where.sums(record.name), checksums.LIMIT),
        (where.stage_pieces(stage_id), where.pieces(record.name), pieces.LIMIT),
    ):
        data = durable.read_file(staged, limit=limit)
        if data is not None:
            durable.write_file(final, data)
    cache.write_record(record)


def finish(cache: CacheStore, base: OpenBase) -> evidence.Record | None:
    """Write the record of a base whose publisher died between the link and the record.

    Safe beside a publisher that lives: both write the same. Returns the record, or None if no stage is that
    of this very file.
    """
    carried = base_attributes.read_id(base.fd)
    if not carried:
        return None
    for stage_id, note in stages.iter_stages(cache):
        if note.record is not None and note.record.base_id == carried:
            durable.sync_directory(cache.layout.base_path)
            _write_evidence(cache, stage_id, note.record)
            return cache.record_of(base)
    return None
