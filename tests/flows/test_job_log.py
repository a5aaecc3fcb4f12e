# SPDX-License-Identifier: Apache-2.0
"""The files that SQLite keeps beside a job database in use, removed or replaced under a conductor."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator

from imagecache_lib.precache import job
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.precache.reader import EmbeddedJobs
from imagecache_lib.system.host import System
from imagecache_lib.system.trace import TracePoint
from tests.flows.test_job_database import DatabaseCase

_LOOK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(*connection.execute("PRAGMA integrity_check").fetchone())
print(*(job_id for (job_id,) in connection.execute("SELECT id FROM jobs")))
"""


class LogCase(DatabaseCase):
    def beside(self, suffix: str) -> pathlib.Path:
        return pathlib.Path(self.path + suffix)

    @contextlib.contextmanager
    def noticing(self, what: str) -> Iterator[None]:
        """Check that the body says once in the log what befell a file, and no more when it goes on."""
        with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
            yield
        said = [line for line in logged.output if "opened anew" in line]
        self.assertEqual(1, len(said), logged.output)
        self.assertIn(what, said[0])

    def check_stored(self, *jobs: job.Job) -> None:
        """Check that another process, which opens the files by their names, sees these jobs."""
        # In this process all connections share the index of the log.
        done = subprocess.run(
            [sys.executable, "-S", "-c", _LOOK, self.path], check=True, stdout=subprocess.PIPE, text=True
        )
        verdict, *found = done.stdout.split()
        self.assertEqual("ok", verdict)
        self.assertEqual({each.id for each in jobs}, set(found))
        self.assertEqual(
            {each.id for each in jobs}, {each.id for each in EmbeddedJobs(self.path).summaries()}
        )


