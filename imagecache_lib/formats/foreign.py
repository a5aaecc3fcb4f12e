# SPDX-License-Identifier: Apache-2.0
"""What is known not to be a disk: compressed files, archives, documents, disks of unsupported formats.

"Raw" means that a disk has no format, so that any content would do as a raw disk. These contents do not: no
disk begins like them, and a guest could not use them. A filesystem that fills a disk is a disk, and one that
is only ever an archive's is not. How they begin is in :mod:`imagecache_lib.formats.foreign_marks`.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Literal

from imagecache_lib import errors
from imagecache_lib.formats import foreign_marks as marks


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Something that is no disk.

    :param what: what it is, with its article.
    :param next_step: what its owner should do.
    """

    what: str
    next_step: str


#: As much of the content as :func:`recognise` looks at.
LOOKED_AT = 1024

_TAR_SUM = re.compile(rb" *([0-7]{1,7})[ \0]")
#: Signature, version 4 and length 512 of the block that ends an Apple disk image.
_KOLY = b"koly\0\0\0\x04\0\0\x02\0"
#: Byte order marks, the longest first where one begins with another.
_ENCODINGS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
#: Of a disk, in bytes.
_SECTOR = 512
#: Fewer characters before zeros are no text.
_PADDED = 7
#: Characters without width that editors leave at the beginning of a file, besides blanks.
_BLANK = "\ufeff\u200b\u2060"
#: No text has these control characters; blanks, a bell, a backspace and an escape it may have.
_NO_TEXT = re.compile(r"[\0-\x06\x0e-\x1a\x1c-\x1f]")
#: What sets colours on a terminal.
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PRINTED = frozenset(range(0x20, 0x7F))
_TYPED = _PRINTED | frozenset(b"\t\r\n")


def recognise(start: bytes, *, vouched: bool = True) -> Foreign | None:
    """Tell content that is not a disk from content that could be one. Returns None if it could be a disk.

    :param start: the first :data:`LOOKED_AT` bytes of the content, or all of it.
    :param vouched: whether a digest says that this content is what is meant. Text that begins in no known way
        is taken for what a server says instead of the image, unless a digest vouches for it. So is one word
        or a blank that is all of the content.
    """
    for offset, magic, what, next_step in marks.MAGIC:
        if start.startswith(magic, offset):
            return Foreign(what, next_step)
    for pattern, what, next_step in marks.PATTERNS:
        if pattern.match(start):
            return Foreign(what, next_step)
    for is_one, (what, next_step) in (
        (_is_old_tar, marks.TAR),
        (_is_old_cpio, marks.CPIO),
        (_is_zlib, marks.ZLIB),
        (_is_program, marks.PROGRAM),
    ):
        if is_one(start):
            return Foreign(what, next_step)
    found = _document(start, vouched=vouched)
    if found is None and not vouched and 0 < len(start) < _SECTOR and _TYPED.issuperset(start):
        return Foreign(*marks.TEXT)  # one word or none, which is no sector of a disk either
    return found


def document(start: bytes) -> Foreign | None:
    """Return which document content is, or None if it is none: what a server may send instead of an image.

    :param start: as for :func:`recognise`.
    """
    for offset, magic, what, next_step in marks.MAGIC:
        if what.startswith("a picture") and start.startswith(magic, offset):
            return Foreign(what, next_step)
    return _document(start[:LOOKED_AT], vouched=False)


def refuse_end(end: bytes) -> None:
    """Refuse raw content that only its end shows to be no disk.

    :param end: the last 512 bytes of the content.
    :raises ImageRejected: it is an Apple disk image (UDIF, ``.dmg``).
    """
    if end.startswith(_KOLY) and len(end) == 512:
        raise errors.ImageRejected(
            "it is an Apple disk image (dmg) and no disk",
            next_step="convert it to raw or qcow2, and upload that under a new id",
        )


def _is_old_tar(start: bytes) -> bool:
    """Return whether content begins as tar archives did before POSIX: only a sum shows their header."""
    header = start[:512]
    stated = _TAR_SUM.match(header, 148)
    if len(header) < 512 or stated is None or not header[0]:
        return False
    return int(stated[1], 8) == sum(header[:148]) + 8 * 0x20 + sum(header[156:])


def _is_old_cpio(start: bytes) -> bool:
    """Return whether content begins as cpio archives in the old binary form, of either byte order, do."""
    orders: tuple[tuple[bytes, Literal["little", "big"]], ...] = (
        (b"\xc7\x71", "little"),
        (b"\x71\xc7", "big"),
    )
    for mark, order in orders:
        if start.startswith(mark) and len(start) > 26:
            length = int.from_bytes(start[20:22], order)
            name, behind = start[26 : 25 + length], start[25 + length : 26 + length]
            return 1 < length < LOOKED_AT and behind == b"\0" and _PRINTED.issuperset(name)
    return False


def _is_zlib(start: bytes) -> bool:
    """Return whether content begins with a stream of RFC 1950, which is proved by unpacking the beginning."""
    if start[:1] != b"\x78" or len(start) < 3 or int.from_bytes(start[:2], "big") % 31:
        return False
    decoder = zlib.decompressobj()
    try:
        return bool(decoder.decompress(start, 64)) and not decoder.unused_data
    except zlib.error:
        return False


def _is_program(start: bytes) -> bool:
    """Return whether content begins as a Windows program, such as an archive that unpacks itself.

    What has a boot sector's signature may be a disk that boots: a program for EFI may begin with one.
    """
    if not start.startswith(b"MZ") or start[510:512] == b"\x55\xaa":
        return False
    at = int.from_bytes(start[60:64], "little")
    return start[at : at + 4] == b"PE\0\0"


def _document(start: bytes, *, vouched: bool) -> Foreign | None:
    """Return which document the content is: text throughout that begins in a known way, or any text.

    Returns None if it is no document.
    """
    found = _decoded(start)
    whole = found.rstrip("\0")
    padded = whole != found  # as where a text was copied in blocks
    text = _ESCAPE.sub("", whole).lstrip().lstrip(_BLANK).lstrip()
    if len(text) < (_PADDED if padded else 1) or _NO_TEXT.search(text):
        return None
    for pattern, what, next_step in marks.TEXTS:
        if pattern.match(text):
            return Foreign(what, next_step)
    return None if vouched or padded or not _is_prose(text) else Foreign(*marks.TEXT)


def _decoded(start: bytes) -> str:
    """Return content as text, in the encoding that its beginning shows. Most content is none."""
    for mark, encoding in _ENCODINGS:
        if start.startswith(mark):
            return start[len(mark) :].decode(encoding, "replace")
    for first, encoding in ((0, "utf-16-le"), (1, "utf-16-be")):
        letters, between = start[first:64:2], start[1 - first : 64 : 2]
        if len(letters) > 8 and not any(between) and _TYPED.issuperset(letters):
            return start.decode(encoding, "replace")
    return start.decode("utf-8", "replace")


def _is_prose(text: str) -> bool:
    """Return whether what has no control characters is text of several words, as a server's message is."""
    # In another alphabet most of it is ASCII too: blanks, digits, punctuation, names. What was cut off in the
    # middle of a character is text all the same.
    wrong = text.rstrip("\ufffd").count("\ufffd")
    if wrong and sum(character < "\x80" for character in text) < len(text) / 2:
        return False
    return len(text.split()) > 1
