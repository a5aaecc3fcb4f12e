# SPDX-License-Identifier: Apache-2.0
"""Sources that break their contract: the caller gets an error of this library, and never wrong bytes."""

from __future__ import annotations

import array
import asyncio
import contextlib
import dataclasses
import hashlib
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from imagecache_lib import errors, model
from imagecache_lib.sources import checked, transfer
from imagecache_lib.sources.interface import ImageSource, SourceRefused
from imagecache_lib.system.host import System

DATA = bytes(range(256)) * 256
HOST = System(name="here", sleep=lambda seconds: None)
GOOD = model.Image("x", size=len(DATA), digest=model.Digest("sha256", hashlib.sha256(DATA).hexdigest()))


class Careless(ImageSource):
    """A source that does as it is told."""

    def __init__(self, chunks: Callable[[], Any], image: Any = GOOD, resume: Any = True) -> None:
        self.chunks, self.image, self.resume = chunks, image, resume
        self.opens = 0

    def describe(self, image_id: str) -> model.Image:
        return self.image  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        self.opens += 1
        yield self.chunks()

    def can_resume(self, image: model.Image) -> bool:
        if isinstance(self.resume, Exception):
            raise self.resume
        return bool(self.resume)


def fetch(source: ImageSource) -> list[bytes]:
    """Return the chunks as they are after the last one came, which is when they are hashed and written."""
    found, image = transfer.describe(source, "x", host=HOST)
    return list(transfer.Transfer(found, image, host=HOST).chunks())


def reused(size: int) -> Iterator[bytearray]:
    buffer = bytearray(size)
    for at in range(0, len(DATA), size):
        buffer[:] = DATA[at : at + size]
        yield buffer


def yielding(*chunks: object) -> Careless:
    return Careless(lambda: iter(chunks))


class TestChunks(unittest.TestCase):
    def test_a_buffer_that_is_used_again_is_copied(self) -> None:
        for source in (
            Careless(lambda: reused(4096)),
            Careless(lambda: (memoryview(chunk) for chunk in reused(4096))),
        ):
            self.assertEqual(DATA, b"".join(fetch(source)))

    def test_any_buffer_is_its_bytes(self) -> None:
        for chunk in (
            bytearray(DATA),
            memoryview(DATA),
            memoryview(DATA).cast("I"),
            array.array("Q", DATA),
        ):
            self.assertEqual([DATA], fetch(yielding(chunk)))

    def test_bytes_are_not_copied(self) -> None:
        self.assertIs(DATA, fetch(Careless(lambda: iter([DATA])))[0])

    def test_what_is_no_buffer_is_the_sources_fault_and_not_retried(self) -> None:
        for wrong in ("text", 5, None, [1, 2], 1.5, object()):
            with self.subTest(wrong=wrong):
                source = yielding(DATA[:10], wrong)
                with self.assertRaisesRegex(SourceRefused, type(wrong).__name__):
                    fetch(source)
                self.assertEqual(1, source.opens)

    def test_empty_chunks_are_passed_over_and_an_endless_row_of_them_ends(self) -> None:
        self.assertEqual([DATA], fetch(Careless(lambda: iter([b"", DATA, b""]))))
        with self.assertRaisesRegex(SourceRefused, "without a byte"):
            fetch(Careless(lambda: iter(lambda: b"", None)))

    def test_a_deadline_ends_empty_chunks_too(self) -> None:
        now = [1000.0]
        host = System(name="here", sleep=lambda seconds: None, clock=lambda: now[0])

        def empty() -> Iterator[bytes]:
            while True:
                now[0] += 1.0
                yield b""

        source = Careless(empty)
        fetching = transfer.Transfer(source, GOOD, host=host, deadline=1010.0)
        with self.assertRaisesRegex(errors.SourceError, "deadline"):
            list(fetching.chunks())