class RemovedTest(LogCase):
    def test_a_log_that_was_removed_loses_no_job(self) -> None:
        for suffix in ("-wal", "-shm"):
            with self.subTest(suffix=suffix):
                self.path = str(self.directory / f"jobs{suffix}")
                database = self.database()
                before = self.start(database)
                self.beside(suffix).unlink()
                with self.noticing(f"{suffix} was removed"):
                    later = self.start(database)
                self.check_stored(before, later)
                with self.assertNoLogs("imagecache_lib.precache", "WARNING"):
                    last = self.start(database)
                self.check_stored(before, later, last)
                self.assertTrue(self.beside(suffix).exists())

    def test_all_that_is_beside_the_database_may_be_removed_again_and_again(self) -> None:
        database, jobs = self.database(), []
        for _time in range(3):
            jobs.append(self.start(database))
            self.beside("-wal").unlink()
            self.beside("-shm").unlink()
            with self.assertLogs("imagecache_lib.precache", "WARNING"):
                jobs.append(self.start(database))
            self.check_stored(*jobs)

    def test_a_log_that_was_removed_under_a_run_costs_no_result(self) -> None:
        with self.noticing("-wal was removed"):
            ended = self.at_work(self.beside("-wal").unlink)
        self.assertEqual(50, ended.count()[job.Result.CACHED])
        self.assertEqual(ended, EmbeddedJobs(self.path).get(ended.id))

    def test_whoever_only_reads_notices_too(self) -> None:
        database = self.database()
        before = self.start(database)
        self.beside("-wal").unlink()
        with self.noticing("-wal was removed"):
            self.assertEqual(before, database.get(before.id))
        self.check_stored(before)

    def test_a_log_that_is_removed_before_the_first_job_is_noticed(self) -> None:
        database = self.database()
        self.beside("-wal").unlink()
        with self.noticing("-wal was removed"):
            work = self.start(database)
        self.check_stored(work)

    def removing(self, pending: list[TracePoint]) -> JobDatabase:
        """Return a database whose log is removed when it comes to a point that is pending by then."""

        def remove(reached: TracePoint) -> None:
            if reached in pending:
                pending.clear()
                self.beside("-wal").unlink()

        database = JobDatabase(self.path, host=System(trace=remove))
        self.addCleanup(database.close)
        return database

    def test_a_log_that_is_removed_while_a_job_is_stored_loses_nothing(self) -> None:
        pending: list[TracePoint] = []
        database, jobs = self.removing(pending), list[job.Job]()
        for point in TracePoint.JOBS_COMMIT, TracePoint.JOBS_COMMITTED:
            with self.subTest(point=point):
                pending.append(point)
                with self.noticing("-wal was removed"):
                    jobs.append(self.start(database))
                self.assertEqual([], pending)
                self.check_stored(*jobs)

    def test_what_is_committed_into_a_removed_log_is_seen_by_others_at_once(self) -> None:
        pending: list[TracePoint] = []
        database = self.removing(pending)
        work = self.start(database)
        pending.append(TracePoint.JOBS_COMMIT)
        with self.noticing("-wal was removed"):
            database.cancel(work.id)
        self.assertTrue(EmbeddedJobs(self.path).get(work.id).cancelled)
        self.check_stored(work)

    def test_a_log_that_a_process_still_reads_is_waited_for(self) -> None:
        database = self.database()
        before = self.start(database)
        with self.transaction("BEGIN", "SELECT * FROM cells"):
            self.beside("-wal").unlink()
            with self.assertRaisesRegex(JobDatabaseError, "still reads"):
                self.start(database)
        with self.noticing("-wal was removed"):
            later = self.start(database)
        self.check_stored(before, later)

    def test_two_databases_of_one_process_go_on(self) -> None:
        first, second = self.database(), self.database()
        jobs = [self.start(first), self.start(second)]
        self.beside("-wal").unlink()
        for database in (first, second, first, second):
            jobs.append(self.start(database))
        self.check_stored(*jobs)

    def test_threads_that_write_and_read_meanwhile_all_go_on(self) -> None:
        database = JobDatabase(self.path)
        self.addCleanup(database.close)
        first, failures, made = self.start(database), list[BaseException](), list[job.Job]()
        at_once = threading.Barrier(5)

        def work(number: int) -> None:
            try:
                at_once.wait()
                for _time in range(5):
                    if number % 2:
                        made.append(self.start(database))
                    else:
                        database.get(first.id)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        at_once.wait()
        self.beside("-wal").unlink()
        for thread in threads:
            thread.join()
        self.assertEqual([], failures)
        self.check_stored(first, *made)

    def test_a_database_with_a_rollback_journal_has_no_such_files(self) -> None:
        database = self.database()
        database.close()
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.execute("PRAGMA journal_mode = delete")
        with self.transaction("BEGIN", "SELECT * FROM cells"):
            database = self.database()  # which cannot change the journal while that is read
        with self.assertNoLogs("imagecache_lib.precache", "WARNING"):
            jobs = [self.start(database) for _job in range(3)]
        self.check_stored(*jobs)


class ReplacedTest(LogCase):
    def test_what_another_process_wrote_into_a_new_log_is_kept(self) -> None:
        database = self.database()
        before = self.start(database)
        self.change("PRAGMA wal_checkpoint")
        self.beside("-wal").unlink()
        self.change("UPDATE jobs SET aggregate = 'renamed'")
        self.assertGreater(os.path.getsize(self.beside("-wal")), 0)
        with self.noticing("-wal was replaced"):
            later = self.start(database)
        self.check_stored(before, later)
        names = {each.id: each.aggregate for each in database.summaries()}
        self.assertEqual({before.id: "renamed", later.id: "racks"}, names)
        for opened in self.opened:
            opened.close()
        self.check_stored(before, later)
        self.assertEqual("renamed", EmbeddedJobs(self.path).get(before.id).aggregate)

    def test_an_index_that_another_process_replaced_ends_the_run_and_no_host(self) -> None:
        def replace() -> None:
            self.beside("-shm").rename(self.directory / "aside")
            self.beside("-shm").write_bytes(bytes(32768))

        self.check_left(
            replace,
            lambda: (self.directory / "aside").rename(self.beside("-shm")),
            "replaced by another process",
        )
