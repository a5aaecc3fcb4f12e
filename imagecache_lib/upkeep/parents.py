# SPDX-License-Identifier: Apache-2.0
"""Which files the headers of other formats than qcow2 name: parents, and extents in which the data lie.

Headers are hostile input: each offset and length in them may be any number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import struct
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from imagecache_lib import errors
from imagecache_lib.formats import vhdx

#: A file's name has fewer bytes, and what is longer is a broken header.
LONGEST_NAME = 4095

#: As much of a descriptor that lies somewhere in a VMDK as is read.
_DESCRIPTOR = 2**20

#: The first version of qcow has the place and the length of its backing file's name where qcow2 has them.
_QCOW_VERSION = b"\0\0\0\1"
_QCOW = struct.Struct(">8xQI")

#: Where a QED header has the place and the length of its backing file's name (QEMU's
#: docs/interop/qed_spec.txt).
_QED_NAME = struct.Struct("<II")
_QED_NAME_AT = 56

_VMDK_PARENT = re.compile(rb'parentFileNameHint="([^"]+)"')
_VMDK_EXTENT = re.compile(
    rb'^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+\d+[ \t]+\w+[ \t]+"([^"\r\n]+)"', re.MULTILINE
)
#: Sectors of the disk, of a grain, and where a sparse extent has its descriptor and how long that is, in
#: sectors too.
_VMDK_HEADER = struct.Struct("<12xQQQQ")
_SECTOR = 512

#: What a differencing VHD has where a footer's copy says: eight locators of its parent.
_VHD_HEADER_AT = struct.Struct(">16xQ")
_VHD_HEADER = b"cxsparse"
_VHD_NAME = slice(64, 576)
_VHD_LOCATORS_AT = 576
_VHD_LOCATOR = struct.Struct(">4s4xI4xQ")
_VHD_LOCATORS = 8
_DRIVE = re.compile(rb"[A-Za-z]:(?=[\\/])")


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A file from an offset on, where a disk in it begins.

    :param start: bytes.
    """

    fd: int
    start: int = 0

    def read(self, length: int, at: int = 0) -> bytes:
        """Return so many bytes, or all there are, however few each read returns.

        :raises OSError: as pread(2).
        """
        parts: list[bytes] = []
        done = self.start + at
        end = min(done + length, 2**63 - 1)  # there is nothing behind that
        while done < end and (part := os.pread(self.fd, end - done, done)):
            parts.append(part)
            done += len(part)
        return b"".join(parts)


def named_in(window: Window, text: bytes) -> Iterator[bytes]:
    """Yield the names in a header, wherever in the file they are.

    :param text: what the file begins with.
    :raises OSError: as pread(2).
    """
    if text.startswith(b"QFI\xfb"):
        yield from _in_qcow(window, text)
    elif text.startswith(b"QED\0"):
        yield from _in_qed(window, text)
    elif text.startswith(b"cone"):
        yield from _in_vhd(window, text)
    elif text.startswith(b"vhdx"):
        yield from _in_vhdx(window)
    else:
        yield from _in_vmdk(window, text)


def _in_qcow(window: Window, text: bytes) -> Iterator[bytes]:
    if len(text) >= _QCOW.size and text[4:8] == _QCOW_VERSION:
        at, size = _QCOW.unpack_from(text)
        yield from _ended(window.read(min(size, LONGEST_NAME), at))


def _in_qed(window: Window, text: bytes) -> Iterator[bytes]:
    if len(text) >= _QED_NAME_AT + _QED_NAME.size:
        at, size = _QED_NAME.unpack_from(text, _QED_NAME_AT)
        yield from _ended(window.read(min(size, LONGEST_NAME), at))


def _ended(name: bytes) -> Iterator[bytes]:
    """Yield a name up to its first zero, if there is one."""
    if name := name.partition(b"\0")[0]:
        yield name


def _in_vmdk(window: Window, text: bytes) -> Iterator[bytes]:
    is_sparse = text.startswith(b"KDMV") and len(text) >= _VMDK_HEADER.size
    capacity = 0
    if is_sparse:
        capacity, _grain, at, size = _VMDK_HEADER.unpack_from(text)
        if (at + size) * _SECTOR > len(text):
            text = window.read(min(size * _SECTOR, _DESCRIPTOR), at * _SECTOR)
    yield from (match[1] for match in _VMDK_PARENT.finditer(text))
    if not is_sparse or not capacity:
        # The descriptor in an extent that has the data itself may name it as it was called once.
        yield from (match[1] for match in _VMDK_EXTENT.finditer(text))


def _in_vhd(window: Window, text: bytes) -> Iterator[bytes]:
    if len(text) < _VHD_HEADER_AT.size:
        return
    (at,) = _VHD_HEADER_AT.unpack_from(text)
    header = window.read(_VHD_LOCATORS_AT + _VHD_LOCATORS * _VHD_LOCATOR.size, at)
    if not header.startswith(_VHD_HEADER):
        return
    yield from _path(header[_VHD_NAME].decode("utf-16-be", "replace").encode())
    for number in range((len(header) - _VHD_LOCATORS_AT) // _VHD_LOCATOR.size):
        code, size, place = _VHD_LOCATOR.unpack_from(header, _VHD_LOCATORS_AT + number * _VHD_LOCATOR.size)
        if not any(code):
            continue
        data = window.read(min(size, 2 * LONGEST_NAME), place)
        if code == b"MacX":
            yield from _path(unquote_to_bytes(data.removeprefix(b"file://")))
        elif code in (b"W2ku", b"W2ru"):
            yield from _path(data.decode("utf-16-le", "replace").encode())
        else:
            yield from _path(data)


def _in_vhdx(window: Window) -> Iterator[bytes]:
    with contextlib.suppress(errors.ImageRejected):  # it is broken
        if (named := vhdx.parent(_Image(window))) is not None:
            yield from _path(named.encode("utf-8", "replace"))


class _Image:
    """A window as a :class:`~imagecache_lib.formats.reader.Reader`."""

    size = None

    def __init__(self, window: Window) -> None:
        self._window = window

    def read(self, offset: int, length: int) -> bytes:
        return self._window.read(length, offset)


def _path(name: bytes) -> Iterator[bytes]:
    """Yield a name with the separators of this system, and without a drive."""
    for ended in _ended(name):
        yield _DRIVE.sub(b"", ended, count=1).replace(b"\\", b"/")
