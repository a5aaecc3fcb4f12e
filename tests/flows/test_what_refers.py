# SPDX-License-Identifier: Apache-2.0
"""References by what they mean, the last report for every evictor, and small files that stop nothing."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.upkeep import headers
from imagecache_lib.upkeep.follow import CannotTell, Follower, Nothing
from tests.flows.test_upkeep import NAME, OLD, UpkeepCase
from tests.support import files
from tests.support.cache_case import ID, MIB, OTHER_ID


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(each):04x}" for each in text)


class TestMeaning(UpkeepCase):
    def disk(self, backing: str | os.PathLike[str], instance: str = "uuid") -> pathlib.Path:
        path = self.instances / instance / "disk"
        files.overlay(path, backing)
        return path

    def assertCounts(self, base: pathlib.Path) -> None:
        self.unused()
        self.assertKept(base, self.verify(), "used by")

    def test_names_count_however_they_are_spelled(self) -> None:
        base = self.cached()
        nested = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(base)}})
        for backing in (
            f'json:{{"driver":"raw","file":{{"driver":"file","filename":"/x/{escaped(NAME)}"}}}}',
            f"json:{{'driver':'raw','file':{{'driver':'file','filename':'/x/{escaped(NAME)}'}}}}",
            "json:" + json.dumps({"driver": "raw", "file": {"filename": "json:" + nested}}),
            "/x/" + "".join(f"%{ord(each):02x}" for each in NAME),
            "/x/" + "".join(f"%25{ord(each):02X}" for each in NAME),
            f"/x/{NAME.upper()}",
        ):
            with self.subTest(backing):
                self.disk(backing)
                self.assertCounts(base)

    def test_a_backing_file_that_is_a_link_to_the_base_counts(self) -> None:
        base = self.cached()
        link = self.directory / "any-name"
        link.symlink_to(base)
        self.disk(link)
        self.assertCounts(base)

    def test_a_link_to_the_base_in_an_instance_directory_counts(self) -> None:
        base = self.cached()
        (self.instances / "uuid").mkdir()
        (self.instances / "uuid" / "kernel").symlink_to(base)
        self.assertCounts(base)

    def test_an_external_data_file_counts(self) -> None:
        base = self.cached()
        link = self.directory / "data"
        disk = self.instances / "uuid" / "disk"
        disk.parent.mkdir()
        options = f"data_file={link},data_file_raw=on"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, disk, "1M"], check=True)
        link.unlink()
        link.symlink_to(base)
        self.assertCounts(base)

    def test_overlays_of_another_format_than_qcow2_count(self) -> None:
        base = self.cached()
        disk = self.instances / "uuid" / "disk"
        disk.parent.mkdir()
        options = ["-F", "raw", "-b", str(base), str(disk), "1M"]
        subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qed", *options], check=True)
        self.assertCounts(base)

    def test_names_beside_the_magic_of_a_format_that_may_have_a_parent_count(self) -> None:
        base = self.cached()
        disk = self.instances / "uuid" / "disk"
        disk.parent.mkdir()
        for magic in (b"KDMV", b"COWD", b"# Disk DescriptorFile\n", b"conectix", b"vhdxfile"):
            for encoding in ("ascii", "utf-16-le", "utf-16-be"):
                with self.subTest((magic, encoding)):
                    disk.write_bytes(magic.ljust(1024, b"\0") + str(base).encode(encoding) + bytes(512))
                    self.assertCounts(base)
        disk.write_bytes(b"vhdxfile".ljust(3 * MIB, b"\0") + str(base).encode("utf-16-le"))
        self.assertCounts(base)

    def test_a_name_at_the_end_of_a_large_header_cluster_counts(self) -> None:
        base = self.cached()
        disk = self.instances / "uuid" / "disk"
        disk.parent.mkdir()
        options = ["-o", "cluster_size=2M", "-F", "raw", "-b", str(base)]
        subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *options, disk, "1M"], check=True)
        head = bytearray(disk.read_bytes()[: 2 * MIB])
        offset, size = struct.unpack_from(">QI", head, 8)
        late = 2 * MIB - size
        head[late:], head[offset : offset + size] = head[offset : offset + size], bytes(size)
        struct.pack_into(">Q", head, 8, late)
        disk.write_bytes(head)
        self.assertCounts(base)

    def test_headers_are_whole_however_few_bytes_a_read_returns(self) -> None:
        self.cached()
        path = self.disk("/x/" + "y" * 900 + f"/{NAME}")
        read_end, write_end = os.pipe()
        os.write(write_end, b"QFI")
        os.close(write_end)
        fd = os.open(path, os.O_RDONLY)
        try:
            head = os.pread(fd, 100, 0)
            (backing,) = headers.references(fd, head)
            self.assertTrue(backing.endswith(NAME.encode()))
            self.assertEqual(
                b"QFI", os.read(read_end, headers.HEAD), "a read may return less than is asked for"
            )
        finally:
            os.close(fd)
            os.close(read_end)

    def test_a_chain_counts_through_json_and_beyond_another_base_s_name(self) -> None:
        base, other = self.cached(), self.cached(OTHER_ID)
        outside = self.directory / "outside"
        files.overlay(outside / f"{other.name}-copy", base)
        reference = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": f"{outside}/{other.name}-copy"},
        }
        files.overlay(outside / "two", "json:" + json.dumps(reference), backing_format="qcow2")
        files.overlay(self.instances / "uuid" / "disk", outside / "two", backing_format="qcow2")
        self.assertCounts(base)

    def test_a_chain_of_a_hundred_files_counts(self) -> None:
        base = self.cached()
        before: pathlib.Path = base
        for number in range(100):
            files.overlay(self.directory / "outside" / str(number), before)
            before = self.directory / "outside" / str(number)
        self.disk(before)
        self.assertCounts(base)

    def test_a_chain_that_cannot_be_read_now_keeps_what_it_led_to(self) -> None:
        base = self.cached()
        outside = self.directory / "outside"
        files.overlay(outside / "between", base)
        disk = self.disk(outside / "between")
        self.verify()
        outside.rename(self.directory / "unmounted")
        for _pass in range(2):
            self.assertCounts(base)
        self.assertIn(str(disk), self.verify().problems[0])
        disk.unlink()
        self.unused()
        self.verify()
        self.assertFalse(base.exists())

    def test_a_chain_that_leads_nowhere_and_never_did_stops_nothing(self) -> None:
        base = self.cached()
        self.disk("/nonexistent/file")
        self.assertEqual((), self.verify().problems)
        self.assertFalse(base.exists())

    def test_a_file_that_does_not_answer_is_given_up(self) -> None:
        answers = threading.Event()
        asked = []

        def look(path: str, starts: Sequence[int]) -> Nothing:
            asked.append(path)
            answers.wait(60)
            return Nothing()

        follower = Follower(limit=0.01, looks=look)
        self.assertIsInstance(follower.look("/dead"), CannotTell)
        self.assertIsInstance(follower.look("/another"), CannotTell)
        self.assertEqual(["/dead"], asked, "while one look has not come back no other is begun there")
        answers.set()

    def test_sockets_that_go_while_their_directory_is_read_keep_nothing(self) -> None:
        """A guest that ends takes QEMU's sockets with it. The filesystem chooses which entry comes first."""
        base = self.cached()
        directory = self.instances / "uuid"
        directory.mkdir()
        sockets = [directory / f"monitor-{number}" for number in range(20)]
        for path in sockets:
            os.mkfifo(path)
        for number in range(10):
            (directory / f".disk.{number:032x}.new").touch()

        def end() -> None:
            for path in sockets:
                path.unlink(missing_ok=True)

        self.points.at("references:unfinished", end)
        report = self.verify()
        self.assertFalse(any(path.exists() for path in sockets))
        self.assertFalse(base.exists(), report)

    def test_nothing_but_a_regular_file_is_opened(self) -> None:
        pipe = self.directory / "pipe"
        os.mkfifo(pipe)
        self.assertIsInstance(Follower().look(str(pipe)), Nothing)
        self.assertIsInstance(Follower().look("/nonexistent"), CannotTell)


