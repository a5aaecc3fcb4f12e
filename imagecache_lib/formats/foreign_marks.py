# SPDX-License-Identifier: Apache-2.0
"""How content that is no disk begins: tables for :mod:`imagecache_lib.formats.foreign`.

From the formats' own specifications and file(1). A mark has three bytes at least, or fewer with a structure
behind them: the first bytes of a disk may be anything, such as those of an encrypted one.
"""

from __future__ import annotations

import re

_UPLOAD = "and upload the disk that is in it under a new id"
_CONVERT = "convert it to raw or qcow2 with qemu-img, and upload that under a new id"
_RESTORE = f"restore it to a disk {_UPLOAD}"
_DECRYPT = f"decrypt it {_UPLOAD}"
_ADDRESS = "check the address that it is fetched from, and what it was uploaded from"
_STANDS_FOR = "upload the file that it stands for"
_VOUCHES_FOR = "upload the image that it is about"
_GUESTS_DISK = "upload the guest's disk"

#: Offset, bytes, what it is, and what its owner should do.
MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b\x08", "a gzip-compressed file", f"decompress it (gunzip) {_UPLOAD}"),
    (0, b"\xfd7zXZ\0", "an xz-compressed file", f"decompress it (unxz) {_UPLOAD}"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd-compressed file", f"decompress it (unzstd) {_UPLOAD}"),
    (0, b"\x04\x22\x4d\x18", "an lz4-compressed file", f"decompress it (unlz4) {_UPLOAD}"),
    (0, b"\x02\x21\x4c\x18", "an lz4-compressed file", f"decompress it (unlz4) {_UPLOAD}"),
    (0, b"\x89LZO\0\r\n\x1a\n", "an lzop-compressed file", f"decompress it (lzop -d) {_UPLOAD}"),
    (0, b"LZIP\x01", "an lzip-compressed file", f"decompress it (lzip -d) {_UPLOAD}"),
    (0, b"LRZI\0", "an lrzip-compressed file", f"decompress it (lrunzip) {_UPLOAD}"),
    (0, b"RZIP\x02", "an rzip-compressed file", f"decompress it (runzip) {_UPLOAD}"),
    (0, b"\xff\x06\0\0sNaPpY", "a snappy-compressed file", f"decompress it {_UPLOAD}"),
    (0, b"7kSt\xa0\x31\x83\xd3", "a zpaq archive", f"unpack it (zpaq x) {_UPLOAD}"),
    (0, b"qpress10", "a qpress archive", f"unpack it (qpress -d) {_UPLOAD}"),
    (0, b"PK\x03\x04", "a zip archive", f"unpack it (unzip) {_UPLOAD}"),
    (0, b"PK\x05\x06", "a zip archive", f"unpack it (unzip) {_UPLOAD}"),
    (0, b"PK\x07\x08", "a zip archive", f"unpack it (unzip) {_UPLOAD}"),
    (0, b"PK00PK", "a zip archive", f"unpack it (unzip) {_UPLOAD}"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"unpack it (7z x) {_UPLOAD}"),
    (0, b"Rar!\x1a\x07", "a rar archive", f"unpack it (unrar x) {_UPLOAD}"),
    (0, b"RE~^\x07", "a rar archive", f"unpack it (unrar x) {_UPLOAD}"),
    (0, b"MSCF\0\0\0\0", "a cabinet archive", f"unpack it (cabextract) {_UPLOAD}"),
    (0, b"xar!", "a xar archive", f"unpack it {_UPLOAD}"),
    (0, b"MSWIM\0\0\0", "a Windows image archive (wim)", f"apply it to a disk {_UPLOAD}"),
    (0, b"WLPWM\0\0\0", "a Windows image archive (wim)", f"apply it to a disk {_UPLOAD}"),
    (0, b"ALZ\x01", "an ALZip archive", f"unpack it {_UPLOAD}"),
    (0, b"EGGA\0\x01", "an EGG archive", f"unpack it {_UPLOAD}"),
    (0, b"StuffIt (c)1997", "a StuffIt archive", f"unpack it {_UPLOAD}"),
    (10, b"rLau", "a StuffIt archive", f"unpack it {_UPLOAD}"),
    (20, b"\xdc\xa7\xc4\xfd", "a zoo archive", f"unpack it {_UPLOAD}"),
    (7, b"**ACE**", "an ACE archive", f"unpack it {_UPLOAD}"),
    (257, b"ustar", "a tar archive (as OVA files and container images are)", f"unpack it (tar x) {_UPLOAD}"),
    (0, b"070701", "a cpio archive", f"unpack it (cpio) {_UPLOAD}"),
    (0, b"070702", "a cpio archive", f"unpack it (cpio) {_UPLOAD}"),
    (0, b"070707", "a cpio archive", f"unpack it (cpio) {_UPLOAD}"),
    (0, b"!<arch>\n", "an ar archive", f"unpack it (ar x) {_UPLOAD}"),
    (0, b"!<thin>\n", "an ar archive without its members", _STANDS_FOR),
    (0, b"XBSTCK01", "an xbstream archive", f"unpack it (xbstream -x) {_UPLOAD}"),
    (0, b"VMA\0", "a guest's backup (vma)", f"unpack it (vma extract) {_UPLOAD}"),
    (0, b"\x3a\xff\x26\xed", "an Android sparse image", f"unpack it (simg2img) {_UPLOAD}"),
    (0, b"CrAU\0\0\0\0", "an Android update", f"unpack it {_UPLOAD}"),
    (4, b"SignedImage ", "a full flash update image (ffu)", f"apply it to a disk {_UPLOAD}"),
    (0, b"EVF\x09\x0d\x0a\xff\0", "an EnCase image (E01)", f"export it as raw (ewfexport) {_UPLOAD}"),
    (0, b"EVF2\x0d\x0a\x81\0", "an EnCase image (Ex01)", f"export it as raw (ewfexport) {_UPLOAD}"),
    (0, b"AFF10\r\n\0", "a forensic image (AFF)", f"convert it to raw {_UPLOAD}"),
    (0, b"MComprHD", "a compressed disk image (chd)", f"extract it (chdman) {_UPLOAD}"),
    (0, b"CISO", "a compressed ISO image", f"decompress it {_UPLOAD}"),
    (0, b"IsZ!", "a compressed ISO image (isz)", f"convert it to an ISO image {_UPLOAD}"),
    (0, b"DAA\0\0\0\0\0", "a PowerISO image (daa)", f"convert it to an ISO image {_UPLOAD}"),
    (
        0,
        b"\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0",
        "a compact disc in sectors of 2352 bytes (bin)",
        f"convert it to an ISO image {_UPLOAD}",
    ),
    (0, b"partclone-image", "a partition's backup (partclone)", _RESTORE),
    (0, b"\0ntfsclone-image", "a partition's backup (ntfsclone)", _RESTORE),
    (0, b"PaRtImAgE-VoLuMe", "a partition's backup (partimage)", _RESTORE),
    (0, b"FsArCh_0", "a filesystem's backup (fsarchiver)", _RESTORE),
    (0, b"xFSdump0", "a filesystem's backup (xfsdump)", _RESTORE),
    (24, b"\x6c\xea\0\0", "a filesystem's backup (dump)", _RESTORE),
    (0, b"\xce\x24\xb9\xa2\x20\0\0\0", "a disk's backup (Acronis)", _RESTORE),
    (0, b"\xfe\xef\x01", "a disk's backup (Ghost)", _RESTORE),
    (0, b"btrfs-stream\0", "a btrfs send stream", f"receive it on a disk {_UPLOAD}"),
    (0, b"Salted__", "a file that OpenSSL encrypted", _DECRYPT),
    (0, b"age-encryption.org/v1\n", "a file that age encrypted", _DECRYPT),
    (0, b"\xed\xab\xee\xdb", "an rpm package", _ADDRESS),
    (0, b"drpm", "an rpm package", _ADDRESS),
    (0, b"hsqs", "a squashfs archive", f"make a disk of its content (unsquashfs) {_UPLOAD}"),
    (0, b"sqsh", "a squashfs archive", f"make a disk of its content (unsquashfs) {_UPLOAD}"),
    (0, b"%PDF-", "a PDF document", _ADDRESS),
    (0, b"%!PS-Adobe", "a PostScript document", _ADDRESS),
    (0, b"{\\rtf1", "an RTF document", _ADDRESS),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an MSI package or an Office document", _ADDRESS),
    (0, b"\x7fELF", "an ELF program", _ADDRESS),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O program", _ADDRESS),
    (0, b"\xce\xfa\xed\xfe", "a Mach-O program", _ADDRESS),
    (0, b"\xca\xfe\xba\xbe", "a Java class or a Mach-O program", _ADDRESS),
    (0, b"\0asm\x01\0\0\0", "a WebAssembly program", _ADDRESS),
    (0, b"PAR1", "a Parquet file", _ADDRESS),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _ADDRESS),
    (0, b"fLaC\0", "a sound (FLAC)", _ADDRESS),
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
    (8, b"WEBPVP8", "a picture (WebP)", _ADDRESS),
    (4, b"ftyp", "a film or picture (MP4)", _ADDRESS),
    (0, b"\x1a\x45\xdf\xa3", "a film (Matroska)", _ADDRESS),
    (0, b"OggS\0\x02", "a sound (Ogg)", _ADDRESS),
    (0, b"II*\0", "a picture (TIFF)", _ADDRESS),
    (8, b"AVI LIST", "a film (AVI)", _ADDRESS),
    (8, b"WAVEfmt ", "a sound (WAV)", _ADDRESS),
    (0, b"SQLite format 3\0", "an SQLite database", _ADDRESS),
    (0, b"# v2 git bundle\n", "a git bundle", _ADDRESS),
    (0, b"# v3 git bundle\n", "a git bundle", _ADDRESS),
    (0, b"PACK\0\0\0\x02", "a git pack", _ADDRESS),
    (0, b"LibvirtQemudSave", "a guest's saved memory", _GUESTS_DISK),
    (0, b"LibvirtQemudPart", "a guest's saved memory", _GUESTS_DISK),
    (0, b"QEVM", "a guest's saved memory", _GUESTS_DISK),
    (0, b"\xd0\xbe\xd2\xbe", "a guest's saved memory (VMware)", _GUESTS_DISK),
    (0, b"\xd1\xba\xd1\xba", "a guest's saved memory (VMware)", _GUESTS_DISK),
    (0, b"\xd2\xbe\xd2\xbe", "a guest's saved memory (VMware)", _GUESTS_DISK),
    (0, b"\xd3\xbe\xd3\xbe", "a guest's saved memory (VMware)", _GUESTS_DISK),
    (0, b"\x7fVirtualBox SavedState", "a guest's saved memory (VirtualBox)", _GUESTS_DISK),
    (0, b"KDUMP   ", "a kernel's crash dump", _GUESTS_DISK),
    (0, b"PAGEDU64", "a kernel's crash dump", _GUESTS_DISK),
    (0, b"SPARSEIMAGE", "an Apple sparse image", _CONVERT),
    (0, b"encrcdsa", "an encrypted Apple disk image", _CONVERT),
)

