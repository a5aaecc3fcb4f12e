# SPDX-License-Identifier: Apache-2.0
"""What is known not to be a disk: compressed files, archives, documents, disks of unsupported formats.

"Raw" means that a disk has no format, so that any content would do as a raw disk. These contents do not: no
disk begins like them, and a guest could not use them. Magic numbers as in the formats' own specifications
and file(1).
"""

from __future__ import annotations

import codecs
import dataclasses
import re


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

_UPLOAD = "and upload the disk that is in it under a new id"
_CONVERT = "convert it to raw or qcow2 with qemu-img, and upload that under a new id"
_ADDRESS = "check the address that it is fetched from, and what it was uploaded from"

_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b\x08", "a gzip-compressed file", f"decompress it (gunzip) {_UPLOAD}"),
    (0, b"\x1f\x9d", "a compress-ed file", f"decompress it (uncompress) {_UPLOAD}"),
    (0, b"\xfd7zXZ\0", "an xz-compressed file", f"decompress it (unxz) {_UPLOAD}"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd-compressed file", f"decompress it (unzstd) {_UPLOAD}"),
    (0, b"\x04\x22\x4d\x18", "an lz4-compressed file", f"decompress it (unlz4) {_UPLOAD}"),
    (0, b"\x02\x21\x4c\x18", "an lz4-compressed file", f"decompress it (unlz4) {_UPLOAD}"),
    (0, b"\x89LZO\0\r\n\x1a\n", "an lzop-compressed file", f"decompress it (lzop -d) {_UPLOAD}"),
    (0, b"LZIP\x01", "an lzip-compressed file", f"decompress it (lzip -d) {_UPLOAD}"),
    (0, b"PK\x03\x04", "a zip archive", f"unpack it (unzip) {_UPLOAD}"),
    (0, b"PK\x05\x06", "a zip archive", f"unpack it (unzip) {_UPLOAD}"),
    (0, b"PK\x07\x08", "a zip archive", f"unpack it (unzip) {_UPLOAD}"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"unpack it (7z x) {_UPLOAD}"),
    (0, b"Rar!\x1a\x07", "a rar archive", f"unpack it (unrar x) {_UPLOAD}"),
    (0, b"MSCF\0\0\0\0", "a cabinet archive", f"unpack it (cabextract) {_UPLOAD}"),
    (0, b"xar!", "a xar archive", f"unpack it {_UPLOAD}"),
    (0, b"MSWIM\0\0\0", "a Windows image archive (wim)", f"apply it to a disk {_UPLOAD}"),
    (7, b"**ACE**", "an ACE archive", f"unpack it {_UPLOAD}"),
    (257, b"ustar", "a tar archive, as OVA files and container images are", f"unpack it (tar x) {_UPLOAD}"),
    (0, b"070701", "a cpio archive", f"unpack it (cpio) {_UPLOAD}"),
    (0, b"070702", "a cpio archive", f"unpack it (cpio) {_UPLOAD}"),
    (0, b"070707", "a cpio archive", f"unpack it (cpio) {_UPLOAD}"),
    (0, b"!<arch>\n", "an ar archive", f"unpack it (ar x) {_UPLOAD}"),
    (0, b"VMA\0", "a guest's backup (vma)", f"unpack it (vma extract) {_UPLOAD}"),
    (0, b"\x3a\xff\x26\xed", "an Android sparse image", f"unpack it (simg2img) {_UPLOAD}"),
    (4, b"SignedImage ", "a full flash update image (ffu)", f"apply it to a disk {_UPLOAD}"),
    (0, b"EVF\x09\x0d\x0a\xff\0", "an EnCase image (E01)", f"export it as raw (ewfexport) {_UPLOAD}"),
    (0, b"EVF2\x0d\x0a\x81\0", "an EnCase image (Ex01)", f"export it as raw (ewfexport) {_UPLOAD}"),
    (0, b"AFF10\r\n\0", "a forensic image (AFF)", f"convert it to raw {_UPLOAD}"),
    (0, b"MComprHD", "a compressed disk image (chd)", f"extract it (chdman) {_UPLOAD}"),
    (0, b"CISO", "a compressed ISO image", f"decompress it {_UPLOAD}"),
    (0, b"partclone-image", "a partition's backup (partclone)", f"restore it to a disk {_UPLOAD}"),
    (0, b"\0ntfsclone-image", "a partition's backup (ntfsclone)", f"restore it to a disk {_UPLOAD}"),
    (0, b"btrfs-stream\0", "a btrfs send stream", f"receive it on a disk {_UPLOAD}"),
    (0, b"d8:announce", "a torrent", "upload the file that it stands for"),
    (0, b"\xed\xab\xee\xdb", "an rpm package", _ADDRESS),
    (0, b"hsqs", "a squashfs archive", f"make a disk of its content (unsquashfs) {_UPLOAD}"),
    (0, b"sqsh", "a squashfs archive", f"make a disk of its content (unsquashfs) {_UPLOAD}"),
    (0, b"%PDF-", "a PDF document", _ADDRESS),
    (0, b"\x7fELF", "an ELF program", _ADDRESS),
    (0, b"-----BEGIN ", "a PEM file", _ADDRESS),
    (0, b"version https://git-lfs.github.com/", "a Git LFS pointer", "upload the file that it stands for"),
    (0, b"#cloud-config", "a cloud-init file", _ADDRESS),
    (0, b"#!", "a script", _ADDRESS),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor, to which other files belong", _CONVERT),
    (0, b"KDMV", "a VMDK image", _CONVERT),
    (0, b"COWD", "a VMDK extent of an old kind", _CONVERT),
    (0, b"QFI\xfb", "a qcow image of version 1 or an unknown one", _CONVERT),
    (0, b"QED\0", "a QED image", _CONVERT),
    (0, b"WithoutFreeSpace", "a Parallels image", _CONVERT),
    (0, b"WithouFreSpacExt", "a Parallels image", _CONVERT),
    (0, b"Bochs Virtual HD Image", "a Bochs image", _CONVERT),
    (0, b"OOOM", "a User Mode Linux image", _CONVERT),
    (0, b"\x89PNG\r\n\x1a\n", "a picture (PNG)", _ADDRESS),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", _ADDRESS),
    (0, b"GIF8", "a picture (GIF)", _ADDRESS),
    (0, b"SQLite format 3\0", "an SQLite database", _ADDRESS),
    (0, b"LibvirtQemudSave", "a guest's saved memory", "upload the guest's disk"),
    (0, b"LibvirtQemudPart", "a guest's saved memory", "upload the guest's disk"),
    (0, b"QEVM", "a guest's saved memory", "upload the guest's disk"),
    (0, b"SPARSEIMAGE", "an Apple sparse image", _CONVERT),
    (0, b"encrcdsa", "an encrypted Apple disk image", _CONVERT),
)

