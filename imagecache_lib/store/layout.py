# SPDX-License-Identifier: Apache-2.0
"""The on-disk protocol: which names the cache uses and what each of them means.

This module is pure: it turns ids into names and paths, and back, and touches no file. What follows is
the protocol itself, for programs and operators that have to read a cache directory, or to share one with
this library. The names outside ``.imagecache`` are Nova's, so that a directory that Nova made is adopted in
place and stays readable by Nova::

    <instances_path>/_base/<sha1 of the image id>        a base image
    <instances_path>/_base/<sha1>_<GiB>, <sha1>_sm       legacy resized bases: recognised, aged, never created
    <instances_path>/_base/swap_<MiB>                    a swap area of that size
    <instances_path>/_base/ephemeral_<GiB>_<7 hex>       an empty filesystem of that size
    <instances_path>/_base/<name>.part, .converted       Nova's, in flight: reaped a day after it crashed
    <instances_path>/_base/.imagecache/                  everything that is ours alone; Nova ignores it
        version                 the layout's version; a newer one is never rewritten
        records/<name>.json     evidence of how a base was made, bound to the file
        records/<name>.sums     checksums of its content, taken in flight, bound to the record
        records/<name>.pieces   hashes of the source's data, piece by piece, bound to digest, size and base
        stage/<id>, <id>.json   in flight: the data; its record-to-be with the bytes it reserves, and who
                                fetches it and how far that is
        stage/<id>.sums         its checksums, once the data is complete
        stage/<id>.pieces       its source's hashes, once the digest of the whole turned out to be right
        stage/<name>.<id>.waits  empty: a request waits for a base that another one makes
        stage/<id>.outside      the path of a file in the making outside of every disk root
        stage/<name>.failed     how that failed, as long as one waits
        trash/<name>.<id>/base  renamed away, not yet proven unreferenced
        spare/                  empty: what a base is evicted into when the filesystem is full
        hosts/<id>.json         each host that shares the storage writes its own and no other
        hosts/<id>.scan         what that host's last pass saw of its disks, and its driver's last report; its
                                mtime is when that was
        hosts/<id>.readings     the same for the release before, which rewrites it: names by path of disk
        hosts/<id>.<hex>.roots  a disk root that a process of that host names, before it makes a disk there
        hosts/<id>.<hex>.seen   when a pass of that host read that disk root as the same directory
        history/<id>            what happened to bases, as that host saw it, a line each
        scrubbed                empty: its mtime is when a scrub of the whole cache last ended
        pins/<name>/<sha1 of the owner>.json    that, and until when, an owner wants a base to stay
        pins/<name>.json        the same of all owners, as earlier releases keep it
    <instances_path>/locks/nova-<name>                   lock files: Nova's names, never unlinked by us

Who may do what
---------------

*The name of an ephemeral base does not tell its filesystem*: the superblock is read. Earlier releases took
the name at its word. They named an ext4 base ``ephemeral_<GiB>_40d1d2c`` whatever the configuration; overlays
on it go on being served. Beside this release on one directory they take ``ephemeral_<GiB>_0706d66`` for vfat:
no base is lost by that, but a new disk may get the other filesystem. Update all hosts before the next such
disk is made or moved.

*Base names are never replaced.* A base appears by ``link(stage/<id>, <name>)`` of a finished, fsynced
file, and disappears by ``rename(<name>, trash/<name>.<id>/base)``. While the name exists its bytes do not
change. Nothing is ever written through it.

*A pin* is one owner's file, and needs no lock. Earlier releases keep all pins of a base in
``pins/<name>.json``, which they read, change and write under the lock ``nova-imagecache-pins``, and know of
nothing else. So their pins are read there, and count unless the owner has a file. And as long as the
directory ``pins/<name>`` exists, that file holds one pin more, of the owner ``a later release`` and without
an end, which makes them keep the base; it is not read as a pin here. It is written under that lock, and
seldom. Where no locks work, an earlier release can lose it, as it loses its own pins; no pin in the
directory is lost.

*Locks* are OFD byte-range locks on the whole of ``locks/nova-<name>``: shared to look at a base and to touch
it, exclusive to fetch or to evict it. They save work; every step below is safe if all of them fail.

*A lease* is a shared OFD lock on byte 299 of the base file itself, for as long as the lease lasts, in the
cache and in the trash. It is set under the base's lock. Earlier releases hold the base's lock instead, and
take the byte for QEMU's, so that each keeps what the other leases. Nova sees neither: a base that is leased
for long is touched meanwhile, so that it is too young for Nova's pass.

*A stage file* belongs to the process that holds an OFD lock on it. It is a leftover when that lock is free
and the file was not touched for an hour, or when it was not touched for a day: its owner is stopped, or on a
host that hangs, and makes another should it go on. Until then nothing can be evicted that it is about to
publish.

*A record* is evidence only for the very file it was written for: its random id must equal the base's
``user.imagecache.id`` attribute, and inode and size must match. Otherwise the base counts as adopted: it is
checked as far as it can be before its first use, and never proves a certificate.

*What a pass saw* counts until its absence is proved, so ``hosts/<id>.scan`` keeps, for each disk that refers
to a base, the identity of its directory and of every one above it: device, inode, the filesystem's own id,
and whether a mount or a link led there. A disk that is not seen any more is forgotten only by what
:mod:`imagecache_lib.upkeep.absence` calls a proof. The file ends in ``.scan``, since every ``.json`` is a
member.

*Which disk roots a process names*, ``hosts/<id>.<hex>.roots``, is a JSON array for each: the absolute path,
and which directory it was as a disk was made there, in the form of ``hosts/<id>.scan``; or null, if this
process has made no disk there. Only the disk root above a disk is looked at: another's server may be gone.
The file is named by the first 16 hex digits of its sha256, so that another directory at that path is another
file. It is written before the process makes its first disk there, compared with the directory before any
later one, and written anew within the hour. Where a filesystem, or another directory of the same one, is
mounted between that root and the disk, or a link leads to one, a note of the path of its top has a third
element, ``"volume"``, and as its mtime when the last disk was made there: a pass that began two minutes later
has seen them all.

A pass of any process of that host reads these disk roots as well. One that has read a root as the directory
that the note says, has found nothing that it cannot tell, and has written ``hosts/<id>.scan``, writes
``hosts/<id>.<hex>.seen``: when it began, in epoch seconds. That says nothing, and is removed, if
``hosts/<id>.scan`` is older by more than two seconds, or gone: then an older copy of it was restored, and
does not have what that pass saw. A note does not count any more, and is removed, once it is a week old and
that was two hours after it was written; for one with null any pass will do. A note that counts keeps
everything if it cannot be read; if it names another directory than is there now, unless
``hosts/<id>.scan`` has that one for the root, or all instances of the host have directories in the new one;
or if its root cannot be read, and no pass has seen it since. A note of a volume keeps everything while
another directory is at that path, or none, and no pass has seen the disks; nothing is read for it.

*Two releases on one directory.* The release before this one knows neither ``hosts/<id>.scan`` nor that the
driver's report is remembered. It reads and replaces ``hosts/<id>.readings``, which is written beside it with
the same disks, those that are not to be seen included, so that it keeps what it always kept, and no less.
What it writes there counts for this release too: a disk that only it saw is remembered without the identity
of its directory, and stays until it is seen again, its instance leaves the report, or an operator says so.
An entry with an empty path and no names says that this release wrote the file; the older one drops it.

It passes over ``hosts/<id>.<hex>.roots``, ``hosts/<id>.<hex>.seen``, ``stage/<name>.<id>.waits``,
``stage/<id>.outside``, ``stage/<name>.failed``, ``history``, and the fields ``origin``, ``fetcher`` and
``source`` of a stage's note: its callers neither share a failure nor are told of one, and what it does is in
no history. An operator's ``passed_over_directories`` is an option of this release: the older one reads those
directories as all others, and keeps what they refer to. It removes any file in the making by its name, and
this one behind a link only a file that carries ``user.imagecache.made``.

*The field* ``fetcher`` *of a stage's note* says who fills the file, for people who wait for it: ``host``, its
name; ``pid``, the process there; ``received``, bytes of the source's data that arrived, written anew every
16 MiB; ``total``, bytes in all, or null. It is evidence of nothing, and null once the data is complete. A
note without it, or with another form of it, is a note.

*The field* ``source`` *of a stage's note* says that the file holds an image's data as its source sent it,
from the first byte on, and which data: a digest over the image's id and its data's size, digest and entity
tag. It is empty for any other file. Once the owner of such a file is dead, which only a lock that is free
proves, and never a filesystem without locks, a fetch of the same data may own it and begin with its bytes.
They are evidence of nothing. Releases that do not know the field sweep the file like any other.

*A damaged* ``.scan`` is replaced by what ``.readings`` says, and the other way round. If neither can be read,
everything stays.

*The image service's name of an image* is the attribute ``user.imagecache.name`` of the base file, in UTF-8:
for people, and evidence of nothing. It is no field of the record, since earlier releases take a record with a
field that they do not know for torn, and adopt the base: what a scrub or a certificate said of it would be
lost. Earlier releases ignore the attribute and the file ``scrubbed``, and keep both.

What a crash leaves, and who repairs it
---------------------------------------

================================================  ============================================================
crash                                             what the next start or user does
================================================  ============================================================
while fetching                                    the stage is unlinked an hour later; it is fetched again
while an agent fetches                            the next agent goes on with what came, or the same
after the stage is complete, before the link      the same
after the link, before the record moved           the next user of the base, or start, moves the record
after the record moved, before the stage is gone  the stage name is unlinked; the base stays
after the rename into the trash                   references are read again: linked back, or unlinked
while a disk is made                              its temporary name goes after an hour; the retry works
while one is made outside of every disk root      the same, by the note of where it is
================================================  ============================================================

Checksums go where their record goes, a step before it. A scrub that finds none, or torn ones, cannot tell
whether a base was damaged on disk, and says so.

*The hashes of pieces* (:mod:`imagecache_lib.store.pieces` has their format) go the same way. They are of the
data as the source sent it, whatever the base was converted to, and exist only for a base whose source's
digest was checked. They let hosts that pass an image on see at once which piece is wrong, and are evidence
of nothing else: without them, or with torn ones, the digest of the whole decides, as for earlier releases,
which leave them alone. What is left of them beside a base that an earlier release evicted is removed an hour
later.

A torn or unknown record is treated as absent; a torn or unknown pin or host file as *keep*. A host's id has
32 hex digits, and a file in ``hosts`` under any other name is no member's: the release before takes one that
ends in ``.json`` for a member that never looks, and keeps what lies in the trash. Modes do not depend on the
umask: bases 0644, ``_base`` and ``locks`` 0755, ``.imagecache`` 0700.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import os
import re

from imagecache_lib import errors

#: The version of this protocol, in the file ``version``.
VERSION = 1

#: Extended attribute that binds a base file to its record.
ID_ATTRIBUTE = "user.imagecache.id"

#: Extended attribute with the name that the image service has for the image.
NAME_ATTRIBUTE = "user.imagecache.name"

BASE_MODE = 0o644
BASE_DIR_MODE = 0o755
LOCKS_DIR_MODE = 0o755
PRIVATE_DIR_MODE = 0o700

#: How the names of lock files begin: as Nova's.
LOCK_PREFIX = "nova-"

#: Name, in the directory of base images, of the one that is this library's alone.
PRIVATE = ".imagecache"

#: Nova's names for files in flight.
FOREIGN_STAGE_SUFFIXES = (".part", ".converted")

#: How the names of files end that say that a request waits.
WAITS = ".waits"

#: Where fsck puts what lost its name: root's, and no instance's.
LOST_AND_FOUND = "lost+found"

#: Any name that an overlay's backing string may hold. Deliberately unanchored: other mount paths,
#: relative and ``json:`` references must all be found.
NAME_PATTERN = re.compile(rb"[0-9a-f]{40}(?:_(?:\d+|sm))?|swap_\d+|ephemeral_\d+_[0-9a-z.]+")

#: A base's name wherever it begins in a string, even within a longer run of hex digits.
SHA1_ANYWHERE = re.compile(rb"(?=([0-9a-f]{40})((?:_(?:\d+|sm))?))")

_ORIGINAL = re.compile(r"[0-9a-f]{40}")
_RESIZED = re.compile(r"[0-9a-f]{40}_(?:\d+|sm)")
_SWAP = re.compile(r"swap_\d+")
_EPHEMERAL = re.compile(r"ephemeral_\d+_[0-9a-z.]+")

_MAX_ID_BYTES = 1024

#: All of Unicode's category Cc.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Kind(enum.Enum):
    """What a name in ``_base`` stands for."""

    ORIGINAL = "original"
    RESIZED = "resized"
    SWAP = "swap"
    EPHEMERAL = "ephemeral"
    FOREIGN_STAGE = "foreign-stage"
    UNKNOWN = "unknown"


def stated_version(data: bytes) -> int | None:
    """Return the version that the file ``version`` states, or None if the file is damaged."""
    return int(data) if re.fullmatch(rb"[0-9]{1,9}", data.strip()) else None


def is_known_version(data: bytes) -> bool:
    """Whether the file ``version`` states a layout that this release knows."""
    stated = stated_version(data)
    return stated is not None and stated <= VERSION


def classify(name: str) -> Kind:
    """Return what a name in ``_base`` stands for. The cache never changes an entry that is UNKNOWN."""
    if _ORIGINAL.fullmatch(name):
        return Kind.ORIGINAL
    if _RESIZED.fullmatch(name):
        return Kind.RESIZED
    if _SWAP.fullmatch(name):
        return Kind.SWAP
    if _EPHEMERAL.fullmatch(name):
        return Kind.EPHEMERAL
    for suffix in FOREIGN_STAGE_SUFFIXES:
        if name.endswith(suffix) and classify(name.removesuffix(suffix)) in (
            Kind.ORIGINAL,
            Kind.SWAP,
            Kind.EPHEMERAL,
        ):
            return Kind.FOREIGN_STAGE
    return Kind.UNKNOWN


def base_name(image_id: str) -> str:
    """Return the name of the base image of an image id: sha1 of its UTF-8 bytes, in hex, as Nova's.

    :raises ImageRejected: for an id that is empty, too long, or holds control characters.
    """
    if not isinstance(image_id, str) or not image_id:
        raise errors.ImageRejected("an image id must be non-empty text", next_step="correct the request")
    try:
        encoded = image_id.encode()
    except UnicodeEncodeError:
        raise errors.ImageRejected(
            f"image id {image_id[:80]!r} is not valid Unicode", next_step="correct the request"
        ) from None
    if len(encoded) > _MAX_ID_BYTES:
        raise errors.ImageRejected(
            f"image id {image_id[:40]!r}... has {len(encoded)} bytes, at most {_MAX_ID_BYTES} are possible",
            next_step="correct the request",
        )
    if _CONTROL.search(image_id) is not None:
        raise errors.ImageRejected(
            f"image id {image_id[:80]!r} holds a control character", next_step="correct the request"
        )
    # sha1 names a file here, it protects nothing.
    return hashlib.sha1(encoded, usedforsecurity=False).hexdigest()


def swap_name(size_mb: int) -> str:
    """Return the name of the shared swap base of a size in MiB."""
    return f"swap_{size_mb}"


def ephemeral_name(size_gb: int, mkfs: str) -> str:
    """Return the name of the shared ephemeral base of a size in GiB.

    The name does not tell which filesystem the base has: Nova makes what the guest's type or its disk's
    ``guest_format`` says, under a name that leaves both out. Nothing is inferred from it.

    :param mkfs: the operator's mkfs command line where one is configured, else ``default_ephemeral_format``,
        else ``vfat``, as Nova's ``get_file_extension_for_os_type`` in nova/privsep/fs.py has it. Its md5 is
        part of the name (vfat: ``0706d66``, ext4: ``40d1d2c``).
    """
    return f"ephemeral_{size_gb}_{hashlib.md5(mkfs.encode(), usedforsecurity=False).hexdigest()[:7]}"


def lock_name(name: str) -> str:
    """Return the file name of a base's lock: Nova's, so that both can share a directory."""
    return f"{LOCK_PREFIX}{name}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The paths of one cache.

    :param base_path: absolute path of the directory of base images.
    :param locks_path: absolute path of the directory of lock files.
    """

    # Paths are asked for many times in one spawn. A cached property leaves the value itself as it is.

    base_path: str
    locks_path: str

    def base(self, name: str) -> str:
        return os.path.join(self.base_path, name)

    def lock(self, name: str) -> str:
        return os.path.join(self.locks_path, lock_name(name))

    @functools.cached_property
    def private(self) -> str:
        return os.path.join(self.base_path, PRIVATE)

    @functools.cached_property
    def version(self) -> str:
        return os.path.join(self.private, "version")

    @functools.cached_property
    def records(self) -> str:
        return os.path.join(self.private, "records")

    @functools.cached_property
    def stages(self) -> str:
        return os.path.join(self.private, "stage")

    @functools.cached_property
    def trash(self) -> str:
        return os.path.join(self.private, "trash")

    @functools.cached_property
    def hosts(self) -> str:
        return os.path.join(self.private, "hosts")

    @functools.cached_property
    def histories(self) -> str:
        return os.path.join(self.private, "history")

    def history(self, host_id: str) -> str:
        return f"{self.histories}/{host_id}"

    @functools.cached_property
    def scrubbed(self) -> str:
        return os.path.join(self.private, "scrubbed")

    @functools.cached_property
    def pins(self) -> str:
        return os.path.join(self.private, "pins")

    def record(self, name: str) -> str:
        return f"{self.records}/{name}.json"

    def sums(self, name: str) -> str:
        return f"{self.records}/{name}.sums"

    def pieces(self, name: str) -> str:
        return f"{self.records}/{name}.pieces"

    def stage(self, stage_id: str) -> str:
        return f"{self.stages}/{stage_id}"

    def stage_record(self, stage_id: str) -> str:
        return f"{self.stages}/{stage_id}.json"

    def stage_sums(self, stage_id: str) -> str:
        return f"{self.stages}/{stage_id}.sums"

    def stage_pieces(self, stage_id: str) -> str:
        return f"{self.stages}/{stage_id}.pieces"

    def beside_stage(self, stage_id: str) -> tuple[str, ...]:
        """All that may lie beside a stage file."""
        return self.stage_record(stage_id), self.stage_sums(stage_id), self.stage_pieces(stage_id)

    def waits(self, name: str, waiter_id: str) -> str:
        return f"{self.stages}/{name}.{waiter_id}{WAITS}"

    def failure(self, name: str) -> str:
        return f"{self.stages}/{name}.failed"

    def trashed(self, name: str, trash_id: str) -> str:
        """The directory that an evicted base is renamed into."""
        return f"{self.trash}/{name}.{trash_id}"

    def host(self, host_id: str) -> str:
        return f"{self.hosts}/{host_id}.json"

    def readings(self, host_id: str) -> str:
        return f"{self.hosts}/{host_id}.readings"

    def last_scan(self, host_id: str) -> str:
        return f"{self.hosts}/{host_id}.scan"

    def named_roots(self, host_id: str, roots_id: str) -> str:
        return f"{self.hosts}/{host_id}.{roots_id}.roots"

    def pins_of(self, name: str) -> str:
        """The directory of a base's pins."""
        return os.path.join(self.pins, name)

    def pin(self, name: str, owner: str) -> str:
        # sha1 names a file here, it protects nothing. An owner may be any text, lone surrogates included.
        encoded = owner.encode("utf-8", "surrogatepass")
        owner_id = hashlib.sha1(encoded, usedforsecurity=False).hexdigest()
        return os.path.join(self.pins_of(name), f"{owner_id}.json")

    def former_pins(self, name: str) -> str:
        """The file in which earlier releases keep all pins of a base."""
        return os.path.join(self.pins, f"{name}.json")
