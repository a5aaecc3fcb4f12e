# SPDX-License-Identifier: Apache-2.0
"""Tells whether one file is all of a disk. A file that is not known to be self-contained is refused.

Each format that is accepted has a reader of its own here or beside, which also says how large the disk is.
A format without a reader is not accepted. The same readers look at the beginning of an image as it arrives,
at the whole file before it is used, and at each file before an outside program opens it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from imagecache_lib import errors
from imagecache_lib.formats import vdi, vhd, vhdx, vmdk
from imagecache_lib.formats.program import DataRefused
from imagecache_lib.formats.qcow2 import decoder
from imagecache_lib.formats.qcow2 import header as qcow2_header
from imagecache_lib.formats.qcow2.header import Header, HeaderError, Incompatible, NotQcow2, Truncated
from imagecache_lib.formats.reader import Reader

#: No format states more; the configuration's bound is far below.
_NO_BOUND = 2**63


@dataclasses.dataclass(frozen=True)
class Facts:
    """What an image's own header says of the disk in it.

    :param virtual_size: in bytes, or None for a raw disk, which is as large as its file.
    :param one_size: whether all programs that read the format read this size.
    """

    virtual_size: int | None
    one_size: bool = True


def examine(image: Reader, format: str) -> Facts:
    """Return what an image's own header says of the disk.

    :param format: QEMU's name of the image's format.
    :raises ImageRejected: the image is broken, or is not known to be self-contained.
    :raises NeedMore: too little of the image has arrived to tell.
    """
    read = _READERS.get(format)
    if read is None:
        raise errors.ImageRejected(
            f"whether an image in format {format} is self-contained is not known",
            next_step="have its owner convert it to qcow2",
        )
    return read(image)


def require(image: Reader, format: str, *, path: str, overlay: bool = False) -> None:
    """Refuse a file that an outside program must not open, since another file belongs to it.

    :param path: path of the file, for the error.
    :param overlay: the header may name a backing file, since the caller states the backing file to the
        program.
    :raises DataRefused: another file belongs to this one, or the header does not tell whether one does.
    """
    try:
        if overlay and format == "qcow2":
            _require_own_data(read_qcow2_header(image))
        else:
            examine(image, format)
    except errors.ImageRejected as error:
        raise DataRefused(error.cause, path=path, next_step=error.next_step) from error


def _raw(image: Reader) -> Facts:
    return Facts(None)


def _qcow2(image: Reader) -> Facts:
    header = read_qcow2_header(image)
    _require_own_data(header)
    decoder.check(header, _NO_BOUND)
    return Facts(header.virtual_size)


def read_qcow2_header(image: Reader) -> Header:
    """Return a qcow2 image's header.

    :raises ImageRejected: it is none.
    :raises NeedMore: it has not arrived as a whole yet.
    """
    needed = qcow2_header.V2_LENGTH
    while True:
        data = image.read(0, needed)
        try:
            return qcow2_header.parse(data)
        except NotQcow2:
            raise errors.ImageRejected("it is no qcow2 image") from None
        except Truncated as error:
            if len(data) < needed or error.needed <= needed:
                raise
            needed = error.needed


def _require_own_data(header: Header) -> None:
    # The name alone, without the bit that makes a reader heed it, is as good as none. It is nothing that a
    # writer leaves there, though.
    if (
        header.incompatible_features & Incompatible.DATA_FILE
        or qcow2_header.EXTENSION_DATA_FILE in header.extensions
    ):
        raise HeaderError("the qcow2 image keeps its data in another file")


def _vhd(image: Reader) -> Facts:
    found = vhd.read(image)
    return Facts(found.current_size, found.one_size)


_READERS: dict[str, Callable[[Reader], Facts]] = {
    "raw": _raw,
    "qcow2": _qcow2,
    "vmdk": lambda image: Facts(vmdk.read(image).virtual_size),
    "vpc": _vhd,
    "vhdx": lambda image: Facts(vhdx.read(image)),
    "vdi": lambda image: Facts(vdi.read(image)),
}
