# SPDX-License-Identifier: Apache-2.0
"""Bad input: its own error with image, cause and next step; nothing published, no file left, life goes on."""

from __future__ import annotations

import hashlib
import os
import pathlib
import struct
import subprocess
import time
from collections.abc import Callable
from typing import Any

from imagecache_lib import errors, events, model
from imagecache_lib.sources.file import FileImage, FileSource
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.testing.bad_server import Answer, BadServer
from imagecache_lib.testing.sources import FakeSource
from tests.support import files
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, content_of, disk_image, raw_image

DATA = raw_image(1)
BAD = "bad-image"


class BadInputCase(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.keeper = self.manager()
        self.keeper.cache_image(OTHER_ID)
        self.disk = self.target("disk", "new-instance")

    def refused(
        self,
        kind: type[errors.ImageCacheError],
        source: FakeSource | FileSource | HttpSource,
        *words: str,
        image_id: str = BAD,
        request: model.Request | None = None,
        **config: Any,
    ) -> errors.ImageCacheError:
        """Check how an image is refused, by each way in, and that nothing came of it."""
        manager = self.manager(source, **config)
        attempts: tuple[Callable[[], object], ...] = (
            lambda: manager.create_disk(image_id, self.disk, request=request),
            lambda: manager.cache_image(image_id, request=request),
        )
        refusals = []
        for attempt in attempts:
            with self.leaves_nothing(), self.assertRaises(errors.ImageCacheError) as caught:
                attempt()
            refusal = caught.exception
            refusals.append(refusal)
            self.assertIsInstance(refusal, kind)
            self.assertEqual(image_id, refusal.image)
            self.assertTrue(refusal.next_step, refusal)
            for word in (image_id, *words):
                self.assertIn(word, str(refusal))
        published = [event.image_id for event in self.events if isinstance(event, events.Published)]
        self.assertNotIn(image_id, published)
        # The next good request, by the same manager.
        good = model.Request(source=FakeSource({f"good for {image_id}": DATA}))
        self.assertEqual(DATA, self.spawn(manager, f"good for {image_id}", request=good))
        manager.evict_image(f"good for {image_id}")
        return refusals[-1]


class TestSources(BadInputCase):
    def test_an_unknown_image(self) -> None:
        self.refused(errors.ImageNotFound, FakeSource({}))

    def test_an_image_whose_file_may_not_be_read_or_is_gone(self) -> None:
        self.refused(errors.ImageNotFound, FileSource({BAD: FileImage(self.directory / "absent")}))

    def test_an_image_that_is_not_active(self) -> None:
        for status, kind in (
            ("queued", errors.SourceError),
            ("saving", errors.SourceError),
            ("deactivated", errors.ImageRejected),
            ("killed", errors.ImageRejected),
            ("deleted", errors.ImageNotFound),
        ):
            with self.subTest(status=status):
                source = FakeSource({status: DATA})
                source.change_status(status, status)
                with self.leaves_nothing(), self.assertRaises(kind) as caught:
                    self.manager(source).create_disk(status, self.disk)
                self.assertIn(status, str(caught.exception))
                self.assertTrue(caught.exception.next_step)

    def test_an_image_without_data(self) -> None:
        self.refused(errors.ImageRejected, FakeSource({BAD: b""}), "no data")
        self.refused(errors.ImageRejected, FakeSource({BAD: b""}, sizes=False, digests=False), "no data")

    def test_a_wrong_digest(self) -> None:
        source = FakeSource({BAD: DATA})
        source.change_data(BAD, DATA[:-1] + b"x")
        error = self.refused(errors.ImageRejected, source, "sha512")
        self.assertIn(hashlib.sha512(DATA).hexdigest(), str(error))
        self.assertEqual(2, self.happened(events.Rejected))

    def test_a_digest_of_an_unknown_kind(self) -> None:
        path = self.directory / "image"
        path.write_bytes(DATA)
        for algorithm in ("crc32", "shake_128", "", "\0"):
            with self.subTest(algorithm=algorithm):
                image = FileImage(path, digest=model.Digest(algorithm, "00"))
                self.refused(errors.ImageRejected, FileSource({BAD: image}))

    def test_too_few_and_too_many_bytes(self) -> None:
        cases = (
            (DATA[:-1], False, errors.SourceError),
            (DATA + b"x", False, errors.SourceError),
            (DATA + b"x", True, errors.ImageRejected),
        )
        for data, digests, kind in cases:
            with self.subTest(kind=kind, digests=digests):
                source = FakeSource({BAD: DATA}, digests=digests)
                source.change_data(BAD, data)
                self.refused(kind, source)

    def test_a_source_that_fails(self) -> None:
        source = FakeSource({BAD: DATA})
        source.fail_describe(*[errors.SourceError("the server is down") for _ in range(2)])
        self.refused(errors.SourceError, source, "the server is down")

    def test_bad_ids(self) -> None:
        self.manager().cache_image(ID)
        for image_id in ("", "a\0b", "a\nb", "\x7f", "x" * 1025, "\ud800"):
            with self.subTest(image_id=image_id):
                manager = self.manager()
                for attempt in (
                    lambda: manager.create_disk(image_id, self.disk),  # noqa: B023
                    lambda: manager.cache_image(image_id),  # noqa: B023
                    lambda: manager.pin(image_id, owner="me"),  # noqa: B023
                    lambda: manager.evict_image(image_id),  # noqa: B023
                    lambda: manager.fetch_file(image_id, self.disk),  # noqa: B023
                ):
                    with self.leaves_nothing(), self.assertRaises(errors.ImageRejected) as caught:
                        attempt()
                    self.assertTrue(caught.exception.next_step)


class TestHttp(BadInputCase):
    def setUp(self) -> None:
        super().setUp()
        self.server = self.enterContext(BadServer())
        self.http = self.reading(60.0)

    def reading(self, read: float) -> HttpSource:
        return HttpSource({BAD: HttpImage(f"{self.server.url}/image")}, timeout=(60.0, read))

    def test_a_transfer_that_is_cut_stalls_or_is_reset(self) -> None:
        for after in ("close", "reset", "stall", "drop"):
            with self.subTest(after=after):
                answer = Answer(body=DATA[:MIB], length=len(DATA), after=after)
                self.server.script("/image", answer)
                self.refused(errors.SourceError, self.reading(0.5))

    def test_a_server_that_never_ends(self) -> None:
        self.server.script("/image", Answer(body=DATA, length=-1, after="endless"))
        self.refused(errors.ImageRejected, self.http, max_virtual_size=8 * MIB)

    def test_no_permission(self) -> None:
        for status, kind in ((403, errors.ImageNotFound), (404, errors.ImageNotFound)):
            with self.subTest(status=status):
                self.server.script("/image", Answer(status=status))
                self.refused(kind, self.http)


class TestContent(BadInputCase):
    def image(self, format: str, options: str = "") -> bytes:
        return disk_image(self.directory, format, options=options)

    def rejected(self, data: bytes, claimed: str | None, *words: str, **config: Any) -> None:
        source = FakeSource({BAD: data}, disk_format=claimed)
        self.refused(errors.ImageRejected, source, *words, **config)
        self.sent = source.bytes_sent // 2

    def rejected_at_once(self, data: bytes, claimed: str | None, *words: str, **config: Any) -> None:
        """It is refused by its first bytes: the rest is never asked for."""
        self.rejected(data + bytes(4 * MIB), claimed, *words, **config)
        self.assertLessEqual(self.sent, 2 * MIB)

    def test_content_unlike_the_claim(self) -> None:
        for made, claimed in (
            ("qcow2", "raw"),
            ("qcow2", "vmdk"),
            ("vmdk", "qcow2"),
            ("vdi", "raw"),
            ("vhdx", "vhd"),
            ("qcow2", "iso"),
            ("qcow2", "ami"),
        ):
            with self.subTest(made=made, claimed=claimed):
                self.rejected(self.image(made), claimed, made, claimed)

    def test_raw_content_with_a_claim(self) -> None:
        for claimed in ("qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso", "ploop", "nonsense"):
            with self.subTest(claimed=claimed):
                self.rejected(DATA, claimed, "raw", claimed)

    def test_two_formats_at_once(self) -> None:
        iso = bytearray(self.image("qcow2"))
        iso[0x8000:0x8006] = b"\x01CD001"
        self.rejected(bytes(iso), "qcow2", "iso")
        self.rejected(bytes(iso), "iso", "qcow2")

    def test_a_format_that_nothing_here_supports(self) -> None:
        qed = self.image("qed")
        for claimed in (None, "qed"):
            with self.subTest(claimed=claimed):
                self.rejected_at_once(qed, claimed, "qed")
        luks = b"LUKS\xba\xbe\0\x01" + bytes(2 * MIB)
        self.rejected(luks, None, "luks")

    def test_a_qcow2_with_a_backing_file(self) -> None:
        secret, overlay = self.directory / "secret", self.directory / "overlay"
        secret.write_bytes(bytes(MIB))
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, overlay], check=True
        )
        self.rejected_at_once(overlay.read_bytes(), "qcow2", "backing file")
        self.rejected_at_once(overlay.read_bytes(), None, "backing file")

    def test_a_qcow2_with_a_data_file(self) -> None:
        image, data = self.directory / "image", self.directory / "data"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", image, "1M"], check=True
        )
        self.rejected_at_once(image.read_bytes(), "qcow2", "another file")

    def test_a_qcow2_with_features_that_nobody_knows(self) -> None:
        image = bytearray(self.image("qcow2"))
        image[72:80] = struct.pack(">Q", 1 << 40)
        self.rejected_at_once(bytes(image), "qcow2", "unknown features")

    def test_a_qcow2_that_is_truncated_or_garbage_behind_its_header(self) -> None:
        image = self.image("qcow2")
        for data in (image[:512], image[: 5 * 65536], image[:65536] + os.urandom(len(image) - 65536)):
            with self.subTest(length=len(data)):
                self.rejected(data, "qcow2")

    def test_an_absurd_virtual_size(self) -> None:
        image = bytearray(self.image("qcow2"))
        for size in (2**62, 2**63 + 1, 17 * 2**40):
            with self.subTest(size=size):
                image[24:32] = struct.pack(">Q", size)
                self.rejected_at_once(bytes(image), "qcow2", "virtual size")
        image[24:32] = bytes(8)
        self.rejected_at_once(bytes(image), "qcow2", "virtual size")

    def test_a_vmdk_of_a_type_that_is_not_allowed(self) -> None:
        sparse = self.image("vmdk", "subformat=monolithicSparse")
        self.rejected(sparse, "vmdk", "monolithicsparse", vmdk_allowed_types=("streamOptimized",))
        descriptor, flat = self.directory / "flat.vmdk", self.directory / "flat-flat.vmdk"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", descriptor, "1M"],
            check=True,
        )
        self.assertTrue(flat.exists())
        self.rejected(descriptor.read_bytes(), "vmdk")

    def test_a_vmdk_that_names_another_file(self) -> None:
        image = self.image("vmdk", "subformat=monolithicSparse")
        evil = image.replace(b'"source.vmdk"', b'"/etc/passwd"', 1)
        self.assertNotEqual(image, evil)
        self.rejected(evil, "vmdk")

    def test_what_qemu_img_cannot_convert(self) -> None:
        image = bytearray(self.image("vdi"))
        image[0x168:0x16C] = struct.pack("<I", 1000)  # its sector size
        self.rejected(bytes(image), "vdi")


