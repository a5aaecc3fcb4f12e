# SPDX-License-Identifier: Apache-2.0
"""What is mounted below a disk root while that is read. Needs root."""

from __future__ import annotations

import pathlib
import subprocess

from imagecache_lib.system.trace import TracePoint
from tests.flows.test_upkeep import UpkeepCase
from tests.support import files, needs


class TestMountedMeanwhile(UpkeepCase):
    def test_what_is_mounted_on_a_directory_that_was_read_is_not_missed(self) -> None:
        """The directory does not change by that, so that no second look would tell."""
        needs.root()
        base, volume = self.cached(), self.directory / "volume"
        files.overlay(volume / "disk", base)
        where = self.instances / "uuid"
        where.mkdir()

        def mount() -> None:
            subprocess.run(["mount", "--bind", volume, where], check=True)
            self.addCleanup(lambda: subprocess.run(["umount", where], check=True))

        self.points.at(TracePoint.EVICT_RENAMED, lambda: self.points.at(TracePoint.REFERENCES_SCANNED, mount))
        self.assertKept(base, self.verify(), f"put back: {where} changed all the while it was read")
        self.unused()
        self.assertKept(base, self.verify(), f"used by the disk {where}")

    def volume(self) -> tuple[pathlib.Path, pathlib.Path]:
        """Return a base, and where a volume is mounted with a disk on it that no pass has seen."""
        needs.root()
        base, where = self.cached(), self.instances / "uuid"
        where.mkdir()
        self.mount(where)
        files.overlay(where / "disk", base)
        return base, where

    def mount(self, where: pathlib.Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", where], check=True)
        self.addCleanup(lambda: subprocess.run(["umount", "-q", where], check=False))

    def test_a_volume_that_is_taken_away_before_it_is_read_is_not_missed(self) -> None:
        base, where = self.volume()
        self.points.at(
            TracePoint.REFERENCES_KNOWN, lambda: subprocess.run(["umount", "-l", where], check=True)
        )
        report = self.verify()
        self.assertTrue(base.exists(), report)
        self.assertIn(f"{where} changed all the while it was read", report.problems[0])

    def test_a_volume_that_another_one_covers_before_it_is_read_is_not_missed(self) -> None:
        base, where = self.volume()
        self.points.at(TracePoint.REFERENCES_KNOWN, lambda: self.mount(where))
        self.verify()
        self.assertTrue(base.exists())

    def test_a_disk_root_that_is_taken_away_while_it_is_read(self) -> None:
        needs.root()
        base, root = self.cached(), self.directory / "root"
        root.mkdir()
        self.mount(root)
        files.overlay(root / "uuid" / "disk", base)
        self.points.at(
            TracePoint.REFERENCES_KNOWN, lambda: subprocess.run(["umount", "-l", root], check=True)
        )
        report = self.verify(disk_roots=(str(self.instances), str(root)))
        self.assertTrue(base.exists(), report)
        self.assertIn(f"{root} cannot be read (it went away while it was read)", report.problems[0])
