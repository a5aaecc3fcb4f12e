# SPDX-License-Identifier: Apache-2.0
"""What a scrub finds, what becomes of it, and how slowly it looks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import imagecache_lib as ic
from imagecache_lib import events, model
from imagecache_lib.store import checksums, layout
from imagecache_lib.system import locks, priority
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, content_of, raw_image
from tests.support.tokens import Looks


class ScrubCase(CacheCase):
    def flip(self, offset: int, image_id: str = ID) -> None:
        """Change one bit, and leave everything that is said of the file as it was."""
        path = self.base(image_id)
        before = path.stat()
        with path.open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 4]), offset)
            os.fsync(file.fileno())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def found(self, manager: ic.ImageCacheManager, **options: Any) -> ic.ScrubbedBase:
        (base,) = manager.scrub(**{"rate": 0, **options}).bases
        return base

    def damages(self) -> list[events.Damaged]:
        return [event for event in self.events if isinstance(event, events.Damaged)]


class TestInterrupts(ScrubCase):
    def test_a_slow_scrub_ends_soon_when_it_is_interrupted(self) -> None:
        """Its thread rests for hours at such a rate, and whoever ends the command waits for it."""
        rests = 0

        def rest(_seconds: float) -> None:
            nonlocal rests
            rests += 1
            if rests == 1:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.05)
            assert rests < 1000, "it goes on and on"

        manager = self.manager(host=self.host(sleep=rest))
        manager.cache_image(ID)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with self.assertRaises(KeyboardInterrupt):
                manager.scrub(rate=1)
        finally:
            signal.signal(signal.SIGINT, before)
        self.assertLess(rests, 1000)
        self.assertIs(ic.Verdict.SOUND, self.found(self.manager()).verdict)


class TestFinding(ScrubCase):
    def test_what_is_as_it_was_is_sound(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        manager.scrub()  # which makes the file whose time says when
        with self.leaves_nothing():
            base = self.found(manager)
        self.assertIs(ic.Verdict.SOUND, base.verdict)
        self.assertEqual(ID, base.image_id)
        # Holes are not read.
        self.assertLess(base.read, 2 * MIB)
        self.assertGreater(base.read, MIB)

    def test_a_flipped_bit_is_found_wherever_it_is(self) -> None:
        size = len(raw_image(1))
        manager = self.manager()
        for offset in (0, 100_000, size // 2, size - 1):
            with self.subTest(offset=offset):
                manager.cache_image(ID)
                self.flip(offset)
                base = self.found(manager)
                self.assertIs(ic.Verdict.DAMAGED, base.verdict)
                granule = offset // checksums.GRANULE * checksums.GRANULE
                self.assertIn(f"the first at byte {granule}", base.detail)

    def test_data_that_became_a_hole_is_found(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        size = self.base().stat().st_size
        with self.base().open("r+b") as file:
            file.truncate(0)
            file.truncate(size)
        self.assertIs(ic.Verdict.DAMAGED, self.found(manager).verdict)

    def test_a_base_that_came_as_qcow2_and_stays_one_is_compared_too(self) -> None:
        manager = self.manager(force_raw_images=False)
        manager.cache_image(ID)
        self.flip(5)
        self.assertIs(ic.Verdict.DAMAGED, self.found(manager).verdict)

    def test_generated_bases_are_compared_too(self) -> None:
        manager = self.manager()
        manager.create_swap(self.target(), size_mb=8)
        (base,) = manager.scrub(rate=0).bases
        self.assertIs(ic.Verdict.SOUND, base.verdict)
        self.assertIsNone(base.image_id)


class TestWithoutChecksums(ScrubCase):
    """Somebody else made it, or its checksums are lost."""

    def test_an_unconverted_one_is_compared_with_the_sources_digest(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.record().unlink()
        manager.cache_image(ID)
        self.record().with_suffix(".sums").unlink(missing_ok=True)
        self.assertIs(ic.Verdict.SOUND, self.found(manager).verdict)
        self.flip(3)
        base = self.found(manager)
        self.assertIs(ic.Verdict.DAMAGED, base.verdict)
        self.assertIn("sha512", base.detail)

    def test_of_the_rest_it_is_said_that_nobody_can_tell(self) -> None:
        self.manager(FakeSource({ID: raw_image(1)}, digests=False)).cache_image(ID)
        sums = self.record().with_suffix(".sums")
        sums.write_bytes(sums.read_bytes()[:-1])
        base = self.found(self.manager())
        self.assertIs(ic.Verdict.UNVERIFIABLE, base.verdict)
        self.record().unlink()
        base = self.found(self.manager())
        self.assertIs(ic.Verdict.UNVERIFIABLE, base.verdict)
        self.assertTrue(self.base().exists())


class TestWhatBecomesOfIt(ScrubCase):
    def test_one_that_nobody_uses_is_evicted_and_fetched_again_when_wanted(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.flip(7)
        base = self.found(manager)
        self.assertIsNone(base.stays)
        self.assertFalse(self.base().exists())
        self.assertIsNone(self.damages()[0].stays)
        self.assertEqual(raw_image(1), self.spawn(manager))
        self.assertIs(ic.Verdict.SOUND, self.found(manager).verdict)

    def test_one_in_use_is_reported_never_replaced_and_nobody_else_gets_it(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        self.flip(7)
        inode, content = self.base().stat().st_ino, self.base().read_bytes()
        base = self.found(manager)
        self.assertIn(disk.target, base.stays or "")
        self.assertEqual(base.stays, self.damages()[0].stays)
        other = manager.create_disk(ID, self.target(instance="instance-2"))
        self.assertEqual(raw_image(1), content_of(other.target, other.format))
        self.assertIsNone(other.base)
        self.assertEqual((inode, content), (self.base().stat().st_ino, self.base().read_bytes()))
        # Known already, and told again.
        self.assertIs(ic.Verdict.DAMAGED, self.found(manager).verdict)
        with self.assertRaisesRegex(ic.BackendError, "damaged"):
            manager.cache_image(ID)

    def test_the_mark_outlives_the_process_and_is_no_use(self) -> None:
        manager = self.manager()
        manager.create_disk(ID, self.target())
        for path in (self.base(), self.record()):
            os.utime(path, (1000, 1000))
        self.flip(7)
        self.found(manager)
        self.assertEqual(1000, self.record().stat().st_mtime)
        with self.assertRaisesRegex(ic.BackendError, "damaged"):
            self.manager().cache_image(ID)

    def test_one_that_was_replaced_while_it_was_read_is_let_be(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.flip(7)
        slept: list[float] = []

        def replace(seconds: float) -> None:
            if not slept:
                self.base().unlink()
                self.manager().cache_image(ID)
            slept.append(seconds)

        base = self.found(self.manager(host=self.host(sleep=replace)), rate=MIB)
        self.assertIs(ic.Verdict.GONE, base.verdict)
        self.assertEqual([], self.damages())
        self.assertIs(ic.Verdict.SOUND, self.found(manager).verdict)


class _Once:
    """A cancellation that comes as soon as something is the case."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.is_set = condition