class TestCacheDirectory(BadInputCase):
    def odd_entry(self, what: str) -> None:
        path = self.base(BAD)
        if what == "symbolic link":
            path.symlink_to(self.base(OTHER_ID))
        elif what == "directory":
            path.mkdir()
        else:
            os.mkfifo(path)

    def test_an_entry_that_is_no_regular_file_is_not_touched(self) -> None:
        for what in ("symbolic link", "directory", "FIFO"):
            with self.subTest(what=what):
                self.odd_entry(what)
                started = time.monotonic()
                self.refused(errors.CacheEntryError, FakeSource({BAD: DATA}), str(self.base(BAD)))
                self.assertLess(time.monotonic() - started, 60)
                if what == "directory":
                    self.base(BAD).rmdir()
                else:
                    self.base(BAD).unlink()

    def test_records_that_are_torn_or_something_else_are_absent(self) -> None:
        path = self.record(OTHER_ID)
        for damage in (b"", b"{", b"null", b"[]", os.urandom(100), path.read_bytes()[:-20], b"[" * 100_000):
            with self.subTest(damage=damage[:10]):
                path.write_bytes(damage)
                self.assertEqual(raw_image(2), self.spawn(self.manager(), OTHER_ID))
        self.assertEqual(1, self.source.opens)

    def test_no_instances_directory(self) -> None:
        for number in range(2):
            with self.assertRaises(errors.ConfigError) as caught:
                self.manager(instances_path=str(self.directory / "absent")).create_disk(ID, self.disk)
            self.assertIn("absent", str(caught.exception), number)
            self.assertTrue(caught.exception.next_step)
        self.assertFalse((self.directory / "absent").exists())

    def test_a_newer_layout_is_left_alone(self) -> None:
        version = self.base().parent / ".imagecache" / "version"
        version.write_bytes(b"2\n")
        with self.leaves_nothing(), self.assertRaises(errors.ConfigError):
            self.manager().create_disk(ID, self.disk)

    def test_a_lock_that_cannot_be_opened_is_an_error_of_ours(self) -> None:
        (self.instances / "locks" / f"nova-{self.base(BAD).name}").symlink_to("elsewhere")
        manager = self.manager(FakeSource({BAD: DATA}))
        with self.leaves_nothing(), self.assertRaises(errors.BackendError) as caught:
            manager.create_disk(BAD, self.disk)
        self.assertEqual(BAD, caught.exception.image)
        self.assertIn("locks", str(caught.exception))

    def test_no_room_is_found_out_before_a_byte_is_asked_for(self) -> None:
        source = FakeSource({BAD: DATA})
        room = os.statvfs(self.instances)
        manager = self.manager(source, free_space_low=room.f_blocks * room.f_frsize)
        with self.leaves_nothing(), self.assertRaises(errors.NoSpaceError) as caught:
            manager.create_disk(BAD, self.disk)
        self.assertEqual((BAD, 0), (caught.exception.image, source.opens))
        self.assertTrue(caught.exception.next_step)


