# SPDX-License-Identifier: Apache-2.0
"""What does not fit together in a directory that Nova made is found, and nothing is left behind."""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
import unittest

import imagecache_lib as ic
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource

NAME = layout.base_name("image")


class AuditTest(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.instances = pathlib.Path(directory.name, "instances")
        self.base = self.instances / "_base" / NAME
        self.disk = self.instances / "0a4c1a5e-0000-4000-8000-000000000001" / "disk"
        self.base.parent.mkdir(parents=True)
        self.disk.parent.mkdir()

    def make(self, base_format: str = "raw") -> None:
        for command in (
            ["create", "-q", "-f", base_format, str(self.base), "1M"],
            ["create", "-q", "-f", "qcow2", "-F", base_format, "-b", str(self.base), str(self.disk)],
        ):
            subprocess.run(["qemu-img", *command], check=True)

    def findings(self, instances: list[ic.Instance] | None = None) -> list[tuple[ic.Severity, str, str]]:
        before = sorted(map(str, self.instances.rglob("*")))
        config = ic.CacheConfig(instances_path=str(self.instances))
        report = ic.ImageCacheManager(config, FakeSource({})).audit(instances)
        self.assertEqual(before, sorted(map(str, self.instances.rglob("*"))))
        return [(each.severity, each.subject, each.text) for each in report.findings]

    def assert_one(self, severity: ic.Severity, subject: str, words: str) -> None:
        found = self.findings()
        self.assertEqual([(severity, subject)], [each[:2] for each in found], found)
        self.assertIn(words, found[0][2])

    def test_what_fits_gives_no_finding(self) -> None:
        for format in ("raw", "qcow2"):
            self.make(format)
            self.assertEqual([], self.findings())

    def test_a_missing_base_and_its_image(self) -> None:
        self.make()
        self.base.unlink()
        self.assert_one(ic.Severity.ERROR, str(self.disk), f"{NAME} is missing")
        instance = ic.Instance(uuid=self.disk.parent.name, host="another", images=("image",))
        self.assertIn("of image image is missing", self.findings([instance])[0][2])

    def test_an_orphan(self) -> None:
        self.make()
        self.disk.unlink()
        self.assert_one(ic.Severity.INFO, NAME, "nothing refers to it")

    def test_a_raw_overlay_on_qcow2_bytes_and_the_reverse(self) -> None:
        for before, after in (("raw", "qcow2"), ("qcow2", "raw")):
            self.make(before)
            subprocess.run(["qemu-img", "create", "-q", "-f", after, str(self.base), "1M"], check=True)
            self.assert_one(ic.Severity.ERROR, str(self.disk), f"is {before}, and it is {after}")

    def test_a_header_without_the_format(self) -> None:
        self.make()
        data = self.disk.read_bytes()
        self.disk.write_bytes(data.replace(b"\xe2\x79\x2a\xca", b"\x00\x00\x00\x01", 1))
        self.assert_one(ic.Severity.WARNING, str(self.disk), "does not say which format")

    def test_disk_info_that_disagrees(self) -> None:
        self.make()
        (self.disk.parent / "disk.info").write_text(json.dumps({str(self.disk): "raw"}))
        self.assertIn((ic.Severity.WARNING, str(self.disk)), [each[:2] for each in self.findings()])

    def test_a_broken_header(self) -> None:
        self.make()
        self.disk.write_bytes(self.disk.read_bytes()[:60])
        self.assertIn((ic.Severity.WARNING, str(self.disk)), [each[:2] for each in self.findings()])

    def test_leftovers_and_odd_entries(self) -> None:
        (self.base.parent / f"{NAME}.part").write_bytes(b"x")
        (self.base.parent / "readme").write_bytes(b"x")
        found = [each[:2] for each in self.findings()]
        self.assertEqual([(ic.Severity.WARNING, "readme"), (ic.Severity.INFO, f"{NAME}.part")], found)
