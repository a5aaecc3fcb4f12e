# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import random
import subprocess
import tempfile
import unittest
from typing import Any

import pytest

from imagecache_lib.formats.qcow2 import decoder, header, inflate
from imagecache_lib.formats.qcow2.spill import Spill
from imagecache_lib.system import sparse
from tests.support import qcow2_images
from tests.support.campaign import pick
from tests.support.qcow2_images import Cluster

KIB = 2**10
MIB = 2**20


def varied_disk(size: int, seed: int = 1) -> bytes:
    """Random, compressible and zero stretches of all lengths."""
    rng = random.Random(seed)
    disk = bytearray(size)
    position = 0
    while position < size:
        length = rng.choice([100, 512, 4096, 65536, 300_000])
        kind = rng.randrange(3)
        if kind == 0:
            disk[position : position + length] = rng.randbytes(length)
        elif kind == 1:
            disk[position : position + length] = (rng.randbytes(40) * (length // 40 + 1))[:length]
        position += length
    return bytes(disk[:size])


class WithImages(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.raw = os.path.join(directory.name, "raw")
        self.path = os.path.join(directory.name, "image")

    def qemu(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, f"{command}: {done.stdout}{done.stderr}")

    def image(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()

    def check_same_as_qemu(self, **arguments: Any) -> decoder.Decoded:
        seen, decoded = qcow2_images.decode(self.image(), **arguments)
        expected = qcow2_images.convert(self.path)
        # assertEqual would print megabytes.
        self.assertTrue(seen == expected, "the decoded disk differs from what qemu-img makes of it")
        return decoded


class ImagesThatQemuConverted(WithImages):
    def setUp(self) -> None:
        super().setUp()
        self.disk = varied_disk(5 * MIB + 3 * 512)
        with open(self.raw, "wb") as file:
            file.write(self.disk)

    def convert(self, options: list[str], *arguments: str) -> None:
        self.qemu(
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            ",".join(options),
            *arguments,
            self.raw,
            self.path,
        )

    def test_versions_cluster_sizes_and_compression(self) -> None:
        sizes = ("512", "1k", "4k", "16k", "64k", "2M")
        for version, size, packed in itertools.product(("0.10", "1.1"), sizes, ("", "zlib", "zstd")):
            if version == "0.10" and packed == "zstd":
                continue
            with self.subTest(version=version, cluster_size=size, compression=packed):
                options = [f"compat={version}", f"cluster_size={size}"]
                options += [f"compression_type={packed}"] if version != "0.10" and packed else []
                self.convert(options, *(["-c"] if packed else []))
                seen, decoded = qcow2_images.decode(self.image())
                self.assertTrue(seen == self.disk, "the decoded disk differs")
                self.assertEqual(decoded.spilled_bytes, 0)

    def test_extended_l2_entries(self) -> None:
        for size, packed in itertools.product(("16k", "64k", "2M"), ((), ("-c",))):
            with self.subTest(cluster_size=size, compressed=bool(packed)):
                self.convert(["extended_l2=on", f"cluster_size={size}"], *packed)
                self.assertTrue(qcow2_images.decode(self.image())[0] == self.disk, "the decoded disk differs")

    def test_preallocation(self) -> None:
        for mode, version in itertools.product(("metadata", "falloc", "full"), ("0.10", "1.1")):
            with self.subTest(preallocation=mode, version=version):
                self.convert([f"preallocation={mode}", f"compat={version}"])
                self.assertTrue(qcow2_images.decode(self.image())[0] == self.disk, "the decoded disk differs")

    def test_out_of_order_writes_and_refcount_widths(self) -> None:
        for arguments in (("-W", "-m", "8"), ("-W", "-m", "8", "-c")):
            for bits in ("1", "64"):
                with self.subTest(arguments=arguments, refcount_bits=bits):
                    self.convert([f"refcount_bits={bits}", "cluster_size=4k"], *arguments)
                    self.assertTrue(
                        qcow2_images.decode(self.image())[0] == self.disk, "the decoded disk differs"
                    )

    def test_chunks_of_any_size(self) -> None:
        for size, packed in (("512", ()), ("64k", ("-c",)), ("2M", ())):
            self.convert([f"cluster_size={size}"], *packed)
            for length in (511, 65537, 3 * MIB, 100 * MIB):
                with self.subTest(cluster_size=size, chunk=length):
                    seen, _ = qcow2_images.decode(self.image(), chunks=lambda length=length: length)  # type: ignore[misc]
                    self.assertTrue(seen == self.disk, "the decoded disk differs")

    def test_byte_by_byte(self) -> None:
        with open(self.raw, "r+b") as file:
            file.truncate(200 * KIB)
        self.convert(["cluster_size=4k"], "-c")
        seen, _ = qcow2_images.decode(self.image(), chunks=lambda: 1)
        self.assertTrue(seen == self.disk[: 200 * KIB], "the decoded disk differs")

    def test_without_the_optional_inflate(self) -> None:
        self.convert(["cluster_size=64k"], "-c")
        with tempfile.TemporaryFile() as out:
            decoding = decoder.StreamDecoder(
                sparse.SparseFile(out.fileno()),
                spill=Spill(tempfile.TemporaryFile),
                file_size=None,
                max_virtual_size=2**40,
                inflater=inflate.Zlib(),
            )
            with decoding:
                decoding.write(self.image())
                decoding.finish()
            out.seek(0)
            self.assertTrue(out.read() == self.disk, "the decoded disk differs")


class ImagesThatAGuestWrote(WithImages):
    """Written, rewritten, discarded, zeroed, compressed, grown and snapshotted in random order."""

    @pytest.mark.campaign
    def test_random_histories(self) -> None:
        creations = (
            "cluster_size=64k",
            "cluster_size=4k",
            "cluster_size=512",
            "cluster_size=64k,compat=0.10",
            "cluster_size=16k,extended_l2=on",
            "cluster_size=64k,extended_l2=on",
            "cluster_size=4k,preallocation=metadata",
            "cluster_size=64k,compression_type=zstd",
            "cluster_size=2M,lazy_refcounts=on",
        )
        for number, options in enumerate(creations * pick(sample=1, whole=10)):
            with self.subTest(number=number, options=options):
                self.write_history(random.Random(number), options)
                rng = random.Random(number)
                self.check_same_as_qemu(chunks=lambda rng=rng: rng.choice([1000, 70_000]))

    def write_history(self, rng: random.Random, options: str) -> None:
        size = 4 * MIB
        self.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, self.path, str(size))
        cluster = 2 * MIB if "2M" in options else 65536
        for epoch in range(3):
            commands = []
            for _ in range(25):
                start, length = rng.randrange(0, size - 512, 512), rng.choice([512, 3 * 512, 8192, 200 * KIB])
                length = min(length, size - start)
                aligned = start // cluster * cluster
                commands += ["-c"]
                commands += [
                    rng.choice(
                        [
                            f"write -q -P {rng.randrange(256)} {start} {length}",
                            f"write -q -P {rng.randrange(256)} {start} {length}",
                            f"write -q -z {start} {length}",
                            f"write -q -z -u {start} {length}",
                            f"write -q -c -P {rng.randrange(256)} {aligned} {cluster}",
                            f"discard -q {aligned} {cluster}",
                        ]
                    )
                ]
            # A compressed write to a cluster that is there fails, and qemu-io goes on.
            subprocess.run(
                ["qemu-io", "-f", "qcow2", "-d", "unmap", *commands, self.path],
                capture_output=True,
                check=False,
            )
            if epoch < 2 and rng.random() < 0.7:
                self.qemu("qemu-img", "snapshot", "-c", f"s{epoch}", self.path)
            elif "compat=0.10" not in options and rng.random() < 0.5:
                size += 8 * MIB
                self.qemu("qemu-img", "resize", "-q", "-f", "qcow2", self.path, str(size))
        if rng.random() < 0.3:
            subprocess.run(["qemu-img", "snapshot", "-a", "s0", self.path], capture_output=True, check=False)

    def test_a_grown_l1_table_behind_all_data(self) -> None:
        self.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", self.path, "16M")
        self.qemu("qemu-io", "-c", "write -q -P 9 0 12M", self.path)
        self.qemu("qemu-img", "resize", "-q", self.path, "64M")
        parsed = header.parse(self.image())
        self.assertGreater(parsed.l1_table_offset, 12 * MIB)
        decoded = self.check_same_as_qemu()
        self.assertGreater(decoded.spilled_bytes, 12 * MIB)

    def test_vm_state_of_a_snapshot_is_ignored(self) -> None:
        size = 512
        guest = {0: Cluster("data", b"\1" * size), 64: Cluster("data", b"\2" * size)}
        image = bytearray(qcow2_images.build(65 * size, guest))
        image[24:32] = (64 * size).to_bytes(8, "big")
        for snapshots in (0, 1):  # its tables stay when the snapshot is deleted
            image[60:64] = snapshots.to_bytes(4, "big")
            self.assertEqual(qcow2_images.decode(bytes(image))[0], (b"\1" * size).ljust(64 * size, b"\0"))

    def test_what_is_mapped_behind_the_disk_is_no_part_of_it(self) -> None:
        size = 512
        guest = {0: Cluster("data", b"\1" * size), 1: Cluster("data", b"\2" * size)}
        image = bytearray(qcow2_images.build(2 * size, guest))
        image[24:32] = size.to_bytes(8, "big")
        self.assertEqual(qcow2_images.decode(bytes(image))[0], b"\1" * size)
