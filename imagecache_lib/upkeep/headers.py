# SPDX-License-Identifier: Apache-2.0
"""What single files on a host say: the texts that may name another file, and which format is pinned.

Headers are hostile input: a guest may write one into its raw disk. They are searched, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from imagecache_lib.formats.qcow2 import header
from imagecache_lib.formats.qcow2.header import HeaderError, Truncated
from imagecache_lib.nova import disk_info
from imagecache_lib.system import durable
from imagecache_lib.upkeep import parents
from imagecache_lib.upkeep.parents import Window

#: As much of each file as is read at first; the header of nearly every overlay is within.
HEAD = 4096

#: What a read must return before a missing magic proves anything.
_SHORTEST = 8

#: A qcow2 header with its names may take a whole cluster, and QEMU allows clusters of so many bytes. An
#: unparseable header may still hold a name, which is looked for in as much of the file.
_DEEP = 2**21

#: Beginnings of the other formats that can name another file, and in how much of the file the names lie. A
#: VMDK descriptor needs no comment in front of its version.
_OTHERS = {
    b"QED\0": 2**16,
    b"KDMV": 2**20,
    b"COWD": 2**20,
    b"# Di": 2**20,
    b"vers": 2**20,
    b"cone": 2**16,
    b"vhdx": 2**22,
}

_NAMING = frozenset((header.MAGIC, *_OTHERS))

#: A VMDK descriptor may begin with any comment or blanks. What it has for certain, near its beginning, tells
#: it from other texts.
_DESCRIPTOR = 2**20
_BEFORE_DESCRIPTOR = (b"#", b" ", b"\t", b"\r", b"\n")
_OF_DESCRIPTOR = b"createType="

#: Where a version 3 header has its incompatible features, of which bit 2 says that there is a data file.
_FEATURES_AT = 79

_ESCAPE = re.compile(rb"\\u([0-9a-fA-F]{4})|\\(.)", re.DOTALL)

_QUOTED = re.compile(r"""(["'])((?:(?!\1)[^\\]|\\.)*)\1""", re.DOTALL)
_IN_QUOTES = re.compile(r"""\\.|["]""", re.DOTALL)

#: QEMU takes what stands before a colon for a protocol: what is meant is no file on this host.
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]*:")

#: What names a file on this host all the same, or two.
_OF_A_FILE = ("file", "host_device", "host_cdrom", "host_floppy")
_OF_TWO_FILES = ("blkdebug", "blkverify")

#: A number of bytes, also as text: hexadecimal, or with a unit.
_SIZE = re.compile(r"(0[xX][0-9a-fA-F]{1,16})|(\d{1,19}(?:\.\d{1,19})?)([bkmgtpeBKMGTPE]?)")
_UNITS = "bkmgtpe"

#: No file reaches so far that a read there could be refused.
_FARTHEST = 2**62

#: An escape may be escaped again, when a name in JSON holds JSON.
_MOST_LAYERS = 4


def read_head(fd: int, start: int = 0) -> bytes:
    """Return the first bytes of a disk, or nothing of one that cannot refer to another.

    :param start: where in the file it begins, in bytes.
    :raises OSError: as pread(2).
    """
    head = os.pread(fd, HEAD, start)
    if 0 < len(head) < _SHORTEST:
        head = Window(fd, start).read(HEAD)
    if head[:4] not in _NAMING and not _is_descriptor(head):
        return b""
    # A filesystem may return less than there is.
    return head if len(head) == HEAD else Window(fd, start).read(HEAD)


def _is_descriptor(head: bytes) -> bool:
    """Whether a text is the descriptor of a VMDK, which may begin with any comment."""
    return head[:1] in _BEFORE_DESCRIPTOR and _OF_DESCRIPTOR in head


def references(fd: int, head: bytes, start: int = 0) -> tuple[bytes, ...]:
    """Return the texts in a header that may name another file.

    Of a header that cannot be parsed, and of formats other than qcow2, that is all that is near it.

    :param head: as :func:`read_head` returned it, not empty.
    :param start: likewise.
    :raises OSError: as pread(2).
    """
    window = Window(fd, start)
    if head[:4] != header.MAGIC:
        text = window.read(_OTHERS.get(head[:4], _DESCRIPTOR))
        # Names in UTF-16, of either order, become readable without the zeros. With a zero behind it none of
        # these is a file's name.
        return (text + b"\0", text.replace(b"\0", b"") + b"\0", *parents.named_in(window, text))
    try:
        backing, whole = _backing(window, head)
    except HeaderError:
        return (window.read(_DEEP), *parents.named_in(window, head))
    # For QEMU a name ends with its first zero.
    named = () if backing is None else tuple(dict.fromkeys((backing, backing.partition(b"\0")[0])))
    if len(whole) > _FEATURES_AT and whole[7] == 3 and whole[_FEATURES_AT] & 4:
        return (*named, *_data_file(window))
    return named


def _backing(window: Window, head: bytes) -> tuple[bytes | None, bytes]:
    try:
        return header.backing_reference(head), head
    except Truncated as error:
        more = window.read(max(HEAD, min(error.needed, _DEEP)))
        return header.backing_reference(more), more


