# SPDX-License-Identifier: Apache-2.0
"""Checking bases in the cache, where they lie, that were not checked yet for what they are wanted for.

A base that this library did not publish is checked once, before its first use. A base whose record lacks
nothing but an inspection under today's rules is inspected again. One that has the source's bytes as they came
is compared with a digest that is demanded and that its record does not have. A base of a cache that was
copied, restored or moved is bound to its record anew by the checksums that came along, and no source is
asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os

from imagecache_lib import errors, model
from imagecache_lib.formats import inspection
from imagecache_lib.formats.inspection import Rules
from imagecache_lib.formats.qemu_img import DiskFile, QemuImg
from imagecache_lib.ingest import decode, digest
from imagecache_lib.ingest.call import Call
from imagecache_lib.store import base_attributes, checksums, evidence
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.system import durable
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)


def adopt(
    cache: CacheStore, base: OpenBase, call: Call, use: evidence.Use, converter: QemuImg
) -> tuple[evidence.Record | None, str]:
    """Check a base that has no record, and write one with what was found.

    :returns: its record, or None and the reason why it does not serve, as a clause.
    :raises SourceError: what the source says of the image is needed and it does not answer.
    :raises NoSpaceError, BackendError: the filesystem failed.
    """
    image = _what_the_source_says(call)
    with translated(base.path):
        try:
            finding = None if use is evidence.Use.FILE else _inspect(cache, base, image)
            finding = _settled(cache, base, finding, call, converter)
            verified = _compare(base, call, image, use, finding)
        except errors.ImageRejected as error:
            return None, error.cause
        _make_durable(base)
        record = _bound(base, call, image, finding, verified=verified)
        cache.write_record(record)
    return record, ""


def bind_again(cache: CacheStore, base: OpenBase, call: Call) -> evidence.Record | evidence.Unmet | None:
    """Bind a base to the record that lies beside it, if that record is of another file of the same content.

    A copy of a cache has other inodes, and may lack the extended attributes: its records are of no file
    there. The checksums beside a record tell whether the content is what was checked. They are not
    cryptographic, so that such a base counts as adopted, and no certificate vouches for it any more. One with
    other content is bound as damaged: it serves no new disk.

    :returns: the record that it has now; or why it does not serve, if it is the first part of what was
        checked; or None if there is no record, or there are no checksums, or the record is of another size.
    :raises NoSpaceError, BackendError: the filesystem failed.
    :raises CancelledError, LockTimeoutError: the caller no longer waits.
    """
    with translated(base.path):
        record = cache.read_record(base.name)
        if record is None or not _may_be_of(record, base, call):
            return None
        differing = compare_with_sums(cache, base, record, call.waiter)
        if differing is None:
            return None
        if base.stat.st_size < record.size:
            # Another program may have made a smaller file of that image, with other content.
            whole = base.stat.st_size // checksums.GRANULE
            is_part = not differing or differing[0] >= whole
            return _cut_off(record, base) if is_part else None
        if differing:
            # Half a copy, or one that the disk changed. A look at it would show nothing.
            LOG.warning("Base image %s is not what its record and its checksums describe", base.path)
        # The checksums are bound to this id, so that a crash here leaves what can be bound the next time.
        if base_attributes.read_id(base.fd) == "":
            base_attributes.write_id(base.fd, record.base_id)
        carried = base_attributes.read_id(base.fd)
        _make_durable(base)
        bound = dataclasses.replace(
            record,
            base_id=record.base_id if carried is None else carried,
            inode=base.stat.st_ino,
            origin=evidence.Origin.ADOPTED,
            certificates=(),
            signed_by=None,
            damaged=bool(differing),
        )
        cache.write_record(bound)
        return cache.record_of(base)


def compare_with_sums(
    cache: CacheStore, base: OpenBase, record: evidence.Record, waiter: Waiter
) -> list[int] | None:
    """Compare a base with the checksums beside a record.

    :returns: the numbers of the granules that differ, in order, or None without checksums of that record.
    :raises OSError: it cannot be read.
    :raises CancelledError, LockTimeoutError: the caller no longer waits.
    """
    data = durable.read_file(cache.layout.sums(base.name), limit=checksums.LIMIT)
    expected = checksums.parse(data, record.base_id) if data is not None else None
    if expected is None:
        return None
    found = checksums.Checksums()
    found.read_back(base.fd, waiter)
    return found.differing(expected)


def _cut_off(record: evidence.Record, base: OpenBase) -> evidence.Unmet:
    return evidence.Unmet(f"it is cut off: it has {base.stat.st_size} bytes of {record.size}")


def _may_be_of(record: evidence.Record, base: OpenBase, call: Call) -> bool:
    """Whether a record may be of a base's content, or of one that it is a part of, as size and names tell."""
    if (record.name, record.image_id) != (base.name, call.image_id) or base.stat.st_size > record.size:
        return False
    # A file with another id was published or adopted here, and that record is lost.
    return base_attributes.read_id(base.fd) in (None, "", record.base_id)


