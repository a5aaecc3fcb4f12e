# SPDX-License-Identifier: Apache-2.0
"""From a request to a disk: misses, hits, formats, modes, and what may happen in between."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import stat
import threading
import time
from collections.abc import Iterator
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors, events, model
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.store import layout, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, content_of, disk_image, raw_image

DATA = raw_image(1)


class TestMissAndHit(CacheCase):
    def test_a_miss_fetches_and_every_hit_leaves_the_source_alone(self) -> None:
        manager = self.manager()
        self.assertEqual(DATA, self.spawn(manager))
        asked = (self.source.describes, self.source.opens)
        for _ in range(3):
            self.assertEqual(DATA, self.spawn(manager))
        self.assertEqual(DATA, self.spawn(self.manager()))
        self.assertEqual(asked, (self.source.describes, self.source.opens))
        self.assertEqual((1, 1), asked)
        self.assertEqual((1, 4), (self.happened(events.Published), self.happened(events.Hit)))

    def test_the_disk_is_an_overlay_that_names_its_base_and_the_format_of_it(self) -> None:
        disk = self.manager().create_disk(ID, self.target(), size=8 * MIB)
        self.assertEqual(("qcow2", 8 * MIB, self.base().name), (disk.format, disk.virtual_size, disk.base))
        self.assertEqual(DATA + bytes(5 * MIB), content_of(disk.target, "qcow2"))
        pinned = json.loads((pathlib.Path(disk.target).parent / "disk.info").read_bytes())
        self.assertEqual({disk.target: "qcow2"}, pinned)

    def test_a_raw_disk_stands_alone(self) -> None:
        manager = self.manager(backend="raw")
        disk = manager.create_disk(ID, self.target(), size=8 * MIB)
        self.assertIsNone(disk.base)
        manager.evict_image(ID)
        self.assertEqual(DATA + bytes(5 * MIB), pathlib.Path(disk.target).read_bytes())

    def test_modes_do_not_depend_on_the_umask(self) -> None:
        self.addCleanup(os.umask, os.umask(0o077))
        disk = self.manager().create_disk(ID, self.target())
        for path, mode in (
            (self.base(), 0o644),
            (self.base().parent, 0o755),
            (self.base().parent / ".imagecache", 0o700),
            (pathlib.Path(disk.target), 0o644),
        ):
            self.assertEqual(oct(mode), oct(stat.S_IMODE(path.stat().st_mode)), path)

    def test_zeros_become_holes(self) -> None:
        self.source = FakeSource({ID: os.urandom(MIB) + bytes(63 * MIB)})
        self.manager().cache_image(ID)
        found = self.base().stat()
        self.assertEqual(64 * MIB, found.st_size)
        self.assertLessEqual(found.st_blocks * 512, 2 * MIB)

    def test_nothing_stays_in_flight(self) -> None:
        self.spawn(self.manager())
        self.assertEqual([], self.in_flight())
        self.assertEqual(1, self.base().stat().st_nlink)

    def test_an_image_of_no_known_size_and_digest_is_fetched_too(self) -> None:
        self.source = FakeSource({ID: DATA}, sizes=False, digests=False)
        self.assertEqual(DATA, self.spawn(self.manager()))
        with self.manager().fetch_or_reuse(ID) as base:
            self.assertIsNone(base.digest)

    def test_a_raw_image_that_ends_within_a_sector_is_whole(self) -> None:
        for backend in ("raw", "qcow2"):
            with self.subTest(backend=backend):
                data = DATA[: MIB + 100]
                self.source = FakeSource({backend: data})
                self.assertEqual(data + bytes(412), self.spawn(self.manager(backend=backend), backend))

    def test_any_id_will_do_that_is_text(self) -> None:
        for image_id in ("../../etc/passwd", "http://x/", " ", "K\u00f6ln", "x" * 1024):
            with self.subTest(image_id=image_id):
                self.source = FakeSource({image_id: DATA})
                self.assertEqual(DATA, self.spawn(self.manager(), image_id))
                self.assertTrue(self.base(image_id).is_file())


class TestFormats(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.qcow2 = disk_image(self.directory, "qcow2", options="compression_type=zlib")

    def test_what_is_fetched_is_converted_to_raw(self) -> None:
        for format in ("qcow2", "vmdk", "vpc", "vhdx", "vdi"):
            options = {"vmdk": "subformat=streamOptimized", "vpc": "force_size=on"}.get(format, "")
            claimed = {"vpc": "vhd"}.get(format, format)
            with self.subTest(format=format):
                data = disk_image(self.directory, format, options=options)
                source = FakeSource({format: data}, disk_format=claimed)
                self.assertEqual(DATA, self.spawn(self.manager(source), format)[: len(DATA)])
                self.assertEqual(DATA, self.base(format).read_bytes()[: len(DATA)])
                self.assertEqual([], self.in_flight())

    def test_without_force_raw_what_is_fetched_is_stored_as_it_came(self) -> None:
        self.source = FakeSource({ID: self.qcow2}, disk_format="qcow2")
        for backend in ("qcow2", "raw"):
            with self.subTest(backend=backend):
                manager = self.manager(backend=backend, force_raw_images=False)
                disk = manager.create_disk(ID, self.target(backend), size=8 * MIB)
                self.assertEqual("qcow2", disk.format)
                self.assertEqual(DATA + bytes(5 * MIB), content_of(disk.target, "qcow2"))
        self.assertEqual(self.qcow2, self.base().read_bytes())

    def test_a_bases_format_comes_from_its_record_and_not_from_the_configuration(self) -> None:
        self.source = FakeSource({ID: self.qcow2}, disk_format="qcow2")
        self.manager(force_raw_images=False).cache_image(ID)
        before = self.base().stat().st_ino
        self.assertEqual(DATA, self.spawn(self.manager(force_raw_images=True)))
        self.assertEqual((before, 1), (self.base().stat().st_ino, self.source.opens))
        with self.manager(force_raw_images=True).fetch_or_reuse(ID) as base:
            self.assertEqual("qcow2", base.format)

    def test_a_size_below_the_images_is_refused_before_anything_is_written(self) -> None:
        for image_id, data, format in (("raw", DATA, "raw"), ("qcow2", self.qcow2, "qcow2")):
            with self.subTest(format=format):
                source = FakeSource({image_id: data}, disk_format=format)
                manager = self.manager(source)
                target = self.target()
                self.spawn(self.manager())
                with self.leaves_nothing(), self.assertRaises(errors.DiskTooSmallError) as caught:
                    manager.create_disk(image_id, target, size=2 * MIB)
                self.assertEqual(image_id, caught.exception.image)
                self.assertIn("flavor", str(caught.exception))
                self.assertLess(source.bytes_sent, len(data))
                # The same image fits another disk.
                self.assertEqual(DATA, self.spawn(manager, image_id, size=3 * MIB))

    def test_a_size_below_a_cached_base_s_is_refused(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        target = self.target()
        with self.leaves_nothing(), self.assertRaises(errors.DiskTooSmallError):
            manager.create_disk(ID, target, size=len(DATA) - 512)


class TestTargets(CacheCase):
    def test_an_existing_target_is_refused_before_anything_is_fetched(self) -> None:
        manager = self.manager()
        self.spawn(manager, OTHER_ID)
        target = pathlib.Path(self.target())
        for what in ("file", "link"):
            with self.subTest(what=what):
                if what == "file":
                    target.write_bytes(b"precious")
                else:
                    target.unlink()
                    target.symlink_to("nowhere")
                for attempt in (manager.create_disk, manager.fetch_file):
                    with self.leaves_nothing(), self.assertRaises(errors.DiskExistsError) as caught:
                        attempt(ID, str(target))
                    self.assertEqual(ID, caught.exception.image)
                    self.assertIn(str(target), str(caught.exception))
        self.assertEqual(1, self.source.opens)

    def test_a_target_that_cannot_be_is_refused_before_anything_is_fetched(self) -> None:
        manager = self.manager()
        self.spawn(manager, OTHER_ID)
        for target in ("relative", f"{self.instances}/absent/disk", f"{self.directory}/", "/a\0b", ""):
            with self.subTest(target=target):
                with self.leaves_nothing(), self.assertRaises(errors.BackendError) as caught:
                    manager.create_disk(ID, target)
                self.assertEqual(ID, caught.exception.image)
                self.assertIsNotNone(caught.exception.next_step)
        self.assertEqual(1, self.source.opens)

    def test_a_disk_that_is_there_can_be_used_again(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        inode = os.stat(disk.target).st_ino
        again = manager.create_disk(ID, disk.target, size=8 * MIB, if_exists="reuse")
        self.assertEqual((inode, 8 * MIB), (os.stat(disk.target).st_ino, again.virtual_size))
        self.assertEqual(DATA + bytes(5 * MIB), content_of(disk.target, "qcow2"))

    def test_a_disk_whose_content_a_power_cut_may_have_taken_is_not_used_again(self) -> None:
        manager = self.manager(backend="raw", sync_copied_disks=False)
        disk = manager.create_disk(ID, self.target())
        manager.create_disk(ID, self.target("other"))
        restarted = self.manager(backend="raw", host=self.host(boot_id="another"))
        with self.assertRaisesRegex(errors.BackendError, "remove the disk and make it anew") as caught:
            restarted.create_disk(ID, disk.target, if_exists="reuse")
        self.assertEqual((ID, disk.target), (caught.exception.image, caught.exception.path))
        # On the host that made it, in the same run of its kernel, nothing can have been lost.
        manager.create_disk(ID, self.target("other"), if_exists="reuse")
        restarted.create_disk(ID, self.target("other"), if_exists="reuse")

    def test_a_disk_used_again_gets_its_lost_base_back(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        self.base().unlink()
        manager.create_disk(ID, disk.target, if_exists="reuse")
        self.assertEqual(DATA, content_of(disk.target, "qcow2"))

    def test_a_disk_used_again_grows_though_its_base_is_being_evicted(self) -> None:
        config = self.manager().config
        cache = CacheStore(config, self.host())

        class Raced(Qcow2Backend):
            """Another process evicts the base as the disk is about to grow, which it has not seen yet."""

            evictions = 1

            def resize(self, disk: model.Disk, size: int) -> model.Disk:
                if self.evictions:
                    self.evictions -= 1
                    trash.move_in(cache, layout.base_name(ID))
                return super().resize(disk, size)

        manager = ic.ImageCacheManager(config, self.source, Raced(config, self.host()), observers=())
        disk = manager.create_disk(ID, self.target())
        grown = manager.create_disk(ID, disk.target, size=8 * MIB, if_exists="reuse")
        self.assertEqual(8 * MIB, grown.virtual_size)
        self.assertEqual(DATA + bytes(5 * MIB), content_of(disk.target, "qcow2"))

    def test_a_target_taken_while_its_disk_is_made_is_left_alone(self) -> None:
        target = pathlib.Path(self.target())
        self.points.at("disk:confirmed", lambda: target.write_bytes(b"another's"))
        with self.assertRaises(errors.DiskExistsError):
            self.manager().create_disk(ID, str(target))
        self.assertEqual(b"another's", target.read_bytes())
        self.assertEqual(["disk"], os.listdir(target.parent))


class TestVanishingBases(CacheCase):
    """Whatever becomes of the base meanwhile, the caller gets a disk whose base is there."""

    def evict_behind_its_back(self) -> None:
        self.base().unlink()
        self.record().unlink()

    def test_a_base_that_goes_between_its_publication_and_its_use_is_fetched_again_unseen(self) -> None:
        self.points.at("publish:recorded", self.evict_behind_its_back)
        self.assertEqual(DATA, self.spawn(self.manager()))
        self.assertEqual(2, self.source.opens)

    def test_a_base_that_goes_while_the_disk_is_made_is_fetched_again_unseen(self) -> None:
        for backend in ("qcow2", "raw"):
            with self.subTest(backend=backend):
                self.points.at("disk:made", self.evict_behind_its_back)
                disk = self.manager(backend=backend).create_disk(ID, self.target(backend))
                self.assertEqual(DATA, content_of(disk.target, disk.format))
                self.assertTrue(self.base().exists())
                self.assertEqual([], [name for name in os.listdir(self.target(".")) if name.endswith(".new")])

    def test_a_file_goes_the_same_way(self) -> None:
        self.points.at("disk:made", self.evict_behind_its_back)
        path = self.target("kernel")
        self.manager().fetch_file(ID, path)
        self.assertEqual(DATA, pathlib.Path(path).read_bytes())

    def test_a_base_that_always_goes_ends_with_an_error(self) -> None:
        for _ in range(100):
            self.points.at("disk:made", self.evict_behind_its_back)
        with self.assertRaises(errors.BackendError) as caught:
            self.manager().create_disk(ID, self.target())
        self.assertEqual(ID, caught.exception.image)
        self.assertEqual([], os.listdir(self.target(".")))

    def test_a_file_whose_base_always_goes_ends_with_an_error_too(self) -> None:
        for _ in range(100):
            self.points.at("disk:made", self.evict_behind_its_back)
        with self.assertRaises(errors.BackendError) as caught:
            self.manager().fetch_file(ID, self.target("kernel"))
        self.assertEqual(ID, caught.exception.image)
        self.assertEqual([], os.listdir(self.target(".")))

    def test_a_stage_that_is_always_swept_away_ends_with_an_error(self) -> None:
        stages = self.base().parent / ".imagecache" / "stage"

        def sweep() -> None:
            for path in stages.iterdir():
                path.unlink()

        for _ in range(100):
            self.points.at("stage:sync", sweep)
        with self.assertRaisesRegex(errors.BackendError, "stage directory") as caught:
            self.manager().create_disk(ID, self.target())
        self.assertEqual((ID, []), (caught.exception.image, self.in_flight()))
        self.assertLess(self.source.opens, 30)

    def test_another_file_under_its_name_is_noticed_even_with_its_inode_number(self) -> None:
        # The descriptor that the lease holds keeps the inode number from being given to the new file.
        def replace() -> None:
            self.base().unlink()
            path = self.base()
            for number in range(50):
                path = self.base().with_name(f"try-{number}")
                path.write_bytes(b"another's")
            os.rename(path, self.base())
            for left in self.base().parent.glob("try-*"):
                left.unlink()

        self.points.at("disk:made", replace)
        self.assertEqual(DATA, self.spawn(self.manager()))

    def test_what_lies_in_the_trash_is_linked_back_without_a_download(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        trash = self.base().parent / ".imagecache" / "trash"
        self.base().rename(trash / f"{self.base().name}.{'0' * 32}")
        self.assertEqual(DATA, self.spawn(manager))
        self.assertEqual((1, []), (self.source.opens, os.listdir(trash)))

    def test_a_lease_whose_base_goes_says_so_at_its_end(self) -> None:
        with self.assertRaises(errors.LeaseLostError), self.manager().fetch_or_reuse(ID) as base:
            assert base.fd is not None
            self.evict_behind_its_back()
            self.assertEqual(DATA, os.pread(base.fd, 2 * len(DATA), 0))

    def test_a_stage_that_is_swept_away_is_filled_again_unseen(self) -> None:
        stages = self.base().parent / ".imagecache" / "stage"

        def sweep() -> None:
            for path in stages.iterdir():
                path.unlink()

        for number, point in enumerate(("ingest:reserved", "stage:sync", "ingest:sealed", "publish:link")):
            with self.subTest(point=point):
                self.points.at(point, sweep)
                # Each a content of its own: one that is cached would not be fetched.
                data = raw_image(number)
                source = FakeSource({point: data})
                self.assertEqual(data, self.spawn(self.manager(source), point))
                self.assertEqual((2, []), (source.opens, self.in_flight()))

    def test_an_image_whose_stage_is_swept_before_qemu_img_converts_it_is_fetched_again(self) -> None:
        stages = self.base().parent / ".imagecache" / "stage"

        def sweep() -> None:
            for path in stages.iterdir():
                path.unlink()

        self.points.at("convert", sweep)
        data = disk_image(self.directory, "vdi")
        source = FakeSource({ID: data}, disk_format="vdi")
        self.assertEqual(DATA, self.spawn(self.manager(source)))
        self.assertEqual((2, []), (source.opens, self.in_flight()))


class TestObserversThatInterrupt(CacheCase):
    """What a notification raises that is no error: a time-out of a green thread, an interrupt."""

    def test_an_interrupt_at_any_event_leaves_nothing_in_flight(self) -> None:
        for number, kind in enumerate((events.Miss, events.Progress, events.Fetched, events.Published)):

            def interrupt(event: events.Event, kind: type[events.Event] = kind) -> None:
                if isinstance(event, kind):
                    raise KeyboardInterrupt

            with self.subTest(kind.__name__):
                image_id = f"image-{number}"
                self.source = FakeSource({image_id: raw_image(number + 10)})
                manager = self.manager()
                interrupted = ic.ImageCacheManager(
                    manager.config, self.source, host=self.host(), observers=(interrupt,)
                )
                with self.assertRaises(KeyboardInterrupt):
                    interrupted.create_disk(image_id, self.target(kind.__name__))
                self.assertEqual([], self.in_flight())
                manager.cache_image(image_id)
                manager.evict_image(image_id)
                self.assertFalse(self.base(image_id).exists())


class TestReports(CacheCase):
    def test_precaching_tells_what_it_took(self) -> None:
        manager = self.manager()
        report = manager.precache_image(ID)
        allocated = self.base().stat().st_blocks * 512
        self.assertEqual(ic.CacheReport(ic.CacheResult.CACHED, len(DATA), allocated), report)
        self.assertEqual(ic.CacheReport(ic.CacheResult.EXISTING), manager.precache_image(ID))
        self.assertIs(ic.CacheResult.EXISTING, manager.cache_image(ID))

    def test_usage_that_cannot_be_read_is_an_error_of_the_library(self) -> None:
        self.base().parent.symlink_to("_base")
        with self.assertRaises(errors.BackendError):
            self.manager().get_disk_usage()


class TestSourcesThatFail(CacheCase):
    def test_what_is_cached_goes_on_serving_when_the_image_is_gone(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.source.remove(ID)
        self.assertEqual(DATA, self.spawn(manager))

    def test_a_fallback_serves_what_is_gone_from_the_source(self) -> None:
        peer = FakeSource({ID: DATA})
        self.source.remove(ID)
        self.assertEqual(DATA, self.spawn(self.manager(), request=model.Request(fallbacks=(peer,))))

    def test_a_requests_own_source_is_the_one_that_is_asked(self) -> None:
        own = FakeSource({ID: DATA})
        self.spawn(self.manager(), request=model.Request(source=own))
        self.assertEqual((1, 0), (own.opens, self.source.opens))

    def test_a_transfer_that_breaks_goes_on_where_it_broke(self) -> None:
        self.source.break_at(MIB, 2 * MIB)
        manager = self.manager(num_retries=3, host=self.host(sleep=lambda _seconds: None))
        self.assertEqual(DATA, self.spawn(manager))
        self.assertEqual([0, MIB, 2 * MIB], self.source.offsets)

    def test_a_splice_of_two_versions_costs_one_clean_pass(self) -> None:
        self.source.break_at(MIB)
        self.source.change_data(ID, raw_image(3))
        self.points.at("transfer.open", lambda: None)
        self.points.at("transfer.open", lambda: self.source.change_data(ID, DATA))
        manager = self.manager(num_retries=3, host=self.host(sleep=lambda _seconds: None))
        self.assertEqual(DATA, self.spawn(manager))
        self.assertEqual([0, MIB, 0], self.source.offsets)


class TestResults(CacheCase):
    def test_caching_ahead_says_whether_it_fetched(self) -> None:
        manager = self.manager()
        self.assertIs(ic.CacheResult.CACHED, manager.cache_image(ID))
        self.assertIs(ic.CacheResult.EXISTING, manager.cache_image(ID))

    def test_an_adopted_base_was_there(self) -> None:
        self.base().parent.mkdir()
        self.base().write_bytes(DATA)
        self.assertIs(ic.CacheResult.EXISTING, self.manager().cache_image(ID))
        self.assertEqual(0, self.source.opens)

    def test_whoever_waited_while_another_fetched_fetched_nothing(self) -> None:
        stop = self.points.stop_at("ingest:reserved")
        first = self.running(lambda: self.manager().cache_image(ID))
        stop.wait()
        waiting = self.points.stop_at("lock:waiting")
        second = self.running(lambda: self.manager().cache_image(ID))
        waiting.wait()
        waiting.go_on()
        stop.go_on()
        self.assertIs(ic.CacheResult.CACHED, first.result())
        self.assertIs(ic.CacheResult.EXISTING, second.result())

    def test_observers_that_fail_do_no_harm(self) -> None:
        def fail(_event: events.Event) -> None:
            raise RuntimeError("an observer's own trouble")

        manager = ic.ImageCacheManager(
            ic.CacheConfig(instances_path=str(self.instances)),
            self.source,
            observers=(fail, self.events.append),
        )
        with self.assertLogs("imagecache_lib.events", "ERROR"):
            self.assertEqual(DATA, self.spawn(manager))
        self.assertEqual(1, self.happened(events.Published))

    def test_the_source_is_told_nothing_before_the_first_call(self) -> None:
        self.manager()
        self.assertEqual([], os.listdir(self.instances))


class TestWaiting(CacheCase):
    def test_one_download_for_many_threads(self) -> None:
        manager = self.manager()
        runs = [self.running(lambda: self.spawn(manager)) for _ in range(16)]
        self.assertEqual([DATA] * 16, [run.result() for run in runs])
        self.assertEqual(1, self.source.opens)

    def test_disks_of_one_image_are_made_at_the_same_time(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        stop = self.points.stop_at("disk:made")
        first = self.running(lambda: self.spawn(manager))
        stop.wait()
        self.assertEqual(DATA, self.spawn(manager))
        stop.go_on()
        self.assertEqual(DATA, first.result())

    def test_disks_of_one_image_are_made_at_the_same_time_by_those_who_waited_for_its_download(self) -> None:
        looking = self.points.stop_at("lease:shared")
        first = self.running(lambda: self.spawn(self.manager()))
        looking.wait()
        waiting = self.points.stop_at("lock:waiting")
        second = self.running(lambda: self.spawn(self.manager(lock_timeout=600.0)))
        waiting.wait()  # for the exclusive lock, since it has seen that there is no base
        # The first holds its lease for as long as its disk takes. The second must not wait for that.
        copying = self.points.stop_at("disk:made")
        looking.go_on()
        copying.wait()
        waiting.go_on()
        self.assertEqual(DATA, second.result())
        copying.go_on()
        first.result()

    def test_a_request_can_be_cancelled_while_it_waits(self) -> None:
        fetching = self.points.stop_at("ingest:reserved")
        first = self.running(lambda: self.spawn(self.manager()))
        fetching.wait()
        cancel = threading.Event()
        self.points.at("lock:waiting", cancel.set)
        target = self.target()
        with self.assertRaises(errors.CancelledError) as caught:
            self.manager().create_disk(ID, target, request=model.Request(cancel=cancel))
        self.assertEqual(ID, caught.exception.image)
        self.assertEqual([], os.listdir(os.path.dirname(target)))
        fetching.go_on()
        first.result()

    def test_a_deadline_ends_the_wait(self) -> None:
        fetching = self.points.stop_at("ingest:reserved")
        first = self.running(lambda: self.spawn(self.manager()))
        fetching.wait()
        now = [time.time()]
        self.points.at("lock:waiting", lambda: now.append(now[0] + 601))
        host = self.host(clock=lambda: now[-1])
        request = model.Request(deadline=now[0] + 600)
        with self.assertRaises(errors.LockTimeoutError) as caught:
            self.manager(host=host).create_disk(ID, self.target(), request=request)
        self.assertEqual(ID, caught.exception.image)
        fetching.go_on()
        first.result()

    def test_a_download_can_be_cancelled_and_leaves_nothing(self) -> None:
        now = [time.time()]
        manager = self.manager(host=self.host(clock=lambda: now[-1]))
        self.spawn(manager, OTHER_ID)
        target = self.target()
        self.points.at("transfer.chunk", (cancel := threading.Event()).set)
        self.points.at("transfer.chunk", lambda: now.append(now[0] + 601))
        for request, kind in (
            (model.Request(cancel=cancel), errors.CancelledError),
            (model.Request(deadline=now[0] + 600), errors.SourceError),
        ):
            with self.subTest(kind=kind):
                with self.leaves_nothing(), self.assertRaises(kind) as caught:
                    manager.create_disk(ID, target, request=request)
                self.assertEqual(ID, caught.exception.image)
        self.assertEqual(DATA, self.spawn(manager))

    def test_a_conversion_can_be_cancelled_and_leaves_nothing(self) -> None:
        data = disk_image(self.directory, "vmdk")
        for request, kind in (
            (model.Request(cancel=(cancel := threading.Event())), errors.CancelledError),
            (model.Request(deadline=time.time() + 600), errors.LockTimeoutError),
        ):
            with self.subTest(kind=kind):
                ahead = 0.0

                def execute(*command: str, **options: Any) -> tuple[str, str]:
                    nonlocal ahead
                    if "convert" not in command:
                        return ic.System().execute(*command, **options)
                    cancel.set()
                    ahead = 601.0
                    return ic.System().execute("sleep", "600", **options)  # a conversion that takes its time

                host = self.host(execute=execute, clock=lambda: time.time() + ahead)  # noqa: B023
                source = FakeSource({ID: data}, disk_format="vmdk")
                manager = self.manager(source, host=host)
                self.spawn(self.manager(), OTHER_ID)
                target, started = self.target(), time.monotonic()
                with self.leaves_nothing(), self.assertRaises(kind) as caught:
                    manager.create_disk(ID, target, request=request)
                self.assertEqual(ID, caught.exception.image)
                self.assertLess(time.monotonic() - started, 300)

    def test_a_holder_that_gets_nowhere_is_not_waited_for_any_longer(self) -> None:
        fetching = self.points.stop_at("ingest:reserved")
        first = self.running(lambda: self.spawn(self.manager()))
        fetching.wait()
        self.assertEqual(DATA, self.spawn(self.manager(lock_timeout=0.3)))
        fetching.go_on()
        self.assertEqual(DATA, first.result())
        self.assertEqual(2, self.source.opens)
        self.assertEqual([], self.in_flight())

    def test_a_holder_that_gets_on_is_waited_for(self) -> None:
        # Each chunk is written before the next is asked for, and the wait sees the stage file grow.
        source = _SlowSource({ID: os.urandom(4 * MIB)})
        fetching = self.points.stop_at("transfer.chunk")
        first = self.running(lambda: self.manager(source).cache_image(ID))
        fetching.wait()
        clock = _LookedAt()
        waiting = self.points.stop_at("lock:waiting")
        second = self.running(
            lambda: self.manager(source, lock_timeout=1.0, host=self.host(monotonic=clock)).cache_image(ID)
        )
        waiting.wait()
        waiting.go_on()
        fetching.go_on()
        for _ in range(7):
            self.assertTrue(source.asked.acquire(timeout=60))
            clock.go_on(0.25)  # the slowness itself: the download takes longer than the patience
            source.may.release()
        self.assertIs(ic.CacheResult.CACHED, first.result())
        self.assertIs(ic.CacheResult.EXISTING, second.result())
        self.assertEqual(1, source.opens)

    def test_only_so_many_are_fetched_at_a_time(self) -> None:
        manager = self.manager(max_concurrent_disk_ops=1)
        stop = self.points.stop_at("ingest:reserved")
        first = self.running(lambda: self.spawn(manager))
        stop.wait()
        other = _TellingSource({OTHER_ID: raw_image(2)})
        second = self.running(lambda: self.spawn(manager, OTHER_ID, request=model.Request(source=other)))
        other.described.wait(60)
        request = model.Request(deadline=time.time() + 5, source=FakeSource({"third": DATA}))
        with self.assertRaises(errors.LockTimeoutError):
            manager.fetch_file("third", self.target(), request=request)
        self.assertEqual(1, self.points.seen.count("ingest:reserved"))
        stop.go_on()
        self.assertEqual(DATA, first.result())
        self.assertEqual(raw_image(2), second.result())
        self.assertEqual([], self.in_flight())


class _TellingSource(FakeSource):
    """Tells when it was first asked."""

    def __init__(self, images: dict[str, bytes]) -> None:
        super().__init__(images)
        self.described = threading.Event()

    def describe(self, image_id: str) -> model.Image:
        self.described.set()
        return super().describe(image_id)


class _SlowSource(FakeSource):
    """Gives out a chunk only when it may.

    :ivar asked: is released as often as it is asked for another chunk.
    """

    def __init__(self, images: dict[str, bytes]) -> None:
        super().__init__(images, chunk_size=MIB // 2)
        self.asked, self.may = threading.Semaphore(0), threading.Semaphore(0)

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(image, offset) as chunks:
            yield self._slowly(chunks)

    def _slowly(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for number, chunk in enumerate(chunks):
            if number:
                self.asked.release()
                if not self.may.acquire(timeout=60):
                    raise AssertionError("nobody let it go on")
            yield chunk


class _LookedAt:
    """A clock that goes on as it is told, and then waits until it was looked at."""

    def __init__(self) -> None:
        self._now, self._looks = 0.0, threading.Semaphore(0)

    def __call__(self) -> float:
        self._looks.release()
        return self._now

    def go_on(self, seconds: float) -> None:
        self._now += seconds
        while self._looks.acquire(blocking=False):
            pass
        for _look in range(2):
            if not self._looks.acquire(timeout=60):
                raise AssertionError("nobody looks at the clock")