class TestLastReport(UpkeepCase):
    """A storage whose disks no disk root holds is known by the driver's report alone."""

    def setUp(self) -> None:
        super().setUp()
        self.cached()
        self.verify([ic.Instance("uuid", "there", images=(ID,))])
        self.unused()

    def test_an_eviction_by_name_knows_it(self) -> None:
        with self.assertRaisesRegex(errors.BackendError, "used by instance uuid"):
            self.manager().evict_image(ID)
        self.assertTrue(self.base().exists())

    def test_an_eviction_for_lack_of_room_knows_it(self) -> None:
        with self.assertRaises(errors.NoSpaceError):
            self.manager(free_space_low=2**60).cache_image(OTHER_ID)
        self.assertTrue(self.base().exists())

    def test_the_scrub_knows_it(self) -> None:
        with open(self.base(), "r+b") as file:
            file.write(b"rot")
        (found,) = self.manager().scrub(rate=0).bases
        self.assertIn("used by instance uuid", str(found.stays))
        self.assertTrue(self.base().exists())

    def test_a_request_that_the_base_does_not_serve_knows_it(self) -> None:
        record = json.loads(self.record().read_text())
        self.record().write_text(json.dumps({**record, "damaged": True}))
        self.unused()
        self.spawn(self.manager())
        self.assertTrue(self.base().exists())

    def test_a_dry_run_and_a_driver_that_cannot_tell_do_not_change_it(self) -> None:
        self.verify([], dry_run=True)
        self.verify(None)
        self.test_an_eviction_by_name_knows_it()

    def test_the_next_report_replaces_it(self) -> None:
        self.verify([ic.Instance("another", "there")])
        self.assertFalse(self.base().exists())

    def test_a_damaged_report_keeps_everything_until_the_next_one(self) -> None:
        (kept,) = (self.private / "hosts").glob("*.scan")
        kept.write_text("{")
        with self.assertRaisesRegex(errors.BackendError, "is damaged"):
            self.manager().evict_image(ID)
        self.verify([])
        self.assertFalse(self.base().exists())

    def test_a_report_may_be_any_iterable(self) -> None:
        self.manager().verify_base_images(each for each in [ic.Instance("uuid", "there", images=[ID])])  # type: ignore[arg-type]
        self.assertTrue(self.base().exists())

    def test_text_where_several_values_belong_is_refused(self) -> None:
        for field in ("images", "directories", "ephemerals"):
            with self.assertRaisesRegex(errors.ConfigError, f"{field} of instance uuid is 'x'"):
                ic.Instance("uuid", "here", **{field: "x"})  # type: ignore[arg-type]


