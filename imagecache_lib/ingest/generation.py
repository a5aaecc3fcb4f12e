# SPDX-License-Identifier: Apache-2.0
"""Which swap area or empty filesystem a disk needs, what it is called, and which command makes it.

One that overlays refer to is shared, under the name that Nova with the same configuration gives it and
keeps. That name does not tell which filesystem is in it: the superblock does. A base that is there serves
the disks that want its filesystem; every other disk gets one of its own. What is made to be shared is the
same byte for byte on every host and every time, since an overlay may meet it again elsewhere, or after it was
evicted and made anew.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import uuid
from collections.abc import Iterator, Mapping

from imagecache_lib import errors
from imagecache_lib.config import CacheConfig
from imagecache_lib.formats import superblock
from imagecache_lib.formats.superblock import Signature
from imagecache_lib.store import layout
from imagecache_lib.store.evidence import Unmet
from imagecache_lib.system import arguments

#: The label of a guest's first ephemeral disk, as Nova calls it; the only one that is shared.
LABEL = "ephemeral0"

MIB = 2**20
GIB = 2**30

#: No file is longer, in bytes.
_LONGEST = 2**63 - 1

#: Of all shared ones. A guest never sees two: those with another label, and those made in place, get a
#: random one.
_UUID = "d3b5a6f4-5f0c-4a53-9a63-1f6b1c1f7a10"

#: By which the superblock of a shared one is known: an ext filesystem's UUID, and the volume id that
#: ``mkfs.vfat --invariant`` gives.
IDENTITIES: Mapping[str, bytes] = {
    "ext3": uuid.UUID(_UUID).bytes,
    "ext4": uuid.UUID(_UUID).bytes,
    "vfat": (0x1234ABCD).to_bytes(4, "little"),
}

#: Where the guest's type and the operator say nothing.
_BY_OS_TYPE = {"linux": "ext4", "windows": "ntfs"}
_OTHERWISE = "vfat"

#: Features are listed, and the host's mke2fs.conf thereby overruled, so that two hosts with other releases
#: make the same. They are those that kernels since 3.18 know.
_EXT3 = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
_EXT4 = f"{_EXT3},extent,64bit,flex_bg,huge_file,dir_nlink,extra_isize,metadata_csum"

#: The file is zeros already. Were the inode tables left to the guest's kernel, it would write them all.
_EXT_OPTIONS = "nodiscard,lazy_itable_init=0,lazy_journal_init=1,root_owner=0:0"

_MKFS: Mapping[str, tuple[str, ...]] = {
    "ext2": ("mkfs.ext2", "-q", "-F", "-L"),
    "ext3": ("mkfs.ext3", "-q", "-F", "-L"),
    "ext4": ("mkfs.ext4", "-q", "-F", "-L"),
    "vfat": ("mkfs.vfat", "-n"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-L"),
    "ntfs": ("mkfs.ntfs", "-q", "-F", "--fast", "-L"),
}
#: What the geometry of a shared ext filesystem is, whatever its size and the host's mke2fs.conf.
_EXT_SHAPE = ("-q", "-F", "-b", "4096", "-I", "256", "-i", "16384")
_EXT_NAMES = ("-U", _UUID, "-E", f"{_EXT_OPTIONS},hash_seed={_UUID}", "-L", LABEL)

_SHARED: Mapping[str, tuple[str, ...]] = {
    "swap": ("mkswap", "-p", "4096", "-U", _UUID),
    "ext3": ("mkfs.ext3", *_EXT_SHAPE, "-O", _EXT3, *_EXT_NAMES),
    "ext4": ("mkfs.ext4", *_EXT_SHAPE, "-O", _EXT4, *_EXT_NAMES),
    "vfat": ("mkfs.vfat", "--invariant", "-F", "32", "-n", LABEL),
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """A swap area or a filesystem that is wanted.

    :param name: the base's name in the cache.
    :param size: bytes.
    :param kind: ``swap`` or the filesystem, or None for whatever the operator's command makes or a base has.
    :param label: the filesystem's label, or None if any label will do, or for a swap area.
    :param command: the operator's command line, or None for this library's.
    :param shared: whether the disk may refer to a base in the cache that fits.
    :param publishable: whether it may become the base where the cache has none; if not, it is made for one
        disk.
    :param impossible: why it cannot be made, or None if it can.
    """

    name: str
    size: int
    kind: str | None
    label: str | None = None
    command: str | None = None
    shared: bool = False
    publishable: bool = False
    impossible: errors.BackendError | None = None

    def words(self, target: str) -> list[str]:
        """Return the command that makes it in an existing file of zeros.

        :raises ConfigError: the operator's command line cannot be filled in.
        """
        if self.command is not None:
            if not self.command.strip():
                raise errors.ConfigError(
                    "virt_mkfs has a command without any word", next_step="name a program, or leave it out"
                )
            label = None if self.label is None else arguments.in_utf8(self.label)
            try:
                words = arguments.in_utf8(self.command).split()
                return [word % {"fs_label": label, "target": target} for word in words]
            except (KeyError, ValueError, TypeError) as error:
                raise errors.ConfigError(
                    f"virt_mkfs has the command {self.command!r}, which cannot be filled in: {error}",
                    next_step="use %(target)s and %(fs_label)s, and %% for a percent sign",
                ) from error
        assert self.kind is not None  # a generation without a command has a kind
        if self.publishable:
            return [*_SHARED[self.kind], target]
        if self.kind == "swap":
            return ["mkswap", target]
        return [*_MKFS[self.kind], arguments.in_utf8(self.label or LABEL), target]

    def unmet(self, found: Signature | None, size: int, *, empty: bool) -> Unmet | None:
        """Return what is wrong with a file that should be this, or None if nothing is.

        :param found: the signature in the file.
        :param size: the file's, in bytes.
        :param empty: the file has no data.
        """
        return next((Unmet(fault) for fault in self._faults(found, size, empty)), None)

    def _faults(self, found: Signature | None, size: int, empty: bool) -> Iterator[str]:
        if size != self.size:
            yield f"it has {size} bytes instead of {self.size}"
        if self.kind is None:
            if empty:
                yield "nothing was written into it"
            return
        if found is None:
            yield f"it has no signature of {self.kind}"
            return
        if found.kind != self.kind:
            yield f"it is {found.kind} and not {self.kind}"
        if self.publishable and self.label is not None and found.label != self.label:
            yield f"its label is {found.label!r} and not {self.label!r}"
        if not self._spanned_by(found):
            yield f"its {found.kind} spans {found.size} bytes of {self.size}"

    def _spanned_by(self, found: Signature) -> bool:
        # A filesystem ends on a whole cluster or block group.
        return self.size * 0.9 <= found.size <= self.size

    def unmet_by(self, fd: int) -> Unmet | None:
        """Return why a base of that name does not serve, whatever its record says, or None if it serves.

        :param fd: of the base, open for reading.
        :raises OSError: it cannot be read.
        """
        found, size, empty = look(fd)
        unmet = self.unmet(found, size, empty=empty)
        if unmet is None and found is not None and self.label not in (None, found.label):
            # NTFS keeps its label where it is not read: such a base serves no disk that is made here.
            unmet = Unmet(f"its label is {found.label!r} and not {self.label!r}")
        if unmet is None:
            return None
        sound = size == self.size and found is not None and self._spanned_by(found)
        return dataclasses.replace(unmet, sound=sound)


def look(fd: int) -> tuple[Signature | None, int, bool]:
    """Return a file's signature, its size in bytes, and whether it has no data.

    :raises OSError: it cannot be read.
    """
    size = os.fstat(fd).st_size
    found = superblock.read(os.pread(fd, superblock.LENGTH, 0))
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return found, size, True
    return found, size, False


def swap(size_mb: int, *, share: bool) -> Generation:
    """Return a swap area of so many MiB.

    :param share: the backend's disks refer to bases.
    :raises BackendError: a size that cannot be.
    """
    _require_size(size_mb, "MiB", MIB)
    name = layout.swap_name(size_mb)
    return Generation(name, size_mb * MIB, "swap", shared=share, publishable=share)


def ephemeral(
    size_gb: int,
    *,
    os_type: str | None,
    fs: str | None,
    label: str | None,
    config: CacheConfig,
    share: bool,
) -> Generation:
    """Return an empty filesystem of so many GiB.

    :param share: the backend's disks refer to bases.
    :raises BackendError: a size or a filesystem that cannot be.
    """
    _require_size(size_gb, "GiB", GIB)
    for what, value in (("os_type", os_type), ("fs", fs), ("label", label)):
        arguments.require_text(what, value)
    label = label or LABEL
    if "\0" in label or not _is_encodable(label):
        raise errors.BackendError(f"{label!r} can label no filesystem", next_step="use plain text")
    name = ephemeral_name(size_gb, os_type, config)
    kind = filesystem(os_type, fs, config)
    if kind is None:
        return Generation(name, size_gb * GIB, None, label, _command(os_type, config))
    # What an operator's command made has a name of its own, which two labels share and no other base has.
    # Of a guest's ephemeral disks Nova's pass knows the first: it removes the base of any other.
    shared = share and label == LABEL and name == _name(size_gb, config)
    # Of the filesystems that one name may have only the usual one is published, so that the hosts of one
    # configuration do not fill it differently.
    usual = not _command(os_type, config) and kind == _usual(os_type, config)
    publishable = shared and usual and can_be_shared(kind)
    return Generation(name, size_gb * GIB, kind, label, shared=shared, publishable=publishable)


def filesystem(os_type: str | None, fs: str | None, config: CacheConfig) -> str | None:
    """Return the filesystem of an ephemeral disk, or None for whatever the operator's command makes.

    It is ``fs``, or what the operator's command for the guest's type makes, or ``default_ephemeral_format``,
    or the default of the guest's type.

    :raises BackendError: there is no such filesystem here.
    """
    if fs is None and _command(os_type, config):
        return None
    kind = fs or _usual(os_type, config)
    if kind not in _MKFS:
        raise errors.BackendError(
            f"ephemeral disks cannot have the filesystem {kind!r}",
            next_step=f"use one of {', '.join(_MKFS)}, or configure a command line in virt_mkfs",
        )
    return kind


def ephemeral_name(size_gb: int, os_type: str | None, config: CacheConfig) -> str:
    """Return the name that Nova with this configuration gives to a shared ephemeral base, and keeps.

    It is of the operator's command, or of ``default_ephemeral_format``, or of vfat: Nova looks the default
    filesystem up for a type that it calls ``default``, whichever type the guest has, and makes the guest's.
    """
    commands = _commands(config)
    command = commands.get(os_type or "default") or commands.get("default")
    return layout.ephemeral_name(size_gb, command) if command else _name(size_gb, config)


def can_be_shared(kind: str) -> bool:
    """Whether all hosts make a swap area or a filesystem of that kind alike."""
    return kind in _SHARED


def _name(size_gb: int, config: CacheConfig) -> str:
    return layout.ephemeral_name(size_gb, config.default_ephemeral_format or _OTHERWISE)


def _usual(os_type: str | None, config: CacheConfig) -> str:
    return config.default_ephemeral_format or _BY_OS_TYPE.get(os_type or "", _OTHERWISE)


def _commands(config: CacheConfig) -> Mapping[str, str]:
    return dict(each.split("=", 1) for each in config.virt_mkfs)


def _command(os_type: str | None, config: CacheConfig) -> str | None:
    commands = _commands(config)
    return commands.get(os_type or "default", commands.get("default"))


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_size(size: int, unit: str, unit_bytes: int) -> None:
    if type(size) is not int or not 1 <= size <= _LONGEST // unit_bytes:
        raise errors.BackendError(
            f"a disk cannot have {errors.shown(size)} {unit}",
            next_step=f"ask for a whole number from 1 to {_LONGEST // unit_bytes}",
        )