def compare_again(
    cache: CacheStore, base: OpenBase, record: evidence.Record, call: Call
) -> tuple[evidence.Record | None, str]:
    """Compare a base that has the source's bytes as they came with the digest that is demanded today.

    The record then has that digest in the place of the one by another algorithm: older releases read records
    with one digest only.

    :param record: of a base whose bytes were not compared with a digest by that algorithm.
    :returns: the record that it has now, or None and the reason why it does not serve, as a clause.
    :raises NoSpaceError, BackendError: the filesystem failed.
    :raises CancelledError, LockTimeoutError: the caller no longer waits.
    """
    demanded = call.known_digest
    assert demanded is not None and not record.converted
    with translated(base.path):
        try:
            _compare_bytes(base, demanded, call)
        except errors.ImageRejected as error:
            return None, error.cause
        record = dataclasses.replace(record, digest=demanded, digest_checked=True)
        cache.write_record(record)
    return record, ""


def inspect_again(
    cache: CacheStore, base: OpenBase, record: evidence.Record, call: Call, converter: QemuImg
) -> tuple[evidence.Record | None, str]:
    """Inspect a base whose evidence lacks nothing else, and renew that in its record.

    :param record: of a base that was inspected under other rules, or fetched as a plain file.
    :returns: the record that it has now, or None and the reason why it does not serve, as a clause.
    :raises SourceError: what the source says of the image is needed and it does not answer.
    :raises NoSpaceError, BackendError: the filesystem failed.
    """
    claims = _claims(record, call)
    with translated(base.path):
        try:
            finding = _inspect_stored(cache, base, record, claims)
            finding = _settled(cache, base, finding, call, converter) or finding
        except errors.ImageRejected as error:
            return None, error.cause
        if record.inspected is None:
            wanted = call.stored_format or ("raw" if cache.config.force_raw_images else finding.format)
            if finding.format != wanted:
                return None, f"it was fetched as a plain file of {finding.format}, and {wanted} is needed"
            record = dataclasses.replace(
                record,
                source_format=finding.format,
                stored_format=finding.format,
                virtual_size=_virtual_size(base, finding),
            )
        record = dataclasses.replace(record, inspected=evidence.INSPECTION_RULES)
        cache.write_record(record)
    return record, ""


def _claims(record: evidence.Record, call: Call) -> tuple[str | None, ...]:
    """Return what the content may be, as Glance names it, any of which will do."""
    if record.inspected is None:
        image = _what_the_source_says(call)
        return (image.disk_format if image is not None else None,)
    # It was found to be what was claimed. A record does not tell an ISO image from other raw ones.
    return ("raw", "iso") if record.content_format == "raw" else (record.content_format,)


def _inspect_stored(
    cache: CacheStore, base: OpenBase, record: evidence.Record, claims: tuple[str | None, ...]
) -> inspection.Finding:
    if record.content_format != record.stored_format:
        return _look_at_conversion(cache, base)
    for claimed in claims[:-1]:
        with contextlib.suppress(errors.ImageRejected):
            return _look(cache, base, claimed, strict=True, vouched=record.digest_checked)
    return _look(cache, base, claims[-1], strict=True, vouched=record.digest_checked)


def _bound(
    base: OpenBase,
    call: Call,
    image: model.Image | None,
    finding: inspection.Finding | None,
    *,
    verified: bool,
) -> evidence.Record:
    record = evidence.Record(
        name=base.name,
        image_id=call.image_id,
        base_id=base_attributes.mark(base.fd),
        inode=base.stat.st_ino,
        size=base.stat.st_size,
        origin=evidence.Origin.ADOPTED,
        source_format=finding.format if finding is not None else "raw",
        stored_format=finding.format if finding is not None else "raw",
        virtual_size=_virtual_size(base, finding),
        digest=image.digest if image is not None and verified else None,
        digest_checked=verified,
        inspected=evidence.INSPECTION_RULES if finding is not None else None,
    )
    if image is not None and not verified and finding is not None:
        record = _as_converted(record, image)
    return record


def _what_the_source_says(call: Call) -> model.Image | None:
    """Return the source's description of the image, or None if the image is gone from the source."""
    try:
        _source, image = call.describe()
    except errors.ImageNotFound:
        return None
    return image


