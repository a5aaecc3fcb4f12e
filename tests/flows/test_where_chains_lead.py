# SPDX-License-Identifier: Apache-2.0
"""Disks whose backing files lie outside of the disk roots: each leads to its base however it is named."""

from __future__ import annotations

import json
import os
import pathlib
import random
import struct
import subprocess
import tracemalloc
import uuid
from collections.abc import Callable

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.upkeep import headers
from imagecache_lib.upkeep.follow import Follower, Looked
from imagecache_lib.upkeep.names import Names
from tests.flows.test_upkeep import UpkeepCase
from tests.support import files
from tests.support.cache_case import ID, OTHER_ID

#: GUIDs of [MS-VHDX]: the region of the metadata, and items of it.
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d83404dbd7").bytes_le


class ChainsCase(UpkeepCase):
    def setUp(self) -> None:
        super().setUp()
        self.only = self.cached()
        self.outside = self.directory / "outside"
        self.disk = self.instances / "uuid" / "disk"

    def between(self, name: str = "between") -> pathlib.Path:
        """Make an overlay on the base outside of the disk roots."""
        files.overlay(self.outside / name, self.only)
        return self.outside / name

    def assertCounts(self) -> None:
        self.unused()
        self.assertKept(self.only, self.verify(), "used by")


class TestNames(ChainsCase):
    def test_dots_behind_a_link_mean_the_directory_above_what_it_leads_to(self) -> None:
        self.between()
        (self.outside / "uuid").mkdir()
        (self.instances / "uuid").symlink_to(self.outside / "uuid")
        files.overlay(self.outside / "uuid" / "disk", "../between", backing_format="qcow2")
        self.assertCounts()

    def test_a_relative_name_counts_from_where_a_linked_disk_lies_too(self) -> None:
        self.between()
        files.overlay(self.outside / "disk", "between", backing_format="qcow2")
        self.disk.parent.mkdir()
        self.disk.symlink_to(self.outside / "disk")
        self.assertCounts()

    def test_a_name_ends_with_its_first_zero(self) -> None:
        files.overlay(self.disk, f"{self.between()}xx", backing_format="qcow2")
        head = bytearray(self.disk.read_bytes())
        offset, size = struct.unpack_from(">QI", head, 8)
        head[offset + size - 2 : offset + size] = bytes(2)
        self.disk.write_bytes(head)
        self.assertCounts()

    def test_a_file_elsewhere_that_has_another_base_s_very_name_is_followed(self) -> None:
        other = self.cached(OTHER_ID)
        files.overlay(self.disk, self.between(other.name), backing_format="qcow2")
        self.assertCounts()
        self.assertEqual(0, self.happened(events.MovedToTrash), "a guest could not start meanwhile")

    def test_a_base_that_is_gone_stops_nothing_however_its_path_is_spelled(self) -> None:
        files.overlay(self.disk, f"../_base/{'cd' * 20}")
        (self.disk.parent / "disk.info").write_text(f'{{"{self.disk}": "qcow2"}}')
        self.verify()
        self.assertFalse(self.only.exists())


class TestPins(ChainsCase):
    def test_a_disk_below_another_one_is_followed_though_it_is_pinned_raw(self) -> None:
        below = self.instances / "other" / "disk"
        files.overlay(below, self.between(), backing_format="qcow2")
        (below.parent / "disk.info").write_text(json.dumps({str(below): "raw"}))
        files.overlay(self.disk, below, backing_format="qcow2")
        self.assertCounts()


class SpellingsCase(ChainsCase):
    """One pass each, over a disk for each way to name the file between it and its base."""

    def named(self, *spellings: Callable[[pathlib.Path], str]) -> None:
        for number, spelled in enumerate(spellings, 1):
            base = self.foreign(f"{number:040x}")
            self.outside.mkdir(exist_ok=True)
            between = self.outside / f"between-{number}"
            self.lies_at(between, base)
            disk = self.instances / f"uuid-{number}" / "disk"
            files.overlay(disk, spelled(between), backing_format="qcow2")
        evicted = [each.name for each in self.verify().evicted]
        self.assertEqual([self.only.name], evicted, "the base that no disk needs is the only one to go")

    def lies_at(self, between: pathlib.Path, base: pathlib.Path) -> None:
        files.overlay(between, base)


