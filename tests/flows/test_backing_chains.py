# SPDX-License-Identifier: Apache-2.0
"""What an overlay stands on, in every way that QEMU writes it, and what is refused."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

from imagecache_lib import errors
from imagecache_lib.system.bounded import Bounded
from tests.support import files
from tests.support.cache_case import ID, MIB, CacheCase, content_of, raw_image

DATA = raw_image(1)


def tool(*words: str | os.PathLike[str]) -> None:
    subprocess.run(words, check=True, capture_output=True)


def on_file(path: object, **more: object) -> str:
    return "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(path)}, **more})


class ChainCase(CacheCase):
    def target(self, name: str = "disk", instance: str = "uuid") -> str:
        directory, _, last = name.rpartition("/")
        return super().target(last, directory or instance)

    def overlay(self, backing: str, backing_format: str = "raw", name: str = "uuid/disk") -> str:
        path = self.target(name)
        files.overlay(path, backing, backing_format=backing_format, size="3M")
        return path

    def on_top(self, below: str, name: str) -> str:
        """Return an external snapshot of a disk, in its directory."""
        path = str(pathlib.Path(below).with_name(name))
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", "qcow2", path, "3M")
        return path


class TestSpellings(ChainCase):
    def test_a_base_that_is_named_in_any_way_of_qemu_is_made_and_the_disk_used_again(self) -> None:
        base = self.base()
        dotted = {"driver": "raw", "file.driver": "file", "file.filename": str(base)}
        undriven = {"driver": "raw", "file": {"filename": str(base)}}
        as_json = [f"json:{json.dumps(each)}" for each in (dotted, undriven)]
        for number, backing in enumerate(
            (str(base), f"file:{base}", f"../_base/{base.name}", on_file(base), *as_json)
        ):
            with self.subTest(backing):
                path = self.overlay(backing, name=f"uuid{number}/disk")
                manager = self.manager()
                made = manager.ensure_backing(path, image_id=ID)
                assert made is not None
                self.assertEqual(base.name, made.name)
                disk = manager.create_disk(ID, path, size=4 * MIB, if_exists="reuse")
                self.assertEqual((4 * MIB, base.name), (disk.virtual_size, disk.base))
                self.assertEqual(DATA + bytes(MIB), content_of(path, "qcow2"))
                self.assertIsNone(manager.flatten_disk(disk).base)
                self.assertEqual(DATA + bytes(MIB), content_of(path, "qcow2"))

    def test_what_is_more_or_less_than_a_base_on_a_plain_file_is_refused(self) -> None:
        base = self.base()
        self.manager().cache_image(ID)
        twice = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"/etc/x","filename":"{base}"}}}}'
        both = {"driver": "raw", "file": {"driver": "file", "filename": "/etc/x"}, "file.filename": str(base)}
        for number, backing in enumerate(
            (
                on_file(base, offset=512),
                on_file(f"_base/{base.name}"),
                f"file:_base/{base.name}",
                f"nbd:unix:{base}",
                twice,
                "json:" + json.dumps(both),
                "json:" + json.dumps({"driver": "file", "filename": str(base)}),
                f"json:{{'driver':'raw','file':{{'driver':'file','filename':'{base}'}}}}",
                "json:[]",
                "json:" + "[" * 900,
                f"{self.instances}/_base/.imagecache/{base.name}",
                str(self.instances / "_base"),
            )
        ):
            with self.subTest(backing):
                path = self.overlay(backing, name=f"uuid{number}/disk")
                before = pathlib.Path(path).read_bytes()
                for call in (
                    lambda path=path: self.manager().ensure_backing(path, image_id=ID),
                    lambda path=path: self.manager().resize_disk(self.manager().inspect_disk(path), 8 * MIB),
                    lambda path=path: self.manager().flatten_disk(self.manager().inspect_disk(path)),
                ):
                    with self.assertRaises(errors.BackendError):
                        call()
                self.assertEqual(before, pathlib.Path(path).read_bytes())

    def test_a_format_that_contradicts_the_name_is_refused(self) -> None:
        path = self.overlay(on_file(self.base()), "qcow2")
        with self.assertRaises(errors.BackendError):
            self.manager().ensure_backing(path, image_id=ID)


class TestChains(ChainCase):
    def test_external_snapshots_in_the_disks_directory_lead_to_the_base(self) -> None:
        disk = self.manager().create_disk(ID, self.target()).target
        top = self.on_top(self.on_top(disk, "disk.snap1"), "disk.snap2")
        manager = self.manager()
        base = manager.ensure_backing(top, image_id=ID)
        assert base is not None
        self.assertEqual(
            (base.name, True), (manager.inspect_disk(top).base, manager.note_use(manager.inspect_disk(top)))
        )
        self.assertEqual(5 * MIB, manager.create_disk(ID, top, size=5 * MIB, if_exists="reuse").virtual_size)
        self.assertIsNone(manager.flatten_disk(manager.inspect_disk(top)).base)
        self.assertEqual(DATA, content_of(top, "qcow2")[: len(DATA)])

    def test_the_missing_base_of_a_chain_is_made(self) -> None:
        top = self.on_top(self.overlay(str(self.base())), "disk.snap1")
        self.assertFalse(self.base().exists())
        self.manager().ensure_backing(top, image_id=ID)
        self.assertEqual(DATA, content_of(top, "qcow2"))

    def test_a_chain_through_another_directory_a_link_or_a_raw_disk_is_refused(self) -> None:
        below = self.overlay(str(self.base()), name="uuid/below")
        elsewhere = self.overlay(str(self.base()), name="other/below")
        link = self.target("uuid/link")
        os.symlink(elsewhere, link)
        raw = self.manager().create_disk(ID, self.target("uuid/raw"), backend="raw").target
        guests = pathlib.Path(below).read_bytes()
        with open(raw, "r+b") as file:
            file.write(guests)  # a guest writes a header into its own raw disk
        fifo = self.target("uuid/fifo")
        os.mkfifo(fifo)
        for number, (named, format) in enumerate(
            (
                (elsewhere, "qcow2"),
                (link, "qcow2"),
                (raw, "qcow2"),
                (fifo, "qcow2"),
                (below, "raw"),
            )
        ):
            with self.subTest(named, format=format):
                path = self.overlay(named, format, name=f"uuid/top{number}")
                with self.assertRaises(errors.BackendError):
                    self.manager().ensure_backing(path, image_id=ID)

    def test_a_chain_that_leads_back_to_itself_is_refused(self) -> None:
        path = self.target()
        files.overlay(path, f"./{pathlib.Path(path).name}", backing_format="qcow2", size="3M")
        with self.assertRaises(errors.BackendError):
            self.manager().ensure_backing(path, image_id=ID)

    def test_a_disk_whose_base_is_gone_is_not_changed_and_says_so(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        self.base().unlink()
        for change in (manager.flatten_disk, lambda disk: manager.resize_disk(disk, 8 * MIB)):
            with self.assertRaises(errors.BackendError) as caught:
                change(disk)
            self.assertIn(str(self.base()), caught.exception.cause)
            self.assertEqual(disk.target, caught.exception.path)
            self.assertIn("ensure_backing", caught.exception.next_step or "")
        manager.ensure_backing(disk.target, image_id=ID)
        self.assertIsNone(manager.flatten_disk(disk).base)
        self.assertEqual(raw_image(1), content_of(disk.target, "qcow2"))

    def test_a_missing_file_of_a_chain_is_named(self) -> None:
        below = self.overlay(str(self.base()))
        top = self.on_top(below, "disk.snap1")
        os.unlink(below)
        with self.assertRaises(errors.BackendError) as caught:
            self.manager().ensure_backing(top, image_id=ID)
        self.assertIn(below, str(caught.exception))

    def test_a_look_that_does_not_come_back_is_given_up(self) -> None:
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        bounded = Bounded(limit=0.01)
        self.assertEqual([], bounded.call(lambda: os.read(reader, 1)))
        self.assertEqual([], bounded.call(lambda: 1))
        os.close(writer)


class TestInternalSnapshots(ChainCase):
    def snapshot_of(self, disk: str) -> bytes:
        out = self.directory / "snapshot"
        tool("qemu-img", "convert", "-f", "qcow2", "-l", "snapshot.name=before", "-O", "raw", disk, out)
        return out.read_bytes()

    def test_a_disk_with_snapshots_is_not_flattened_and_loses_nothing(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        tool("qemu-img", "snapshot", "-c", "before", disk.target)
        with self.assertRaises(errors.BackendError) as caught:
            manager.flatten_disk(disk)
        self.assertIn("snapshots", str(caught.exception))
        self.assertEqual(DATA, self.snapshot_of(disk.target))
        tool("qemu-img", "snapshot", "-d", "before", disk.target)
        self.assertIsNone(manager.flatten_disk(disk).base)

    def test_a_disk_with_snapshots_grows_and_they_stay_whole(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        tool("qemu-img", "snapshot", "-c", "before", disk.target)
        self.assertEqual(6 * MIB, manager.resize_disk(disk, 6 * MIB).virtual_size)
        self.assertEqual(DATA, self.snapshot_of(disk.target)[: len(DATA)])

    def test_an_ephemeral_disk_whose_snapshot_has_data_is_not_taken_for_untouched(self) -> None:
        name = "ephemeral_1_40d1d2c"
        disk = self.target()
        files.overlay(disk, self.base().with_name(name), size="1G")
        made = self.manager().ensure_backing(disk)
        assert made is not None
        tool("qemu-img", "snapshot", "-c", "empty", disk)
        tool("qemu-io", "-f", "qcow2", "-c", "write -P 9 4M 64k", disk)
        tool("qemu-img", "snapshot", "-c", "full", disk)
        tool("qemu-img", "snapshot", "-a", "empty", disk)
        self.base().with_name(name).unlink()
        with self.assertRaises(errors.BackendError):
            self.manager().ensure_backing(disk)