class TestInterruption(UpkeepCase):
    def interrupted(self, at: str, by: Callable[[], object]) -> None:
        base = self.cached()
        inode = base.stat().st_ino
        self.points.at(at, by)
        with self.assertRaises((Interrupt, errors.BackendError)):
            self.verify()
        self.assertEqual(inode, base.stat().st_ino)
        self.assertEqual([], os.listdir(self.private / "trash"))

    def test_an_interrupt_puts_back_what_was_renamed(self) -> None:
        for point in ("evict:renamed", "evict:read", "evict:unlink"):
            with self.subTest(point):
                self.interrupted(point, raise_interrupt)

    def test_a_second_reading_that_fails_puts_back_what_was_renamed(self) -> None:
        def break_pins() -> None:
            shutil.rmtree(self.private / "pins")
            (self.private / "pins").write_bytes(b"")

        self.interrupted("evict:renamed", break_pins)

    def test_another_process_that_starts_leaves_an_eviction_alone(self) -> None:
        base = self.cached()
        other = self.manager(host=self.host(trace=lambda _point: None))
        self.points.at("evict:renamed", lambda: other.pin(OTHER_ID, owner="start"))
        self.verify()
        self.assertFalse(base.exists())


class Interrupt(BaseException):
    """As KeyboardInterrupt, or the timeout of a green thread."""


def raise_interrupt() -> None:
    raise Interrupt