class TestPace(ScrubCase):
    def test_a_flipped_bit_is_found_in_the_time_that_the_rate_allows(self) -> None:
        now = [1000.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds

        host = System(name="here", clock=lambda: now[0], sleep=sleep)
        manager = self.manager(host=host, scrub_rate=MIB // 4)
        manager.cache_image(ID)
        manager.cache_image(OTHER_ID)
        self.flip(len(raw_image(1)) - 1)
        began = now[0]
        report = manager.scrub()
        self.assertEqual([ID], [base.image_id for base in report.damaged])
        self.assertAlmostEqual(report.read / (MIB // 4), now[0] - began, delta=0.01)
        self.assertAlmostEqual(3 * MIB, report.read, delta=MIB // 4)

    def test_the_longest_unchecked_comes_first_and_a_cancelled_one_goes_on(self) -> None:
        manager = self.manager()
        for image_id in (ID, OTHER_ID):
            manager.cache_image(image_id)
        os.utime(self.record(OTHER_ID).with_suffix(".sums"), (1000, 1000))
        checked = self.record(OTHER_ID).with_suffix(".sums")
        found = manager.scrub(rate=0, cancel=_Once(lambda: checked.stat().st_mtime > 1000)).bases
        self.assertEqual([OTHER_ID], [base.image_id for base in found])
        cancel = threading.Event()
        found = manager.scrub(rate=0, cancel=cancel).bases
        self.assertEqual([ID, OTHER_ID], [base.image_id for base in found])
        cancel.set()
        self.assertEqual((), manager.scrub(rate=0, cancel=cancel).bases)

    def test_a_cancellation_ends_it_within_a_base(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.assertEqual((), manager.scrub(rate=0, cancel=Looks(2)).bases)

    def test_a_cancellation_ends_the_wait_for_the_process_that_has_a_damaged_base(self) -> None:
        manager, cancel = self.manager(), threading.Event()
        manager.cache_image(ID)
        self.flip(0)
        lock = str(self.instances / "locks" / layout.lock_name(self.base().name))
        self.points.at("lock:waiting", cancel.set)
        with (
            locks.without_waiting(lock, host=self.host()),
            self.assertNoLogs("imagecache_lib.system.locks"),  # what the end of lock_timeout is told by
        ):
            self.assertIs(ic.Verdict.DAMAGED, self.found(manager, cancel=cancel).verdict)
        self.assertEqual(1, len(self.damages()))
        self.assertFalse(manager.is_cached(ID))

    def test_only_those_asked_for(self) -> None:
        manager = self.manager()
        for image_id in (ID, OTHER_ID):
            manager.cache_image(image_id)
        found = manager.scrub([OTHER_ID], rate=0).bases
        self.assertEqual([OTHER_ID], [base.image_id for base in found])

    def test_its_thread_yields_the_disk_to_everybody_else(self) -> None:
        seen: list[int] = []

        def look() -> None:
            priority.be_modest()
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

        before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        self.assertEqual([10], seen)
        self.assertEqual(before, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))


class TestMark(CacheCase):
    def test_a_record_without_the_mark_is_of_a_sound_base(self) -> None:
        self.manager().cache_image(ID)
        text = self.record().read_text().replace('"damaged": false, ', "")
        self.assertNotIn("damaged", text)
        self.record().write_text(text)
        self.assertIs(model.CacheResult.EXISTING, self.manager().cache_image(ID))
