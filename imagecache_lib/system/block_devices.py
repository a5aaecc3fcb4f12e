# SPDX-License-Identifier: Apache-2.0
"""What block devices are made of, as sysfs tells it: the kernel's Documentation/ABI/testing/sysfs-block and
sysfs-block-loop. Nothing is opened but files of sysfs, so that no device that does not answer is waited for.
"""

from __future__ import annotations

import errno
import os

from imagecache_lib.system.descriptor import Descriptor

_DEVICES = "/sys/dev/block"
_BY_NAME = "/sys/block"

#: What the kernel puts behind the path of a file that has no name any more.
DELETED = b" (deleted)"

#: An attribute of sysfs is no longer than a page.
_PAGE = os.sysconf("SC_PAGESIZE")


def files_beneath(device: int, *, devices: str = _DEVICES) -> tuple[bytes, ...]:
    """Return the paths, without links, of the files on which a block device lies: those of loop devices, of
    the devices that it is put together from, and of the one that it is a partition of.

    A file that has no name any more has the last one, with " (deleted)" behind it.

    :param device: its number, as ``st_rdev`` has it.
    :param devices: the directory of sysfs that has a link for each device, named ``MAJOR:MINOR``.
    :raises OSError: that cannot be told.
    """
    top = os.path.join(devices, f"{os.major(device)}:{os.minor(device)}")
    if not os.path.exists(top):
        raise OSError(errno.EOPNOTSUPP, f"{top} does not tell what the device is made of")
    found: dict[bytes, None] = {}
    seen: set[str] = set()
    pending = [os.path.realpath(top)]
    while pending:
        directory = pending.pop()
        if directory in seen:
            continue
        seen.add(directory)
        if (file := _loop_file(directory)) is not None:
            found[file] = None
        if os.path.exists(os.path.join(directory, "partition")):
            pending.append(os.path.dirname(directory))
            continue
        slaves = os.path.join(directory, "slaves")
        pending += [os.path.realpath(os.path.join(slaves, name)) for name in _names(slaves)]
    return tuple(found)


def loop_files(*, devices: str = _BY_NAME) -> dict[str, bytes]:
    """Return the paths of the files of all loop devices of this host, as :func:`files_beneath` does, by the
    name of the device. What cannot be read is left out.

    :param devices: the directory of sysfs that has a link for each device, by name.
    """
    found = {}
    for name in _names(devices):
        if name.startswith("loop"):
            try:
                file = _loop_file(os.path.join(devices, name))
            except OSError:
                continue
            if file is not None:
                found[name] = file
    return found


def _loop_file(directory: str) -> bytes | None:
    try:
        with Descriptor(os.path.join(directory, "loop", "backing_file"), os.O_RDONLY) as fd:
            return os.read(fd, _PAGE).removesuffix(b"\n") or None
    except (FileNotFoundError, NotADirectoryError):
        return None  # no loop device, or one without a file
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None  # its file was just taken away
        raise


def _names(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as found:
            return [entry.name for entry in found]
    except FileNotFoundError:
        return []