class TestBackingHeaders(CacheCase):
    """``ensure_backing`` reads headers that guests may have written."""

    def overlay(self, backing: str, backing_format: str = "raw") -> str:
        path = self.target()
        files.overlay(path, backing, backing_format=backing_format, size="3M")
        return path

    def test_exactly_the_name_and_the_format_that_the_header_says_are_made(self) -> None:
        qcow2 = disk_image(self.directory, "qcow2")
        for image_id, format in (("converted", "raw"), ("as it came", "qcow2")):
            with self.subTest(format=format):
                path = self.overlay(str(self.base(image_id)), format)
                source = FakeSource({image_id: qcow2}, disk_format="qcow2")
                base = self.manager(source).ensure_backing(path, image_id=image_id)
                assert base is not None
                self.assertEqual(format, base.format)
                self.assertEqual(DATA, content_of(path, "qcow2"))
                os.unlink(path)

    def test_anything_else_is_refused(self) -> None:
        for backing in ("/etc/passwd", "relative", f"{self.instances}/{self.base().name}", "json:{}"):
            with self.subTest(backing=backing):
                path = self.overlay(backing)
                with self.assertRaises(errors.BackendError) as caught:
                    self.manager().ensure_backing(path, image_id=ID)
                self.assertEqual(ID, caught.exception.image)
                os.unlink(path)
        self.assertEqual(0, self.source.opens)

    def test_zero_bytes_in_the_name_are_refused(self) -> None:
        path = pathlib.Path(self.overlay(str(self.base())))
        data = path.read_bytes()
        parent = os.fsencode(self.base().parent)
        path.write_bytes(data.replace(parent, b"/\0" + parent[2:]))
        with self.assertRaises(errors.BackendError):
            self.manager().ensure_backing(str(path), image_id=ID)

    def test_a_fifo_is_not_waited_for(self) -> None:
        path = self.target()
        os.mkfifo(path)
        with self.assertRaises(errors.BackendError):
            self.manager().ensure_backing(path, image_id=ID)

    def test_a_disk_without_a_base_needs_nothing(self) -> None:
        path = pathlib.Path(self.target())
        path.write_bytes(DATA)
        self.assertIsNone(self.manager().ensure_backing(str(path), image_id=ID))

    def test_an_empty_file_is_not_used_again_as_a_disk(self) -> None:
        path = pathlib.Path(self.target())
        for backend in ("qcow2", "raw"):
            manager = self.manager(backend=backend)
            for size in (None, 8 * MIB):
                with self.subTest(backend=backend, size=size):
                    path.write_bytes(b"")
                    with self.assertRaisesRegex(errors.BackendError, "empty"):
                        manager.create_disk(ID, str(path), size=size, if_exists="reuse")
                    with self.assertRaisesRegex(errors.BackendError, "empty"):
                        manager.create_swap(str(path), size_mb=4, if_exists="reuse")
                    self.assertEqual(0, path.stat().st_size)