#: What a few bytes alone do not tell. What follows these may be anything.
PATTERNS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
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
    (
        re.compile(rb"[\x22-\x27]\xb5\x2f\xfd", re.DOTALL),
        "a file compressed by a zstd before 0.8",
        f"decompress it {_UPLOAD}",
    ),
    (
        re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", re.DOTALL),
        "a bzip2-compressed file",
        f"decompress it (bunzip2) {_UPLOAD}",
    ),
    # The widest code has 9 to 16 bits, and the first code, of 9 bits, is that of a byte.
    (
        re.compile(
            rb"\x1f\x9d[\x89-\x90\x09-\x10].[" + re.escape(bytes(range(0, 256, 2))) + rb"]", re.DOTALL
        ),
        "a compress-ed file",
        f"decompress it (uncompress) {_UPLOAD}",
    ),
    (re.compile(rb"bvx[-12n].{4}", re.DOTALL), "an lzfse-compressed file", f"decompress it {_UPLOAD}"),
    (re.compile(rb"..-l[hz][0-9dsx]-", re.DOTALL), "an lha archive", f"unpack it (lha x) {_UPLOAD}"),
    (
        re.compile(rb"\x60\xea.[\0-\x0a][\x1e-\x30].{5}\x02", re.DOTALL),
        "an arj archive",
        f"unpack it (arj x) {_UPLOAD}",
    ),
    # Packets of RFC 9580: a session key for a public key, or for a passphrase; a signature.
    (
        re.compile(rb"(?:\x84.|\x85[\0-\x04].)\x03.{8}[\x01\x02\x10\x12]", re.DOTALL),
        "a file that OpenPGP encrypted",
        _DECRYPT,
    ),
    (
        re.compile(rb"\x8c\x0d\x04[\x02-\x0d]\x03[\x01-\x0e]", re.DOTALL),
        "a file that OpenPGP encrypted",
        _DECRYPT,
    ),
    (
        re.compile(
            rb"(?:\x88.|\x89[\0-\x08].|\xc2.{1,2})\x04[\0\x01][\x01\x03\x11\x13\x16\x1b][\x02\x08-\x0e]\0",
            re.DOTALL,
        ),
        "a signature (OpenPGP)",
        _VOUCHES_FOR,
    ),
    (
        re.compile(
            rb"d(?:8:announce|13:announce-list|7:comment|10:created by|13:creation date|8:encoding|8:url-list"
            rb"|4:infod\d+:)"
        ),
        "a torrent",
        _STANDS_FOR,
    ),
    (re.compile(rb"HTTP/\d(?:\.\d)? \d{3}[ \r\n]"), "the answer of a web server, with its headers", _ADDRESS),
    (
        re.compile(rb"(?:\r?\n)?--[^\s\0]{1,70}\r?\nContent-(?:Disposition|Type):", re.IGNORECASE),
        "what a form sends to a web server",
        f"take the file out of it {_UPLOAD}",
    ),
    # RFC 2046, section 5.1.1; RFC 9110, section 14.6.
    (
        re.compile(rb"(?:\r?\n)?--[^\r\n\0]{1,70}\r?\n(?:Content-[A-Z-]{2,30}|MIME-Version):", re.IGNORECASE),
        "the answer of a web server in several parts",
        _ADDRESS,
    ),
    (
        re.compile(rb"[0-9a-f]{1,8};chunk-signature=[0-9a-f]{64}\r\n", re.IGNORECASE),
        "an upload in chunks that its store did not join",
        "upload it anew, in one piece",
    ),
    (re.compile(rb"#![ \t]*/[!-~]+[^\0-\x08\x0e-\x1f]*\n"), "a script", _ADDRESS),
)

