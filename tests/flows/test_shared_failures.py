# SPDX-License-Identifier: Apache-2.0
"""Failure is shared as success is: who waited for a fetch that was refused for good gets that refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors, events, model
from imagecache_lib.sources.interface import Unauthorized
from imagecache_lib.store import failures, layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.evidence import Use
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, OTHER_ID, CacheCase, Points, Running, Stop, content_of, raw_image

OTHER = raw_image(9)


class SharedFailuresCase(CacheCase):
    def bad(self, data: bytes = OTHER) -> FakeSource:
        """Return a source whose data is not what it says."""
        source = FakeSource({ID: raw_image(1)})
        source.change_data(ID, data)
        return source

    def caller(
        self, source: FakeSource, points: Points, *, kernel: bool = False, **options: Any
    ) -> Callable[[], object]:
        manager = self.manager(source, host=self.host(trace=points), **options)
        target = self.target(f"disk{id(points)}")
        if kernel:
            return lambda: manager.fetch_file(ID, target)
        return lambda: manager.create_disk(ID, target)

    def fetching(self, source: FakeSource) -> tuple[Running, Stop]:
        """Return a call that holds the lock and fetches, stopped in the middle of it."""
        points = Points()
        stop = points.stop_at(TracePoint.TRANSFER_OPEN)
        running = self.running(self.caller(source, points))
        stop.wait()
        return running, stop

    def waiting(self, source: FakeSource, **options: Any) -> Running:
        """Return a call that waits for the lock."""
        points = Points()
        stop = points.stop_at(TracePoint.LOCK_WAITING)
        running = self.running(self.caller(source, points, **options))
        stop.wait()
        stop.go_on()
        return running


class TestRefusedBytes(SharedFailuresCase):
    def test_those_who_waited_for_a_wrong_digest_get_that_refusal(self) -> None:
        source = self.bad()
        holder, stop = self.fetching(source)
        waiters = [self.waiting(source) for _turn in range(3)]
        stop.go_on()
        with self.assertRaises(errors.ImageRejected) as first:
            holder.result()
        for waiter in waiters:
            with self.assertRaises(errors.ImageRejected) as shared:
                waiter.result()
            self.assertEqual(
                (first.exception.cause, first.exception.next_step, ID),
                (shared.exception.cause, shared.exception.next_step, shared.exception.image),
            )
        self.assertEqual(1, source.opens)
        self.assertEqual(1, self.happened(events.Rejected))

    def test_those_who_waited_for_another_format_get_that_refusal(self) -> None:
        source = FakeSource({ID: b"QFI\xfb" + bytes(2**20)}, disk_format="raw")
        holder, stop = self.fetching(source)
        waiter = self.waiting(source)
        stop.go_on()
        for call in (holder, waiter):
            self.assertRaises(errors.ImageRejected, call.result)
        self.assertEqual(1, source.opens)

    def test_sources_that_read_the_same_data_share_a_refusal(self) -> None:
        holder, stop = self.fetching(self.bad())
        second = self.bad()
        waiter = self.waiting(second)
        stop.go_on()
        for call in (holder, waiter):
            self.assertRaises(errors.ImageRejected, call.result)
        self.assertEqual((1, 0), (second.describes, second.opens))

    def test_who_comes_later_fetches_for_itself(self) -> None:
        source = self.bad()
        self.assertRaises(errors.ImageRejected, self.spawn, self.manager(source))
        source.change_data(ID, raw_image(1))
        self.assertEqual(raw_image(1), self.spawn(self.manager(source)))

    def test_who_waited_for_an_earlier_refusal_too_fetches_for_itself(self) -> None:
        """A note of a fetch that ended before the waiting began is no answer."""
        source = self.bad()
        self.assertRaises(errors.ImageRejected, self.spawn, self.manager(source))
        source.change_data(ID, raw_image(1))
        holder, stop = self.fetching(source)
        waiter = self.waiting(source)
        stop.go_on()
        holder.result()
        waiter.result()

    def test_a_kernel_is_not_refused_for_what_is_wrong_with_a_disk(self) -> None:
        source = FakeSource({ID: b"QFI\xfb" + bytes(2**20)}, disk_format="raw")
        holder, stop = self.fetching(source)
        waiter = self.waiting(source, kernel=True)
        stop.go_on()
        self.assertRaises(errors.ImageRejected, holder.result)
        waiter.result()

    def test_other_rules_judge_for_themselves(self) -> None:
        source = FakeSource({ID: raw_image(1)}, disk_format="qcow2")
        holder, stop = self.fetching(source)
        waiter = self.waiting(source, disable_deep_image_inspection=True)
        stop.go_on()
        self.assertRaises(errors.ImageRejected, holder.result)
        waiter.result()

    def test_nothing_is_left_behind(self) -> None:
        source = self.bad()
        holder, stop = self.fetching(source)
        waiters = [self.waiting(source) for _turn in range(2)]
        self.assertEqual(2, len([each for each in self.in_flight() if each.endswith(layout.WAITS)]))
        stop.go_on()
        for call in (holder, *waiters):
            self.assertRaises(errors.ImageRejected, call.result)
        self.assertEqual([], self.in_flight())

    def test_a_torn_note_is_none(self) -> None:
        self.manager().cache_image(ID)
        cache = CacheStore(ic.CacheConfig(instances_path=str(self.instances)), self.host())
        path = cache.layout.failure(layout.base_name(ID))
        for data in (b"", b"{}", b"[1]", b'{"of": 1, "is_final": true, "cause": "x"}', b"[" * 10**6):
            with open(path, "wb") as file:
                file.write(data)
            self.assertIsNone(failures.last(cache, layout.base_name(ID)))

    def test_what_a_killed_process_left_is_swept(self) -> None:
        self.manager().cache_image(ID)
        cache = CacheStore(ic.CacheConfig(instances_path=str(self.instances)), self.host())
        killed = failures.Awaited()
        killed.look(cache, layout.base_name(ID))
        failures.write(cache, layout.base_name(ID), failures.Failure("of", True, "cause"))
        self.assertEqual(2, len(self.in_flight()))
        self.manager(stage_idle_seconds=0).verify_base_images(())
        self.assertEqual([], self.in_flight())


class TestWhatIsEachCallersOwn(SharedFailuresCase):
    def test_a_right_that_one_lacks_the_other_may_have(self) -> None:
        for error in (
            Unauthorized("the token is not accepted"),
            errors.ImageNotFound("there is no such image for this caller"),
        ):
            source = FakeSource({ID: raw_image(1)})
            source.fail_open(error)
            holder, stop = self.fetching(source)
            waiter = self.waiting(source)
            stop.go_on()
            self.assertRaises(type(error), holder.result)
            waiter.result()
            for path in (self.instances / "instance-1").iterdir():
                path.unlink()
            self.manager().evict_image(ID)

    def test_a_refusal_is_not_for_whom_the_source_denies_the_image(self) -> None:
        holder, stop = self.fetching(self.bad())
        denied = self.bad()
        waiter = self.waiting(denied)
        denied.fail_describe(errors.ImageNotFound("not for you"))
        stop.go_on()
        self.assertRaises(errors.ImageRejected, holder.result)
        # It asked before it waited, or asks now: the source's answer comes first.
        self.assertRaises(errors.ImageNotFound, waiter.result)

    def test_a_disk_that_is_too_small_fails_its_own_call_alone(self) -> None:
        source = FakeSource({ID: raw_image(1)})
        points = Points()
        stop = points.stop_at(TracePoint.TRANSFER_OPEN)
        manager = self.manager(source, host=self.host(trace=points))
        small = self.running(lambda: manager.create_disk(ID, self.target("small"), size=512))
        stop.wait()
        waiter = self.waiting(source)
        stop.go_on()
        self.assertRaises(errors.DiskTooSmallError, small.result)
        waiter.result()

    def test_a_cancelled_fetch_fails_its_own_call_alone(self) -> None:
        source = FakeSource({ID: raw_image(1)})
        points = Points()
        stop = points.stop_at(TracePoint.TRANSFER_OPEN)
        manager = self.manager(source, host=self.host(trace=points))
        cancelled = self.running(lambda: manager.create_disk(ID, self.target("cancelled")))
        stop.wait()
        waiter = self.waiting(source)
        manager.shutdown()
        stop.go_on()
        self.assertRaises(errors.CancelledError, cancelled.result)
        waiter.result()

    def test_a_deadline_that_passed_is_its_own_callers(self) -> None:
        source = FakeSource({ID: raw_image(1)})
        manager = self.manager(source)
        request = model.Request(deadline=1.0)
        self.assertRaises(errors.ImageCacheError, manager.create_disk, ID, self.target(), request=request)
        cache = CacheStore(ic.CacheConfig(instances_path=str(self.instances)), self.host())
        self.assertIsNone(failures.last(cache, layout.base_name(ID)))


class TestSourcesThatFail(SharedFailuresCase):
    def test_after_one_failure_the_next_tries(self) -> None:
        source = FakeSource({ID: raw_image(1)})
        source.fail_open(errors.SourceError("it broke"))
        holder, stop = self.fetching(source)
        waiter = self.waiting(source)
        stop.go_on()
        self.assertRaises(errors.SourceError, holder.result)
        waiter.result()

    def test_after_two_failures_nobody_who_waited_queues_any_longer(self) -> None:
        self.manager().cache_image(ID)
        cache = CacheStore(ic.CacheConfig(instances_path=str(self.instances)), self.host())
        name, waits = layout.base_name(ID), failures.Awaited()
        waits.look(cache, name)
        for turn in range(2):
            self.assertIsNone(waits.failed(cache, name))
            failures.write(cache, name, failures.Failure("of", False, f"it broke {turn}"))
            waits.look(cache, name)
        shared = waits.failed(cache, name)
        assert shared is not None
        self.assertEqual("it broke 1", shared.cause)
        source = FakeSource({ID: raw_image(1)})
        request = self.manager(source)._ingest.request(self.manager(source)._call(ID, None), Use.DISK)
        request.producer.share(shared)  # of another source
        with self.assertRaises(errors.SourceError):
            request.producer.share(dataclasses.replace(shared, of=request.producer.origins()[0]))

    def test_another_source_is_not_queued_behind_one_that_hangs(self) -> None:
        hanging, stop = self.fetching(FakeSource({ID: OTHER}))
        self.assertEqual(raw_image(1), self.spawn(self.manager(FakeSource({ID: raw_image(1)}))))
        self.assertTrue(hanging.thread.is_alive())
        stop.go_on()
        hanging.result()

    def test_another_source_is_not_queued_behind_one_that_does_not_describe(self) -> None:
        source, stop = FakeSource({ID: OTHER}), Stop()
        describe = source.describe

        class Hanging(FakeSource):
            def describe(self, image_id: str) -> model.Image:
                stop()
                return describe(image_id)

        hanging = self.running(self.caller(Hanging({ID: OTHER}), Points()))
        stop.wait()
        self.assertEqual(raw_image(1), self.spawn(self.manager(FakeSource({ID: raw_image(1)}))))
        stop.go_on()
        hanging.result()

    def test_nobody_is_queued_behind_a_source_that_does_not_describe_what_is_there(self) -> None:
        """A base that another program made, which is checked, or makes way, by what the source says."""
        self.manager().create_disk(ID, self.target("uses-it"))
        for recorded, data in ((True, OTHER), (False, raw_image(1)), (False, OTHER)):
            with self.subTest(recorded=recorded, is_right=data is not OTHER):
                if recorded:
                    self.base().write_bytes(data)
                    self.assertEqual(1, len(self.manager().scrub(rate=None).damaged))
                else:
                    for path in (self.base(), *self.record().parent.iterdir()):
                        path.unlink()
                    self.base().write_bytes(data)
                source, stop, points = FakeSource({ID: raw_image(1)}), Stop(), Points()
                describe = source.describe

                class Hanging(FakeSource):
                    def describe(self, image_id: str) -> model.Image:
                        stop()  # noqa: B023  the loop's own
                        return describe(image_id)  # noqa: B023

                hanging = self.running(self.caller(Hanging({}), Points()))
                stop.wait()
                manager = self.manager(source, host=self.host(trace=points), lock_timeout=1.0)
                self.assertEqual(raw_image(1), self.spawn(manager))
                self.assertNotIn(TracePoint.LOCK_WAITING, points.seen)
                stop.go_on()
                with contextlib.suppress(errors.ImageCacheError):  # its source has no data
                    hanging.result()

    def test_nobody_is_queued_behind_a_fallback_that_does_not_describe(self) -> None:
        first, fallback, stop = FakeSource({ID: OTHER}), FakeSource({ID: raw_image(1)}), Stop()
        first.fail_open(errors.ImageNotFound("its data is gone"))
        describe = fallback.describe

        class Hanging(FakeSource):
            def describe(self, image_id: str) -> model.Image:
                stop()
                return describe(image_id)

        request = model.Request(source=first, fallbacks=(Hanging({ID: raw_image(1)}),))
        manager = self.manager(lock_timeout=1.0)
        target = self.target("hangs")
        hanging = self.running(lambda: manager.create_disk(ID, target, request=request))
        stop.wait()
        points = Points()
        other = self.manager(FakeSource({OTHER_ID: OTHER}), host=self.host(trace=points), lock_timeout=1.0)
        with self.assertRaises(errors.ImageNotFound):
            other.create_disk(ID, self.target("other"))
        self.spawn(self.manager(fallback, host=self.host(trace=points)))
        self.assertNotIn(TracePoint.LOCK_WAITING, points.seen)
        self.manager().evict_image(ID)
        misses = self.happened(events.Miss)
        stop.go_on()
        hanging.result()
        self.assertEqual(raw_image(1), content_of(target, "qcow2"))
        self.assertEqual((1, misses), (first.opens, self.happened(events.Miss)))

    def test_all_fallbacks_may_be_gone_after_the_data_of_the_first_were(self) -> None:
        for used in (False, True):
            with self.subTest(used=used):
                if used:  # what is there does not serve, and nothing else is had
                    self.manager().create_disk(ID, self.target("uses-it"))
                    with open(self.base(), "r+b") as file:
                        file.write(bytes(4096))
                    self.assertEqual(1, len(self.manager().scrub(rate=None).damaged))
                first = FakeSource({ID: raw_image(1)})
                first.fail_open(errors.ImageNotFound("its data is gone"))
                request = model.Request(source=first, fallbacks=(FakeSource({}), FakeSource({})))
                with self.assertRaisesRegex(errors.ImageNotFound, "none of its 3 sources"):
                    self.manager().create_disk(ID, self.target("other"), request=request)
                self.assertEqual(1, first.opens)
                self.assertEqual([], self.in_flight())

    def test_a_fallback_that_is_being_read_is_waited_for(self) -> None:
        peer = FakeSource({ID: raw_image(1)})
        holder, stop = self.fetching(peer)
        points = Points()
        waits = points.stop_at(TracePoint.LOCK_WAITING)
        manager = self.manager(FakeSource({ID: OTHER}), host=self.host(trace=points))
        request = model.Request(source=FakeSource({}), fallbacks=(peer,))
        waiter = self.running(lambda: manager.create_disk(ID, self.target("waits"), request=request))
        waits.wait()
        waits.go_on()
        stop.go_on()
        holder.result()
        waiter.result()
        self.assertEqual(1, peer.opens)


class TestBetweenProcesses(SharedFailuresCase):
    def test_a_process_that_waited_gets_the_refusal(self) -> None:
        image = self.directory / "image"
        image.write_bytes(OTHER)
        script = textwrap.dedent(
            """
            import sys
            import imagecache_lib as ic
            instances, image, target = sys.argv[1:]
            def trace(point):
                if point == "lock:waiting":
                    print("waits", flush=True)
            source = ic.FileSource({"an image": ic.FileImage(image, "raw", ic.Digest("sha256", "0" * 64))})
            host = ic.System(name="here", trace=trace)
            cache = ic.ImageCacheManager(ic.CacheConfig(instances_path=instances), source, "qcow2", host=host)
            try:
                cache.create_disk("an image", target)
            except ic.ImageRejected as error:
                print("rejected", error.cause, flush=True)
            """
        )
        points = Points()
        stop = points.stop_at(TracePoint.TRANSFER_OPEN)
        source = ic.FileSource({"an image": ic.FileImage(image, "raw", ic.Digest("sha256", "0" * 64))})
        config = ic.CacheConfig(instances_path=str(self.instances))
        manager = ic.ImageCacheManager(
            config, source, "qcow2", host=self.host(trace=points), observers=(self.events.append,)
        )
        holder = self.running(lambda: manager.create_disk("an image", self.target("first")))
        stop.wait()
        words = [sys.executable, "-c", script, str(self.instances), str(image), self.target("second")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ) as waiter:
            assert waiter.stdout is not None
            self.assertEqual("waits\n", waiter.stdout.readline())
            os.truncate(image, 0)  # a second look at the data would say something else
            image.write_bytes(raw_image(1))
            stop.go_on()
            said = waiter.stdout.readline()
        with self.assertRaises(errors.ImageRejected) as refused:
            holder.result()
        self.assertEqual(f"rejected {refused.exception.cause}\n", said)