def _data_file(window: Window) -> tuple[bytes, ...]:
    whole = window.read(_DEEP)
    try:
        named = header.parse(whole).extensions.get(header.EXTENSION_DATA_FILE)
    except (HeaderError, header.NotQcow2):
        return (whole,)
    # Without its extension the name of the data file is the caller's to give.
    return () if named is None else (named,)


def spellings(text: bytes) -> Iterator[bytes]:
    """Yield a text as it stands, and as its escapes, its per cent signs and its capitals mean.

    QEMU decodes JSON more leniently than the standard does, so that escapes are decoded wherever they stand.
    """
    yield text
    for _layer in range(_MOST_LAYERS):
        decoded = _ESCAPE.sub(_unescaped, text) if b"\\" in text else text
        if b"%" in decoded:
            yield decoded
            decoded = unquote_to_bytes(decoded)
        if decoded == text:
            break
        text = decoded
        yield text
    if (lower := text.lower()) != text:
        yield lower


def _unescaped(match: re.Match[bytes]) -> bytes:
    digits, plain = match.group(1), match.group(2)
    return chr(int(digits, 16)).encode("utf-8", "replace") if digits is not None else bytes(plain)


def named_files(path: str, reference: bytes) -> list[str]:
    """Return the paths of the files on this host that a reference in the file ``path`` may mean."""
    if len(reference) > parents.LONGEST_NAME or b"\0" in reference:
        return []
    named = list(_filenames(os.fsdecode(reference)))
    directory = os.path.dirname(path)
    return [os.path.join(directory, each) for each in named if each and "\0" not in each]


def is_plain(reference: bytes) -> bool:
    """Whether a reference is a path as it stands: what it means is relative to the file that it is in."""
    return reference.startswith(b"/") or not _PROTOCOL.match(os.fsdecode(reference))


def starts(reference: bytes) -> tuple[int, ...]:
    """Return where in the files that a reference means the disk may begin, in bytes."""
    if not reference.startswith(b"json:") or b"offset" not in reference:
        return (0,)
    try:
        value = _value(os.fsdecode(reference).removeprefix("json:"))
    except (ValueError, RecursionError):
        return (0,)
    return tuple(dict.fromkeys((0, *_offsets(value, ""))))


def _filenames(text: str) -> Iterator[str]:
    driver, colon, behind = text.partition(":")
    if not _PROTOCOL.match(text):
        yield text
    elif driver == "json":
        try:
            yield from _texts(_value(behind), "")
        except (ValueError, RecursionError):
            for match in _QUOTED.finditer(behind):
                quoted = re.sub(r"\\(.)", r"\1", match.group(2))
                if "/" in quoted:
                    yield from _filenames(quoted)
    elif driver in _OF_A_FILE:
        yield behind
    elif driver in _OF_TWO_FILES:
        # Of the first that is all up to the next colon, and it may be empty.
        first, colon, second = behind.partition(":")
        yield first
        if colon:
            yield from _filenames(second)


def _value(text: str) -> object:
    """Return what JSON says. Of an object that is its pairs: a key may be there twice.

    Single quotes count as double ones.

    :raises ValueError, RecursionError: it is no JSON.
    """
    return json.loads(_QUOTED.sub(_double_quoted, text), object_pairs_hook=tuple, strict=False)


def _double_quoted(match: re.Match[str]) -> str:
    inner = _IN_QUOTES.sub(lambda each: {"\\'": "'", '"': '\\"'}.get(each[0], each[0]), match[2])
    return f'"{inner}"'


def _pairs(value: object, key: str) -> Iterator[tuple[str, object]]:
    """Yield every value in JSON that is no object and no list, with the last part of its key."""
    if isinstance(value, tuple):
        for inner_key, inner in value:
            yield from _pairs(inner, inner_key.rpartition(".")[2])
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner, key)
    else:
        yield key, value


def _texts(value: object, key: str) -> Iterator[str]:
    """Yield every file name in a JSON value: QEMU nests them in many ways."""
    for inner_key, inner in _pairs(value, key):
        # What else there is are names of drivers and of options.
        if isinstance(inner, str) and (inner_key == "filename" or "/" in inner):
            yield from _filenames(inner)


def _offsets(value: object, key: str) -> Iterator[int]:
    for inner_key, inner in _pairs(value, key):
        if inner_key == "offset" and (match := _SIZE.fullmatch(str(inner).strip())) is not None:
            unit = 1024 ** _UNITS.index((match[3] or "b").lower())
            if match[1]:
                offset = int(match[1], 16)
            else:
                offset = int(float(match[2]) * unit) if "." in match[2] else int(match[2]) * unit
            if offset <= _FARTHEST:
                yield offset


def pinned_format(path: str) -> str | None:
    """Return the format that the ``disk.info`` beside a file, which is read now, pins; or None if it pins
    none."""
    try:
        data = durable.read_file(os.path.join(os.path.dirname(path), disk_info.NAME), limit=_DEEP)
    except OSError:
        return None
    # What is torn pins nothing: the header counts then, which keeps more.
    formats = disk_info.parse(data) if data is not None else None
    return disk_info.format_in(formats or {}, path)
