# SPDX-License-Identifier: Apache-2.0
"""What operators get to see: the log, metrics, notifications."""

from __future__ import annotations

import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import unittest
from typing import Any

import oslo_messaging
import prometheus_client
from oslo_config import cfg

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.observers import metrics, notifications
from imagecache_lib.observers.log import LogObserver
from imagecache_lib.store import layout
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, OTHER_ID, CacheCase, content_of, raw_image

NAME = layout.base_name(ID)


class TestLog(unittest.TestCase):
    def lines(self, *happened: events.Event, level: int = logging.INFO) -> list[str]:
        observer = LogObserver()
        with self.assertLogs("imagecache_lib.observers.log", logging.DEBUG) as logged:
            events.LOG.debug("there is at least one line")
            for event in happened:
                observer(event)
        return [record.getMessage() for record in logged.records if record.levelno >= level]

    def test_an_image_that_is_fetched_and_evicted_costs_a_line_each_and_a_hit_none(self) -> None:
        fetched, evicted = self.lines(
            events.Miss(NAME, ID),
            events.Fetched(NAME, ID, received=2**20, allocated=4096, seconds=0.5),
            events.Published(NAME, ID),
            *[events.Hit(NAME, ID)] * 10,
            events.Evicted(NAME, ID, reason="unused", allocated=4096),
        )
        self.assertIn("1.0 MiB in 0.5 s (2.0 MiB/s), 4.0 KiB on disk", fetched)
        self.assertIn("unused", evicted)

    def test_a_fault_that_repeats_is_one_warning_until_its_state_changes(self) -> None:
        bad, worse = events.Rejected(NAME, ID, reason="bad"), events.Rejected(NAME, ID, reason="worse")
        told = self.lines(bad, bad, events.Hit(NAME, ID), bad, worse, worse, bad, level=logging.WARNING)
        self.assertEqual([f"Image {ID} rejected: {each}" for each in ("bad", "worse", "bad")], told)

    def test_images_have_faults_of_their_own(self) -> None:
        told = self.lines(
            events.Rejected("one", "1", reason="bad"),
            events.Rejected("two", "2", reason="bad"),
            events.Bypassed("one", "1", reason="bad"),
            events.NotCloned("one", "1", reason="bad"),
            level=logging.WARNING,
        )
        self.assertEqual(4, len(told))

    def test_a_fault_that_comes_back_after_a_good_base_is_told_again(self) -> None:
        for fault, cure in (
            (events.Rejected(NAME, ID, reason="bad"), events.Published(NAME, ID)),
            (events.Bypassed(NAME, ID, reason="bad"), events.Evicted(NAME, ID)),
            (events.Bypassed(NAME, ID, reason="bad"), events.Adopted(NAME, ID)),
            (events.Damaged(NAME, ID, detail="bad", stays="used"), events.Published(NAME, ID)),
        ):
            with self.subTest(fault=fault):
                self.assertEqual(2, len(self.lines(fault, fault, cure, fault, level=logging.WARNING)))

    def test_a_problem_is_told_when_it_comes_and_not_again_while_it_lasts(self) -> None:
        one, both, none = (events.PassFinished("", problems=found) for found in (("a",), ("a", "b"), ()))
        told = self.lines(one, one, both, both, none, one, level=logging.WARNING)
        self.assertEqual(["a", "b", "a"], told)

    def test_it_forgets_what_it_told_long_ago(self) -> None:
        many = [events.Rejected(f"{number}", reason="bad") for number in range(5000)]
        self.assertEqual(5001, len(self.lines(*many, many[-1], many[0], level=logging.WARNING)))


