# SPDX-License-Identifier: Apache-2.0
"""The rbd backend and the clone flow, on a cluster in memory."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import pathlib
import pickle
import tempfile
import unittest
from collections.abc import Generator
from typing import Any

from imagecache_lib import CacheConfig, CacheResult, ImageCacheManager, Request, System, errors, events, model
from imagecache_lib.backends import load_backend, rbd
from imagecache_lib.backends.ceph import RbdName
from imagecache_lib.backends.interface import CannotClone
from imagecache_lib.ingest.rbd_source import RbdSource
from imagecache_lib.sources.interface import CannotCopy
from imagecache_lib.store import layout
from imagecache_lib.testing.ceph import FakeCluster
from imagecache_lib.testing.sources import FakeSource
from tests.support import qcow2_images

FSID = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
DATA = b"image" * 1024 + bytes(2**20 - 5120)
SNAPSHOT = RbdName("images", "image", "snap")
HERE = f"rbd://{FSID}/images/image/snap"


def simple_qcow2(content: bytes) -> bytes:
    """Return a qcow2 image of one or more whole sectors."""
    clusters = {
        index: qcow2_images.Cluster("data", content[index * 512 : (index + 1) * 512])
        for index in range(len(content) // 512)
    }
    return qcow2_images.build(len(content), clusters)


class Glance(FakeSource):
    """A source with stores: copying an image takes as many looks as it is told."""

    def __init__(
        self, *locations: str, data: bytes = DATA, disk_format: str = "raw", copy_location: str = HERE
    ) -> None:
        super().__init__({"image": data}, disk_format=disk_format)
        self.locations = locations
        self.stores: tuple[str, ...] = ("file",)
        self.looks = 0
        self.fails = False
        self.refusal: errors.SourceError | None = None
        self.asked: list[str] = []
        self._copy_location = copy_location

    def describe(self, image_id: str) -> model.Image:
        image = super().describe(image_id)
        properties: dict[str, object] = {}
        if self.asked:
            if self.fails:
                properties["os_glance_failed_import"] = "ceph"
            elif self.looks == 0:
                self.locations, self.stores = (*self.locations, self._copy_location), ("file", "ceph")
            self.looks -= 1
        return dataclasses.replace(image, locations=self.locations, stores=self.stores, properties=properties)

    def copy_to_store(self, image: model.Image, store: str) -> None:
        self.asked.append(store)
        if self.refusal is not None:
            raise self.refusal


class RbdCase(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = self.enterContext(tempfile.TemporaryDirectory())
        self.now = 1_000_000.0
        self.ticks = 5.0
        self.cluster = FakeCluster(FSID, clock=lambda: self.now)
        self.cluster.create(RbdName("images", "image"), len(DATA))
        self.cluster.fill(RbdName("images", "image"), [(0, DATA)])
        self.cluster.create_snapshot(SNAPSHOT)
        self.seen: list[events.Event] = []
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.ticks += seconds

    def manager(self, source: FakeSource, **config: object) -> ImageCacheManager:
        complete = CacheConfig(
            instances_path=self.directory,
            images_rbd_pool="vms",
            **config,  # type: ignore[arg-type]
        )
        host = System(name="here", clock=lambda: self.now, monotonic=lambda: self.ticks, sleep=self.sleep)
        backend = rbd.RbdBackend(complete, host, self.cluster)
        return ImageCacheManager(complete, source, backend, host=host, observers=[self.seen.append])

    def read(self, target: str, length: int = len(DATA)) -> bytes:
        return self.cluster.read(RbdName("vms", target), 0, length)

    def reasons(self) -> list[str]:
        return [event.reason for event in self.seen if isinstance(event, events.NotCloned)]


class TestContainersThatAreNoDisks(RbdCase):
    """What lies in the cluster is cloned only where it is a disk as it lies there."""

    def source(self, data: bytes = DATA, **fields: Any) -> FakeSource:
        class Contained(Glance):
            def describe(self, image_id: str) -> model.Image:
                return dataclasses.replace(super().describe(image_id), **fields)

        return Contained(HERE, data=data)

    def test_an_archive_is_neither_cloned_nor_fetched(self) -> None:
        for container in ("ova", "docker", "compressed"):
            source = self.source(container_format=container)
            with self.subTest(container=container), self.assertRaisesRegex(errors.ImageRejected, container):
                self.manager(source).create_disk("image", "disk")
            self.assertEqual(0, source.opens)

    def test_a_compressed_disk_is_unpacked_instead_of_cloned(self) -> None:
        source = self.source(gzip.compress(DATA), compression="gzip")
        self.manager(source).create_disk("image", "disk")
        self.assertEqual(["it is compressed"], self.reasons())
        self.assertEqual(DATA, self.read("disk"))


class TestLocations(unittest.TestCase):
    def test_parts_are_quoted(self) -> None:
        self.assertEqual(
            ("id", RbdName("my pool", "a/b", "s@1")), rbd.parse_location("rbd://id/my%20pool/a%2Fb/s%401")
        )

    def test_what_is_no_snapshot_in_a_cluster_is_none(self) -> None:
        for url in (
            "",
            "rbd://",
            "rbd://image",
            "rbd://a/b/c",
            "rbd://a/b/c/",
            "rbd://a/b/c/d/e",
            "file:///a/b/c/d",
            "swift://a/b/c/d",
            "rbd:a/b/c/d",
        ):
            self.assertIsNone(rbd.parse_location(url), url)


class TestCloning(RbdCase):
    def test_a_raw_image_in_the_cluster_is_cloned_and_not_fetched(self) -> None:
        source = Glance("file:///elsewhere", "rbd://other/images/image/snap", HERE)
        manager = self.manager(source)
        disk = manager.create_disk("image", "vm_disk", size=2**21)
        self.assertEqual(model.Disk("vm_disk", "raw", 2**21), disk)
        self.assertEqual(DATA + bytes(2**20), self.read("vm_disk", 2**21))
        self.assertEqual(SNAPSHOT, self.cluster.stat(RbdName("vms", "vm_disk")).parent)
        self.assertEqual(0, source.opens)
        self.assertEqual(["vm_disk"], self.cluster.names("vms"))
        self.assertEqual([], self.reasons())

    def test_caching_is_not_needed(self) -> None:
        source = Glance(HERE)
        self.assertIs(CacheResult.NOT_NEEDED, self.manager(source).cache_image("image"))
        self.assertEqual((0, 0), (source.describes, source.opens))

    def test_a_disk_smaller_than_the_image_is_refused(self) -> None:
        with self.assertRaises(errors.DiskTooSmallError):
            self.manager(Glance(HERE)).create_disk("image", "vm_disk", size=2**19)
        self.assertEqual([], self.cluster.names("vms"))

    def test_the_reason_is_told_and_the_image_imported(self) -> None:
        elsewhere = "rbd://other/images/image/snap"
        for location, reason in (
            ((), "show_image_direct_url"),
            ((elsewhere,), FSID),
            ((f"rbd://{FSID}/images/image/gone",), "images/image@gone"),
        ):
            with self.subTest(reason):
                self.seen.clear()
                target = f"vm{len(self.cluster.names('vms'))}"
                self.manager(Glance(*location)).create_disk("image", target, size=2**21)
                self.assertEqual(DATA + bytes(2**20), self.read(target, 2**21))
                self.assertIsNone(self.cluster.stat(RbdName("vms", target)).parent)
                (told,) = self.reasons()
                self.assertIn(reason, told)

    def test_a_snapshot_that_may_not_be_read_is_a_reason(self) -> None:
        self.cluster.forbidden.add("images")
        self.manager(Glance(HERE)).create_disk("image", "vm_disk")
        self.assertIn("no permission", self.reasons()[0])
        self.assertEqual(DATA, self.read("vm_disk"))

    def test_an_image_that_is_not_raw_is_converted_and_imported(self) -> None:
        virtual = b"guestOS!" * 8192
        source = Glance(HERE, data=simple_qcow2(virtual), disk_format="qcow2")
        for force_raw in (False, True):
            target = f"vm-{force_raw}"
            self.manager(source, force_raw_images=force_raw).create_disk("image", target)
            self.assertEqual(virtual, self.read(target, len(virtual)))
        self.assertIn("qcow2, not raw", self.reasons()[0])

    def test_a_demanded_signature_forbids_cloning(self) -> None:
        manager = self.manager(Glance(HERE), never_download_image_if_on_rbd=True)
        with self.assertRaisesRegex(errors.BackendError, "signature"):
            manager.create_disk("image", "vm_disk", request=Request(trusted_certs=("cert",)))
        self.assertEqual([], self.cluster.names("vms"))

    def test_where_fetching_is_forbidden_the_refusal_says_why(self) -> None:
        source = Glance("rbd://other/images/image/snap")
        manager = self.manager(source, never_download_image_if_on_rbd=True)
        with self.assertRaises(CannotClone) as caught:
            manager.create_disk("image", "vm_disk")
        for part in ("image image", FSID, "never_download_image_if_on_rbd"):
            self.assertIn(part, str(caught.exception))
        self.assertEqual(0, source.opens)

    def test_an_image_that_is_gone_is_made_from_what_is_cached(self) -> None:
        source = Glance()
        manager = self.manager(source)
        manager.create_disk("image", "one")
        source.remove("image")
        manager.create_disk("image", "two")
        self.assertEqual(DATA, self.read("two"))
        self.assertEqual(1, source.opens)

    def test_a_cluster_that_fails_is_no_reason_to_fetch(self) -> None:
        self.cluster.is_down = True
        source = Glance(HERE)
        with self.assertRaisesRegex(errors.BackendError, "Ceph failed"):
            self.manager(source).create_disk("image", "vm_disk")
        self.assertEqual(0, source.opens)


class TestCopyingIntoTheStore(RbdCase):
    def source(self, **facts: object) -> Glance:
        source = Glance("file:///elsewhere")
        for name, value in facts.items():
            setattr(source, name, value)
        return source

    def create(self, source: Glance, **config: object) -> model.Disk:
        config.setdefault("images_rbd_glance_store_name", "ceph")
        return self.manager(source, **config).create_disk("image", "vm_disk")

    def test_the_image_service_copies_it_and_it_is_cloned(self) -> None:
        source = self.source(looks=2)
        self.create(source)
        self.assertEqual((["ceph"], 0), (source.asked, source.opens))
        self.assertEqual([15, 15, 15], self.slept)
        self.assertEqual(SNAPSHOT, self.cluster.stat(RbdName("vms", "vm_disk")).parent)

    def test_a_copy_that_takes_too_long_is_given_up(self) -> None:
        source = self.source(looks=1000)
        self.create(source)
        self.assertEqual(600, sum(self.slept))
        self.assertIn("after 600 s", self.reasons()[0])
        self.assertEqual(DATA, self.read("vm_disk"))

    def test_a_clock_that_is_set_back_does_not_prolong_the_wait(self) -> None:
        source = self.source(looks=1000)
        slept = self.sleep

        def sleep(seconds: float) -> None:
            slept(seconds)
            self.now = 0.0

        self.sleep = sleep  # type: ignore[method-assign]
        self.create(source)
        self.assertEqual(600, sum(self.slept))

    def test_a_copy_that_fails_is_given_up_at_once(self) -> None:
        self.create(self.source(fails=True))
        self.assertEqual([15], self.slept)
        self.assertIn("failed", self.reasons()[0])

    def test_a_service_that_does_not_copy_says_why(self) -> None:
        self.create(self.source(refusal=CannotCopy("the policy forbids it")))
        self.assertIn("the policy forbids it", self.reasons()[0])
        self.assertEqual([], self.slept)

    def test_nobody_is_asked_unless_a_store_is_configured_and_it_would_help(self) -> None:
        for source, config in (
            (self.source(), {"images_rbd_glance_store_name": ""}),
            (self.source(stores=("file", "ceph")), {}),
            (Glance("file:///elsewhere", data=simple_qcow2(bytes(512)), disk_format="qcow2"), {}),
        ):
            disk = self.create(source, **config)
            self.cluster.remove(RbdName("vms", disk.target))
            self.assertEqual([], source.asked)

    def test_who_cancels_does_not_wait_for_the_copy(self) -> None:
        class Cancelled:
            def __init__(self, after: list[float]) -> None:
                self._after = after

            def is_set(self) -> bool:
                return bool(self._after)

        manager = self.manager(self.source(looks=1000), images_rbd_glance_store_name="ceph")
        with self.assertRaises(errors.CancelledError):
            manager.create_disk("image", "vm_disk", request=Request(cancel=Cancelled(self.slept)))
        self.assertEqual([15], self.slept)

    def test_a_source_without_stores_cannot(self) -> None:
        with self.assertRaises(CannotCopy):
            FakeSource({}).copy_to_store(model.Image("image"), "ceph")


class TestUpkeep(RbdCase):
    def test_what_a_crash_left_goes_with_the_periodic_pass(self) -> None:
        left = RbdName("vms", f"vm_disk.{'0' * 32}.new")
        in_use = RbdName("vms", f"other_disk.{'1' * 32}.new")
        for name in (left, in_use, RbdName("vms", "vm_disk"), RbdName("vms", "x.new")):
            self.cluster.create(name, 512)
        manager = self.manager(Glance(HERE))
        manager.verify_base_images([])
        self.assertEqual(4, len(self.cluster.names("vms")))
        self.now += 3601
        with self.cluster.opened(in_use):
            manager.verify_base_images([], dry_run=True)
            self.assertEqual(4, len(self.cluster.names("vms")))
            manager.verify_base_images([])
        self.assertEqual([in_use.image, "vm_disk", "x.new"], self.cluster.names("vms"))
        recovered = [event.name for event in self.seen if isinstance(event, events.Recovered)]
        self.assertIn(left.image, recovered)

    def test_a_cluster_that_is_down_does_not_stop_the_pass(self) -> None:
        manager = self.manager(Glance())
        self.cluster.is_down = True
        with self.assertLogs("imagecache_lib", "WARNING"):
            manager.verify_base_images([])


class TestSetUp(unittest.TestCase):
    config = CacheConfig(instances_path="/instances", images_rbd_pool="vms")

    def test_a_cluster_that_cannot_be_used_is_a_finding(self) -> None:
        cluster = FakeCluster(pools=())
        backend = rbd.RbdBackend(self.config, System(), cluster)
        self.assertIn("vms", backend.preflight()[0])
        cluster.is_down = True
        self.assertIn("connecting", backend.preflight()[0])

    def test_missing_bindings_are_a_finding_with_what_to_do(self) -> None:
        if importlib.util.find_spec("rados") is not None:
            self.skipTest("the bindings are here")
        (finding,) = load_backend("rbd", self.config, System()).preflight()
        self.assertIn("install python3-rados", finding)

    def test_targets_are_names_that_rbd_can_address(self) -> None:
        backend = rbd.RbdBackend(self.config, System(), FakeCluster())
        backend.check_target("0b5c_disk")
        for target in ("", "pool/image", "image@snap", "a\0b"):
            with self.assertRaises(errors.BackendError):
                backend.check_target(target)

    def test_cannot_clone_carries_the_store_through_a_pickle(self) -> None:
        error = CannotClone("why", image="image", store="ceph")
        self.assertEqual("ceph", pickle.loads(pickle.dumps(error)).store)


class TestReadingFromTheCluster(RbdCase):
    """Nova's ``enable_rbd_download``: for disks that are files, the image's bytes come from the cluster."""

    def setUp(self) -> None:
        super().setUp()
        self.glance = Glance(HERE)

    def fetch(self, **options: Any) -> bytes:
        config = CacheConfig(instances_path=self.directory, num_retries=0, **options)
        source = RbdSource(self.glance, self.cluster)
        host = System(name="here", sleep=self.sleep)
        manager = ImageCacheManager(config, source, backend="qcow2", host=host)
        with manager.fetch_or_reuse("image") as base, open(base.path, "rb") as file:
            return file.read()

    def nothing_is_left(self) -> None:
        left = [path for path in pathlib.Path(self.directory, "_base").rglob("*") if "stage/" in str(path)]
        self.assertEqual([], left)
        self.assertFalse(pathlib.Path(self.directory, "_base", layout.base_name("image")).exists())

    def test_the_service_is_asked_for_no_bytes(self) -> None:
        self.assertEqual(DATA, self.fetch())
        self.assertEqual(0, self.glance.opens)

    def test_the_digest_is_checked(self) -> None:
        self.cluster.remove_snapshot(SNAPSHOT)
        self.cluster.fill(RbdName("images", "image"), [(0, b"other")])
        self.cluster.create_snapshot(SNAPSHOT)
        with self.assertRaisesRegex(errors.ImageRejected, "sha512|digest"):
            self.fetch()
        self.nothing_is_left()

    def test_what_the_cluster_lacks_comes_from_the_service(self) -> None:
        for what, location in (
            ("another cluster", HERE.replace("aaaaaaaa", "bbbbbbbb")),
            ("another store", "file:///images/image"),
            ("a snapshot that is gone", f"{HERE}-gone"),
            ("a pool that is denied", HERE),
            ("a cluster that is down", HERE),
        ):
            with self.subTest(what):
                self.setUp()
                self.glance = Glance(location)
                self.cluster.is_down = "down" in what
                self.cluster.forbidden = {"images"} if "denied" in what else set()
                self.assertEqual(DATA, self.fetch())
                self.assertEqual(1, self.glance.opens)

    def test_a_cluster_that_goes_away_on_the_way_is_told_and_nothing_is_left(self) -> None:
        cluster = self.cluster

        class Breaking(FakeCluster):
            def chunks(self, name: RbdName, offset: int = 0) -> Generator[bytes]:
                for chunk in cluster.chunks(name, offset):
                    yield chunk
                    cluster.is_down = True

        self.cluster = Breaking(FSID)
        self.cluster._pools = cluster._pools
        with self.assertRaisesRegex(
            errors.SourceError, "image image: its snapshot in Ceph cannot be read on"
        ):
            self.fetch()
        self.nothing_is_left()