#: How texts begin that are no disk, whoever vouches for them. Only what is text throughout is compared.
TEXTS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"<(?:!doctype\s+html|html|head|body|title)\b", re.IGNORECASE),
        "a web page (HTML)",
        _ADDRESS,
    ),
    (
        re.compile(r"<(?:\?[a-z]|!--|!doctype\b|[a-z][a-z0-9:_-]*[\s/>])", re.IGNORECASE),
        "an XML document",
        _ADDRESS,
    ),
    (
        re.compile(r"(?:\)\]\}'[^\n]*\n)?(?:\{\s*(?:\"|\}|$)|\[\s*(?:[\"{\[\]0-9-]|$))"),
        "a JSON document",
        _ADDRESS,
    ),
    (
        re.compile(r"-----BEGIN PGP (?:SIGNATURE|SIGNED MESSAGE)-----"),
        "a signature (OpenPGP)",
        _VOUCHES_FOR,
    ),
    (re.compile(r"-----BEGIN PGP MESSAGE-----"), "a file that OpenPGP encrypted", _DECRYPT),
    (re.compile(r"-----BEGIN AGE ENCRYPTED FILE-----"), "a file that age encrypted", _DECRYPT),
    (re.compile(r"-----BEGIN [A-Z0-9 ]+-----|---- BEGIN SSH2"), "a PEM file", _ADDRESS),
    (re.compile(r"untrusted comment: "), "a signature (minisign or signify)", _VOUCHES_FOR),
    (re.compile(r"(?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[a-z0-9@.-]+ AAAA"), "an SSH key", _ADDRESS),
    (re.compile(r"\$ANSIBLE_VAULT;"), "a file that Ansible encrypted", _DECRYPT),
    # As sha256sum and its like write it, with comments before it; or as BSD's do, and OVF's manifests.
    (
        re.compile(
            r"(?:#[^\n]*\n\s*)*(?:\\?(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{56}|[0-9a-f]{64}|[0-9a-f]{96}"
            r"|[0-9a-f]{128})(?:[ \t]+\*?\S|[ \t]*\r?\n)"
            r"|(?:MD5|SHA|BLAKE)[0-9A-Za-z/-]* ?\([^)\n]+\) ?= ?[0-9a-f]{32})",
            re.IGNORECASE,
        ),
        "a file of checksums",
        _VOUCHES_FOR,
    ),
    (
        re.compile(r"version https://(?:git-lfs|hawser)\.github\.com/|(?:\.\./)*(?:\.git)?/annex/objects/\S"),
        "a Git LFS or git-annex pointer",
        _STANDS_FOR,
    ),
    (re.compile(r"zsync: \d"), "a zsync file", _STANDS_FOR),
    (
        re.compile(
            r"#cloud-(?:config|boothook)|#(?:include|include-once|part-handler|upstart-job)\r?\n"
            r"|## template: ?jinja"
        ),
        "a cloud-init file",
        _ADDRESS,
    ),
    (
        re.compile(
            r"(?:Content-Type|MIME-Version|Received|Return-Path): |From \S+ (?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b"
        ),
        "a MIME message, as cloud-init takes it",
        _ADDRESS,
    ),
    (re.compile(r"#![ \t]*/"), "a script", _ADDRESS),
    (
        re.compile(
            r"begin(?:-base64)? [0-7]{3,4} \S|data:[\w.+-]+/[\w.+-]+[;,]|(?:[A-Za-z0-9+/]{64,76}\r?\n){3}"
        ),
        "a file that was encoded as text",
        f"decode it {_UPLOAD}",
    ),
    (
        re.compile(r"\.encoding = \"|config\.version = \""),
        "a virtual machine's configuration (vmx)",
        _GUESTS_DISK,
    ),
    (
        re.compile(
            r"%YAML |---[ \t]*(?:#[^\n]*)?\r?\n|(?:heat_template_version|AWSTemplateFormatVersion"
            r"|apiVersion|version): ?['\"]?[\w.-]+['\"]?[ \t]*\r?\n"
        ),
        "a YAML document",
        _ADDRESS,
    ),
)

TEXT = ("a text", _ADDRESS)
TAR = ("a tar archive", f"unpack it (tar x) {_UPLOAD}")
CPIO = ("a cpio archive", f"unpack it (cpio) {_UPLOAD}")
ZLIB = ("a zlib-compressed file", f"decompress it {_UPLOAD}")
PROGRAM = ("a Windows program", _ADDRESS)
