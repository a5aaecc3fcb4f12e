# SPDX-License-Identifier: Apache-2.0
"""What decoding takes: memory, space, a side file, and what it says before it needs them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import unittest
from typing import BinaryIO

from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import decoder
from imagecache_lib.formats.qcow2.spill import Spill
from imagecache_lib.formats.qcow2.walk import UNCONDITIONAL, Leave
from imagecache_lib.system import sparse
from tests.support import leftovers, qcow2_images
from tests.support.qcow2_images import Cluster

SIZE = 512

# All tables of a badly fragmented image come first; its data is never sent.
_FRAGMENTED = """
import array, random, sys, tempfile
from imagecache_lib.system import sparse
from imagecache_lib.formats.qcow2 import decoder, header, inflate
from imagecache_lib.formats.qcow2.spill import Spill

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

def packed(numbers):
    values = array.array("Q", numbers)
    if sys.byteorder == "little":
        values.byteswap()
    return values.tobytes()

SIZE, TABLES = 65536, int(sys.argv[1])
order = array.array("I", range(TABLES * 8192))
random.Random(1).shuffle(order)
fields = header.V2_FIELDS.pack(
    header.MAGIC, 3, 0, 0, 16, TABLES * 8192 * SIZE, 0, TABLES, SIZE, 2 * SIZE, 1, 0, 0
) + header.V3_FIELDS.pack(0, 0, 0, 4, 104)
inflate.fastest_deflate()
before = peak()
with tempfile.TemporaryFile() as out, decoder.StreamDecoder(
    sparse.SparseFile(out.fileno()),
    spill=Spill(tempfile.TemporaryFile),
    file_size=None,
    max_virtual_size=2**44,
) as decoding:
    decoding.write(fields.ljust(SIZE, b"\\0"))
    decoding.write(packed((3 + i) * SIZE for i in range(TABLES)).ljust(2 * SIZE, b"\\0"))
    for table in range(TABLES):
        hosts = order[table * 8192 : (table + 1) * 8192]
        decoding.write(packed((3 + TABLES + host) * SIZE for host in hosts))
    assert decoding.mapped_bytes == TABLES * 8192 * SIZE
print(peak() - before)
"""


class Memory(unittest.TestCase):
    def test_maps_are_compact(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _FRAGMENTED, "64"], capture_output=True, text=True, check=True
        )
        # 32 GiB in half a million fragments: ten bytes each, and what a table takes while it is parsed.
        self.assertLess(int(done.stdout) / 1024, 16)


class _Room:
    """Lets decoding go on until the tables map more than so many bytes."""

    def __init__(self, most: int) -> None:
        self._most = most

    def require(self, needed: int) -> None:
        if needed > self._most:
            raise errors.NoSpaceError("there is no room")


class Space(unittest.TestCase):
    def test_what_the_tables_map_is_known_before_the_data(self) -> None:
        clusters = {number: Cluster("data", b"\1" * SIZE) for number in range(20)}
        image = qcow2_images.build(200 * SIZE, clusters | {30: Cluster("zero")})
        with tempfile.TemporaryFile() as out, self.decoding(out.fileno()) as decoding:
            self.assertIsNone(decoding.virtual_size)
            decoding.write(image[:SIZE])
            self.assertEqual(decoding.virtual_size, 200 * SIZE)
            self.assertEqual(decoding.mapped_bytes, 0)
            decoding.write(image[SIZE : 4 * SIZE])
            self.assertEqual(decoding.mapped_bytes, 20 * SIZE)
            self.assertEqual(os.fstat(out.fileno()).st_size, 0)
            decoding.write(image[4 * SIZE :])
            self.assertEqual(decoding.finish().mapped_bytes, 20 * SIZE)
            self.assertEqual(os.fstat(out.fileno()).st_size, 200 * SIZE)

    def test_zeros_take_none(self) -> None:
        size = 65536
        clusters = {
            0: Cluster("data", bytes(size)),
            1: Cluster("compressed", bytes(size)),
            2: Cluster("data", bytes(size - 1) + b"\1"),
        }
        image = qcow2_images.build(100 * size, clusters, cluster_bits=16)
        with tempfile.TemporaryFile() as out, self.decoding(out.fileno()) as decoding:
            decoding.write(image)
            decoding.finish()
            self.assertLessEqual(os.fstat(out.fileno()).st_blocks * 512, 8192)

    def test_what_one_piece_maps_is_not_written_without_leave(self) -> None:
        image = qcow2_images.repeating()
        for most in (0, 512 * 2**20 - 1):
            with tempfile.TemporaryFile() as out, self.decoding(out.fileno(), _Room(most)) as decoding:
                with self.assertRaises(errors.NoSpaceError):
                    decoding.write(image)
                self.assertEqual(0, os.fstat(out.fileno()).st_blocks)

    @staticmethod
    def decoding(descriptor: int, leave: Leave = UNCONDITIONAL) -> decoder.StreamDecoder:
        def no_side_file() -> BinaryIO:
            raise AssertionError("nothing has to be set aside")

        return decoder.StreamDecoder(
            sparse.SparseFile(descriptor),
            spill=Spill(no_side_file),
            file_size=None,
            max_virtual_size=2**40,
            leave=leave,
        )


class Failures(unittest.TestCase):
    def test_a_disk_that_cannot_be_written_ends_the_decoding(self) -> None:
        size = 65536
        for kind in ("data", "compressed"):
            clusters = {number: Cluster(kind, b"\1" * size) for number in range(200)}
            image = qcow2_images.build(200 * size, clusters, cluster_bits=16)
            reader, writer = os.pipe()
            self.addCleanup(os.close, reader)
            self.addCleanup(os.close, writer)
            # A pipe has no offsets, so that every pwrite fails.
            with Space.decoding(writer) as decoding, self.assertRaises(OSError):
                decoding.write(image)
                decoding.finish()

    def test_a_bad_cluster_ends_the_decoding_however_much_follows(self) -> None:
        size = 4096
        clusters = {number: Cluster("compressed", b"\1" * size) for number in range(5000)}
        image = qcow2_images.build(5000 * size, clusters, cluster_bits=12, compress=lambda _: b"\xff" * 2000)
        for threads in (1, 3):
            # Not in finish(): nobody wants the rest of a bad image.
            with tempfile.TemporaryFile() as out:
                decoding = decoder.StreamDecoder(
                    sparse.SparseFile(out.fileno()),
                    spill=Spill(tempfile.TemporaryFile),
                    file_size=len(image),
                    max_virtual_size=2**40,
                    threads=threads,
                )
                with decoding, self.assertRaises(errors.ImageRejected):
                    decoding.write(image)

    def test_closing_in_the_middle_leaves_no_thread(self) -> None:
        before = set(threading.enumerate())
        size = 65536
        clusters = {number: Cluster("compressed", b"\1" * size) for number in range(500)}
        image = qcow2_images.build(500 * size, clusters, cluster_bits=16)
        with (
            leftovers.no_thread_left(),
            tempfile.TemporaryFile() as out,
            Space.decoding(out.fileno()) as decoding,
        ):
            decoding.write(image[: len(image) - 100])
            self.assertTrue(set(threading.enumerate()) - before)
