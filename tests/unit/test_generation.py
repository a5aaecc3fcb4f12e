# SPDX-License-Identifier: Apache-2.0
"""Which swap areas and filesystems are shared, and under which names."""

from __future__ import annotations

import unittest

from imagecache_lib import config, errors
from imagecache_lib.formats import superblock
from imagecache_lib.ingest import generation
from imagecache_lib.store import layout


def ephemeral(
    os_type: str | None = "linux",
    fs: str | None = None,
    label: str | None = None,
    share: bool = True,
    **options: object,
) -> generation.Generation:
    where = config.CacheConfig(instances_path="/instances", **options)  # type: ignore[arg-type]
    return generation.ephemeral(10, os_type=os_type, fs=fs, label=label, config=where, share=share)


class SharingTest(unittest.TestCase):
    def test_names_are_those_that_nova_of_the_same_configuration_keeps(self) -> None:
        self.assertEqual("swap_512", generation.swap(512, share=True).name)
        for os_type in ("linux", "windows", "solaris", None):
            self.assertEqual("ephemeral_10_0706d66", ephemeral(os_type).name)
            self.assertEqual("ephemeral_10_40d1d2c", ephemeral(os_type, default_ephemeral_format="ext4").name)
        self.assertEqual("ephemeral_10_0706d66", ephemeral("linux", fs="ext3").name)

    def test_a_filesystem_is_the_guests_whatever_the_name(self) -> None:
        self.assertEqual(
            ["ext4", "ntfs", "vfat", "vfat"],
            [ephemeral(os_type).kind for os_type in ("linux", "windows", "solaris", None)],
        )
        self.assertEqual("ext3", ephemeral("windows", default_ephemeral_format="ext3").kind)

    def test_only_the_default_filesystem_with_the_default_label_is_published(self) -> None:
        self.assertTrue(ephemeral().publishable)
        self.assertTrue(ephemeral(label="ephemeral0").publishable)
        self.assertTrue(ephemeral(fs="ext4").publishable)
        self.assertTrue(ephemeral(default_ephemeral_format="ext3").publishable)
        self.assertFalse(ephemeral(label="ephemeral1").publishable)
        self.assertFalse(ephemeral(fs="vfat").publishable)
        self.assertFalse(ephemeral(share=False).publishable)
        self.assertFalse(generation.swap(512, share=False).publishable)

    def test_what_differs_each_time_is_not_published(self) -> None:
        self.assertFalse(ephemeral("windows").publishable)
        self.assertFalse(ephemeral(default_ephemeral_format="xfs").publishable)
        self.assertFalse(ephemeral(virt_mkfs=("linux=mkfs.ext4 %(target)s",)).publishable)

    def test_a_base_that_is_there_may_serve_whoever_wants_what_it_is(self) -> None:
        for wanted in (ephemeral("windows"), ephemeral(fs="xfs"), ephemeral(label="ephemeral0")):
            self.assertTrue(wanted.shared)

    def test_only_a_guests_first_ephemeral_disk_shares_a_base_since_novas_pass_knows_no_other(self) -> None:
        self.assertFalse(ephemeral(label="ephemeral1").shared)
        self.assertFalse(ephemeral("windows", label="ephemeral3").shared)

    def test_no_base_is_shared_without_overlays_or_where_a_command_made_it(self) -> None:
        command = ("linux=mkfs.ext4 %(target)s",)
        self.assertFalse(ephemeral(share=False).shared)
        self.assertFalse(generation.swap(512, share=False).shared)
        self.assertFalse(ephemeral(virt_mkfs=command).shared)
        self.assertFalse(ephemeral(fs="ext4", virt_mkfs=command).shared)
        self.assertTrue(ephemeral("windows", virt_mkfs=command).shared)

    def test_the_guests_type_chooses_the_command_and_default_stands_for_all_others(self) -> None:
        commands = ("linux=a -o x=y %(target)s", "default=b %(target)s")
        self.assertEqual(["a", "-o", "x=y", "/t d"], ephemeral("linux", virt_mkfs=commands).words("/t d"))
        self.assertEqual(["b", "/t"], ephemeral("windows", virt_mkfs=commands).words("/t"))
        self.assertEqual("ext3", ephemeral("linux", fs="ext3", virt_mkfs=commands).kind)
        self.assertEqual("ext4", ephemeral("linux", virt_mkfs=("windows=c",)).kind)

    def test_a_label_that_no_encoding_has_is_refused_at_once(self) -> None:
        for label in ("a\0b", "\ud800"):
            with self.assertRaisesRegex(errors.BackendError, "can label no filesystem"):
                ephemeral(label=label)

    def test_a_label_is_one_word_whatever_is_in_it(self) -> None:
        wanted = ephemeral(label="a b; c", virt_mkfs=("linux=mkfs -L %(fs_label)s %(target)s",))
        self.assertEqual(["mkfs", "-L", "a b; c", "/t"], wanted.words("/t"))
        self.assertIn("a b; c", ephemeral(label="a b; c").words("/t"))

    def test_names_belong_to_generated_bases(self) -> None:
        for wanted in (ephemeral(), generation.swap(1, share=True)):
            self.assertIn(layout.classify(wanted.name), (layout.Kind.EPHEMERAL, layout.Kind.SWAP))

    def test_unknown_filesystems_are_refused(self) -> None:
        with self.assertRaises(errors.BackendError):
            ephemeral(fs="../../bin/sh")


class SignatureTest(unittest.TestCase):
    def test_zeros_and_fragments_have_none(self) -> None:
        for data in (b"", bytes(512), bytes(4096), bytes(superblock.LENGTH), b"XFSB"):
            self.assertIsNone(superblock.read(data))

    def test_a_boot_sector_alone_is_no_filesystem(self) -> None:
        self.assertIsNone(superblock.read((bytes(510) + b"\x55\xaa").ljust(4096, b"\0")))

    def test_any_bytes_are_read_without_harm(self) -> None:
        for lead in (b"XFSB", b"\xeb\x58\x90NTFS    "):
            superblock.read((lead.ljust(510, b"\xff") + b"\x55\xaa").ljust(superblock.LENGTH, b"\xff"))
