# SPDX-License-Identifier: Apache-2.0
"""What users upload by mistake is told by its name, and no disk is taken for it."""

from __future__ import annotations

import hashlib
import random
import subprocess
import unittest
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

from imagecache_lib.formats import foreign, foreign_marks
from imagecache_lib.store import evidence

NOISE = random.Random(3).randbytes(1024)
SUM = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
PAGE = "<!DOCTYPE html>\n<html><body>404</body></html>"

#: Words of what it is told to be, and how it begins.
BINARY = (
    ("lrzip", b"LRZI\0\6"),
    ("rzip", b"RZIP\2\1"),
    ("zpaq", b"7kSt\xa0\x31\x83\xd3\x8c\xb2"),
    ("qpress", b"qpress10"),
    ("snappy", b"\xff\x06\0\0sNaPpY"),
    ("lzfse", b"bvx2\0\0\1\0"),
    ("zstd", b"\x27\xb5\x2f\xfd"),
    ("compress-ed", b"\x1f\x9d\x90\x68\xca\xb0"),
    ("zlib", zlib.compress(NOISE)),
    ("zlib", zlib.compress(bytes(99999), 9)),
    ("zip", b"PK00PK\3\4"),
    ("rar", b"RE~^\x07\1"),
    ("wim", b"WLPWM\0\0\0"),
    ("ALZip", b"ALZ\1\n\0\0\0"),
    ("EGG", b"EGGA\0\1"),
    ("StuffIt", b"StuffIt (c)1997-2002 Aladdin"),
    ("StuffIt", b"SIT!\0\1\0\0\0\0rLau"),
    ("zoo", b"ZOO 2.10 Archive.\x1a\0\0\xdc\xa7\xc4\xfd"),
    ("arj", b"\x60\xea\x2b\0\x22\x0b\x01\x0b\x10\0\x02"),
    ("cpio", b"\xc7\x71" + bytes(18) + (9).to_bytes(2, "little") + bytes(4) + b"disk.img\0"),
    ("cpio", b"\x71\xc7" + bytes(18) + (9).to_bytes(2, "big") + bytes(4) + b"disk.img\0"),
    ("ar archive", b"!<thin>\n"),
    ("Mach-O", b"\xcf\xfa\xed\xfe\x07\0\0\1"),
    ("Mach-O", b"\xce\xfa\xed\xfe\x07\0\0\0"),
    ("Java class", b"\xca\xfe\xba\xbe\0\0\0\x34"),
    ("WebAssembly", b"\0asm\1\0\0\0"),
    ("Parquet", b"PAR1\x15\4"),
    ("HDF5", b"\x89HDF\r\n\x1a\n"),
    ("FLAC", b"fLaC\0\0\0\x22"),
    ("Ghost", b"\xfe\xef\x01\x01"),
    ("Acronis", b"\xce\x24\xb9\xa2\x20\0\0\0"),
    ("partimage", b"PaRtImAgE-VoLuMe"),
    ("xfsdump", b"xFSdump0"),
    ("(dump)", bytes(24) + b"\x6c\xea\0\0"),
    ("compact disc", b"\0" + b"\xff" * 10 + b"\0\0\2\0\1"),
    ("isz", b"IsZ!"),
    ("OpenSSL", b"Salted__"),
    ("age", b"age-encryption.org/v1\n-> X25519 abc\n"),
    ("OpenPGP encrypted", b"\x8c\x0d\x04\x09\x03\x08"),
    ("OpenPGP encrypted", b"\x85\x01\x8c\x03" + NOISE[:8] + b"\x01"),
    ("OpenPGP encrypted", b"\x84\x5e\x03" + NOISE[:8] + b"\x12"),
    ("signature", b"\x89\x01\x33\x04\0\1\x0a\0\x1d"),
    ("signature", b"\x88\x75\x04\0\x16\x0a\0\x1d"),
    ("torrent", b"d13:announce-listll"),
    ("torrent", b"d10:created by14:"),
    ("torrent", b"d4:infod5:files"),
    ("saved memory", b"\xd2\xbe\xd2\xbe"),
    ("saved memory", b"\x7fVirtualBox SavedState V2.0\n"),
    ("crash dump", b"KDUMP   "),
    ("MSI", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
    ("Windows program", b"MZ\x90\0" + bytes(56) + b"\x80\0\0\0" + bytes(64) + b"PE\0\0"),
    ("MP4", b"\0\0\0\x18ftypmp42"),
    ("WebP", b"RIFF\0\0\1\0WEBPVP8 "),
    ("answer of a web server", b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n"),
    ("a form sends", b'--xYz\r\nContent-Disposition: form-data; name="f"\r\n\r\n'),
    ("a form sends", b"\r\n--xYz\nContent-type: application/octet-stream\n\n"),
    ("in several parts", b"--a b\r\nContent-Range: bytes 0-99/100\r\n\r\n"),
    ("in several parts", b"\r\n--xYz\r\nContent-Length: 100\r\n\r\n"),
    ("in several parts", b"--xYz\r\nMIME-version: 1.0\r\n\r\n"),
    ("in chunks", b"10000;chunk-signature=" + b"a" * 64 + b"\r\n"),
    ("script", b"#!/bin/sh\n# unpacks itself\n"),
)

TEXTS = (
    ("checksums", f"{SUM}  noble.img\n"),
    ("checksums", f"{SUM[:32]} *disk.qcow2\r\n"),
    ("checksums", f"{SUM}\n"),
    ("checksums", f"SHA256 (disk.qcow2) = {SUM}\n"),
    ("checksums", f"SHA256(disk.vmdk)= {SUM}\n"),
    ("checksums", f"# disk.qcow2: 5 bytes\nSHA256 (disk.qcow2) = {SUM}\n"),
    ("signature", "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n"),
    ("signature", "untrusted comment: signature from somebody\nRWQ=\n"),
    ("OpenPGP encrypted", "-----BEGIN PGP MESSAGE-----\n\nabc\n"),
    ("PEM", "-----BEGIN CERTIFICATE-----\nabc\n"),
    ("SSH key", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 me\n"),
    ("pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
    ("pointer", "/annex/objects/SHA256E-s10--abc.img\n"),
    ("cloud-init", "#cloud-config\npackages: []\n"),
    ("cloud-init", "## template: jinja\n#cloud-config\n"),
    ("cloud-init", "#include\nhttps://somewhere\n"),
    ("MIME", 'Content-Type: multipart/mixed; boundary="=="\nMIME-Version: 1.0\n\n'),
    ("YAML", "---\nkind: x\n"),
    ("YAML", "heat_template_version: 2015-04-30\n"),
    ("vmx", '.encoding = "UTF-8"\nconfig.version = "8"\n'),
    ("zsync", "zsync: 0.6.2\n"),
    ("encoded as text", "begin 644 disk.img\nM4$L#!\n"),
    ("encoded as text", ("UUZJ+wAA" * 9 + "\n") * 4),
    ("HTML", PAGE),
    ("HTML", "\f\v\x1b[0m " + PAGE),
    ("HTML", "\u200b\u00a0" + PAGE),
    ("XML", "<!DOCTYPE plist>\n<plist/>"),
    ("XML", "<?php echo 1; ?>"),
    ("XML", "<!-- a comment -->\n<VirtualBox/>"),
    ("JSON", ')]}\'\n{"error": 1}'),
)


def told(start: bytes) -> str:
    found = foreign.recognise(start[: foreign.LOOKED_AT])
    return "a disk" if found is None else found.what


class TestMistakes(unittest.TestCase):
    def test_what_is_told_by_its_first_bytes(self) -> None:
        for words, start in BINARY:
            with self.subTest(words, start=start[:20]):
                self.assertIn(words, told(start + NOISE))
                self.assertIn(words, told(start + bytes(1024)))

    def test_what_is_told_by_its_text_in_any_encoding(self) -> None:
        for words, text in TEXTS:
            for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
                with self.subTest(text[:20], encoding=encoding):
                    self.assertIn(words, told(text.encode(encoding)))

    def test_a_word_or_a_blank_that_is_all_of_it_is_no_disk_unless_a_digest_vouches_for_it(self) -> None:
        for text in (b"Forbidden", b"null", b"404\n", b"\r\n\r\n", b" "):
            with self.subTest(text):
                found = foreign.recognise(text, vouched=False)
                self.assertIsNotNone(found)
                self.assertIsNone(foreign.recognise(text))
                self.assertIsNone(foreign.recognise(text + b"\0", vouched=False))
        self.assertIsNone(foreign.recognise(b"", vouched=False))
        self.assertIsNone(foreign.recognise(b"x" * 512, vouched=False))

    def test_a_document_without_a_mark_of_its_encoding(self) -> None:
        for encoding in ("utf-16-le", "utf-16-be"):
            self.assertIn("HTML", told((PAGE * 3).encode(encoding)))
        self.assertIn("HTML", told("<html>gel\u00f6scht</html>".encode("latin-1")))

    def test_a_document_that_fills_its_last_block_with_zeros(self) -> None:
        for text in (PAGE, '{"error": 404}', "#cloud-config\n"):
            self.assertNotEqual("a disk", told(text.encode().ljust(4096, b"\0")))

    def test_what_the_programs_at_hand_write(self) -> None:
        with TemporaryDirectory() as directory:
            path = Path(directory) / "disk.img"
            path.write_bytes(NOISE * 99)
            for words, command in (
                ("checksums", ("sha512sum", path)),
                ("checksums", ("sha256sum", "--tag", path)),
                ("checksums", ("md5sum", "-b", path)),
                ("encoded as text", ("base64", path)),
            ):
                made = subprocess.run(command, capture_output=True, check=True).stdout
                self.assertIn(words, told(made), command)

    def test_an_apple_image_is_told_by_its_end_alone(self) -> None:
        foreign.refuse_end(NOISE[:512])
        foreign.refuse_end(b"koly".ljust(512, b"\0"))


class TestDisks(unittest.TestCase):
    def test_what_only_resembles_something_else(self) -> None:
        sector = b"\xeb\x63\x90".ljust(510, b"\0") + b"\x55\xaa"
        for start in (
            b"",
            bytes(512),
            b"\xff" * 1024,
            b"x" * 1024,
            b"{" + bytes(1023),
            b"<" + bytes(1023),
            b"<html>" + bytes(1000),
            b"hello world" + bytes(1000),
            b"#!\x90\x12" + NOISE,
            b"#!/" + NOISE,
            b"\x1f\x9d" + bytes(10) + NOISE,
            b"\xc7\x71" + NOISE,
            b"\x78\x9c" + NOISE,
            b"PE\0\0" + NOISE,
            b"-----BEGIN " + NOISE,
            b"#cloud-config\n" + NOISE,
            sector + NOISE,
            # A program for EFI that begins with a boot sector, as a kernel does.
            (b"MZ\xea\x07" + bytes(56) + b"\x82\0\0\0").ljust(0x82, b"\0") + b"PE\0\0" + sector[0x86:],
            b"\xeb\x52\x90NTFS    ".ljust(512, b"\0"),
            b"\xeb\x58\x90-FVE-FS-".ljust(512, b"\0"),
            b"-rom1fs-".ljust(512, b"\0"),
            b"\x45\x3d\xcd\x28".ljust(512, b"\0"),
            b"XFSB".ljust(512, b"\0"),
            b"\0\0\0\0ReFS".ljust(512, b"\0"),
            "hello <html>".encode("utf-16-le") + NOISE,
        ):
            with self.subTest(start[:16]):
                self.assertEqual("a disk", told(start))


#: What each number of the rules stands for: a digest of all marks.
MARKS = {3: "6cd4c0daec4d942e6ecb0912a9c1467e7b3c370a26c05626b3a4df1de5040714"}


class TestRulesNumber(unittest.TestCase):
    """A base that was inspected under fewer marks is only looked at again if the rules' number was raised."""

    def test_other_marks_have_another_number(self) -> None:
        patterns = [(mark.pattern, mark.flags) for mark, *_ in foreign_marks.PATTERNS]
        texts = [(mark.pattern, mark.flags) for mark, *_ in foreign_marks.TEXTS]
        marks = repr(([row[:2] for row in foreign_marks.MAGIC], patterns, texts))
        found = hashlib.sha256(marks.encode()).hexdigest()
        self.assertEqual(
            MARKS.get(evidence.INSPECTION_RULES),
            found,
            "the marks are not those of this number: raise INSPECTION_RULES, and write its digest down here",
        )
