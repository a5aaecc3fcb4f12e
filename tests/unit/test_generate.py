# SPDX-License-Identifier: Apache-2.0
"""Which swap areas and filesystems are shared, and under which names."""

from __future__ import annotations

import unittest

from imagecache_lib import config, errors
from imagecache_lib.formats import superblock
from imagecache_lib.ingest import generate
from imagecache_lib.store import layout


def ephemeral(
    os_type: str | None = "linux",
    fs: str | None = None,
    label: str | None = None,
    share: bool = True,
    **options: object,
) -> generate.Generation:
    where = config.CacheConfig(instances_path="/instances", **options)  # type: ignore[arg-type]
    return generate.ephemeral(10, os_type=os_type, fs=fs, label=label, config=where, share=share)


class SharingTest(unittest.TestCase):
    def test_names_are_novas_and_say_what_is_in_them(self) -> None:
        self.assertEqual("swap_512", generate.swap(512, share=True).name)
        self.assertEqual("ephemeral_10_40d1d2c", ephemeral("linux").name)
        self.assertEqual("ephemeral_10_0706d66", ephemeral(None).name)
        self.assertEqual("ephemeral_10_0706d66", ephemeral("linux", default_ephemeral_format="vfat").name)

    def test_only_the_default_filesystem_with_the_default_label_is_shared(self) -> None:
        self.assertTrue(ephemeral().shared)
        self.assertTrue(ephemeral(label="ephemeral0").shared)
        self.assertTrue(ephemeral(fs="ext4").shared)
        self.assertTrue(ephemeral(default_ephemeral_format="ext3").shared)
        self.assertFalse(ephemeral(label="ephemeral1").shared)
        self.assertFalse(ephemeral(fs="vfat").shared)
        self.assertFalse(ephemeral(share=False).shared)
        self.assertFalse(generate.swap(512, share=False).shared)

    def test_what_differs_each_time_is_not_shared(self) -> None:
        self.assertFalse(ephemeral("windows").shared)
        self.assertFalse(ephemeral(default_ephemeral_format="xfs").shared)
        self.assertFalse(ephemeral(virt_mkfs=("linux=mkfs.ext4 %(target)s",)).shared)

    def test_the_guests_type_chooses_the_command_and_default_stands_for_all_others(self) -> None:
        commands = ("linux=a -o x=y %(target)s", "default=b %(target)s")
        self.assertEqual(["a", "-o", "x=y", "/t d"], ephemeral("linux", virt_mkfs=commands).words("/t d"))
        self.assertEqual(["b", "/t"], ephemeral("windows", virt_mkfs=commands).words("/t"))
        self.assertEqual("ext3", ephemeral("linux", fs="ext3", virt_mkfs=commands).kind)
        self.assertEqual("ext4", ephemeral("linux", virt_mkfs=("windows=c",)).kind)

    def test_a_label_is_one_word_whatever_is_in_it(self) -> None:
        wanted = ephemeral(label="a b; c", virt_mkfs=("linux=mkfs -L %(fs_label)s %(target)s",))
        self.assertEqual(["mkfs", "-L", "a b; c", "/t"], wanted.words("/t"))
        self.assertIn("a b; c", ephemeral(label="a b; c").words("/t"))

    def test_names_belong_to_generated_bases(self) -> None:
        for wanted in (ephemeral(), generate.swap(1, share=True)):
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