#: What a few bytes alone do not tell.
_PATTERNS = (
    # Properties and a dictionary as the tools write them, and a size that is unknown or below a terabyte.
    (
        re.compile(rb"\x5d\0\0[\0\x40\x80\xc0][\0-\x10](?:\xff{8}|.{5}\0{3})", re.DOTALL),
        "an lzma-compressed file",
        f"decompress it (unlzma) {_UPLOAD}",
    ),
    (
        re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),
        "a zstd- or lz4-compressed file",
        f"decompress it {_UPLOAD}",
    ),
    (re.compile(rb"..-l[hz][0-9dsx]-", re.DOTALL), "an lha archive", f"unpack it (lha x) {_UPLOAD}"),
)
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", re.DOTALL)
_TAR_SUM = re.compile(rb" *([0-7]{1,7})[ \0]")
#: Signature, version 4 and length 512 of the block that ends an Apple disk image.
_KOLY = b"koly\0\0\0\x04\0\0\x02\0"
_BLANK = b" \t\r\n"
_MARKS = (b"\xef\xbb\xbf",)
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body|title)\b", re.IGNORECASE)
_XML = re.compile(rb"<(?:\?xml\b|!--|[a-z][a-z0-9:_-]*[\s/>])", re.IGNORECASE)
_JSON = re.compile(rb"(?:\{\s*(?:\"|\}|$)|\[\s*(?:[\"{\[\]0-9-]|$))")


def recognise(start: bytes, *, vouched: bool = True) -> Foreign | None:
    """Tell content that is not a disk from content that could be one. Returns None if it could be a disk.

    :param start: the first :data:`LOOKED_AT` bytes of the content, or all of it.
    :param vouched: whether a digest says that this content is what is meant. Text that begins in no known way
        is taken for what a server says instead of the image, unless a digest vouches for it.
    """
    for offset, magic, what, next_step in _MAGIC:
        if start.startswith(magic, offset):
            return Foreign(what, next_step)
    for pattern, what, next_step in _PATTERNS:
        if pattern.match(start):
            return Foreign(what, next_step)
    if _BZIP2.match(start):
        return Foreign("a bzip2-compressed file", f"decompress it (bunzip2) {_UPLOAD}")
    if _is_old_tar(start):
        return Foreign("a tar archive", f"unpack it (tar x) {_UPLOAD}")
    return _document(start, vouched=vouched)


def document(start: bytes) -> Foreign | None:
    """Return which document content is, or None if it is none: what a server may send instead of an image.

    :param start: as for :func:`recognise`.
    """
    for offset, magic, what, next_step in _MAGIC:
        if what.startswith("a picture") and start.startswith(magic, offset):
            return Foreign(what, next_step)
    return _document(start[:LOOKED_AT], vouched=False)


def is_apple_image(end: bytes) -> bool:
    """Return whether content is an Apple disk image (UDIF, ``.dmg``): the block that tells so is its end.

    :param end: the last 512 bytes of the content.
    """
    return end.startswith(_KOLY) and len(end) == 512


def _is_old_tar(start: bytes) -> bool:
    """Return whether content begins as tar archives did before POSIX: only a sum shows their header."""
    header = start[:512]
    stated = _TAR_SUM.match(header, 148)
    if len(header) < 512 or stated is None or not header[0]:
        return False
    return int(stated[1], 8) == sum(header[:148]) + 8 * 0x20 + sum(header[156:])


def _document(start: bytes, *, vouched: bool) -> Foreign | None:
    """Return which document the content is: text throughout that begins as HTML, XML or JSON does, or any.

    Returns None if it is no document.
    """
    for encoding, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        if start.startswith(mark):
            start = start[2:].decode(encoding, "replace").encode()
    for mark in _MARKS:
        start = start.removeprefix(mark)
    text = start.lstrip(_BLANK)
    if not text or any(byte < 32 and byte not in _BLANK for byte in text):
        return None
    for pattern, what in (
        (_HTML, "a web page (HTML)"),
        (_XML, "an XML document"),
        (_JSON, "a JSON document"),
    ):
        if pattern.match(text):
            return Foreign(what, _ADDRESS)
    return None if vouched or not _is_prose(text) else Foreign("a text", _ADDRESS)


def _is_prose(text: bytes) -> bool:
    """Return whether what has no control characters is text of several words, as a server's message is."""
    try:
        # What was cut off in the middle of a character is text all the same.
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        # In another alphabet most of it is ASCII too: blanks, digits, punctuation, names.
        if sum(byte < 128 for byte in text) < len(text) / 2:
            return False
    return len(text.split()) > 1