def _inspect(cache: CacheStore, base: OpenBase, image: model.Image | None) -> inspection.Finding:
    strict = not cache.config.disable_deep_image_inspection
    if image is None or image.size is None:
        return _look(cache, base, None, strict=strict, vouched=False)
    if _unconverted(base, image):
        return _look(cache, base, image.disk_format, strict=strict, vouched=image.digest is not None)
    # Only a conversion changes the size, and the only conversion is to raw.
    return _look_at_conversion(cache, base)


def _settled(
    cache: CacheStore,
    base: OpenBase,
    finding: inspection.Finding | None,
    call: Call,
    converter: QemuImg,
) -> inspection.Finding | None:
    """Return the finding with the size that qemu-img reads too, if the base is in a format of its own.

    :raises ImageRejected: qemu-img does not open it, or programs read different sizes.
    """
    if finding is None or finding.format == "raw":
        return finding
    if not finding.one_size:
        raise errors.ImageRejected(f"not all programs read the same size from this {finding.format}")
    disk = DiskFile(base.path, finding.format)
    size = decode.settle(base.fd, disk, Rules.of(cache.config), converter, call.waiter)
    return dataclasses.replace(finding, virtual_size=size)


def _look_at_conversion(cache: CacheStore, base: OpenBase) -> inspection.Finding:
    """Inspect what was converted to raw.

    A disk's own bytes need not pass the rules for images, such as that a boot sector has partitions, but must
    not be taken for an image.
    """
    finding = _look(cache, base, None, strict=False, vouched=True)
    if finding.format != "raw":
        raise errors.ImageRejected(f"it should be raw, and its content is {finding.format}")
    return finding


def _look(
    cache: CacheStore, base: OpenBase, claimed: str | None, *, strict: bool, vouched: bool
) -> inspection.Finding:
    """Inspect a base's bytes as those of an image.

    :param strict: as of :class:`Rules`.
    :param vouched: whether a digest says that these bytes are what is meant.
    """
    return inspection.inspect_file(base.fd, claimed, Rules.of(cache.config, strict=strict), vouched=vouched)


def _unconverted(base: OpenBase, image: model.Image) -> bool:
    return image.size is not None and base.stat.st_size == image.size


def _compare(
    base: OpenBase,
    call: Call,
    image: model.Image | None,
    use: evidence.Use,
    finding: inspection.Finding | None,
) -> bool:
    """Compare a base with what the source says. Returns whether its digest was checked.

    :raises ImageRejected: the base is not what the source has.
    """
    if base.stat.st_size == 0:
        raise errors.ImageRejected("the file is empty")
    if image is None:
        return False
    as_it_came = _unconverted(base, image)
    if use is evidence.Use.FILE and not as_it_came and image.size is not None:
        raise errors.ImageRejected(f"it has {base.stat.st_size} bytes and the image has {image.size}")
    if as_it_came and image.digest is not None:
        _compare_bytes(base, image.digest, call)
        return True
    if not as_it_came and finding is not None and finding.format == "raw":
        _compare_converted(base, image)
    return False


def _compare_bytes(base: OpenBase, expected: model.Digest, call: Call) -> None:
    """Read a base and compare its bytes with a digest.

    :raises ImageRejected: they have another one.
    """
    with contextlib.closing(digest.StreamDigest(expected, call.waiter)) as hashed:
        for chunk in inspection.chunks_of(base.fd):
            call.check()
            hashed.feed(chunk)
        hashed.finish()


def _compare_converted(base: OpenBase, image: model.Image) -> None:
    if image.disk_format == "raw" and image.size is not None:
        raise errors.ImageRejected(
            f"it has {base.stat.st_size} bytes, and the raw image it was made from has {image.size}"
        )
    if image.virtual_size and base.stat.st_size != image.virtual_size:
        raise errors.ImageRejected(
            f"it has {base.stat.st_size} bytes, and the image's virtual size is {image.virtual_size}"
        )


def _virtual_size(base: OpenBase, finding: inspection.Finding | None) -> int:
    if finding is not None and finding.virtual_size is not None:
        return finding.virtual_size
    return -(-base.stat.st_size // 512) * 512


def _as_converted(record: evidence.Record, image: model.Image) -> evidence.Record:
    """Say what the source's format was: bytes that were converted must never serve as a plain file."""
    source_format = inspection.QEMU_FORMATS.get(image.disk_format or "", image.disk_format or "unknown")
    return dataclasses.replace(record, source_format=source_format)


def _make_durable(base: OpenBase) -> None:
    """Sync the base: the process that made it may not have, and overlays are about to depend on it."""
    os.fsync(base.fd)
    durable.sync_directory(os.path.dirname(base.path))
