# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a host's set-up is found before the first spawn, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
import time
import unittest
from collections.abc import Iterator
from typing import Any

import imagecache_lib as ic
from imagecache_lib.testing.sources import FakeSource
from tests.support import needs

_USED = (
    *("prlimit", "timeout", "sh", "head", "tail", "cat", "qemu-img", "bwrap"),
    *("mkswap", "mkfs.ext4", "mkfs.vfat"),
)


@contextlib.contextmanager
def _programs(scripts: dict[str, str]) -> Iterator[None]:
    """Have other programs in PATH for the body: these scripts, and those of this host for the rest."""
    if not scripts:
        yield
        return
    before = os.environ["PATH"]
    with tempfile.TemporaryDirectory() as directory:
        for name in _USED:
            path, found = pathlib.Path(directory, name), shutil.which(name)
            if script := scripts.get(name):
                path.write_text(f"#!/bin/sh\n{script}\n")
                path.chmod(0o755)
            elif name not in scripts and found is not None:
                path.symlink_to(found)
        os.environ["PATH"] = directory
        try:
            yield
        finally:
            os.environ["PATH"] = before


class PreflightTest(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.instances = pathlib.Path(directory.name, "instances")
        self.instances.mkdir(mode=0o755)

    def findings(
        self, *, programs: dict[str, str] | None = None, skew: float = 0, **options: Any
    ) -> list[ic.Finding]:
        """Examine a host on which the named programs are other scripts; an empty one: they are missing."""
        host = ic.System(clock=lambda: time.time() + skew)
        config = ic.CacheConfig(**{"instances_path": str(self.instances), **options})
        before = self.tree()
        with _programs(programs or {}):
            found = ic.ImageCacheManager(config, FakeSource({}), host=host).preflight()
        self.assertEqual(before, self.tree())
        return found

    def tree(self) -> list[str]:
        return sorted(map(str, self.instances.rglob("*"))) if self.instances.is_dir() else []

    def assert_finds(self, severity: ic.Severity, words: str, **options: Any) -> None:
        found = self.findings(**options)
        matching = [each for each in found if words in each.text]
        self.assertEqual([severity], [each.severity for each in matching], found)
        for each in matching:
            self.assertTrue(each.next_step or severity is ic.Severity.INFO)

    def test_a_good_host_has_no_errors(self) -> None:
        self.assertEqual([], [each for each in self.findings() if each.severity is ic.Severity.ERROR])

    def test_it_works_beside_a_cache_in_use(self) -> None:
        config = ic.CacheConfig(instances_path=str(self.instances))
        ic.ImageCacheManager(config, FakeSource({})).verify_base_images([])
        self.assertEqual([], [each for each in self.findings() if each.severity is ic.Severity.ERROR])

    def test_a_missing_instances_directory_is_the_only_thing_said(self) -> None:
        self.instances.rmdir()
        found = self.findings()
        self.assertEqual([ic.Severity.ERROR], [each.severity for each in found])
        self.assertIn("does not exist", found[0].text)

    def test_a_file_in_its_place(self) -> None:
        self.assert_finds(ic.Severity.ERROR, "no directory", instances_path="/dev/null")

    def test_root_beside_the_service(self) -> None:
        needs.root()
        os.chown(self.instances, 65534, 65534)
        self.assert_finds(ic.Severity.ERROR, "this is root")

    def test_a_cache_of_a_newer_release(self) -> None:
        private = self.instances / "_base/.imagecache"
        private.mkdir(parents=True)
        (private / "version").write_text("99\n")
        self.assert_finds(ic.Severity.ERROR, "newer release")

    def test_a_disk_root_that_is_not_mounted(self) -> None:
        self.assert_finds(ic.Severity.ERROR, "nothing is ever evicted", disk_roots=("/no/such/root",))

    def test_programs_that_are_missing_or_old(self) -> None:
        self.assert_finds(ic.Severity.ERROR, "qemu-img cannot be run", programs={"qemu-img": ""})
        for name in ("prlimit", "timeout", "sh", "head", "tail", "cat"):
            self.assert_finds(ic.Severity.ERROR, f"{name} is not installed, without", programs={name: ""})
        old = "echo qemu-img version 4.2.1"
        self.assert_finds(ic.Severity.ERROR, "qemu-img is 4.2", programs={"qemu-img": old})
        self.assert_finds(ic.Severity.WARNING, "does not say", programs={"qemu-img": "echo hello"})
        for version in ("5.0.0", "10.1.2"):
            found = self.findings(programs={"qemu-img": f"echo qemu-img version {version}"})
            self.assertFalse([each for each in found if "qemu-img" in each.text])

    def test_a_program_that_does_not_stop_talking(self) -> None:
        said = f"head -c {2**23} /dev/zero"
        self.assert_finds(ic.Severity.ERROR, "qemu-img cannot be run: ", programs={"qemu-img": said})

    def test_a_process_that_may_start_no_program_is_not_told_to_install_one(self) -> None:
        def execute(*_command: str, **_options: Any) -> tuple[str, str]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        config = ic.CacheConfig(instances_path=str(self.instances))
        host = ic.System(execute=execute)
        found = ic.ImageCacheManager(config, FakeSource({}), host=host).preflight()
        (told,) = [each for each in found if "programs" in each.text]
        self.assertIs(ic.Severity.ERROR, told.severity)
        self.assertIn("Too many open files", told.text)
        self.assertIn("ulimit", str(told.next_step))
        self.assertFalse([each for each in found if "cannot be run" in each.text])

    def test_a_host_that_cannot_shut_programs_in(self) -> None:
        text = "not shut in: bubblewrap (bwrap) is not installed"
        self.assert_finds(ic.Severity.WARNING, text, programs={"bwrap": ""})

    def test_clocks_that_differ(self) -> None:
        self.assert_finds(ic.Severity.WARNING, "2 min behind this host's", skew=119.5)
        self.assert_finds(ic.Severity.WARNING, "ahead of this host's", skew=-100)
        self.assertFalse([each for each in self.findings(skew=2) if "clock" in each.text])

    def test_little_space(self) -> None:
        self.assert_finds(ic.Severity.ERROR, "nothing is fetched", free_space_low=2**60)
        self.assert_finds(ic.Severity.WARNING, "images may not fit", free_space_low=2**60)

    def test_what_does_not_belong_into_the_cache(self) -> None:
        (self.instances / "_base").mkdir()
        (self.instances / "_base/notes.txt").write_text("?")
        self.assert_finds(ic.Severity.WARNING, "notes.txt")

    def test_a_cache_on_another_filesystem_is_worth_knowing(self) -> None:
        needs.other_filesystem("/dev/shm", str(self.instances))
        with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
            os.symlink(other, self.instances / "_base")
            self.assert_finds(ic.Severity.INFO, "another filesystem")

    def test_the_worst_comes_first(self) -> None:
        found = self.findings(programs={"qemu-img": ""}, skew=100)
        order = list(ic.Severity)
        self.assertEqual(sorted(found, key=lambda each: order.index(each.severity)), found)
        self.assertIs(ic.Severity.ERROR, found[0].severity)
