# SPDX-License-Identifier: Apache-2.0
"""The only caller of qemu-img. It is given disks, never arguments.

Each file that qemu-img opens is stated to it with its format, and so is what lies under it: nothing, or the
one backing file that the caller knows of. What is known not to be self-contained is refused before it runs.
Each run has limits, ends when the caller no longer waits, and its result is looked at.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
from typing import Any, Self

from imagecache_lib import errors
from imagecache_lib.config import CacheConfig
from imagecache_lib.formats import contained, program
from imagecache_lib.formats.disk_file import DiskFile
from imagecache_lib.formats.program import DataRefused, Limits, StorageFailed
from imagecache_lib.formats.reader import OpenFile
from imagecache_lib.formats.sandbox import Sandbox
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

__all__ = ["DataRefused", "DiskFile", "QemuImg", "StorageFailed"]

_CONVERT = ("convert", "-p", "-n", "--target-is-zero", "-W", "-m", "8")

#: What a conversion that came to its end writes last, since it is asked how far it is.
_COMPLETE = "(100.00/100%)"

_READING = re.compile(r"\b[Rr]ead|Could not open")

#: The name of a backing file has 1,023 bytes at most: QEMU's docs/interop/qcow2.rst.
_TOO_LONG_A_NAME = 1024

#: What qemu-img says of a disk that another QEMU program has open.
_IN_USE = 'Failed to get "'

_NAMES_A_FILE = ("backing-filename", "full-backing-filename", "backing-image")


class QemuImg:
    """Runs qemu-img within the limits of the configuration. Safe to share between threads.

    Every run ends once its caller no longer waits: the one that the call states, else that of
    :meth:`for_caller`, else one that waits as long as the limits allow.
    """

    def __init__(self, config: CacheConfig, host: System) -> None:
        self._waiter = Waiter(host)  # a caller that waits as long as it takes
        self._sandbox = Sandbox("qemu-img", host)
        self._looking = Limits.of(config.images_cpu_time_limit, config.images_address_space_limit)
        self._working = Limits.of(config.convert_cpu_time_limit, config.convert_address_space_limit)

    def for_caller(self, waiter: Waiter) -> Self:
        """Return what runs qemu-img for one caller."""
        bound = copy.copy(self)
        bound._waiter = waiter
        return bound

    def sandbox_problem(self) -> str:
        """Return, as a clause, why qemu-img runs without a sandbox on this host; empty if it has one."""
        return self._sandbox.problem()

    def virtual_size(self, disk: DiskFile, *, waiter: Waiter | None = None) -> int:
        """Return a disk's virtual size: how many bytes a guest sees.

        :param waiter: the caller, or None for the one of :meth:`for_caller`.
        :raises DataRefused: the file cannot be read in the stated format, is encrypted, or another file
            belongs to it.
        :raises BackendError: the host is at fault.
        """
        found = self._json(disk, self._looking, waiter, "info", "--force-share", "--output=json")
        _require_alone(found, disk.path)
        return _number(found, "virtual-size", disk.path)

    def mapped_bytes(self, disk: DiskFile, *, waiter: Waiter) -> int:
        """Return how many bytes of a disk are data, in clusters of 64 KiB: the most it takes as a raw file.

        :raises DataRefused: the file cannot be read in the stated format.
        :raises BackendError: the host is at fault.
        """
        # For raw, measure says the virtual size; for qcow2 it counts data, and some bytes of tables for each
        # 64 KiB. The map would be exact, and has a line for each extent: a vmdk of two megabytes, whose grain
        # tables are all one, fills gigabytes with it.
        found = self._json(disk, self._working, waiter, "measure", "--output=json", "-O", "qcow2")
        return _number(found, "required", disk.path)

    def convert_to_raw(self, source: DiskFile, target: str, *, waiter: Waiter) -> None:
        """Convert into an existing, empty raw file that has the virtual size already; zeros stay holes.

        :param waiter: the caller. Once it no longer waits, the conversion ends with the error that says so.
        :raises ImageRejected: the source is damaged.
        :raises NoSpaceError: the filesystem is full.
        :raises StorageFailed: the disk failed.
        :raises BackendError: the host is at fault.
        """
        out = DiskFile(target, "raw")
        with translated(target):
            size = os.stat(target).st_size
        try:
            self._copy(source, "raw", waiter, out)
        except DataRefused as error:
            raise errors.ImageRejected(
                f"it cannot be converted from {source.format}: {error.cause}",
                next_step="have its owner upload a good image under a new id",
            ) from error
        with translated(target):
            if os.stat(target).st_size != size:
                raise errors.BackendError("qemu-img changed the size of what it filled", path=target)

    def read_through(self, disk: DiskFile, virtual_size: int, *, waiter: Waiter) -> None:
        """Read all of a disk as a guest would, and keep nothing of it.

        :param virtual_size: of the disk, in bytes.
        :raises DataRefused: some of it cannot be read.
        :raises StorageFailed: the storage failed, and not the image.
        :raises BackendError: the host is at fault.
        """
        nowhere = json.dumps({"driver": "null-co", "size": virtual_size})
        self._copy(disk, "null-co", waiter, behind=(f"json:{nowhere}",))

    def convert(self, source: DiskFile, target: DiskFile) -> None:
        """Convert into an existing, empty disk that has the virtual size already; zeros stay holes.

        :raises BackendError: qemu-img failed.
        :raises NoSpaceError: the filesystem is full.
        """
        self._copy(source, target.format, None, target)

    def resize(self, disk: DiskFile, size: int) -> None:
        """Grow a disk to ``size`` bytes.

        :raises BackendError: qemu-img failed.
        :raises NoSpaceError: the filesystem is full.
        """
        self._run(disk, ("resize", "-q"), self._working, None, writes=True, behind=(str(size),))
        alone = dataclasses.replace(disk, backing=None)  # qemu-img info opens no backing file
        words = ("info", "--force-share", "--output=json")
        now = _number(self._json(alone, self._looking, None, *words, overlay=True), "virtual-size", disk.path)
        if now != size:
            raise errors.BackendError(
                f"the disk has {now} bytes after it was resized to {size}", path=disk.path
            )

    def flatten(self, disk: DiskFile, size: int) -> None:
        """Copy into an overlay what its backing file has, and forget the backing file.

        qemu-img forgets the backing file first, and writes the tables of what it copied behind that, as it
        closes the overlay, without a look at how this goes. Killed in between, or on a disk that fails, it
        leaves an overlay without the base's data. So the data and its tables are made durable before it is
        asked to forget.

        :param size: the overlay's virtual size in bytes.
        :raises BackendError: qemu-img or the disk failed; the overlay still has its backing file.
        :raises NoSpaceError: the filesystem is full.
        """
        with translated(disk.path), Descriptor(disk.path, os.O_RDONLY) as fd:
            self._fill(disk, size)
            os.fsync(fd)
            # There is nothing left to copy. Were there, each piece would be durable before the next.
            self._run(disk, ("rebase", "-t", "writethrough", "-b", ""), self._working, None, writes=True)
            os.fsync(fd)
        with translated(disk.path), contextlib.closing(OpenFile.at(disk.path)) as file:
            contained.require(file, disk.format, path=disk.path)

    def _fill(self, disk: DiskFile, size: int) -> None:
        """Copy into an overlay what its backing file has. It keeps its backing file.

        The overlay is put on zeros whose name is longer than a header can hold. That fails, as its last step.
        """
        zeros = json.dumps({"driver": "null-co", "size": size, "read-zeroes": True})
        named = f"json:{zeros[:-1]}{' ' * _TOO_LONG_A_NAME}}}"
        words = ("rebase", "-b", named)
        # Should another release refuse that at once, the run that follows copies all, slowly; and what is
        # wrong with the disk that one meets again.
        with contextlib.suppress(DataRefused):
            self._run(disk, words, self._working, None, writes=True, hidden=(named,))

    def _copy(
        self,
        disk: DiskFile,
        format: str,
        waiter: Waiter | None,
        out: DiskFile | None = None,
        *,
        behind: tuple[str, ...] = (),
    ) -> None:
        """Convert a disk, and see to it that the conversion came to its end."""
        said = self._run(disk, (*_CONVERT, "-O", format), self._working, waiter, out, behind=behind)
        if _COMPLETE not in said:
            raise errors.BackendError(
                "qemu-img ended without an error, and does not say that it converted all of the image",
                path=disk.path,
                next_step="find out what runs in the place of qemu-img; another host may do it",
            )

    def _json(
        self,
        disk: DiskFile,
        limits: Limits,
        waiter: Waiter | None,
        *words: str,
        overlay: bool = False,
    ) -> dict[str, Any]:
        out = self._run(disk, words, limits, waiter, overlay=overlay)
        try:
            found = json.loads(out)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise errors.BackendError(
                f"qemu-img {words[0]} wrote no JSON object",
                path=disk.path,
                next_step="find out what runs in the place of qemu-img; another host may do it",
            )
        return found

    def _run(
        self,
        disk: DiskFile,
        words: tuple[str, ...],
        limits: Limits,
        waiter: Waiter | None,
        out: DiskFile | None = None,
        *,
        writes: bool = False,
        overlay: bool = False,
        behind: tuple[str, ...] = (),
        hidden: tuple[str, ...] = (),
    ) -> str:
        """Run one subcommand on a disk, and into another if ``out`` says so.

        :param overlay: the disk may name a backing file, though none is opened.
        :param behind: arguments to put behind the files.
        :param hidden: texts besides the files that are cut from what it says.
        """
        for each in disk.files():
            stated = overlay or each.backing is not None
            with translated(each.path), contextlib.closing(OpenFile.at(each.path)) as file:
                contained.require(file, each.format, overlay=stated, path=each.path)
        others = () if out is None else (out,)
        shown = (disk, *others)
        written = tuple(each.path for each in others) + ((disk.path,) if writes else ())
        paths = {each.path for given in shown for each in given.files()}
        command = (
            *self._sandbox.command(reads=tuple(sorted(paths - set(written))), writes=written),
            "qemu-img",
            *words,
            *(each.to_option() for each in shown),
            *behind,
        )
        hidden = (*hidden, *(each.to_option() for each in shown), *paths)
        waiter = waiter or self._waiter
        try:
            return program.run(
                command,
                limits=limits,
                waiter=waiter,
                program="qemu-img",
                subject=disk.path,
                hidden=hidden,
            )
        except DataRefused as error:
            if writes:  # a disk, and no image that its owner could replace
                error.next_step = "look at the disk with qemu-img check"
            raise
        except StorageFailed as error:
            # QEMU calls it an I/O error too where tables of the image lead nowhere, such as behind its end.
            seen = "Input/output error" in error.cause and _READING.search(error.cause)
            if seen and _is_readable(disk, waiter):
                raise DataRefused(error.cause, path=error.path) from error
            raise
        except errors.BackendError as error:
            if _IN_USE in error.cause:
                error.next_step = "shut the guest down, or end what else has the disk open"
            raise


def _is_readable(disk: DiskFile, waiter: Waiter) -> bool:
    """Return whether every byte of a disk's files can be read, so that the storage did not fail."""
    try:
        for each in disk.files():
            with contextlib.closing(OpenFile.at(each.path)) as file:
                offset = 0
                while piece := file.read(offset, 2**20):
                    waiter.check()
                    offset += len(piece)
    except OSError:
        return False
    return True


def _require_alone(found: dict[str, Any], path: str) -> None:
    """Refuse what qemu-img sees another file or encryption in."""
    specific = found.get("format-specific") or {}
    data = specific.get("data") if isinstance(specific, dict) else None
    details = data if isinstance(data, dict) else {}
    extents = details.get("extents") or []
    alone = isinstance(extents, list) and len(extents) <= 1
    if any(found.get(name) for name in _NAMES_A_FILE) or details.get("data-file") or not alone:
        raise DataRefused("another file belongs to it", path=path)
    if found.get("encrypted"):
        raise DataRefused("it is encrypted", path=path)


def _number(found: dict[str, Any], name: str, path: str) -> int:
    value = found.get(name)
    if type(value) is not int or value < 0:
        raise errors.BackendError(f"qemu-img does not say its {name}", path=path)
    return value
