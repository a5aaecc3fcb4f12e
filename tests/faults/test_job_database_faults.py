# SPDX-License-Identifier: Apache-2.0
"""The file that keeps jobs, on a disk that fails under a conductor at work."""

from __future__ import annotations

import subprocess

from imagecache_lib import errors
from imagecache_lib.precache import writer
from imagecache_lib.precache.reader import EmbeddedJobs
from tests.flows.test_job_database import DatabaseCase
from tests.lab.filesystems import loop_mounted


class ReadOnlyTest(DatabaseCase):
    def test_a_filesystem_that_becomes_read_only_meanwhile_ends_the_run_and_no_host(self) -> None:
        with loop_mounted(self.directory, 8 * 2**20, ["mkfs.ext4", "-q"]) as mounted:
            self.path = str(mounted / "jobs.sqlite")
            with self.assertRaisesRegex(errors.ConfigError, "(?s)is left.*resume"):
                # As the kernel does to a filesystem whose disk fails.
                self.at_work(lambda: subprocess.run(["mount", "-o", "remount,abort", mounted], check=True))
            self.assertGreaterEqual(self.now, 1000 + writer.PATIENCE)
            (found,) = EmbeddedJobs(self.path).summaries()
            self.assertEqual(0, sum(found.counts.values()))
            for database in self.opened:
                database.close()