class TestSpellings(SpellingsCase):
    def test_a_prefix_stands_before_a_file_s_name(self) -> None:
        self.named(
            lambda path: f"host_device:{path}",
            lambda path: f"blkdebug::{path}",
            lambda path: f"blkdebug:/nonexistent/rules:blkdebug::file:{path}",
            lambda path: f"blkverify:/nonexistent/raw:{path}",
            lambda path: f"blkverify:{path}:/nonexistent/other",
        )

    def test_a_relative_name_behind_a_prefix_begins_at_the_root(self) -> None:
        self.named(
            lambda path: f"file:{str(path)[1:]}",
            lambda path: "json:" + json.dumps({"file": {"driver": "file", "filename": str(path)[1:]}}),
        )

    def test_escapes_in_single_quotes(self) -> None:
        self.named(
            lambda path: "json:{'file':{'filename':'" + str(path).replace("/", "\\u002f") + "'}}",
            lambda path: "json:{'file':{'filename':'" + str(path).replace("n", "\\u006E") + "'}}",
            lambda path: "json:{'node-name':'it\\'s \"x\"','file.filename':\"" + str(path) + '"}',
        )

    def test_a_key_that_is_there_twice(self) -> None:
        self.named(lambda path: f'json:{{"file.filename":"{path}","file.filename":"/nonexistent"}}')


class TestDisksWithinFiles(SpellingsCase):
    """The file between a disk and its base lies somewhere in another file."""

    OFFSET = 2**20

    def lies_at(self, between: pathlib.Path, base: pathlib.Path) -> None:
        files.overlay(between, base)
        between.write_bytes(bytes(self.OFFSET) + between.read_bytes())

    def test_it_is_found_by_its_offset(self) -> None:
        def spelled(offset: object) -> Callable[[pathlib.Path], str]:
            inner = {"driver": "raw", "offset": offset}
            return lambda path: "json:" + json.dumps({"file": {**inner, "file": {"filename": str(path)}}})

        self.named(
            spelled(self.OFFSET),
            spelled("1M"),
            spelled("0x100000"),
            lambda path: f'json:{{"file.offset":"1024k","file.file.filename":"{path}"}}',
        )

    def test_an_offset_may_be_any_number(self) -> None:
        offsets: tuple[object, ...] = (2**63 - 1, 2**63, 2**64, -1, 1.5, "x", None, [], True, "9" * 400)
        for offset in offsets:
            with self.subTest(offset):
                text = b"json:" + json.dumps({"offset": offset, "filename": "/x"}).encode()
                answer = Follower().look(str(self.only), headers.starts(text))
                self.assertIsInstance(answer, Looked)
        self.assertEqual((0, 2**53 + 1), headers.starts(f'json:{{"offset":{2**53 + 1}}}'.encode()))
        self.assertEqual((0, 3 * 2**19), headers.starts(b'json:{"offset":"1.5M"}'))


