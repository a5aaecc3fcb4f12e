# SPDX-License-Identifier: Apache-2.0
"""An image to which another file belongs, or may belong, never gets in, whatever the cache is set to."""

from __future__ import annotations

import struct
import subprocess
import uuid

import imagecache_lib as ic
from imagecache_lib.formats import contained
from imagecache_lib.formats.reader import Prefix
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, OTHER_ID, CacheCase, disk_image
from tests.support.odd_images import dynamic_vhd, edited, with_descriptor

_HAS_PARENT = 2
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le


class TestSelfContained(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.manager().cache_image(OTHER_ID)  # what is there afterwards is made

    def refused(self, image: bytes, claimed: str, *, inspected: tuple[bool, ...] = (True, False)) -> None:
        target = self.target()
        for inspect in inspected:
            for force_raw in (True, False):
                for claim in (claimed, None):
                    source = FakeSource({ID: image}, disk_format=claim)
                    manager = self.manager(
                        source, force_raw_images=force_raw, disable_deep_image_inspection=not inspect
                    )
                    told = f"force_raw={force_raw} claim={claim} inspected={inspect}"
                    with self.leaves_nothing(), self.assertRaises(ic.ImageRejected, msg=told) as caught:
                        manager.create_disk(ID, target)
                    self.assertTrue(caught.exception.next_step)
                    self.assertIn(ID, str(caught.exception))

    def test_a_vmdk_that_states_a_parent(self) -> None:
        image = disk_image(self.directory, "vmdk")
        for line in (
            b'parentFileNameHint="other.vmdk"\n',
            b'PARENTFILENAMEHINT = "other.vmdk"\n',
            b"# parentFileNameHint\n",
        ):
            with self.subTest(line=line):
                self.refused(with_descriptor(image, b"# The Disk Data Base", line + b"# The"), "vmdk")

    def test_a_vmdk_whose_content_id_is_another_disks(self) -> None:
        image = disk_image(self.directory, "vmdk")
        self.refused(with_descriptor(image, b"parentCID=ffffffff", b"parentCID=12345678"), "vmdk")

    def test_a_vmdk_that_states_a_parent_behind_the_length_of_its_descriptor(self) -> None:
        image = bytearray(disk_image(self.directory, "vmdk"))
        text = bytes(image[512 : 512 + 10240]).rstrip(b"\0")
        image[512 : 512 + 10240] = (text.ljust(1024, b"\0") + b'\nparentFileNameHint="o"\n').ljust(
            10240, b"\0"
        )
        struct.pack_into("<Q", image, 36, 2)  # sectors of the descriptor
        self.refused(bytes(image), "vmdk")

    def test_a_vmdk_whose_footer_says_other_things(self) -> None:
        image = bytearray(disk_image(self.directory, "vmdk", options="subformat=streamOptimized"))
        header = bytearray(image[:512])
        struct.pack_into("<Q", image, 56, 2**64 - 1)  # look at the footer
        struct.pack_into("<Q", header, 12, 2 * struct.unpack_from("<Q", header, 12)[0])
        marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
        self.refused(bytes(image + marker + header + bytes(512)), "vmdk")

    def test_a_vmdk_of_several_extents_or_of_a_flat_one(self) -> None:
        image = disk_image(self.directory, "vmdk")
        for lines in (
            b'RW 2048 FLAT "x-flat.vmdk" 0\n',
            b'RW 1024 SPARSE "a.vmdk"\nRW 1024 SPARSE "b.vmdk"\n',
            b'RW 2048 SPARSE "../x.vmdk"\n',
        ):
            with self.subTest(lines=lines):
                at = image.index(b"RW ")
                line = image[at : image.index(b"\n", at) + 1]
                self.refused(with_descriptor(image, line, lines), "vmdk")

    def test_a_vmdk_whose_extent_is_named_by_an_address(self) -> None:
        image = disk_image(self.directory, "vmdk")
        for name in (b"nbd:there", b"NBD+UNIX:x", b"json:{}", b"http://there/x", b"../x", b" file:x"):
            with self.subTest(name):
                self.refused(with_descriptor(image, b"source.vmdk", name), "vmdk")

    def test_a_vmdk_descriptor_without_its_extents(self) -> None:
        for subformat in ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
            path = self.directory / f"{subformat}.vmdk"
            options = f"subformat={subformat}"
            command = ["qemu-img", "create", "-q", "-f", "vmdk", "-o", options, str(path), "1M"]
            subprocess.run(command, check=True)
            with self.subTest(subformat=subformat):
                self.refused(path.read_bytes(), "vmdk")

    def test_a_vmdk_without_a_size_of_its_own(self) -> None:
        image = disk_image(self.directory, "vmdk")
        self.refused(edited(image, (12, "<Q", 0)), "vmdk")

    def test_no_vmdk_type_is_allowed_that_is_more_than_one_file(self) -> None:
        path = self.directory / "flat.vmdk"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, "1M"],
            check=True,
        )
        source = FakeSource({ID: path.read_bytes()}, disk_format="vmdk")
        with self.assertRaises(ic.ImageRejected):
            self.manager(source, vmdk_allowed_types=("monolithicFlat",)).cache_image(ID)

    def test_a_differencing_vhd(self) -> None:
        self.refused(dynamic_vhd(bytes(2**20), kind=4), "vhd")

    def test_a_vhd_that_states_a_parent_although_it_is_of_a_type_that_has_none(self) -> None:
        image = dynamic_vhd(bytes(2**20))
        for at in (512 + 64, 512 + 576):
            with self.subTest(at=at):
                self.refused(edited(image, (at, ">I", 1)), "vhd")

    def test_a_vmdk_that_states_a_parent_where_readers_look_whatever_its_header_says(self) -> None:
        image = disk_image(self.directory, "vmdk", options="subformat=monolithicSparse")
        descriptor = image[512 : 512 + 10240]
        there = b'parentFileNameHint="other.vmdk"\n' + descriptor.rstrip(b"\0")
        moved = bytearray(image) + descriptor
        moved[512 : 512 + 10240] = there.ljust(10240, b"\0")
        struct.pack_into("<Q", moved, 28, len(image) // 512)
        with self.assertRaisesRegex(ic.ImageRejected, "another file belongs"):
            contained.examine(Prefix(bytes(moved), whole=True), "vmdk")

    def test_a_vhdx_with_a_parent(self) -> None:
        image = bytearray(disk_image(self.directory, "vhdx"))
        entry = image.index(_FILE_PARAMETERS)
        table = image.rindex(b"metadata", 0, entry)
        (offset,) = struct.unpack_from("<I", image, entry + 16)
        (flags,) = struct.unpack_from("<I", image, table + offset + 4)
        self.refused(edited(bytes(image), (table + offset + 4, "<I", flags | _HAS_PARENT)), "vhdx")

    def test_a_vdi_that_is_a_part_of_a_disk(self) -> None:
        image = disk_image(self.directory, "vdi")
        for edit in ((76, "<I", 3), (76, "<I", 4), (424, "<Q", 1), (440, "<Q", 1)):
            with self.subTest(edit=edit):
                self.refused(edited(image, edit), "vdi")

    def test_a_qcow2_with_a_backing_file_or_a_data_file(self) -> None:
        for options in (["-u", "-F", "raw", "-b", "/x"], ["-o", f"data_file={self.directory}/data"]):
            path = self.directory / "image"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M"], check=True)
            with self.subTest(options=options):
                self.refused(path.read_bytes(), "qcow2")

    def test_a_qcow2_that_names_a_data_file_without_saying_that_it_has_one(self) -> None:
        path = self.directory / "image"
        options = ["-o", f"data_file={self.directory}/data"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M"], check=True)
        self.refused(edited(path.read_bytes(), (72, ">Q", 0)), "qcow2")

    def test_formats_of_which_nobody_knows_whether_they_are_one_file(self) -> None:
        for format in ("qed", "parallels", "qcow"):
            path = self.directory / "image"
            subprocess.run(["qemu-img", "create", "-q", "-f", format, path, "1M"], check=True)
            with self.subTest(format=format):
                # Uninspected they are raw bytes, in which nothing is looked up either.
                self.refused(path.read_bytes(), format, inspected=(True,))

    def test_a_format_without_a_reader_is_refused(self) -> None:
        with self.assertRaises(ic.ImageRejected):
            contained.examine(Prefix(b"", whole=True), "tomorrows")
