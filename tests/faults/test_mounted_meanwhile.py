# SPDX-License-Identifier: Apache-2.0
"""What is mounted below a disk root while that is read. Needs root."""

from __future__ import annotations

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