class TestOtherFormats(ChainsCase):
    def test_a_chain_that_begins_with_the_first_version_of_qcow_is_followed(self) -> None:
        files.overlay(self.disk, self.between(), format="qcow", backing_format="qcow2")
        self.assertCounts()

    def test_the_extents_of_a_vmdk_are_followed(self) -> None:
        self.disk.parent.mkdir()
        self.outside.mkdir()
        (self.outside / "link").symlink_to(self.only)
        extents = '\nRW 63 ZERO\nRW  4096 FLAT "../../outside/link" 0\n'
        for begin in ("# Disk DescriptorFile\nversion=1\n", "#\nversion=1\n", " \nversion=1\n"):
            with self.subTest(begin):
                self.disk.write_text(f'{begin}CID=1\nparentCID=ffffffff\ncreateType="custom"\n{extents}')
                self.assertCounts()

    def test_a_descriptor_far_within_a_vmdk_is_found(self) -> None:
        self.disk.parent.mkdir()
        at = 3 * 2**20
        header = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 2048, 128, at // 512, 1)
        self.disk.write_bytes(header.ljust(at, b"\0") + f'parentFileNameHint="{self.between()}"'.encode())
        self.assertCounts()

    def vhd(self, code: bytes, location: bytes) -> None:
        at, far = 512, 2**20
        footer = struct.pack(">8sIIQ", b"conectix", 2, 0x10000, at).ljust(at, b"\0")
        locators = bytes(24) + struct.pack(">4sIIIQ", code, 512, len(location), 0, far)
        self.disk.write_bytes(
            (footer + b"cxsparse".ljust(576, b"\0") + locators).ljust(far, b"\0") + location
        )

    def test_the_parent_of_a_vhd_is_found_by_each_kind_of_locator(self) -> None:
        self.disk.parent.mkdir()
        between = str(self.between())
        relative = r".\..\..\outside\between"
        for code, location in (
            (b"W2ku", ("C:" + between.replace("/", "\\")).encode("utf-16-le")),
            (b"W2ru", relative.encode("utf-16-le")),
            (b"Wi2r", relative.encode()),
            (b"MacX", b"file://" + between.replace("b", "%62").encode()),
            (b"MacX", b"file://./../../outside/between"),
        ):
            with self.subTest(code):
                self.vhd(code, location)
                self.assertCounts()

    def vhdx(self, *stated: tuple[str, str]) -> None:
        """Make a disk of which nothing but its parent's locator is there, behind a large log."""
        far, size = 16 * 2**20, 65536
        texts = [text.encode("utf-16-le") for each in stated for text in each]
        ends = [20 + 12 * len(stated) + sum(map(len, texts[: at + 1])) for at in range(len(texts))]
        locator = struct.pack("<18xH", len(stated))
        for key, value in zip(range(0, len(texts), 2), range(1, len(texts), 2), strict=True):
            lengths = len(texts[key]), len(texts[value])
            locator += struct.pack("<IIHH", ends[key] - lengths[0], ends[value] - lengths[1], *lengths)
        items = (_PARAMETERS, 0), (_SIZE, 0), (_LOCATOR, size)
        metadata = struct.pack("<8sHH20x", b"metadata", 0, len(items))
        metadata += b"".join(struct.pack("<16sI12x", item, at) for item, at in items)
        regions = struct.pack("<4sIII", b"regi", 0, 1, 0) + struct.pack("<16sQII", _METADATA, far, 0, 1)
        with open(self.disk, "wb") as file:
            for at, data in (
                (0, b"vhdxfile"),
                (192 * 1024, regions.ljust(size, b"\0")),
                (far, metadata.ljust(size, b"\0") + locator + b"".join(texts)),
            ):
                file.seek(at)
                file.write(data)

    def test_the_parent_of_a_vhdx_is_found_wherever_its_metadata_lie(self) -> None:
        self.disk.parent.mkdir()
        self.between()
        self.vhdx(("parent_linkage", "{no path}"), ("relative_path", r".\..\..\outside\between"))
        self.assertCounts()

    def test_a_path_that_is_relative_to_a_vhdx_counts_before_one_that_is_not(self) -> None:
        self.disk.parent.mkdir()
        absolute, relative = ("absolute_win32_path", r"C:\there\between"), ("relative_path", r"..\between")
        for stated, named in (((absolute,), b"/there/between"), ((absolute, relative), b"../between")):
            with self.subTest(named):
                self.vhdx(*stated)
                looked = Follower().look(str(self.disk))
                assert isinstance(looked, Looked)
                self.assertEqual(named, looked.references[-1])

    def test_offsets_in_a_header_may_be_any_number(self) -> None:
        most = b"\xff" * 200
        for begin in (b"QFI\xfb\0\0\0\1", b"QED\0", b"KDMV", b"conectix", b"vhdxfile"):
            with self.subTest(begin):
                self.disk.parent.mkdir(exist_ok=True)
                self.disk.write_bytes(begin + most)
                self.assertIsInstance(Follower().look(str(self.disk)), Looked)

    def qed(self, backing: pathlib.Path, *options: str) -> None:
        self.disk.parent.mkdir()
        command = ["qemu-img", "create", "-q", "-u", "-f", "qed", *options, "-F", "raw", "-b", str(backing)]
        subprocess.run([*command, str(self.disk), "1M"], check=True)

    def test_a_chain_that_begins_with_qed_is_followed(self) -> None:
        self.qed(self.between())
        self.assertCounts()

    def test_a_name_far_behind_the_header_of_qed_counts(self) -> None:
        self.qed(self.only, "-o", "cluster_size=1M")
        data = bytearray(self.disk.read_bytes())
        offset, size = struct.unpack_from("<II", data, 56)
        late = 500_000
        data[late : late + size], data[offset : offset + size] = data[offset : offset + size], bytes(size)
        struct.pack_into("<I", data, 56, late)
        self.disk.write_bytes(data)
        self.assertCounts()

    def test_a_chain_that_begins_with_vmdk_is_followed(self) -> None:
        self.disk.parent.mkdir()
        parent = f'parentFileNameHint="{self.between()}"\n'
        for begin in ("# Disk DescriptorFile\nversion=1\n", "version=1\n"):
            with self.subTest(begin):
                self.disk.write_text(f'{begin}CID=1\nparentCID=2\ncreateType="monolithicSparse"\n{parent}')
                self.assertCounts()