class TestExceptions(unittest.TestCase):
    def raising(self, error: BaseException) -> Careless:
        class Raw:
            """Unlike a generator it raises what a generator may not."""

            def __init__(self) -> None:
                self._first = True

            def __iter__(self) -> Raw:
                return self

            def __next__(self) -> bytes:
                if self._first:
                    self._first = False
                    return DATA[:100]
                raise error

        return Careless(Raw)

    def test_a_foreign_exception_is_not_retried(self) -> None:
        for error in (
            TypeError("t"),
            ValueError("v"),
            StopAsyncIteration(),
            RecursionError(),
            ExceptionGroup("g", [ValueError()]),
            GeneratorExit(),
            asyncio.CancelledError(),
        ):
            with self.subTest(error=error):
                source = self.raising(error)
                with self.assertRaisesRegex(SourceRefused, type(error).__name__):
                    fetch(source)
                self.assertEqual(1, source.opens)

    def test_what_may_pass_is_retried(self) -> None:
        for error in (OSError(5, "EIO"), TimeoutError(), ConnectionResetError(), MemoryError()):
            with self.subTest(error=error):
                source = self.raising(error)
                with self.assertRaisesRegex(errors.SourceError, "gave up after 4 attempts"):
                    fetch(source)
                self.assertEqual(4, source.opens)

    def test_what_only_a_drivers_disk_can_end_with_is_the_sources_defect(self) -> None:
        for error in (errors.DiskExistsError("x"), errors.LeaseLostError("x"), errors.DiskTooSmallError("x")):
            with self.subTest(error=error), self.assertRaisesRegex(SourceRefused, type(error).__name__):
                fetch(self.raising(error))

    def test_what_ends_the_process_passes(self) -> None:
        for error in (KeyboardInterrupt(), SystemExit(3)):
            with self.subTest(error=error), self.assertRaises(type(error)):
                fetch(self.raising(error))

    def test_each_method_is_guarded(self) -> None:
        def fail(*_: object) -> Any:
            raise KeyError("secret")

        for name in ("describe", "open", "can_resume"):
            with self.subTest(name=name):
                source = Careless(lambda: iter([DATA]))
                setattr(source, name, fail)
                with self.assertRaisesRegex(SourceRefused, "KeyError") as caught:
                    fetch(source)
                self.assertNotIn("secret", str(caught.exception))

    def test_an_open_that_is_no_context_is_told(self) -> None:
        source = Careless(lambda: iter([DATA]))
        source.open = lambda image, offset=0: iter([DATA])  # type: ignore[method-assign,assignment,return-value]
        with self.assertRaisesRegex(SourceRefused, "context manager"):
            fetch(source)
        with self.assertRaisesRegex(SourceRefused, "TypeError"):
            fetch(Careless(lambda: 5))

    def test_a_source_cannot_swallow_the_callers_exception(self) -> None:
        @contextlib.contextmanager
        def swallowing(image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
            with contextlib.suppress(Exception):
                yield iter([DATA])

        source = Careless(lambda: iter([]))
        source.open = swallowing  # type: ignore[method-assign]
        with self.assertRaises(LookupError), checked.Opened(source, GOOD, 0):
            raise LookupError

    def test_the_context_is_left_when_the_stream_cannot_be_iterated(self) -> None:
        left = []

        @contextlib.contextmanager
        def opened(image: model.Image, offset: int = 0) -> Iterator[Any]:
            try:
                yield 5
            finally:
                left.append(True)

        source = Careless(lambda: iter([]))
        source.open = opened  # type: ignore[method-assign]
        self.assertRaises(SourceRefused, fetch, source)
        self.assertEqual([True], left)


class TestDescriptions(unittest.TestCase):
    def test_each_field_has_its_type(self) -> None:
        digest = model.Digest
        wrong: tuple[dict[str, Any], ...] = (
            {"id": "another"},
            {"id": 5},
            {"size": "5"},
            {"size": -1},
            {"size": 1.0},
            {"size": True},
            {"virtual_size": "5"},
            {"disk_format": 5},
            {"digest": "sha256:abc"},
            {"digest": digest("sha256", None)},  # type: ignore[arg-type]
            {"digest": digest(None, "abc")},  # type: ignore[arg-type]
            {"status": None},
            {"container_format": b"bare"},
            {"locations": "rbd://x"},
            {"locations": (None,)},
            {"stores": ["a"]},
            {"properties": None},
            {"converted_from": 1},
            {"compression": 1},
            # A line of its own in a log, colours of a terminal, half a character, a page.
            {"disk_format": "raw\nERROR"},
            {"container_format": "\x1b[31mbare"},
            {"status": "\ud800"},
            {"converted_from": "x" * 1000},
        )
        for fields in wrong:
            with self.subTest(fields=fields), self.assertRaises(SourceRefused):
                checked.describe(Careless(lambda: None, dataclasses.replace(GOOD, **fields)), "x")
        for image in (None, {"id": "x"}, "x"):
            with self.subTest(image=image), self.assertRaisesRegex(SourceRefused, type(image).__name__):
                checked.describe(Careless(lambda: None, image), "x")

    def test_properties_that_cannot_be_read_are_the_sources_defect(self) -> None:
        class Broken(dict[str, object]):
            def keys(self) -> Any:
                raise ValueError("secret")

            __iter__ = keys

        image = dataclasses.replace(GOOD, properties=Broken(name="x"))
        with self.assertRaisesRegex(SourceRefused, "ValueError"):
            fetch(Careless(lambda: iter([DATA]), image))

    def test_attributes_of_the_stream_that_cannot_be_read_are_the_sources_defect(self) -> None:
        left: list[bool] = []

        class Broken:
            def __iter__(self) -> Any:
                return self

            def __next__(self) -> bytes:
                return DATA

            @property
            def image(self) -> model.Image:
                raise ValueError("secret")

        class Leaving(Careless):
            @contextlib.contextmanager
            def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
                try:
                    yield self.chunks()
                finally:
                    left.append(True)

        with self.assertRaisesRegex(SourceRefused, "ValueError"):
            fetch(Leaving(Broken))
        self.assertEqual([True], left)

    def test_a_description_that_the_stream_corrects_is_checked_too(self) -> None:
        class Stream:
            image = dataclasses.replace(GOOD, size="5")  # type: ignore[arg-type]

            def __iter__(self) -> Stream:
                return self

            def __next__(self) -> bytes:
                raise StopIteration

        self.assertRaises(SourceRefused, fetch, Careless(Stream))


class TestCorrections(unittest.TestCase):
    """What the stream says of the image replaces what was described."""

    class Stream:
        def __init__(self, image: model.Image, chunks: list[bytes]) -> None:
            self.image, self._chunks = image, iter(chunks)

        def __iter__(self) -> TestCorrections.Stream:
            return self

        def __next__(self) -> bytes:
            return next(self._chunks)

    def test_another_length_starts_again_once_and_is_then_the_length(self) -> None:
        told = dataclasses.replace(GOOD, size=7)
        source = Careless(lambda: self.Stream(GOOD, [DATA]), told)
        fetching = transfer.Transfer(source, told, host=HOST, retries=0)
        with self.assertRaises(transfer.StartAgain):
            list(fetching.chunks())
        self.assertEqual(len(DATA), fetching.image.size)
        self.assertEqual([DATA], list(fetching.chunks()))

    def test_a_length_that_changes_with_each_answer_ends(self) -> None:
        lengths = iter(range(100))
        source = Careless(lambda: self.Stream(dataclasses.replace(GOOD, size=next(lengths)), [DATA]))
        fetching = transfer.Transfer(source, GOOD, host=HOST, retries=2)
        with self.assertRaisesRegex(errors.SourceError, "gave up"):
            for _ in range(20):
                with contextlib.suppress(transfer.StartAgain):
                    list(fetching.chunks())

    def test_a_length_that_is_wrong_once_is_not_held_against_the_image(self) -> None:
        sizes = iter((2, len(DATA), len(DATA)))
        source = Careless(lambda: self.Stream(dataclasses.replace(GOOD, size=next(sizes)), [DATA]))
        fetching = transfer.Transfer(source, GOOD, host=HOST, retries=1)
        for _ in range(2):  # whatever was prepared for a length is prepared anew
            with self.assertRaises(transfer.StartAgain):
                list(fetching.chunks())
        self.assertEqual(len(DATA), fetching.image.size)
        self.assertEqual([DATA], list(fetching.chunks()))

    def test_too_many_bytes_without_a_digest_are_the_sources_fault(self) -> None:
        image = model.Image("x", size=len(DATA))
        source = Careless(lambda: iter([DATA, b"more"]), image)
        fetching = transfer.Transfer(source, image, host=HOST, retries=1)
        with self.assertRaisesRegex(errors.SourceError, "gave up after 2 attempts"):
            for _ in range(20):
                with contextlib.suppress(transfer.StartAgain):
                    list(fetching.chunks())
        self.assertEqual(2, source.opens)

    def test_a_wrong_digest_of_data_without_a_length_is_the_sources_fault(self) -> None:
        image = dataclasses.replace(GOOD, size=None)
        fetching = transfer.Transfer(Careless(lambda: iter([DATA[:100]]), image), image, host=HOST, retries=1)
        self.assertEqual([DATA[:100]], list(fetching.chunks()))
        self.assertTrue(fetching.grant_clean_pass())
        list(fetching.chunks())
        with self.assertRaisesRegex(errors.SourceError, "cut off.*gave up"):
            fetching.grant_clean_pass()

    def test_a_wrong_digest_of_data_with_its_length_is_the_images(self) -> None:
        fetching = transfer.Transfer(Careless(lambda: iter([DATA])), GOOD, host=HOST)
        list(fetching.chunks())
        self.assertFalse(fetching.grant_clean_pass())


class TestQuestions(unittest.TestCase):
    """What is asked beside the data."""

    def test_what_they_raise_is_the_sources_defect(self) -> None:
        class Broken(Careless):
            def fail(self, *_arguments: object) -> Any:
                raise KeyError("secret")

            known_digest: Any = fail
            vouches_for_digest: Any = fail
            copy_to_store: Any = fail
            can_resume: Any = fail

        source = Broken(list)
        questions: tuple[Callable[[], object], ...] = (
            lambda: checked.known_digest(source, "x"),
            lambda: checked.vouches_for_digest(source, GOOD),
            lambda: checked.copy_to_store(source, GOOD, "store"),
            lambda: checked.can_resume(source, GOOD),
        )
        for ask in questions:
            with self.assertRaises(SourceRefused) as caught:
                ask()
            self.assertNotIn("secret", str(caught.exception))

    def test_what_is_no_digest_is_refused(self) -> None:
        class Odd(Careless):
            said: Any = None

            def known_digest(self, image_id: str) -> model.Digest | None:
                return self.said  # type: ignore[no-any-return]

        source = Odd(list)
        self.assertIsNone(checked.known_digest(source, "x"))
        source.said = GOOD.digest
        self.assertEqual(GOOD.digest, checked.known_digest(source, "x"))
        for said in ("sha256:00", b"00", ("sha256", "00"), model.Digest("sha256", None)):  # type: ignore[arg-type]
            source.said = said
            self.assertRaises(SourceRefused, checked.known_digest, source, "x")

    def test_only_a_plain_yes_vouches(self) -> None:
        class Vague(Careless):
            said: Any = None

            def vouches_for_digest(self, image: model.Image) -> bool:
                return self.said  # type: ignore[no-any-return]

        source = Vague(list)
        for said, expected in ((True, True), (False, False), (None, False), ("no", False), (1, False)):
            source.said = said
            self.assertIs(expected, checked.vouches_for_digest(source, GOOD))
