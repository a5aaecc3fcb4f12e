# SPDX-License-Identifier: Apache-2.0
"""Named points of the protocols. Execution tells the injected :attr:`System.trace` when it reaches one.

In production that does nothing. A test stops an actor there, or kills it, so that an interleaving happens by
design and not by chance. The values are the names that such tests and their reports use.
"""

from __future__ import annotations

import enum


class TracePoint(enum.StrEnum):
    """What has just become true, or is true for the last time, as execution reaches the point."""

    #: Another holder has the lock, and this caller begins to wait for it.
    LOCK_WAITING = "lock:waiting"
    #: The cache lacks room for a fetch whose deadline allows it to wait, and it is about to.
    SPACE_WAITING = "space:waiting"

    #: A lease holds the shared lock of a base and has not looked at the base yet.
    LEASE_SHARED = "lease:shared"
    #: A lease holds the exclusive lock of a base, and has not looked at the base again yet.
    LEASE_EXCLUSIVE = "lease:exclusive"

    #: The source is about to be asked for the bytes that are missing.
    TRANSFER_OPEN = "transfer.open"
    #: A chunk of the image was passed on.
    TRANSFER_CHUNK = "transfer.chunk"
    #: The room for the download is reserved; nothing was received.
    INGEST_RESERVED = "ingest:reserved"
    #: The source's bytes are whole; an outside program is about to convert them.
    CONVERT = "convert"
    #: mkfs or mkswap has made the content of a shared base.
    GENERATE_MADE = "generate:made"
    #: The content of a stage file is complete and about to be synced.
    STAGE_SYNC = "stage:sync"
    #: Content and evidence of a stage are durable; nothing can refer to them yet.
    INGEST_SEALED = "ingest:sealed"

    #: A publisher has a sealed stage, and has not yet looked into the trash.
    PUBLISH_BEGIN = "publish:begin"
    #: No eviction of this name is left that could still rename it; the link is next.
    PUBLISH_LINK = "publish:link"
    #: The base has its name, in memory.
    PUBLISH_LINKED = "publish:linked"
    #: The base's name is durable.
    PUBLISH_SYNCED = "publish:synced"
    #: The base's record is in its place.
    PUBLISH_RECORDED = "publish:recorded"

    #: A disk is complete under its temporary name.
    DISK_MADE = "disk:made"
    #: The base still had its name after the disk was complete.
    DISK_CONFIRMED = "disk:confirmed"
    #: The disk has its name.
    DISK_PLACED = "disk:placed"

    #: The scan is about to open another directory.
    REFERENCES_DIRECTORY = "references:directory"
    #: The scan has read the directories of the instances that are known.
    REFERENCES_KNOWN = "references:known"
    #: The scan has read every disk root.
    REFERENCES_SCANNED = "references:scanned"
    #: The scan has met a disk in the making.
    REFERENCES_UNFINISHED = "references:unfinished"

    #: The first reading of references is over; nothing was renamed.
    VERIFY_READ = "verify:read"
    #: An evictor has its directory in the trash, where publishers see it.
    EVICT_ANNOUNCED = "evict:announced"
    #: No complete stage of this name was found; the rename is next.
    EVICT_RENAME = "evict:rename"
    #: The base has left its name and lies in the trash.
    EVICT_RENAMED = "evict:renamed"
    #: The second reading of references is over.
    EVICT_READ = "evict:read"
    #: Nothing refers to the file in the trash; its unlink is next.
    EVICT_UNLINK = "evict:unlink"
    #: A base has its name again; it still has its name in the trash too.
    RESTORE_LINKED = "restore:linked"
    #: The file is gone; its record may still be there.
    EVICT_UNLINKED = "evict:unlinked"

    #: A transaction of the job database is complete, and about to be committed.
    JOBS_COMMIT = "jobs:commit"
    #: A transaction of the job database is committed, and its caller does not know it yet.
    JOBS_COMMITTED = "jobs:committed"