class TestForgetting(UpkeepCase):
    def host_ids(self) -> dict[str | None, str]:
        return {host.name: host.id for host in self.manager().list_hosts()}

    def on(self, name: str, **options: object) -> ic.ImageCacheManager:
        return self.manager(host=self.host(name=name), **options)  # type: ignore[arg-type]

    def test_an_id_is_looked_up_and_leads_nowhere_else(self) -> None:
        self.manager().pin(ID, owner="x")
        for bad in ("../x", f"../pins/{NAME}", "", "/etc/passwd", "no-such-host"):
            with self.subTest(bad), self.assertRaisesRegex(errors.ConfigError, "no host with the id"):
                self.manager().forget_host(bad)
        self.assertTrue((self.private / "pins" / f"{NAME}.json").exists())

    def test_the_own_host_stays_a_member_and_forgets_nothing(self) -> None:
        manager = self.manager()
        manager.verify_base_images([])
        manager.forget_host(self.host_ids()["here"])
        self.assertEqual(["here"], list(self.host_ids()))

    def test_a_host_that_was_forgotten_while_it_lives_registers_before_its_disk_gets_its_name(self) -> None:
        theirs = self.directory / "theirs"
        theirs.mkdir()
        there = self.on("there", disk_roots=(str(theirs),))
        there.cache_image(ID)
        self.points.at("disk:made", lambda: self.on("here").forget_host(self.host_ids()["there"]))
        there.create_disk(ID, str(theirs / "disk"))
        self.assertIn("there", self.host_ids())
        self.unused()
        self.verify()
        there.verify_base_images([])
        self.assertTrue(self.base().exists())

    def test_a_host_that_was_forgotten_while_it_lives_registers_whatever_it_needs_a_base_for(self) -> None:
        theirs = self.directory / "theirs"
        theirs.mkdir()
        there = self.on("there", disk_roots=(str(theirs),))
        disk = there.create_disk(ID, str(theirs / "disk"))

        def lease() -> None:
            with there.fetch_or_reuse(ID):
                self.assertIn("there", self.host_ids())

        def lease_cached() -> None:
            with there.lease_cached(ID):
                self.assertIn("there", self.host_ids())

        for number, use in enumerate(
            (
                lambda: there.ensure_backing(disk.target, image_id=ID),
                lambda: there.create_disk(ID, disk.target, if_exists="reuse"),
                lambda: there.note_use(disk),
                lambda: there.cache_image(ID),
                lease,
                lease_cached,
            )
        ):
            with self.subTest(number):
                self.on("here").forget_host(self.host_ids()["there"])
                use()
                self.assertIn("there", self.host_ids())

    def test_a_host_that_only_novas_registry_names_has_to_look_too(self) -> None:
        base = self.cached()
        registry = self.instances / "compute_nodes"
        now = base.parent.stat().st_mtime
        registry.write_text(json.dumps({"nova-only": now, "long-gone": now - 2 * OLD, "here": now}))
        report = self.verify()
        self.assertIn("until these hosts have looked too: nova-only", self.reason(report))
        self.assertEqual(1, len(os.listdir(self.private / "trash")))
        (told,) = self.verify().problems
        self.assertIn("compute_nodes", told)
        self.on("nova-only").verify_base_images([])
        self.verify()
        self.assertEqual([], os.listdir(self.private / "trash"))

    def test_a_base_that_another_host_s_last_pass_saw_in_use_keeps_its_name(self) -> None:
        base = self.cached()
        theirs = self.directory / "theirs"
        files.overlay(theirs / "uuid" / "disk", base)
        there = self.on("there", disk_roots=(str(theirs),))
        there.verify_base_images([])
        self.unused()
        self.assertKept(base, self.verify(), "of another host")
        shutil.rmtree(theirs / "uuid")
        there.verify_base_images([])
        self.unused()
        self.verify()
        self.assertFalse(base.exists())


class TestSmallFiles(UpkeepCase):
    def test_a_lock_file_that_is_a_pipe_stops_no_dry_run(self) -> None:
        self.cached()
        lock = self.instances / "locks" / f"nova-{NAME}"
        lock.unlink(missing_ok=True)
        os.mkfifo(lock)
        done = threading.Event()

        def look() -> None:
            self.verify(dry_run=True)
            done.set()

        threading.Thread(target=look, daemon=True).start()
        self.assertTrue(done.wait(30))

    def test_a_directory_in_the_trash_gets_no_base_s_name(self) -> None:
        self.manager().pin(OTHER_ID, owner="x")
        (self.private / "trash" / f"{NAME}.{'1' * 32}" / "base").mkdir(parents=True)
        self.manager().cache_image(ID)
        self.assertTrue(self.base().is_file())

    def test_a_sound_scrub_takes_the_mark_of_a_damaged_base_back(self) -> None:
        self.cached()
        record = json.loads(self.record().read_text())
        self.record().write_text(json.dumps({**record, "damaged": True}))
        self.assertFalse(self.manager().is_cached(ID))
        self.manager().scrub(rate=0)
        self.assertTrue(self.manager().is_cached(ID))
