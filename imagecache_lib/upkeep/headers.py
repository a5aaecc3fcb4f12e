# SPDX-License-Identifier: Apache-2.0
"""What single files on a host say: the texts that may name another file, and which format is pinned.

Headers are hostile input: a guest may write one into its raw disk. They are searched, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from imagecache_lib.formats.qcow2 import header
from imagecache_lib.formats.qcow2.header import HeaderError, Truncated
from imagecache_lib.nova import disk_info
from imagecache_lib.system import durable

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

#: Where a QED header has the place and the length of its backing file's name (QEMU's
#: docs/interop/qed_spec.txt).
_QED_NAME = struct.Struct("<II")
_QED_NAME_AT = 56

_VMDK_PARENT = re.compile(rb'parentFileNameHint="([^"\n]+)"')

_NAMING = frozenset((header.MAGIC, *_OTHERS))

#: Where a version 3 header has its incompatible features, of which bit 2 says that there is a data file.
_FEATURES_AT = 79

_ESCAPE = re.compile(rb"\\u([0-9a-fA-F]{4})|\\(.)", re.DOTALL)

_QUOTED = re.compile(r"""(["'])((?:(?!\1)[^\\]|\\.)*)\1""")

#: QEMU takes what stands before a colon for a protocol: what is meant is no file on this host.
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

#: A backing file's name has at most 1,023 bytes, and what is longer is a broken header.
_LONGEST_REFERENCE = 4095

#: An escape may be escaped again, when a name in JSON holds JSON.
_MOST_LAYERS = 4


def read_head(fd: int) -> bytes:
    """Return the first bytes of a file, or nothing of one that cannot refer to another.

    :raises OSError: as read(2).
    """
    head = os.read(fd, HEAD)
    if 0 < len(head) < _SHORTEST:
        head = read_at(fd, HEAD)
    if head[:4] not in _NAMING:
        return b""
    # A filesystem may return less than there is.
    return head if len(head) == HEAD else read_at(fd, HEAD)


def read_at(fd: int, length: int) -> bytes:
    """Return so many bytes from the beginning of a file, or all there are, however few each read returns."""
    parts: list[bytes] = []
    done = 0
    while done < length and (part := os.pread(fd, length - done, done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def references(fd: int, head: bytes) -> tuple[bytes, ...]:
    """Return the texts in a header that may name another file.

    Of a header that cannot be parsed, and of formats other than qcow2, that is all that is near it.

    :param head: as :func:`read_head` returned it, not empty.
    :raises OSError: as pread(2).
    """
    if head[:4] != header.MAGIC:
        text = read_at(fd, _OTHERS[head[:4]])
        # Names in UTF-16, of either order, become readable without the zeros. With a zero behind it none of
        # these is a file's name.
        return (text + b"\0", text.replace(b"\0", b"") + b"\0", *_parents(fd, text))
    try:
        backing, whole = _backing(fd, head)
    except HeaderError:
        return (read_at(fd, _DEEP),)
    # For QEMU a name ends with its first zero.
    named = () if backing is None else tuple(dict.fromkeys((backing, backing.partition(b"\0")[0])))
    if len(whole) > _FEATURES_AT and whole[7] == 3 and whole[_FEATURES_AT] & 4:
        return (*named, *_data_file(fd))
    return named


def _parents(fd: int, text: bytes) -> Iterator[bytes]:
    """Yield the names of backing files in a QED header, wherever in the file, or a VMDK's descriptor."""
    if text.startswith(b"QED\0"):
        if len(text) >= _QED_NAME_AT + _QED_NAME.size:
            offset, size = _QED_NAME.unpack_from(text, _QED_NAME_AT)
            if name := os.pread(fd, min(size, _LONGEST_REFERENCE), offset).partition(b"\0")[0]:
                yield name
        return
    yield from (match[1] for match in _VMDK_PARENT.finditer(text))


def _backing(fd: int, head: bytes) -> tuple[bytes | None, bytes]:
    try:
        return header.backing_reference(head), head
    except Truncated as error:
        more = read_at(fd, max(HEAD, min(error.needed, _DEEP)))
        return header.backing_reference(more), more


def _data_file(fd: int) -> tuple[bytes, ...]:
    whole = read_at(fd, _DEEP)
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
    if len(reference) > _LONGEST_REFERENCE or b"\0" in reference:
        return []
    named = list(_filenames(os.fsdecode(reference)))
    directory = os.path.dirname(path)
    return [os.path.join(directory, each) for each in named if each and "\0" not in each]


def _filenames(text: str) -> Iterator[str]:
    if text.startswith("json:"):
        try:
            yield from _texts(json.loads(text.removeprefix("json:")), "")
        except (ValueError, RecursionError):
            # QEMU's own parser takes more for JSON, such as single quotes.
            for match in _QUOTED.finditer(text):
                quoted = re.sub(r"\\(.)", r"\1", match.group(2))
                if "/" in quoted:
                    yield from _filenames(quoted)
    elif text.startswith("file:"):
        yield text.removeprefix("file:")
    elif not _PROTOCOL.match(text):
        yield text


def _texts(value: object, key: str) -> Iterator[str]:
    """Yield every file name in a JSON value: QEMU nests them in many ways."""
    if isinstance(value, str):
        # What else there is are names of drivers and of options.
        if key.rpartition(".")[2] == "filename" or "/" in value:
            yield from _filenames(value)
    elif isinstance(value, dict):
        for inner_key, inner in value.items():
            yield from _texts(inner, str(inner_key))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


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
