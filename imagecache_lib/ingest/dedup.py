# SPDX-License-Identifier: Apache-2.0
"""Two image ids with one content: the second is made from the first's base, without a download.

The image service's digest says that the content is the same, and the other base's record that its bytes had
that digest when they arrived. Each id still has a file of its own: where the filesystem can share extents,
that costs nothing; a hard link would cost nothing everywhere, but count as a use of the other base for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os

from imagecache_lib import errors, model
from imagecache_lib.formats import inspection
from imagecache_lib.formats.inspection import Rules
from imagecache_lib.ingest import decompress
from imagecache_lib.ingest.call import Call
from imagecache_lib.sources import checked
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import checksums, evidence, layout
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.stage import Stage
from imagecache_lib.system import atomic_file, durable, sparse
from imagecache_lib.system.translate import translated

#: Digest algorithms for which no attacker can find a second content with the same digest.
_STRONG = frozenset(("sha256", "sha384", "sha512", "sha3_256", "sha3_384", "sha3_512", "blake2b", "blake2s"))

_PIECE = 2**20


@dataclasses.dataclass(frozen=True)
class Twin:
    """Another image's base that has the content wanted.

    :param opened: the base, the caller's to close.
    :param record: its evidence.
    :param sums: checksums of its content, taken when it arrived.
    """

    opened: OpenBase
    record: evidence.Record
    sums: checksums.Checksums

    @property
    def allocated(self) -> int:
        """Bytes that a copy takes."""
        return self.opened.stat.st_blocks * 512


def find(
    cache: CacheStore, call: Call, source: ImageSource, image: model.Image, use: evidence.Use
) -> Twin | None:
    """Return a base that was made from the same bytes and is stored as this call needs it, or None.

    :param source: where the image's description is from.
    :raises ImageRejected: there is such a base, and its content is not what this image claims to be.
    """
    digest = image.digest
    if digest is None or digest.algorithm not in _STRONG or image.converted_from is not None:
        return None
    if call.demands_signature:
        return None  # a signature is of one image, and has to be verified on its way
    if call.imposes_digest:
        return None  # the source does not say that it has this content
    names = [name for name in _names_with(digest, cache) if name != call.name]
    if not names or not checked.vouches_for_digest(source, image):
        return None  # an image's owner may have stated this digest, so it gives no access to a twin
    opened = (_open(name, cache, call, image, use) for name in names)
    return next((found for found in opened if found is not None), None)


def _names_with(digest: model.Digest, cache: CacheStore) -> list[str]:
    needle = digest.value.lower().encode()
    found = []
    for entry in sorted(os.listdir(cache.layout.records)):
        name = entry.removesuffix(".json")
        if entry.endswith(".json") and layout.classify(name) is layout.Kind.ORIGINAL:
            with contextlib.suppress(OSError):
                if needle in (durable.read_file(cache.layout.record(name)) or b"").lower():
                    found.append(name)
    return found


def _open(name: str, cache: CacheStore, call: Call, image: model.Image, use: evidence.Use) -> Twin | None:
    try:
        opened = cache.open_base(name)
    except errors.CacheEntryError:
        return None
    if opened is None:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(opened.close)
        record = cache.record_of(opened)
        if record is None or not _serves(record, cache, call, image, use):
            return None
        data = durable.read_file(cache.layout.sums(name), limit=checksums.LIMIT)
        sums = checksums.parse(data, record.base_id) if data is not None else None
        if sums is None:
            return None  # nothing could vouch for the copy
        if use is evidence.Use.DISK:
            call.require_fit(record.virtual_size)
            if record.content_format == record.stored_format:
                _inspect(opened, cache, image)
        stack.pop_all()  # it stays open
        return Twin(opened, record, sums)


def _serves(
    record: evidence.Record, cache: CacheStore, call: Call, image: model.Image, use: evidence.Use
) -> bool:
    """Whether fetching the image would make the same file."""
    config = cache.config
    same = record.digest == image.digest and record.digest_checked
    if not same or record.origin is not evidence.Origin.FETCHED:
        return False
    if evidence.unmet(record, call.requirements(use)) is not None:
        return False
    if use is evidence.Use.FILE:
        return True
    claimed, (content, _, compression) = image.disk_format, record.source_format.partition("+")
    wanted = decompress.compression_of(image, use, config) or ""
    # The bytes are the same, so that where they are to tell how they are packed, they told it before.
    if wanted != compression and not (wanted == decompress.ANY and compression):
        return False
    if claimed in (None, "vhd", "vpc") and content == "raw":
        return False  # what follows the data may be no part of the disk, which only its transfer tells
    kept = content == record.stored_format
    if not kept and inspection.QEMU_FORMATS.get(claimed or "", claimed) != content:
        return False
    to_raw = call.stored_format == "raw" if call.stored_format is not None else config.force_raw_images
    return record.stored_format == "raw" if to_raw else kept


def _inspect(opened: OpenBase, cache: CacheStore, image: model.Image) -> None:
    """Refuse an image that claims to be something else than its content."""
    inspection.inspect_file(opened.fd, image.disk_format, Rules.of(cache.config))


def share(twin: Twin, stage: Stage) -> bool:
    """Fill a stage with a twin's content by sharing its extents. Returns False if the filesystem cannot."""
    with translated(stage.path):
        return atomic_file.share_extents(twin.opened.fd, stage.fd)


def is_whole(twin: Twin, stage: Stage, call: Call) -> bool:
    """Read what was shared. Returns False if its checksums differ, so that the disk has changed the twin."""
    stage.read_back(call.waiter)
    return stage.checksums.differing(twin.sums) == []


def copy(twin: Twin, stage: Stage, call: Call) -> bool:
    """Fill a stage with a copy of a twin's content. Returns False if the disk has changed the twin."""
    with translated(stage.path):
        for start, end in sparse.data_extents(twin.opened.fd):
            position = start
            while position < end and (data := _read(twin, position, end)):
                call.check()
                stage.write(data, position)
                position += len(data)
        stage.content.truncate(twin.opened.stat.st_size)
    return stage.checksums.differing(twin.sums) == []


def _read(twin: Twin, start: int, end: int) -> bytes:
    return os.pread(twin.opened.fd, min(_PIECE, end - start), start)
