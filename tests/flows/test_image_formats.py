# SPDX-License-Identifier: Apache-2.0
"""What common writers write becomes the disk that they meant, and what is no disk is refused by its name."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import lzma
import os
import random
import signal
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.store import evidence
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource
from tests.support import qcow2_images
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, content_of, disk_image, raw_image
from tests.support.odd_images import dynamic_vhd, edited, fixed_vhd, with_descriptor

_LARGEST = (65535, 16, 255)


class FormatCase(CacheCase):
    def disk_of(self, image: bytes, claimed: str | None, **config: Any) -> bytes:
        """Return what a guest sees of an image that is cached anew."""
        source = FakeSource({ID: image}, disk_format=claimed)
        manager = self.manager(source, **config)
        found = self.spawn(manager)
        manager.evict_image(ID)
        return found

    def each_way(
        self, image: bytes, *claims: str | None, backends: Sequence[str] = ("qcow2", "raw")
    ) -> Iterator[tuple[str, bytes]]:
        for force_raw in (True, False):
            for backend in backends:
                for claimed in claims:
                    way = f"force_raw={force_raw} backend={backend} claimed={claimed}"
                    yield way, self.disk_of(image, claimed, force_raw_images=force_raw, backend=backend)

    def refused(self, image: bytes, claimed: str | None, *words: str, **config: Any) -> ic.ImageRejected:
        source = FakeSource({ID: image}, disk_format=claimed)
        with self.assertRaises(ic.ImageRejected) as caught:
            self.manager(source, **config).cache_image(ID)
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertTrue(caught.exception.next_step)
        self.assertFalse(self.base().exists())
        return caught.exception

    def record_of(self, image_id: str = ID) -> evidence.Record:
        record = evidence.parse(self.record(image_id).read_bytes())
        assert record is not None
        return record


class TestVhd(FormatCase):
    data = random.Random(7).randbytes(2 * MIB)

    def test_the_current_size_is_the_disks_whatever_else_it_states(self) -> None:
        half = MIB
        for name, image, expected in (
            ("plain", dynamic_vhd(self.data), self.data),
            ("grown", dynamic_vhd(self.data, original=half), self.data),
            ("shrunk", dynamic_vhd(self.data, current=half), self.data[:half]),
            ("another creator", dynamic_vhd(self.data, creator=b"vbox"), self.data),
            ("largest geometry", dynamic_vhd(self.data, geometry=_LARGEST), self.data),
            ("no geometry", dynamic_vhd(self.data, creator=b"bxic", geometry=(0, 0, 0)), self.data),
        ):
            # Where it is put makes no difference to how it is read, and the claim was tried with the first.
            claims, backends = (
                (("vhd", None), ("qcow2", "raw")) if name == "plain" else (("vhd",), ("qcow2",))
            )
            for way, found in self.each_way(image, *claims, backends=backends):
                with self.subTest(name, way=way):
                    self.assertEqual(expected, found)

    def test_it_is_kept_only_if_all_read_one_size(self) -> None:
        agreeing = disk_image(self.directory, "vpc", data=raw_image(size=4080 * 512))
        for image, kept in ((agreeing, "vpc"), (dynamic_vhd(self.data), "raw")):
            source = FakeSource({ID: image}, disk_format="vhd")
            manager = self.manager(source, force_raw_images=False)
            manager.cache_image(ID)
            self.assertEqual(("vpc", kept), (self.record_of().source_format, self.record_of().stored_format))
            manager.evict_image(ID)

    def test_a_fixed_one_is_stored_without_its_footer(self) -> None:
        for claimed in ("vhd", "vpc", None):
            for force_raw in (True, False):
                with self.subTest(claimed=claimed, force_raw=force_raw):
                    found = self.disk_of(fixed_vhd(self.data), claimed, force_raw_images=force_raw)
                    self.assertEqual(self.data, found)

    def test_a_raw_disk_keeps_what_looks_like_a_footer(self) -> None:
        self.assertEqual(fixed_vhd(self.data), self.disk_of(fixed_vhd(self.data), "raw"))

    def test_no_footer_is_no_vhd(self) -> None:
        broken = bytearray(fixed_vhd(self.data))
        broken[-400] ^= 1
        self.refused(bytes(broken), "vhd", "raw", "vhd")
        self.assertEqual(bytes(broken), self.disk_of(bytes(broken), None))

    def test_header_and_footer_must_agree(self) -> None:
        image = dynamic_vhd(self.data)
        other = dynamic_vhd(self.data, current=MIB)[-512:]
        self.refused(image[:-512] + other, "vhd", "differ")

    def test_a_fixed_one_that_is_too_large_is_told_so(self) -> None:
        source = FakeSource({ID: fixed_vhd(self.data)}, disk_format="vhd")
        with self.assertRaises(ic.DiskTooSmallError):
            self.manager(source).create_disk(ID, self.target(), size=MIB)


class TestVmdk(FormatCase):
    def test_names_in_any_alphabet(self) -> None:
        image = disk_image(self.directory, "vmdk")
        for name in ("Büro-Server.vmdk".encode(), "Büro-Server.vmdk".encode("latin-1"), "仮想.vmdk".encode()):
            for way, found in self.each_way(with_descriptor(image, b"source.vmdk", name), "vmdk"):
                with self.subTest(name=name, way=way):
                    self.assertEqual(raw_image(), found)

    def test_the_allowed_types_are_the_operators(self) -> None:
        image = disk_image(self.directory, "vmdk")
        custom = with_descriptor(image, b'createType="monolithicSparse"', b'createType = "custom"')
        self.refused(custom, "vmdk", "'custom'", "vmdk_allowed_types")
        self.assertEqual(raw_image(), self.disk_of(custom, "vmdk", vmdk_allowed_types=("custom",)))
        self.refused(image, "vmdk", "'monolithicsparse'", vmdk_allowed_types=())

    def test_a_type_is_told_within_bounds(self) -> None:
        image = disk_image(self.directory, "vmdk")
        long = with_descriptor(image, b'"monolithicSparse"', b'"' + b"x" * 5000 + b'"')
        self.assertLess(len(str(self.refused(long, "vmdk", "'xxx"))), 500)


class TestOthers(FormatCase):
    def test_a_format_that_is_not_supported_is_named_whether_it_was_claimed_or_not(self) -> None:
        for name, image in (("luks", b"LUKS\xba\xbe\0\2" + bytes(MIB)), ("qed", b"QED\0" + bytes(MIB))):
            for claimed in (name, None):
                error = self.refused(image, claimed, f"its format {name} is not supported")
                self.assertIn("convert it to qcow2", str(error.next_step))

    def test_a_claim_that_is_no_format_is_told_with_those_that_are(self) -> None:
        for claimed in ("RAW", "ploop", ""):
            error = self.refused(raw_image(), claimed, f"claimed to be {claimed!r}, which is no format")
            self.assertIn("one of aki, ami, ari, iso, qcow2, raw, vdi", str(error.next_step))

    def test_subclusters(self) -> None:
        image = disk_image(self.directory, "qcow2", options="extended_l2=on")
        for way, found in self.each_way(image, "qcow2", None):
            with self.subTest(way):
                self.assertEqual(raw_image(), found)

    def test_a_vhdx_whose_metadata_lie_behind_a_large_log(self) -> None:
        image = disk_image(self.directory, "vhdx", options="log_size=16M")
        for way, found in self.each_way(image, "vhdx", None):
            with self.subTest(way):
                self.assertEqual(raw_image(), found)

    def test_a_bootable_iso_without_a_claim(self) -> None:
        image = bytearray(raw_image())
        image[32768:32774] = b"\x01CD001"
        image[446:462] = bytes.fromhex("80000100170000000000000040000000")
        image[510:512] = b"\x55\xaa"
        for claimed in ("iso", None):
            self.assertEqual(bytes(image), self.disk_of(bytes(image), claimed))
        error = self.refused(bytes(image), "raw", "iso")
        self.assertIn("disk_format iso", str(error.next_step))

    def test_no_boot_sector_of_a_raw_disk_is_wrong(self) -> None:
        for entry in (bytes(16), b"\x41" * 16, bytes.fromhex("ff000100ee0100000100000000000000")):
            image = bytearray(raw_image())
            image[446:510] = entry * 4
            image[510:512] = b"\x55\xaa"
            for claimed in ("raw", None):
                with self.subTest(entry=entry, claimed=claimed):
                    self.assertEqual(bytes(image), self.disk_of(bytes(image), claimed))

    def test_what_qemu_does_not_open_is_not_kept(self) -> None:
        vdi = disk_image(self.directory, "vdi")
        path = self.directory / "luks.qcow2"
        secret = ["--object", "secret,id=s,data=abc"]
        options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
        create = ["qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, str(path), "1M"]
        # It measures its own speed, and gives up now and then where the machine is busy.
        self.assertTrue(any(subprocess.run(create, check=False).returncode == 0 for _attempt in range(20)))
        qcow2 = disk_image(self.directory, "qcow2")
        for name, image, claimed in (
            ("encrypted", path.read_bytes(), "qcow2"),
            ("old encryption", edited(qcow2, (32, ">I", 1)), "qcow2"),
            ("clusters", edited(qcow2, (20, ">I", 31)), "qcow2"),
            ("L1 table", edited(qcow2, (36, ">I", 0x7FFFFFFF)), "qcow2"),
            ("refcount table", edited(qcow2, (48, ">Q", 2**62 + 1)), "qcow2"),
            ("data offset", edited(vdi, (344, "<I", 0x390)), "vdi"),
            ("truncated", disk_image(self.directory, "vhdx")[: 2 * MIB], "vhdx"),
        ):
            with self.subTest(name):
                error = self.refused(image, claimed, force_raw_images=False)
                self.assertNotIn(str(self.instances), str(error))
                self.assertLessEqual(str(error).count("qemu-img: "), 1)

    def test_a_base_converted_under_older_rules_is_fetched_anew(self) -> None:
        image = disk_image(self.directory, "vmdk")
        source = FakeSource({ID: image}, disk_format="vmdk")
        self.manager(source).cache_image(ID)
        record = self.record()
        record.write_bytes(
            record.read_bytes().replace(b'"inspected": %d' % evidence.INSPECTION_RULES, b'"inspected": 1')
        )
        self.manager(source, space_minimum_age_seconds=0).cache_image(ID)
        self.assertEqual(2, source.opens)


class TestNoDisks(FormatCase):
    def archives(self) -> Iterator[tuple[str, bytes]]:
        data = raw_image(size=MIB)
        yield "gzip", gzip.compress(data)
        yield "xz", lzma.compress(data)
        yield "bzip2", bz2.compress(data)
        yield "bzip2", bz2.compress(b"")
        yield "zstd", b"\x28\xb5\x2f\xfd" + data
        yield "lz4", b"\x04\x22\x4d\x18" + data
        yield "lz4", b"\x02\x21\x4c\x18" + data
        yield "zstd- or lz4", b"\x50\x2a\x4d\x18\x04\0\0\0none\x28\xb5\x2f\xfd" + data
        yield "lzma", lzma.compress(data, format=lzma.FORMAT_ALONE)
        yield "lha", b"\x21\0-lh5-" + bytes(4096)
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("disk.img", data)
        yield "zip", made.getvalue()
        for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w", format=format) as tar:
                member = tarfile.TarInfo("disk.ovf")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            yield "tar", made.getvalue()
        header = bytearray(made.getvalue())
        header[257:265] = bytes(8)  # as before POSIX
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
        yield "tar", bytes(header)
        yield "dmg", data + (b"koly\0\0\0\x04\0\0\x02\0").ljust(512, b"\0")
        yield "PNG", b"\x89PNG\r\n\x1a\n" + bytes(4096)
        yield "saved memory", b"LibvirtQemudSave" + bytes(4096)
        yield "squashfs", b"hsqs" + bytes(4096)
        yield "ACE", bytes(7) + b"**ACE**" + bytes(4096)
        yield "vma", b"VMA\0" + bytes(4096)
        yield "Android", b"\x3a\xff\x26\xed\1\0\0\0" + bytes(4096)
        yield "ffu", b"\x20\0\0\0SignedImage " + bytes(4096)
        yield "E01", b"EVF\x09\x0d\x0a\xff\0" + bytes(4096)
        yield "partclone", b"partclone-image\0" + bytes(4096)
        yield "ntfsclone", b"\0ntfsclone-image" + bytes(4096)
        yield "btrfs", b"btrfs-stream\0" + bytes(4096)
        yield "7z", b"7z\xbc\xaf\x27\x1c" + bytes(4096)
        yield "VMDK descriptor", b"# Disk DescriptorFile\nversion=1\n".ljust(4096, b"\0")

    def test_compressed_files_and_archives(self) -> None:
        for name, image in self.archives():
            # What its end shows is no VHD, and refused for that.
            for claimed in ("raw", None, "vhd") if name != "dmg" else ("raw", None):
                with self.subTest(name, claimed=claimed):
                    self.refused(image, claimed, name)

    def test_documents(self) -> None:
        for name, image in (
            ("HTML", b"<!DOCTYPE html>\n<html><body>404</body></html>"),
            ("HTML", b"\xef\xbb\xbf\r\n  <HTML>" + b" " * 4096),
            ("XML", b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'),
            ("XML", b"<Error><Code>NoSuchKey</Code></Error>"),
            ("JSON", b'{"error": {"code": 404}}'),
            ("JSON", b'[\n  {"error": "gone"}\n]'),
            ("Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        ):
            for claimed in ("raw", None):
                with self.subTest(name, claimed=claimed):
                    self.refused(image, claimed, name, "no disk")

    def test_a_text_is_what_a_server_says_unless_a_digest_vouches_for_it(self) -> None:
        texts = (
            b"404 page not found\n",
            "Das Abbild wurde gel\u00f6scht.\n".encode() * 99,
            "Das Abbild wurde gel\u00f6scht.\n".encode("latin-1"),
            "\ufeffThe image is gone.".encode("utf-16-le"),
            b"error: not found\nstatus: 404\n",
        )
        for text, claimed in itertools.product(texts, ("raw", None)):
            with self.subTest(text[:20], claimed=claimed):
                source = FakeSource({ID: text}, disk_format=claimed, digests=False)
                with self.assertRaises(ic.ImageRejected) as caught:
                    self.manager(source).cache_image(ID)
                self.assertIn("a text and no disk", caught.exception.cause)
                vouched = FakeSource({ID: text}, disk_format=claimed)
                manager = self.manager(vouched)
                manager.cache_image(ID)
                manager.evict_image(ID)

    def test_a_disk_without_a_digest_may_hold_anything_but_text(self) -> None:
        for data in (b"\xff" * MIB, b"x" * MIB, raw_image()):
            source = FakeSource({ID: data}, digests=False)
            manager = self.manager(source)
            manager.cache_image(ID)
            manager.evict_image(ID)

    def test_what_only_resembles_them_is_a_disk(self) -> None:
        for start in (b"<html>" + bytes(6), b'{"' + bytes(6), b"BZh9" + bytes(6), b"\x1f\x8b" + bytes(6)):
            image = start + raw_image()[len(start) :]
            self.assertEqual(image, self.disk_of(image, "raw"))

    def test_what_only_its_end_shows_is_not_adopted_either(self) -> None:
        image = raw_image() + (b"koly\0\0\0\x04\0\0\x02\0").ljust(512, b"\0")
        self.base().parent.mkdir(parents=True)
        self.base().write_bytes(image)
        with self.assertRaisesRegex(ic.ImageRejected, "dmg"):
            self.manager(FakeSource({ID: image})).create_disk(ID, self.target())

    def test_what_holds_no_byte_is_no_disk(self) -> None:
        path = self.directory / "packed"
        path.write_bytes(gzip.compress(b""))
        source = ic.FileSource({ID: ic.FileImage(path, "raw", compression="gzip")})
        with self.assertRaisesRegex(ic.ImageRejected, "no byte"):
            self.manager(source).cache_image(ID)

    def test_a_plain_file_may_be_anything(self) -> None:
        kernel = gzip.compress(b"kernel")
        source = FakeSource({ID: kernel}, disk_format="aki")
        path = self.directory / "kernel"
        self.manager(source).fetch_file(ID, str(path))
        self.assertEqual(kernel, path.read_bytes())


class _SetAfter:
    """A token that is set once it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def is_set(self) -> bool:
        self._looks -= 1
        return self._looks < 0


