# SPDX-License-Identifier: Apache-2.0
"""Files that are not what the table says."""

from __future__ import annotations

import os
import pathlib
import random
import socket
import tempfile
import unittest

from imagecache_lib import errors, model
from imagecache_lib.sources.file import FileImage, FileSource
from imagecache_lib.sources.interface import CannotResume
from tests.support import leftovers


class TestFileSource(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def source(self, path: pathlib.Path | str) -> FileSource:
        return FileSource({"x": FileImage(path)})

    def test_takes_the_size_from_the_file(self) -> None:
        path = self.directory / "image"
        path.write_bytes(b"12345")
        self.assertEqual(5, self.source(path).describe("x").size)

    def test_a_missing_file_is_an_image_not_found(self) -> None:
        for name in ("missing", "missing/too"):
            with self.assertRaises(errors.ImageNotFound) as caught:
                self.source(self.directory / name).describe("x")
            self.assertEqual(str(self.directory / name), caught.exception.path)

    def test_only_regular_files_are_read(self) -> None:
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        link = self.directory / "link"
        link.symlink_to(fifo)
        for path in (fifo, link, self.directory, pathlib.Path("/dev/zero")):
            with self.subTest(path=path):
                with self.assertRaises(errors.ImageRejected):
                    self.source(path).describe("x")
                with self.assertRaises(errors.ImageRejected), self.source(path).open(model.Image(id="x")):
                    pass

    def test_a_socket_is_no_file(self) -> None:
        path = self.directory / "socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            with self.assertRaisesRegex(errors.ImageRejected, "regular"):
                self.source(path).describe("x")

    def test_what_cannot_be_opened_is_a_source_error(self) -> None:
        for odd in (str(self.directory / ("x" * 300)), "a\0b"):
            with self.subTest(odd=odd), self.assertRaises(errors.SourceError):
                self.source(odd).describe("x")

    def test_a_file_that_is_written_to_meanwhile_is_not_taken(self) -> None:
        path = self.directory / "image"
        path.write_bytes(b"1" * (2**20 + 1))
        os.utime(path, ns=(1, 1))
        source = self.source(path)
        with source.open(source.describe("x")) as stream:
            next(stream)
            with open(path, "r+b") as file:
                file.write(b"2")
            with self.assertRaisesRegex(errors.SourceError, "changed"):
                list(stream)

    def test_a_wrong_digest_of_a_file_that_is_written_to_meanwhile_is_doubted(self) -> None:
        path = self.directory / "image"
        path.write_bytes(b"1" * (2**20 + 1))
        os.utime(path, ns=(1, 1))
        source = FileSource({"x": FileImage(path, digest=model.Digest("sha256", "0" * 64))})
        with source.open(source.describe("x")) as stream:
            next(stream)
            self.assertIsNone(getattr(stream, "doubt"))  # noqa: B009  # the attribute is optional
            with open(path, "ab") as file:
                file.write(b"2")
            list(stream)
            self.assertIsInstance(getattr(stream, "doubt"), errors.SourceError)  # noqa: B009

    def test_holes_and_data_are_given_in_order_from_any_offset(self) -> None:
        path = self.directory / "image"
        block, size = 4096, 5 * 2**20 + 123
        for seed in range(8):
            numbers = random.Random(seed)
            with open(path, "wb") as file:
                file.truncate(size)
                for _ in range(seed):
                    file.seek(numbers.randrange(size // block) * block)
                    file.write(numbers.randbytes(numbers.randrange(1, 2 * 2**20)))
                file.truncate(size)
            whole = path.read_bytes()
            source = self.source(path)
            image = source.describe("x")
            for offset in (0, 1, block, size // 2, size - 1, *numbers.sample(range(size), 3)):
                with self.subTest(seed=seed, offset=offset), source.open(image, offset) as stream:
                    self.assertEqual(whole[offset:], b"".join(stream))

    def test_what_the_table_says_of_the_content_is_passed_on(self) -> None:
        path = self.directory / "image"
        path.write_bytes(b"12345")
        source = FileSource({"x": FileImage(path, "raw", converted_from="unknown", compression="gzip")})
        image = source.describe("x")
        self.assertEqual(
            ("raw", "unknown", "gzip"), (image.disk_format, image.converted_from, image.compression)
        )

    def test_a_file_that_changed_its_size_is_not_resumed(self) -> None:
        path = self.directory / "image"
        path.write_bytes(b"12345")
        source = self.source(path)
        image = source.describe("x")
        path.write_bytes(b"123456")
        with self.assertRaises(CannotResume), source.open(image, 2):
            pass

    def test_closes_what_it_opens(self) -> None:
        path = self.directory / "image"
        path.write_bytes(b"12345")
        source = self.source(path)
        for _ in range(3):
            with source.open(source.describe("x")) as stream:
                next(stream)
            with self.assertRaises(errors.ImageRejected):
                self.source(self.directory).describe("x")
        self.assertEqual([], leftovers.open_below(self.directory))