class TestMetrics(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.registry = prometheus_client.CollectorRegistry()
        self.metrics = metrics.MetricsObserver(self.registry, clock=lambda: 1700000000.0)

    def observed(self, **options: Any) -> Any:
        manager = self.manager(**options)
        for event in self.events:
            self.metrics(event)
        self.events.clear()
        return manager

    def test_a_copy_is_counted(self) -> None:
        self.source = FakeSource({ID: raw_image(), OTHER_ID: raw_image()})
        for image_id in (ID, OTHER_ID):
            self.manager().cache_image(image_id)
        self.observed()
        self.assertEqual((1, 2), (self.value("copied_total"), self.value("published_total")))

    def value(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"imagecache_{name}")

    def test_a_life_of_a_base_is_counted(self) -> None:
        manager = self.manager(remove_unused_original_minimum_age_seconds=0)
        for instance in ("one", "two", "three"):
            manager.create_disk(ID, self.target(instance=instance))
        self.observed()
        self.assertEqual((1, 2), (self.value("misses_total"), self.value("hits_total")))
        self.assertEqual(3 * 2**20, self.value("fetched_bytes_total"))
        self.assertEqual(1, self.value("fetch_seconds_count"))
        manager.verify_base_images(None)
        self.observed()
        allocated = os.stat(self.base()).st_blocks * 512
        self.assertEqual((1, allocated, 1), tuple(map(self.value, ("bases", "bases_bytes", "problems"))))
        for instance in ("one", "two", "three"):
            manager.remove_disk(manager.inspect_disk(self.target(instance=instance)))
        manager.verify_base_images([])
        self.observed()
        evicted = self.by_reason("evicted_total", "age")
        self.assertEqual((1, allocated), (evicted, self.value("evicted_bytes_total")))
        self.assertEqual((0, 0, 0), tuple(map(self.value, ("bases", "bases_bytes", "problems"))))
        self.assertEqual(1700000000.0, self.value("last_pass_timestamp_seconds"))

    def test_a_dry_run_is_no_pass(self) -> None:
        self.manager().verify_base_images([], dry_run=True)
        self.assertEqual(0, self.happened(events.PassFinished))

    def test_a_refused_image_is_counted(self) -> None:
        manager = self.manager(FakeSource({ID: b"no qcow2" * 512}, disk_format="qcow2"))
        with self.assertRaises(errors.ImageRejected):
            manager.create_disk(ID, self.target())
        self.observed()
        self.assertEqual(1, self.value("rejected_total"))

    def test_each_failed_fetch_is_counted_by_its_kind(self) -> None:
        for source, kind in (
            (FakeSource({ID: b"no qcow2" * 512}, disk_format="qcow2"), "rejected"),
            (FakeSource({}), "not_found"),
        ):
            with self.subTest(kind=kind):
                with self.assertRaises(errors.ImageCacheError):
                    self.manager(source).cache_image(ID)
                self.observed()
                self.assertEqual(1, self.by_reason("fetch_errors_total", kind))
        self.assertEqual(0, self.by_reason("fetch_errors_total", "no_space"))

    def by_reason(self, name: str, reason: str) -> float | None:
        return self.registry.get_sample_value(f"imagecache_{name}", {"reason": reason})

    def test_the_filesystem_is_looked_at_when_the_metrics_are_read(self) -> None:
        registry = prometheus_client.CollectorRegistry()
        observer = metrics.MetricsObserver(registry, filesystem=str(self.directory))
        observer(events.Surveyed("", size=1, free=1))
        status = os.statvfs(self.directory)
        size = registry.get_sample_value("imagecache_filesystem_size_bytes")
        self.assertEqual(status.f_blocks * status.f_frsize, size)

    def test_a_textfile_is_what_prometheus_reads(self) -> None:
        self.metrics(events.Hit(NAME, ID))
        path = self.directory / "imagecache.prom"
        self.metrics.write_textfile(path)
        text = path.read_text()
        self.assertIn("# TYPE imagecache_hits_total counter\nimagecache_hits_total 1.0\n", text)
        self.assertEqual(prometheus_client.generate_latest(self.registry).decode(), text)

    def test_a_textfile_that_cannot_be_written_says_so(self) -> None:
        with self.assertRaises(errors.ConfigError) as caught:
            self.metrics.write_textfile(self.directory / "absent" / "imagecache.prom")
        self.assertIn("absent", str(caught.exception))


class TestNotifications(unittest.TestCase):
    """Through oslo.messaging's own transport in memory."""

    def setUp(self) -> None:
        # oslo.messaging 18 reads some of its options from the global configuration only.
        self.transport = oslo_messaging.get_notification_transport(cfg.CONF, url="fake:/")
        self.addCleanup(self.transport.cleanup)

    def received(self, *happened: events.Event) -> list[tuple[str, str, dict[str, Any]]]:
        found: list[tuple[str, str, dict[str, Any]]] = []
        wanted = sum(type(event) not in (events.Hit, events.Miss, events.Progress) for event in happened)
        complete = threading.Event()

        class Endpoint:
            def tell(self, priority: str, publisher: str, event_type: str, payload: dict[str, Any]) -> None:
                found.append((f"{priority} {publisher}", event_type, payload))
                if len(found) == wanted:
                    complete.set()

            def info(self, _context: Any, publisher: str, kind: str, payload: Any, _metadata: Any) -> None:
                self.tell("info", publisher, kind, payload)

            def warn(self, _context: Any, publisher: str, kind: str, payload: Any, _metadata: Any) -> None:
                self.tell("warn", publisher, kind, payload)

        target = oslo_messaging.Target(topic="notifications")
        listener = oslo_messaging.get_notification_listener(
            self.transport, [target], [Endpoint()], executor="threading"
        )
        listener.start()
        sender = notifications.notifier(self.transport, host="node-1", driver="messaging")
        observer = notifications.NotificationObserver(sender, host="node-1")
        for event in happened:
            observer(event)
        self.assertTrue(complete.wait(60))
        listener.stop()
        listener.wait()
        return found

    def test_what_changed_reaches_listeners_and_hits_do_not(self) -> None:
        happened = self.received(
            events.Hit(NAME, ID),
            events.Fetched(NAME, ID, received=5, allocated=9, seconds=0.5),
            events.Rejected(NAME, ID, reason="bad"),
        )
        # Each priority has a topic of its own, so that only within one is there an order.
        fetched, rejected = sorted(happened, key=lambda each: each[0])
        self.assertEqual(("info imagecache.node-1", "imagecache.fetched"), fetched[:2])
        self.assertEqual(
            {"host": "node-1", "name": NAME, "image_id": ID, "received": 5, "allocated": 9, "seconds": 0.5},
            fetched[2],
        )
        self.assertEqual(("warn imagecache.node-1", "imagecache.rejected"), rejected[:2])
        self.assertEqual("bad", rejected[2]["reason"])

    def test_a_copy_is_told(self) -> None:
        ((told, kind, payload),) = self.received(events.Copied(NAME, ID, origin="other", shared=True))
        self.assertEqual(("info imagecache.node-1", "imagecache.copied"), (told, kind))
        self.assertEqual(("other", True), (payload["origin"], payload["shared"]))

    def test_a_bus_that_does_not_answer_is_one_warning_until_it_does(self) -> None:
        class Sender:
            answers = False

            def info(self, _context: Any, _kind: str, _payload: Any) -> None:
                if not self.answers:
                    raise oslo_messaging.MessageDeliveryFailure("no bus")

        sender = Sender()
        observer = notifications.NotificationObserver(sender, host="node-1")
        with self.assertLogs("imagecache_lib.observers.notifications", logging.WARNING) as logged:
            for sender.answers in (False, False, True, False):
                observer(events.Published(NAME, ID))
        self.assertEqual(2, len(logged.output))


class TestLightImports(unittest.TestCase):
    def test_the_extras_are_not_imported_before_they_are_used(self) -> None:
        code = (
            "import sys, imagecache_lib.manager; "
            "sys.exit(bool({'prometheus_client', 'oslo_messaging'} & set(sys.modules)))"
        )
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-c", code]
            paths = os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *sys.path])
            environment = {**os.environ, "PYTHONPATH": paths}
            finished = subprocess.run(command, cwd=directory, env=environment, check=False)
        self.assertEqual(0, finished.returncode)


class TestCallsBack(CacheCase):
    """An observer that asks for the very image whose fetch it is told of."""

    def test_it_does_not_wait_for_its_own_caller(self) -> None:
        inner = self.target("inner")

        def observe(event: events.Event) -> None:
            if isinstance(event, events.Fetched) and not os.path.lexists(inner):
                manager.create_disk(ID, inner)

        config = ic.CacheConfig(instances_path=str(self.instances))
        manager = ic.ImageCacheManager(config, self.source, host=self.host(), observers=(observe,))
        outer = manager.create_disk(ID, self.target())
        self.assertNotIn(TracePoint.LOCK_WAITING, self.points.seen)
        for path in (inner, outer.target):
            self.assertEqual(raw_image(1), content_of(path, outer.format))
        self.assertEqual([], self.in_flight())