class TestFaults(FormatCase):
    """Whose fault it is when qemu-img fails."""

    def converting(self, script: str, *, subcommand: str = "convert") -> System:
        """Return a host on which a conversion, or what qemu-img does else, is replaced by a script."""

        def execute(*command: str, **options: Any) -> tuple[str, str]:
            words = list(command)
            if subcommand in words:
                at = words.index("sh") + 5  # behind the script, its name and the token
                words[at:] = ["sh", "-c", script]
            return System().execute(*words, **options)

        return self.host(execute=execute)

    def test_the_host_is_at_fault_for_what_it_lacks(self) -> None:
        source = FakeSource({ID: disk_image(self.directory, "vdi")}, disk_format="vdi")
        for script in (
            "kill -KILL $$",
            "kill -ABRT $$",
            "echo 'qemu-img: Cannot allocate memory' >&2; exit 1",
            "echo 'qemu-img: error while loading shared libraries: libx.so' >&2; exit 127",
        ):
            with self.subTest(script), self.assertRaises(ic.ImageCacheError) as caught:
                self.manager(source, host=self.converting(script)).cache_image(ID)
            self.assertIsInstance(caught.exception, ic.BackendError | ic.ConfigError)
            self.assertEqual([], self.in_flight())
        self.assertEqual(0, self.happened(events.Rejected))

    def test_an_image_that_is_changed_by_what_reads_it_is_not_published(self) -> None:
        """Where nothing shuts qemu-img in, what runs in its place may write to what it is to read."""
        source = FakeSource({ID: disk_image(self.directory, "vdi")}, disk_format="vdi")
        stage = self.instances / "_base/.imagecache/stage"
        for change in (
            "truncate -s -512 $file",
            "truncate -s +512 $file",
            "dd if=/dev/zero bs=1 count=1 conv=notrunc of=$file",
        ):
            script = (
                f"for file in {stage}/*; do case $file in *.json) ;; *) {change};; esac; done 2>/dev/null; "
                "echo '    (100.00/100%)'"
            )
            manager = self.manager(source, host=self.converting(script), force_raw_images=False)
            with self.subTest(change), self.assertRaisesRegex(ic.BackendError, "changed by what was to read"):
                manager.cache_image(ID)
            self.assertEqual([], self.in_flight())
            self.assertFalse(self.base().exists())

    def test_an_image_whose_time_alone_was_changed_is_published(self) -> None:
        source = FakeSource({ID: disk_image(self.directory, "vdi")}, disk_format="vdi")
        script = f"touch -d @5 {self.instances}/_base/.imagecache/stage/*; echo '    (100.00/100%)'"
        self.manager(source, host=self.converting(script), force_raw_images=False).cache_image(ID)
        self.assertTrue(self.base().exists())

    def test_a_caller_may_stop_waiting_while_one_chunk_is_decoded(self) -> None:
        image = qcow2_images.repeating()
        source = FakeSource({ID: image}, disk_format="qcow2", chunk_size=len(image))
        with self.assertRaises(ic.CancelledError):
            # Without a look during the chunk there are a dozen in all.
            self.manager(source).cache_image(ID, request=ic.Request(cancel=_SetAfter(100)))
        self.assertEqual([], self.in_flight())

    def test_a_conversion_that_does_not_tell_of_its_end_is_not_published(self) -> None:
        source = FakeSource({ID: disk_image(self.directory, "vdi")}, disk_format="vdi")
        for force_raw in (True, False):
            for script in ("exit 0", "echo '    (99.00/100%)'; exit 0"):
                manager = self.manager(source, host=self.converting(script), force_raw_images=force_raw)
                with self.subTest(script, force_raw=force_raw):
                    with self.assertRaisesRegex(ic.BackendError, "does not say that it converted all"):
                        manager.cache_image(ID)
                    self.assertFalse(self.base().exists())
                    self.assertEqual([], self.in_flight())
        self.assertEqual(0, self.happened(events.Rejected))

    def test_what_is_no_description_of_the_disk_is_not_the_images_fault(self) -> None:
        source = FakeSource({ID: disk_image(self.directory, "vdi")}, disk_format="vdi")
        for told in (
            "",
            "[]",
            "null",
            "5",
            "{}",
            '{"virtual-size": -1}',
            '{"virtual-size": "3145728"}',
            "{}{}",
        ):
            host = self.converting(f"echo '{told}'", subcommand="info")
            with self.subTest(told), self.assertRaises(ic.BackendError):
                self.manager(source, host=host).cache_image(ID)
        self.assertEqual(0, self.happened(events.Rejected))

    def test_what_it_says_of_the_data_is_told_once_and_without_paths(self) -> None:
        source = FakeSource({ID: disk_image(self.directory, "vdi")}, disk_format="vdi")
        said = "qemu-img: qemu-img: error while reading at byte 0: Invalid argument"
        script = f"echo '{said}' >&2; echo hint >&2; exit 1"
        with self.assertRaises(ic.ImageRejected) as caught:
            self.manager(source, host=self.converting(script)).cache_image(ID)
        self.assertIn("qemu-img: error while reading at byte 0: Invalid argument", str(caught.exception))
        self.assertEqual(1, str(caught.exception).count("qemu-img"))

    def test_tables_that_lead_nowhere_are_no_failure_of_the_storage(self) -> None:
        source = FakeSource({ID: disk_image(self.directory, "vdi")}, disk_format="vdi")
        for said, expected in (
            ("error while reading at byte 0: Input/output error", ic.ImageRejected),
            ("error while writing at byte 0: Input/output error", ic.BackendError),
        ):
            host = self.converting(f"echo 'qemu-img: {said}' >&2; exit 1")
            with self.subTest(said), self.assertRaises(expected):
                self.manager(source, host=host).cache_image(ID)

    def test_half_a_conversion_is_not_published_where_child_signals_are_ignored(self) -> None:
        image = disk_image(
            self.directory, "vmdk", options="subformat=streamOptimized", data=os.urandom(4 * MIB)
        )
        damaged = bytearray(image)
        damaged[len(image) // 2 : len(image) // 2 + 4096] = b"\xff" * 4096
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            self.refused(bytes(damaged), "vmdk")
            good = FakeSource({OTHER_ID: image}, disk_format="vmdk")
            self.manager(good).cache_image(OTHER_ID)
        finally:
            signal.signal(signal.SIGCHLD, before)


class TestDigests(FormatCase):
    def table(self, version: int, **known: Any) -> ic.FileSource:
        path = self.directory / f"image-{version}"
        path.write_bytes(raw_image(version))
        return ic.FileSource({ID: ic.FileImage(path, "raw", **known)})

    def digest_of(self, version: int, algorithm: str = "sha256") -> ic.Digest:
        return ic.Digest(algorithm, hashlib.new(algorithm, raw_image(version)).hexdigest())

    def test_what_the_table_demands_is_what_is_served(self) -> None:
        self.manager(self.table(1, digest=self.digest_of(1))).cache_image(ID)
        newer = self.manager(self.table(2, digest=self.digest_of(2)), space_minimum_age_seconds=0)
        self.assertFalse(newer.is_cached(ID))
        self.assertIs(ic.CacheResult.CACHED, newer.cache_image(ID))
        self.assertEqual(raw_image(2), self.spawn(newer))

    def test_a_base_in_use_is_passed_by_and_stays(self) -> None:
        older = self.manager(self.table(1, digest=self.digest_of(1)))
        disk = older.create_disk(ID, self.target())
        newer = self.manager(self.table(2, digest=self.digest_of(2)))
        self.assertEqual(raw_image(2), self.spawn(newer))
        self.assertEqual(raw_image(1), content_of(disk.target, disk.format))

    def test_a_disk_keeps_the_base_that_it_was_made_on(self) -> None:
        older = self.manager(self.table(1, digest=self.digest_of(1)))
        disk = older.create_disk(ID, self.target())
        newer = self.manager(self.table(2, digest=self.digest_of(2)))
        self.assertIsNotNone(newer.ensure_backing(disk.target, image_id=ID))
        newer.create_disk(ID, disk.target, if_exists="reuse")
        self.assertEqual(raw_image(1), content_of(disk.target, disk.format))

    def test_the_same_digest_is_a_hit(self) -> None:
        self.manager(self.table(1, digest=self.digest_of(1))).cache_image(ID)
        self.assertIs(
            ic.CacheResult.EXISTING, self.manager(self.table(1, digest=self.digest_of(1))).cache_image(ID)
        )

    def test_what_was_never_compared_is_compared_for_a_demand(self) -> None:
        for demanded, result in ((1, ic.CacheResult.EXISTING), (2, ic.CacheResult.CACHED)):
            with self.subTest(demanded=demanded):
                self.manager(self.table(1)).cache_image(ID)
                table = self.table(demanded, digest=self.digest_of(demanded))
                demanding = self.manager(table, space_minimum_age_seconds=0)
                self.assertFalse(demanding.is_cached(ID))
                self.assertIs(result, demanding.cache_image(ID))
                self.assertIs(ic.CacheResult.EXISTING, demanding.cache_image(ID))
                self.assertEqual(raw_image(demanded), self.spawn(demanding))
                demanding.evict_image(ID)

    def test_a_conversion_of_another_program_does_not_serve_a_demand(self) -> None:
        image = disk_image(self.directory, "qcow2", data=raw_image(2))
        path = self.directory / "image"
        path.write_bytes(image)
        self.base().parent.mkdir(parents=True, exist_ok=True)
        self.base().write_bytes(raw_image(1))  # of which version, nobody knows
        os.utime(self.base(), (0, 0))
        digest = ic.Digest("sha256", hashlib.sha256(image).hexdigest())
        demanding = self.manager(
            ic.FileSource({ID: ic.FileImage(path, "qcow2", digest=digest)}), space_minimum_age_seconds=0
        )
        self.assertEqual(raw_image(2), self.spawn(demanding))
        with demanding.lease_cached(ID) as base:
            self.assertEqual(digest, base.digest)

    def test_what_another_program_left_serves_a_demand_if_it_has_the_digest(self) -> None:
        self.base().parent.mkdir(parents=True, exist_ok=True)
        self.base().write_bytes(raw_image(1))
        self.assertIs(
            ic.CacheResult.EXISTING, self.manager(self.table(1, digest=self.digest_of(1))).cache_image(ID)
        )

    def test_a_digest_that_somebody_states_opens_no_other_image(self) -> None:
        path = self.directory / "other"
        path.write_bytes(raw_image(3))
        self.manager(self.table(1, digest=self.digest_of(1))).cache_image(ID)
        source = ic.FileSource({OTHER_ID: ic.FileImage(path, "raw", digest=self.digest_of(1))})
        with self.assertRaises(ic.ImageRejected):
            self.manager(source).create_disk(OTHER_ID, self.target())
        with contextlib.suppress(FileNotFoundError):
            self.fail(str(self.base(OTHER_ID).stat()))

    def test_a_copy_of_a_base_that_the_disk_changed_is_not_made(self) -> None:
        source = FakeSource({ID: raw_image(1), OTHER_ID: raw_image(1)})
        self.manager(source).cache_image(ID)
        with self.base().open("r+b") as base:
            base.seek(1000)
            base.write(b"rot")
        self.manager(source).cache_image(OTHER_ID)
        self.assertEqual(raw_image(1), self.base(OTHER_ID).read_bytes())
        self.assertEqual(2, source.opens)
