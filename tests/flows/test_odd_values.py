# SPDX-License-Identifier: Apache-2.0
"""Values and headers that mislead: what they must not break, hand out or take away."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import imagecache_lib as ic
from imagecache_lib.precache import agent, client, job
from imagecache_lib.precache.watch import Watch
from imagecache_lib.store import checksums, layout, membership
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource
from tests.support import leftovers
from tests.support.cache_case import ID, OTHER_ID, CacheCase


class TestPins(CacheCase):
    def test_a_pin_that_no_calendar_can_date_stops_no_pass(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        for expires in (time.time() * 1000, float("inf"), float("nan"), 10**300):
            with self.subTest(expires=expires):
                manager.pin(ID, owner="milliseconds", expires=expires)
                (base,) = manager.verify_base_images([]).bases
                self.assertIn("pinned by milliseconds", base.reason)

    def test_a_pre_caching_that_fails_leaves_the_earlier_pin(self) -> None:
        manager = self.manager()
        until = time.time() + 1000
        manager.cache_image(ID, pin_until=until)
        cancelled = threading.Event()
        cancelled.set()
        with self.assertRaises(ic.CancelledError):
            manager.cache_image(ID, pin_until=until + 1000, request=ic.Request(cancel=cancelled))
        base = manager.show_base(ID)
        assert base is not None
        self.assertEqual([until], [pin.expires for pin in base.pins])

    def test_a_pre_caching_that_fails_leaves_no_pin_of_its_own(self) -> None:
        manager = self.manager()
        with self.assertRaises(ic.ImageNotFound):
            manager.cache_image("gone", pin_until=time.time() + 1000)
        self.assertEqual([], os.listdir(self.instances / "_base" / ".imagecache" / "pins"))


class TestArguments(CacheCase):
    """What no path, size, label or report can be is refused as what it is."""

    def test_what_can_be_no_path_is_refused(self) -> None:
        manager: Any = self.manager()
        good = manager.create_disk(ID, self.target())
        for path in ("a\0b", "/a\0b", "\ud800", "", None, pathlib.Path(good.target), b"/disk", 5):
            disk = dataclasses.replace(good, target=path)
            for call, arguments, options in (
                (manager.create_disk, (ID, path), {}),
                (manager.create_swap, (path,), {"size_mb": 1}),
                (manager.fetch_file, (ID, path), {}),
                (manager.inspect_disk, (path,), {}),
                (manager.ensure_backing, (path,), {"image_id": ID}),
                (manager.resize_disk, (disk, 2**30), {}),
                (manager.flatten_disk, (disk,), {}),
                (manager.remove_disk, (disk,), {}),
            ):
                with self.subTest(path=path, call=call), self.assertRaises(ic.BackendError):
                    call(*arguments, **options)
        self.assertTrue(os.path.exists(good.target))

    def test_a_size_that_no_disk_has_is_refused(self) -> None:
        manager: Any = self.manager()
        for size in (0, -1, 2**70, 1.5, True, None, "1"):
            with self.subTest(size=size), self.assertRaises(ic.BackendError):
                manager.create_swap(self.target(), size_mb=size)
            with self.subTest(size=size), self.assertRaises(ic.BackendError):
                manager.create_ephemeral(self.target(), size_gb=size)

    def test_a_label_that_no_filesystem_has_is_refused(self) -> None:
        for label in ("a\0b", "\ud800"):
            with self.subTest(label=label), self.assertRaisesRegex(ic.BackendError, "label"):
                self.manager().create_ephemeral(self.target(), size_gb=1, label=label)

    def test_what_is_no_report_evicts_nothing(self) -> None:
        manager: Any = self.manager(remove_unused_original_minimum_age_seconds=0)
        manager.cache_image(ID)
        for report in ("uuid", b"uuid", ["uuid"], [None], 5, {"uuid": 1}):
            for call in (manager.verify_base_images, manager.prune, manager.audit, manager.survey):
                with self.subTest(report=report, call=call), self.assertRaisesRegex(ic.ConfigError, "report"):
                    call(report)
            with self.subTest(report=report), self.assertRaisesRegex(ic.ConfigError, "report"):
                manager.explain(ID, report)
        self.assertTrue(self.base().exists())

    def test_whatever_is_passed_raises_an_error_of_the_library_or_none(self) -> None:
        """Each parameter of each call gets values of every type, while the others have what belongs there."""
        manager: Any = self.manager()
        disk = manager.create_disk(ID, self.target(), size=2**24)
        targets = (self.target(f"odd-{number}") for number in itertools.count())
        calls: dict[str, dict[str, Any]] = {
            "create_disk": {"image_id": ID, "target": "", "size": None, "if_exists": "", "backend": None},
            "create_swap": {"target": "", "size_mb": 1, "if_exists": "error", "backend": None},
            "create_ephemeral": {"target": "", "size_gb": 1, "os_type": None, "fs": "ext4", "label": None},
            "fetch_file": {"image_id": ID, "path": "", "if_exists": "error"},
            "cache_image": {"image_id": ID, "pin_until": None, "request": None},
            "describe_image": {"image_id": ID, "request": None},
            "is_cached": {"image_id": ID},
            "inspect_disk": {"target": disk.target, "backend": None},
            "resize_disk": {"disk": disk, "size": 2**24, "backend": None, "request": None},
            "flatten_disk": {"disk": disk, "request": None},
            "note_use": {"disk": disk, "backend": None},
            "remove_disk": {"disk": dataclasses.replace(disk, target=f"{disk.target}.gone"), "backend": None},
            "ensure_backing": {
                "disk_path": disk.target,
                "image_id": ID,
                "backend": None,
                "request": None,
                "os_type": None,
                "fs": None,
                "label": None,
            },
            "verify_base_images": {"instances": ()},
            "prune": {"instances": (), "older_than": 0, "until_free": 0},
            "scrub": {"image_ids": None, "rate": None, "cancel": None},
            "pin": {"image_id": OTHER_ID, "owner": "operator", "expires": None},
            "unpin": {"image_id": OTHER_ID, "owner": "operator"},
            "evict_image": {"image_id": OTHER_ID},
            "show_base": {"image_id": ID},
            "explain": {"image_id": ID, "instances": ()},
            "history": {"image_id": ID},
            "audit": {"instances": ()},
            "survey": {"instances": ()},
            "forget_host": {"host_id": "0" * 32},
            "forget_disks": {"path": "/nowhere"},
        }
        for name, arguments in calls.items():
            for parameter, value in itertools.product(arguments, odd_values()):
                passed = {key: next(targets) if given == "" else given for key, given in arguments.items()}
                passed[parameter] = value
                if parameter == "rate" and value == 1.5:
                    continue  # bytes per second: it takes what it takes
                with self.subTest(name, parameter=parameter, type=type(value)):
                    with contextlib.suppress(ic.ImageCacheError):
                        getattr(manager, name)(**passed)
                    self.assertTrue(os.path.exists(disk.target))

    def test_a_request_with_fields_of_other_types_is_refused(self) -> None:
        request: Any = ic.Request
        for field in ("trusted_certs", "fallbacks", "deadline", "cancel", "rate", "resume"):
            values: tuple[Any, ...] = (b"1", "1", object, float("nan"), {})
            for value in values:
                with self.subTest(field, value=value), self.assertRaisesRegex(ic.ConfigError, field):
                    request(**{field: value})
        for rate in (0, -1, True, float("nan")):
            with self.subTest(rate), self.assertRaisesRegex(ic.ConfigError, "rate"):
                request(rate=rate)

    def test_an_instance_with_other_things_for_disks_is_refused(self) -> None:
        instance: Any = ic.Instance
        for ephemerals in ((1,), [None], ("ephemeral0",), (b"x",), ({"size_gb": 1},), (10**5000,)):
            with self.subTest(), self.assertRaisesRegex(ic.ConfigError, "ephemerals of instance uuid"):
                instance("uuid", "here", ephemerals=ephemerals)
        for field in ("images", "directories", "ephemerals", "swap_mb"):
            with self.subTest(field), self.assertRaisesRegex(ic.ConfigError, field):
                instance(10**5000, "here", **{field: 10**5000})
        sizes: tuple[Any, ...] = (None, -1, 1.0, "1", True, float("nan"))
        for size in sizes:
            with self.subTest(size), self.assertRaisesRegex(ic.ConfigError, "swap_mb of instance uuid"):
                instance("uuid", "here", swap_mb=size)
            with self.subTest(size), self.assertRaisesRegex(ic.ConfigError, "ephemerals of instance uuid"):
                instance("uuid", "here", ephemerals=(ic.Ephemeral(size),))

    def test_a_report_that_breaks_off_raises_what_the_driver_raised(self) -> None:
        def report(error: Exception) -> Iterator[ic.Instance]:
            yield ic.Instance("uuid", "here")
            raise error

        manager = self.manager(remove_unused_original_minimum_age_seconds=0)
        manager.cache_image(ID)
        for error in (TypeError("the driver's"), OSError("the driver's")):
            for call in (manager.verify_base_images, manager.prune, manager.audit, manager.survey):
                with self.subTest(error, call=call), self.assertRaisesRegex(type(error), "the driver's"):
                    call(report(error))
        self.assertTrue(self.base().exists())

    def test_what_is_no_host_is_not_forgotten(self) -> None:
        manager: Any = self.manager()
        wrong: tuple[object, ...] = ([], None, b"0" * 32, "\0", "0" * 32 + "\n")
        for host in wrong:
            with self.subTest(host=host), self.assertRaises(ic.ConfigError):
                manager.forget_host(host)


class Unprintable:
    """Neither repr() nor str() work."""

    def __repr__(self) -> str:
        raise ArithmeticError


def odd_values() -> list[Any]:
    """Return a value of each type, and of numbers and text those that break what is made of them."""
    texts = ["", "x", "a\0b", "\ud800", b"x"]
    numbers = [-1, 1.5, float("nan"), float("inf"), True, 10**400, 10**5000, -(10**5000)]
    others = [None, [], ["x"], [None], {}, {"x": 1}, object(), object, len, iter([1]), Unprintable()]
    return [*texts, *numbers, *others]


class TestHandsOff(CacheCase):
    def test_what_nova_has_in_flight_is_no_base_to_be_evicted_by_name(self) -> None:
        manager = self.manager()
        in_flight = self.base(OTHER_ID).with_name(f"{layout.base_name(OTHER_ID)}.part")
        manager.cache_image(ID)
        in_flight.write_bytes(b"half")
        manager.evict_image(in_flight.name)
        self.assertEqual(b"half", in_flight.read_bytes())

    def test_a_lock_that_cannot_be_opened_keeps_its_base_alone(self) -> None:
        manager = self.manager(remove_unused_original_minimum_age_seconds=0)
        manager.cache_image(ID)
        manager.cache_image(OTHER_ID)
        lock = self.instances / "locks" / f"nova-{self.base().name}"
        lock.unlink()
        lock.mkdir()
        report = manager.verify_base_images([])
        self.assertEqual([self.base(OTHER_ID).name], [base.name for base in report.evicted])
        self.assertTrue(self.base().exists())

    def test_lack_of_room_takes_nothing_from_the_trash_while_removal_is_off(self) -> None:
        self.manager().cache_image(ID)
        thrown = self.base().parent / ".imagecache" / "trash" / f"{self.base().name}.{'0' * 32}"
        thrown.mkdir()
        os.rename(self.base(), thrown / "base")
        found = os.statvfs(self.instances)
        manager = self.manager(
            remove_unused_base_images=False, free_space_low=found.f_blocks * found.f_frsize
        )
        with self.assertRaises(ic.NoSpaceError):
            manager.cache_image(OTHER_ID)
        self.assertTrue((thrown / "base").exists())


class TestLeftovers(CacheCase):
    def test_a_temporary_name_that_cannot_be_removed_fails_no_spawn(self) -> None:
        target = self.target()
        (directory,) = (path for path in self.instances.iterdir() if path.name == "instance-1")

        def block() -> None:
            (unfinished,) = directory.glob(".disk.*.new")
            unfinished.unlink()
            unfinished.mkdir()

        self.points.at("disk:placed", block)
        manager = self.manager()
        manager.cache_image(ID)
        before = leftovers.open_below(self.directory)
        self.assertEqual(target, manager.create_disk(ID, target).target)
        self.assertEqual(before, leftovers.open_below(self.directory))


class TestDisksThatAGuestMayHaveWritten(CacheCase):
    def _disk(self, *options: str) -> str:
        target = self.target()
        command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, target, "1M"]
        subprocess.run(command, check=True)
        return target

    def test_a_disk_on_a_file_of_the_host_is_not_reused(self) -> None:
        target = self._disk("-u", "-b", "/etc/passwd", "-F", "raw")
        with self.assertRaisesRegex(ic.BackendError, "/etc/passwd"):
            self.manager().create_disk(ID, target, if_exists="reuse")

    def test_a_disk_whose_data_is_in_another_file_is_refused(self) -> None:
        secret = self.directory / "secret"
        target = self._disk("-o", f"data_file={secret},data_file_raw=on")
        secret.write_bytes(b"not the guest's")
        manager = self.manager()
        disk = ic.Disk(target, "qcow2", 2**20)
        for use in (
            lambda: manager.create_disk(ID, target, if_exists="reuse", size=2**21),
            lambda: manager.ensure_backing(target, image_id=ID),
            lambda: manager.resize_disk(disk, 2**21),
            lambda: manager.flatten_disk(disk),
        ):
            with self.assertRaisesRegex(ic.BackendError, "another file"):
                use()
        self.assertEqual(b"not the guest's", secret.read_bytes())

    def test_a_disk_that_stands_alone_is_reused(self) -> None:
        target = self._disk()
        self.assertIsNone(self.manager().create_disk(ID, target, if_exists="reuse").base)


class TestHostFiles(CacheCase):
    def test_a_number_that_is_none_counts_as_torn(self) -> None:
        data = b'{"name": "there", "cleared": [], "roots": {"/disks": [Infinity, 1]}}'
        self.assertIsNone(membership.parse("0" * 32, data))


def _vmdk(virtual_size: int) -> bytes:
    """Return a vmdk whose grain tables are all one, in which every other grain is absent.

    As "Virtual Disk Format 5.0" of VMware has it, and as QEMU reads it: nothing forbids the sharing.
    """
    sector, grain, entries = 512, 128, 512
    sectors = virtual_size // sector
    tables = -(-sectors // (grain * entries))
    descriptor_at, directory_at = 1, 21
    table_at = directory_at + -(-tables * 4 // sector)
    data_at = -(-(table_at + 4) // grain) * grain
    header = struct.pack(
        "<4sIIQQQQIQQQB4sH",
        b"KDMV",
        1,
        3,
        sectors,
        grain,
        descriptor_at,
        directory_at - descriptor_at,
        entries,
        directory_at,
        directory_at,
        data_at,
        0,
        b"\n \r\n",
        0,
    )
    descriptor = (
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        'createType="monolithicSparse"\n\n'
        f'# Extent description\nRW {sectors} SPARSE "x.vmdk"\n\n# DDB\nddb.adapterType = "ide"\n'
    )
    table = struct.pack("<2I", 0, data_at) * (entries // 2)
    made = bytearray((data_at + grain) * sector)
    for at, data in (
        (0, header),
        (descriptor_at, descriptor.encode()),
        (directory_at, struct.pack("<I", table_at) * tables),
        (table_at, table),
        (data_at, b"\1" * sector),
    ):
        made[at * sector : at * sector + len(data)] = data
    return bytes(made)


class TestBombs(CacheCase):
    def test_a_disk_of_many_pieces_fills_no_memory_with_their_list(self) -> None:
        longest = 0

        def execute(*command: str, **options: Any) -> tuple[str, str]:
            nonlocal longest
            out, err = System().execute(*command, **options)
            longest = max(longest, len(out) + len(err))
            return out, err

        image = _vmdk(2**28)
        self.assertLess(len(image), 2**18)
        source = FakeSource({ID: image}, disk_format="vmdk")
        self.manager(source, host=self.host(execute=execute)).cache_image(ID)
        self.assertEqual(2**28, self.base().stat().st_size)
        self.assertLess(0, longest)
        self.assertLess(longest, 2**14)

    def test_data_that_is_scattered_over_terabytes_fills_no_memory_with_its_checksums(self) -> None:
        sums = checksums.Checksums()
        with memoryview(b"x" * 4096) as data:
            for offset in range(0, 2**40, 2**26):
                sums.add(data, offset)
        self.assertLess(len(sums.to_bytes("0" * 32)), 2**23)

    def test_a_task_of_ever_more_images_is_refused(self) -> None:
        stop = self.points.stop_at("ingest:reserved")
        host = agent.HostAgent(self.manager(), watch=Watch())
        host.begin(client.HostTask("job", (ID,)))
        stop.wait()
        many = tuple(f"image-{number}" for number in range(job.MOST_IMAGES - 1))
        host.begin(client.HostTask("job", many))
        with self.assertRaisesRegex(ic.BackendError, "at most"):
            host.begin(client.HostTask("job", (OTHER_ID,)))
        self.assertEqual({ID, *many}, set(host.poll("job").cells))
        host.cancel("job")
        stop.go_on()
        host.stop()