class TestUnreadableChains(ChainsCase):
    """What a disk referred to when its chain could be read stays while that cannot be."""

    def unmount(self) -> None:
        self.verify()
        self.outside.rename(self.directory / "unmounted")

    def test_behind_a_file_that_has_another_base_s_very_name(self) -> None:
        other = self.cached(OTHER_ID)
        files.overlay(self.disk, self.between(other.name), backing_format="qcow2")
        self.unmount()
        for _pass in range(2):
            self.assertCounts()

    def test_behind_a_file_that_is_named_as_a_base_may_be(self) -> None:
        files.overlay(self.disk, self.between("ab" * 20), backing_format="qcow2")
        self.unmount()
        self.assertCounts()

    def test_while_the_instance_is_renamed(self) -> None:
        files.overlay(self.disk, self.between(), backing_format="qcow2")
        self.unmount()
        for name in ("uuid_resize", "other", "uuid"):
            with self.subTest(name):
                (directory,) = (each for each in self.instances.iterdir() if (each / "disk").exists())
                directory.rename(self.instances / name)
                self.assertCounts()


class TestSecondReading(ChainsCase):
    """A link to a base leads nowhere while an eviction looks, having renamed the base, who needs it."""

    def assertPutBack(self, appear: Callable[[], object]) -> None:
        self.points.at(TracePoint.VERIFY_READ, appear)
        self.assertKept(self.only, self.verify(), "put back: used by")

    def test_a_link_to_the_base_that_was_made_after_the_first_reading_counts(self) -> None:
        self.disk.parent.mkdir()
        self.assertPutBack(lambda: self.disk.symlink_to(self.only))

    def test_so_does_one_that_leads_there_by_another_link(self) -> None:
        (self.directory / "cache").symlink_to(self.cache_dir)
        self.disk.parent.mkdir()
        self.assertPutBack(lambda: self.disk.symlink_to(self.directory / "cache" / self.only.name))

    def test_so_does_a_disk_whose_backing_file_is_a_link_to_the_base(self) -> None:
        link, made = self.directory / "link", self.directory / "made"
        link.symlink_to(self.only)
        files.overlay(made, link)
        self.disk.parent.mkdir()
        self.assertPutBack(lambda: made.rename(self.disk))

    def test_so_does_what_a_driver_reports_to_another_process_meanwhile(self) -> None:
        instance = ic.Instance("uuid", "there", images=(ID,))
        others = self.manager(host=self.host(trace=lambda _point: None))
        for evict in (
            lambda manager: manager.verify_base_images([]),
            lambda manager: manager.prune([]),
            lambda manager: self.assertRaises(errors.BaseInUseError, manager.evict_image, ID),
        ):
            with self.subTest(evict):
                self.unused(seconds=0)
                self.verify()  # the instance is gone
                self.unused()
                self.points.at(TracePoint.EVICT_RENAME, lambda: others.verify_base_images([instance]))
                evict(self.manager(space_minimum_age_seconds=0))
                self.assertTrue(self.only.exists())


class TestLongRuns(UpkeepCase):
    """A guest may write megabytes of hex digits behind a broken header."""

    def test_a_name_is_found_wherever_it_begins(self) -> None:
        chance = random.Random(5)
        known = [chance.randbytes(20).hex() for _number in range(100)]
        names = Names([*known, f"{known[0]}_20"])
        for length in (0, 1, 100, 119, 120, 121, 139, 140, 141, 200):
            noise = chance.randbytes(length).hex()[:length]
            for at in range(length + 1):
                text = f"{noise[:at]}{known[7]}{noise[at:]}".encode()
                self.assertEqual({known[7]}, names.find([text]), (length, at))
        self.assertEqual({known[0], f"{known[0]}_20"}, names.find([b"0" * 500 + f"{known[0]}_20".encode()]))

    def test_they_take_no_memory(self) -> None:
        text = os.urandom(2**20).hex().encode()
        tracemalloc.start()
        try:
            self.assertEqual(set(), Names(["ab" * 20]).find([text]))
            self.assertLess(tracemalloc.get_traced_memory()[1], 64 * 2**20)
        finally:
            tracemalloc.stop()
