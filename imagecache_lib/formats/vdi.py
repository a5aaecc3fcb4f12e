# SPDX-License-Identifier: Apache-2.0
"""VDI images: the virtual size, and whether a parent belongs to one. Facts from QEMU's block/vdi.c."""

from __future__ import annotations

import struct

from imagecache_lib import errors
from imagecache_lib.formats.reader import Reader

SIGNATURE = 0xBEDA107F
_SIGNATURE_AT = 64
_TYPE_AT = 76
_SIZE_AT = 368
_LINKS = slice(424, 456)
_LENGTH = 512
#: Dynamic and static; the others are parts of a disk.
_WHOLE = (1, 2)

_NEXT_STEP = "have its owner merge it into one image, or convert it to qcow2"


def read(image: Reader) -> int:
    """Return an image's virtual size in bytes.

    :raises ImageRejected: the image is broken, or is not known to be self-contained.
    :raises NeedMore: the bytes that tell have not arrived yet.
    """
    header = image.read(0, _LENGTH)
    if len(header) < _LENGTH or struct.unpack_from("<I", header, _SIGNATURE_AT)[0] != SIGNATURE:
        raise errors.ImageRejected("the vdi image is broken: it has no header", next_step=_NEXT_STEP)
    (kind,) = struct.unpack_from("<I", header, _TYPE_AT)
    if kind not in _WHOLE or any(header[_LINKS]):
        raise errors.ImageRejected("another file belongs to the vdi image", next_step=_NEXT_STEP)
    (size,) = struct.unpack_from("<Q", header, _SIZE_AT)
    return -(-int(size) // 512) * 512
