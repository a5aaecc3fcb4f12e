# SPDX-License-Identifier: Apache-2.0
"""What may happen to the file that keeps jobs: locked, full, read-only, damaged, of another release."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from unittest import TestCase

from imagecache_lib import errors
from imagecache_lib.precache import client, job, lease, writer
from imagecache_lib.precache.database import Change, JobDatabase
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.precache.precacher import AggregatePrecacher
from imagecache_lib.precache.reader import EmbeddedJobs
from imagecache_lib.system import mounts
from imagecache_lib.system.host import System
from tests.support import needs

CACHED = job.Cell(job.Result.CACHED, "", 5, 5)

#: What the first release made.
VERSION_1 = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, aggregate TEXT NOT NULL, terms TEXT NOT NULL, cancelled INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL, attempt INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE cells (
    job TEXT NOT NULL REFERENCES jobs(id), host_position INTEGER NOT NULL, image_position INTEGER NOT NULL,
    host TEXT NOT NULL, image TEXT NOT NULL, result TEXT, reason TEXT NOT NULL DEFAULT '',
    received INTEGER NOT NULL DEFAULT 0, total INTEGER,
    PRIMARY KEY (job, host, image)
);
INSERT INTO jobs VALUES ('old', 'racks', '{"concurrency": 3}', 1, 5.5, 2);
INSERT INTO cells VALUES ('old', 0, 0, 'one', 'image-b', 'cached', '', 7, 7);
INSERT INTO cells VALUES ('old', 0, 1, 'one', 'image-a', 'error', 'no room', 0, 9);
INSERT INTO cells VALUES ('old', 1, 0, 'a-second', 'image-b', NULL, '', 0, NULL);
INSERT INTO cells VALUES ('old', 1, 1, 'a-second', 'image-a', NULL, 'soon', 1, NULL);
PRAGMA user_version = 1;
"""


class Agents(client.HostClient):
    """Hosts that have everything at once.

    :ivar begun: those that were asked to.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []

    def survey(self, host: str, image_ids: Sequence[str]) -> client.Survey:
        raise NotImplementedError

    def begin(self, host: str, task: client.HostTask) -> None:
        self.begun.append(host)

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        return client.TaskReport({"image-a": CACHED, "image-b": CACHED})

    def cancel(self, host: str, job_id: str) -> None:
        raise NotImplementedError


class DatabaseCase(TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.path = str(self.directory / "jobs.sqlite")
        self.now = 1000.0
        self.opened: list[JobDatabase] = []

    def database(self) -> JobDatabase:
        found = JobDatabase(self.path, busy=0.05)
        self.addCleanup(found.close)
        self.opened.append(found)
        return found

    def host(self) -> System:
        return System(
            name="conductor",
            clock=lambda: self.now,
            monotonic=lambda: self.now,
            sleep=self.sleep,
            random=lambda: 0.5,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def start(self, database: JobDatabase, hosts: Sequence[str] = ("one", "two")) -> job.Job:
        return database.add("racks", hosts, ["image-a"], job.Terms(concurrency=5), now=1.0)

    def change(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(statement)

    def small_filesystem(self) -> pathlib.Path:
        """Keep jobs on a filesystem of one MiB, and return where that is."""
        needs.root()
        small = self.directory / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
        self.addCleanup(lambda: subprocess.run(["umount", "-l", small], check=True))
        self.path = str(small / "jobs.sqlite")
        return small

    def fill(self, small: pathlib.Path) -> None:
        """Leave no room on a filesystem, by a file called "fill"."""
        with contextlib.suppress(OSError), open(small / "fill", "wb") as stream:
            while True:
                stream.write(bytes(4096))
                stream.flush()

    @contextlib.contextmanager
    def transaction(self, *statements: str) -> Iterator[sqlite3.Connection]:
        """Another process has a transaction open."""
        opened = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        with contextlib.closing(opened) as connection:
            for statement in statements:
                connection.execute(statement)
            yield connection

    def at_work(self, trouble: Callable[[], object], *, over: Callable[[], object] | None = None) -> job.Job:
        """Return what became of a job in which something befell the database once hosts were at work.

        :param over: ends the trouble half a minute later.
        """
        database, agents = self.database(), Agents()
        work = self.start(database, [f"host-{number}" for number in range(50)])
        begin, pending = agents.begin, [trouble]
        at_once = threading.Lock()

        def befall(host: str, task: client.HostTask) -> None:
            with at_once:
                if pending:
                    pending.pop()()
            begin(host, task)

        def look(seconds: float) -> None:
            self.sleep(seconds)
            if over is not None and self.now > 1030:
                over()

        agents.begin = befall  # type: ignore[method-assign]
        host = System(
            name="conductor",
            clock=lambda: self.now,
            monotonic=lambda: self.now,
            sleep=look,
            random=lambda: 0.5,
        )
        return AggregatePrecacher(database, agents, host=host).run(work.id)

    def check_left(self, trouble: Callable[[], object], mend: Callable[[], object], why: str) -> None:
        """Check that trouble which stays ends the run and no host, and that a resume brings all results.

        :param why: what the run says.
        """
        with self.assertRaisesRegex(errors.ConfigError, f"(?s)is left.*{why}"):
            self.at_work(trouble)
        self.assertGreaterEqual(self.now, 1000 + writer.PATIENCE)
        mend()
        (found,) = EmbeddedJobs(self.path).summaries()
        self.assertEqual(0, sum(found.counts.values()))
        ended = AggregatePrecacher(self.database(), Agents(), host=self.host()).resume(found.id)
        self.assertEqual(50, ended.count()[job.Result.CACHED])


class OtherUsersTest(DatabaseCase):
    def test_a_database_that_is_locked_for_long_ends_no_host(self) -> None:
        database, agents = self.database(), Agents()
        work = self.start(database)
        locked = contextlib.ExitStack()
        locked.enter_context(self.transaction())

        def look(seconds: float) -> None:
            self.sleep(seconds)
            if self.now > 1040:
                locked.close()

        first, agents_begin = iter([True]), agents.begin

        def begin(host: str, task: client.HostTask) -> None:
            if next(first, False):
                locked.enter_context(self.transaction("BEGIN IMMEDIATE"))
            agents_begin(host, task)

        agents.begin = begin  # type: ignore[method-assign]
        conductor = AggregatePrecacher(
            database,
            agents,
            host=System(clock=lambda: self.now, monotonic=lambda: self.now, sleep=look, random=lambda: 0.5),
        )
        with self.assertLogs("imagecache_lib.precache", "INFO") as logged:
            ended = conductor.run(work.id)
        self.assertEqual(2, ended.count()[job.Result.CACHED])
        self.assertGreater(self.now, 1040)
        self.assertIn("kept in memory", logged.output[0])
        self.assertIn("works again", logged.output[-1])

    def test_a_database_that_stays_locked_ends_the_run_and_no_host(self) -> None:
        database, agents = self.database(), Agents()
        work = self.start(database)
        locked = contextlib.ExitStack()
        first, begin = iter([True]), agents.begin

        def lock(host: str, task: client.HostTask) -> None:
            if next(first, False):
                locked.enter_context(self.transaction("BEGIN IMMEDIATE"))
            begin(host, task)

        agents.begin = lock  # type: ignore[method-assign]
        conductor = AggregatePrecacher(database, agents, host=self.host())
        with locked, self.assertRaisesRegex(errors.ConfigError, "resume") as caught:
            conductor.run(work.id)
        self.assertIn("locked", str(caught.exception))
        self.assertGreaterEqual(self.now, 1000 + writer.PATIENCE)
        found = database.get(work.id)
        self.assertEqual({None}, {cell.result for cells in found.cells.values() for cell in cells.values()})
        self.assertEqual(2, conductor.resume(work.id).count()[job.Result.CACHED])

    def test_a_filesystem_that_fills_up_meanwhile_ends_the_run_and_no_host(self) -> None:
        small = self.small_filesystem()
        database, agents = self.database(), Agents()
        work = self.start(database, [f"host-{number}" for number in range(200)])
        begin = agents.begin

        def fill(host: str, task: client.HostTask) -> None:
            if not agents.begun:
                self.fill(small)
            begin(host, task)

        agents.begin = fill  # type: ignore[method-assign]
        conductor = AggregatePrecacher(database, agents, host=self.host())
        with self.assertRaisesRegex(errors.ConfigError, "(?s)full.*resume"):
            conductor.run(work.id)
        self.assertGreaterEqual(self.now, 1000 + writer.PATIENCE)
        found = EmbeddedJobs(self.path).get(work.id)
        self.assertEqual({None}, {cell.result for cells in found.cells.values() for cell in cells.values()})
        (small / "fill").unlink()
        self.assertEqual(200, conductor.resume(work.id).count()[job.Result.CACHED])

    def test_room_that_is_made_in_time_costs_no_result(self) -> None:
        small = self.small_filesystem()
        database, agents = self.database(), Agents()
        work = self.start(database, [f"host-{number}" for number in range(200)])
        begin = agents.begin

        def fill(host: str, task: client.HostTask) -> None:
            if not agents.begun:
                self.fill(small)
            begin(host, task)

        def make_room(seconds: float) -> None:
            self.sleep(seconds)
            if self.now > 1030:
                (small / "fill").unlink(missing_ok=True)

        agents.begin = fill  # type: ignore[method-assign]
        host = System(clock=lambda: self.now, monotonic=lambda: self.now, sleep=make_room, random=lambda: 0.5)
        with self.assertLogs("imagecache_lib.precache", "INFO") as logged:
            ended = AggregatePrecacher(database, agents, host=host).run(work.id)
        self.assertEqual(200, ended.count()[job.Result.CACHED])
        self.assertEqual(200, len(agents.begun))
        self.assertIn("works again", logged.output[-1])

    def test_a_later_release_that_changes_it_meanwhile_ends_the_run_and_no_host(self) -> None:
        self.check_left(
            lambda: self.change("PRAGMA user_version = 3"),
            lambda: self.change("PRAGMA user_version = 2"),
            "version 3",
        )

    def move(self, source: str, target: str) -> None:
        for path in self.directory.glob(f"{source}*"):
            path.rename(path.with_name(path.name.replace(source, target)))

    def test_a_file_that_is_taken_away_meanwhile_ends_the_run_and_no_host(self) -> None:
        self.check_left(
            lambda: self.move("jobs.sqlite", "aside"), lambda: self.move("aside", "jobs.sqlite"), "is gone"
        )

    def test_a_file_that_is_put_back_in_time_costs_no_result(self) -> None:
        ended = self.at_work(
            lambda: self.move("jobs.sqlite", "aside"), over=lambda: self.move("aside", "jobs.sqlite")
        )
        self.assertEqual(50, ended.count()[job.Result.CACHED])
        self.assertEqual(ended, EmbeddedJobs(self.path).get(ended.id))

    def test_another_file_in_its_place_takes_no_results(self) -> None:
        def replace() -> None:
            self.move("jobs.sqlite", "aside")
            self.change("CREATE TABLE other (id TEXT)")

        def put_back() -> None:
            pathlib.Path(self.path).unlink()
            self.move("aside", "jobs.sqlite")

        self.check_left(replace, put_back, "replaced by another file")

    def test_a_file_that_is_damaged_meanwhile_ends_no_host(self) -> None:
        def damage() -> None:
            with open(self.path, "r+b") as file:
                file.seek(4096)
                file.write(os.urandom(os.path.getsize(self.path) - 4096))

        with contextlib.suppress(errors.ConfigError):  # what it wrote before may be enough to go on with
            self.assertEqual(50, self.at_work(damage).count()[job.Result.CACHED])
        with contextlib.suppress(errors.ConfigError):
            (found,) = EmbeddedJobs(self.path).summaries()
            self.assertLessEqual({result for result, count in found.counts.items() if count}, {CACHED.result})

    def test_a_reader_holds_up_no_writer(self) -> None:
        database = self.database()
        work = self.start(database)
        with self.transaction("BEGIN", "SELECT * FROM cells"):
            ended = AggregatePrecacher(database, Agents(), host=self.host()).run(work.id)
        self.assertEqual(2, ended.count()[job.Result.CACHED])

    def test_a_reader_that_holds_up_a_writer_ends_no_host(self) -> None:
        database = self.database()
        work = self.start(database)
        database.close()
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.execute("PRAGMA journal_mode = delete")  # as on a network filesystem
        reading, agents = contextlib.ExitStack(), Agents()
        begin = agents.begin

        def read(host: str, task: client.HostTask) -> None:
            if not agents.begun:
                reading.enter_context(self.transaction("BEGIN", "SELECT * FROM cells"))
            begin(host, task)

        def look(seconds: float) -> None:
            self.sleep(seconds)
            if self.now > 1035:
                reading.close()

        agents.begin = read  # type: ignore[method-assign]
        with self.transaction("BEGIN", "SELECT * FROM cells"):
            database = self.database()  # which cannot change the journal while that is read
            self.assertEqual(work, database.get(work.id))
        host = System(clock=lambda: self.now, monotonic=lambda: self.now, sleep=look, random=lambda: 0.5)
        ended = AggregatePrecacher(database, agents, host=host).run(work.id)
        self.assertEqual(2, ended.count()[job.Result.CACHED])
        self.assertEqual(2, len(agents.begun))

    def test_a_writer_holds_up_no_reader(self) -> None:
        database = self.database()
        work = self.start(database)
        with self.transaction("BEGIN IMMEDIATE", "UPDATE cells SET received = 5"):
            self.assertEqual(work, EmbeddedJobs(self.path).get(work.id))
            self.assertEqual(1, len(EmbeddedJobs(self.path).summaries()))

    def test_processes_that_make_it_at_the_same_moment_all_have_it(self) -> None:
        at_once, failures = threading.Barrier(4), []

        def connect() -> None:
            at_once.wait()
            try:
                JobDatabase(self.path).close()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=connect) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], failures)
        self.assertEqual([], self.database().summaries())

    def test_only_what_changed_is_written_and_once_a_second(self) -> None:
        database, written = self.database(), []
        work = self.start(database, [f"host-{number}" for number in range(50)])

        class Counting(JobDatabase):
            def keep(self, job_id: str, runner: str, changes: Sequence[Change]) -> bool:  # type: ignore[override]
                written.append(len(changes))
                return super().keep(job_id, runner, changes)

        AggregatePrecacher(Counting(self.path), Agents(), host=self.host()).run(work.id)
        self.assertEqual(50, sum(written))
        self.assertLessEqual(len(written), self.now - 1000 + 1)


class ReadingTest(DatabaseCase):
    def test_looking_at_jobs_makes_and_changes_nothing(self) -> None:
        self.assertEqual([], EmbeddedJobs(self.path).summaries())
        with self.assertRaisesRegex(errors.ConfigError, "no job nonsense"):
            EmbeddedJobs(self.path).get("nonsense")
        self.assertEqual([], os.listdir(self.directory))

    def test_looking_at_jobs_does_without_what_writes_them(self) -> None:
        database = self.database()
        work = self.start(database)
        script = (
            "import sys; from imagecache_lib.cli.main import main; "
            f"code = main(['precache', 'status', '--jobs', {self.path!r}, {work.id!r}]); "
            "assert not {'sqlalchemy', 'alembic'} & set(sys.modules); sys.exit(code)"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, stdout=subprocess.DEVNULL)

    def test_a_filesystem_that_is_full_or_read_only_can_be_looked_at(self) -> None:
        small = self.small_filesystem()
        database = self.database()
        work = self.start(database)
        for crashed in (True, False):
            with self.subTest(crashed=crashed):
                if not crashed:
                    database.close()
                self.fill(small)
                self.assertEqual(work, EmbeddedJobs(self.path).get(work.id))
                (small / "fill").unlink()
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        self.assertEqual(work, EmbeddedJobs(self.path).get(work.id))
        self.assertEqual([work.id], [each.id for each in EmbeddedJobs(self.path).summaries()])
        with self.assertRaises(JobDatabaseError):
            self.start(self.database())


class OddRowsTest(DatabaseCase):
    def test_an_odd_row_is_shown_as_such_and_takes_nothing_else_away(self) -> None:
        for statement in (
            "UPDATE jobs SET terms = '{' WHERE id = '%s'",
            "UPDATE jobs SET terms = '{\"concurrency\": 1, \"swarm\": true}' WHERE id = '%s'",
            "UPDATE jobs SET terms = '{\"concurrency\": 0}' WHERE id = '%s'",
        ):
            with self.subTest(statement=statement):
                database = self.database()
                odd, good = self.start(database), self.start(database)
                self.change(statement % odd.id)
                for reading in (database, EmbeddedJobs(self.path)):
                    self.assertIn("terms", str(reading.get(odd.id).problem))
                    self.assertEqual(good, reading.get(good.id))
                    problems = {each.id: each.problem for each in reading.summaries()}
                    self.assertIsNone(problems[good.id])
                    self.assertIsNotNone(problems[odd.id])
                with self.assertRaisesRegex(errors.ConfigError, "terms"):
                    AggregatePrecacher(database, Agents(), host=self.host()).run(odd.id)

    def test_an_odd_result_is_shown_as_such_and_never_overwritten(self) -> None:
        database = self.database()
        work = self.start(database)
        self.change("UPDATE cells SET result = 'deferred', reason = 'soon' WHERE host = 0")
        found = EmbeddedJobs(self.path).get(work.id)
        self.assertEqual(job.Result.UNKNOWN, found.cells["one"]["image-a"].result)
        self.assertIn("'deferred': soon", found.cells["one"]["image-a"].reason)
        ended = AggregatePrecacher(database, Agents(), host=self.host()).resume(work.id)
        self.assertEqual(
            {job.Result.UNKNOWN: 1, job.Result.CACHED: 1}, {k: v for k, v in ended.count().items() if v}
        )
        self.assertEqual(1, database.summaries()[0].counts[job.Result.UNKNOWN])

    def test_odd_values_of_a_row_are_read_as_none(self) -> None:
        database = self.database()
        work = self.start(database)
        self.change("UPDATE cells SET received = 'much', total = 'more' WHERE host = 0")
        self.change("UPDATE jobs SET created = 'yesterday'")
        found = EmbeddedJobs(self.path).get(work.id)
        self.assertEqual(
            (0, None), (found.cells["one"]["image-a"].received, found.cells["one"]["image-a"].total)
        )
        self.assertEqual(0, found.created)

    def test_a_damaged_file_is_said_with_its_path(self) -> None:
        database = self.database()
        for number in range(30):
            self.start(database, [f"host-{number}-{each}" for each in range(50)])
        database.close()
        whole = pathlib.Path(self.path).read_bytes()
        for what, damaged in (
            ("header", bytes(100) + whole[100:]),
            ("middle", whole[:4096] + os.urandom(len(whole) - 4096)),
            ("truncated", whole[: len(whole) // 2]),
        ):
            with self.subTest(what=what):
                pathlib.Path(self.path).write_bytes(damaged)
                with self.assertRaisesRegex(errors.ConfigError, self.path):
                    EmbeddedJobs(self.path).summaries()
                with self.assertRaisesRegex(errors.ConfigError, self.path):
                    self.database().summaries()


class VersionTest(DatabaseCase):
    def make_old(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.executescript(VERSION_1)

    def check_old(self, reading: JobDatabase | EmbeddedJobs) -> None:
        (listed,) = reading.summaries()
        self.assertEqual(("old", 2, 2, True), (listed.id, listed.hosts, listed.images, listed.cancelled))
        self.assertEqual((1, 1), (listed.counts[job.Result.CACHED], listed.counts[job.Result.ERROR]))
        found = reading.get("old")
        self.assertEqual((("one", "a-second"), ("image-b", "image-a")), (found.hosts, found.image_ids))
        self.assertEqual((job.Terms(concurrency=3), 5.5, 2), (found.terms, found.created, found.attempt))
        self.assertEqual(job.Cell(job.Result.CACHED, "", 7, 7), found.cells["one"]["image-b"])
        self.assertEqual(job.Cell(job.Result.ERROR, "no room", 0, 9), found.cells["one"]["image-a"])
        self.assertEqual(job.Cell(None, "soon", 1), found.cells["a-second"]["image-a"])

    def test_the_first_releases_database_is_read_as_it_is(self) -> None:
        self.make_old()
        before = pathlib.Path(self.path).read_bytes()
        self.check_old(EmbeddedJobs(self.path))
        self.assertEqual(before, pathlib.Path(self.path).read_bytes())

    def test_the_first_releases_database_is_taken_over(self) -> None:
        self.make_old()
        database = self.database()
        self.check_old(database)
        self.check_old(EmbeddedJobs(self.path))
        ended = AggregatePrecacher(database, Agents(), host=self.host()).resume("old")
        self.assertEqual(4, ended.count()[job.Result.CACHED])

    def test_a_later_releases_database_is_refused_even_while_a_run_is_at_work(self) -> None:
        database = self.database()
        work = self.start(database)
        self.assertTrue(database.take_lease(work.id, "runner", database.lease_of(work.id)))
        self.change("PRAGMA user_version = 3")
        for attempt in (
            self.database,
            EmbeddedJobs(self.path).summaries,
            lambda: database.keep(work.id, "runner", [Change(0, 0, CACHED)]),
        ):
            with self.assertRaisesRegex(errors.ConfigError, "version 3.*upgrade"):
                attempt()

    def test_a_database_in_the_making_holds_no_job_yet(self) -> None:
        pathlib.Path(self.path).touch()
        self.assertEqual([], EmbeddedJobs(self.path).summaries())
        with self.assertRaisesRegex(errors.ConfigError, "there is no job"):
            EmbeddedJobs(self.path).get("0" * 32)

    def test_another_programs_database_is_refused_and_left_as_it_is(self) -> None:
        for table in ("recipes (name TEXT)", "jobs (id TEXT)", "cells (host_position TEXT)"):
            for version in (0, 1, 2, 3, -1):
                with self.subTest(table=table, version=version):
                    self.path = str(self.directory / f"{table.split()[0]}{version}.sqlite")
                    with contextlib.closing(sqlite3.connect(self.path)) as connection:
                        connection.execute(f"CREATE TABLE {table}")
                        connection.execute(f"PRAGMA user_version = {version}")
                    before = pathlib.Path(self.path).read_bytes()
                    for attempt in (EmbeddedJobs(self.path).summaries, self.database):
                        with self.assertRaisesRegex(errors.ConfigError, "not a job database"):
                            attempt()
                    self.assertEqual(before, pathlib.Path(self.path).read_bytes())

    def test_what_is_no_file_is_refused_at_once(self) -> None:
        fifo, directory, link = (self.directory / name for name in ("fifo", "directory", "link"))
        os.mkfifo(fifo)
        directory.mkdir()
        link.symlink_to(fifo)
        for path in (fifo, directory, link, pathlib.Path("/dev/null")):
            with self.subTest(path=path.name):
                self.path = str(path)
                for attempt in (EmbeddedJobs(self.path).summaries, self.database):
                    with self.assertRaisesRegex(errors.ConfigError, "is no file"):
                        attempt()

    def test_any_path_will_do(self) -> None:
        for name in ("a b?c#d%20", "\N{SNOWMAN}", os.fsdecode(b"\xff"), ":memory:", "link"):
            with self.subTest(name=name):
                self.path = str(self.directory / name)
                if name == "link":
                    os.symlink(self.directory / "elsewhere", self.path)
                work = self.start(self.database())
                self.assertEqual(work, EmbeddedJobs(self.path).get(work.id))

    def test_a_url_that_does_not_work_is_refused_without_its_password(self) -> None:
        for url in (
            "mysql+pymysql://user:SECRET@host:port/jobs",
            "mysql+pymysql://user:SECRET@127.0.0.1:1/jobs",
            "mysql+pymysql://127.0.0.1:1/jobs?password=SECRET",
            "mysql+pymysql://user:SECRET@127.0.0.1:1/jobs?unheard=of",
            "mysql+pymysql://user:SECRET@127.0.0.1:1/jobs?charset=unheard",
            "postgresql+psycopg://user:SECRET@127.0.0.1:1/jobs",
            "postgresql+psycopg://127.0.0.1:1/jobs?password=SECRET",
            "postgresql+unheard://user:SECRET@127.0.0.1:1/jobs",
            "unheard://user:SECRET@host/jobs",
            "sqlite:////tmp/SECRET",
            "://user:SECRET@host",
        ):
            with self.subTest(url=url), self.assertRaises(errors.ConfigError) as refused:
                JobDatabase(url)
            self.assertNotIn("SECRET", str(refused.exception))


class PruneTest(DatabaseCase):
    def test_old_jobs_go_unless_they_are_not_over_or_run(self) -> None:
        database = self.database()
        done, left, run, young = (self.start(database) for _job in range(4))
        self.change(f"UPDATE jobs SET created = 900 WHERE id = '{young.id}'")
        self.change(f"UPDATE cells SET result = 'cached' WHERE job <> '{left.id}'")
        self.assertTrue(database.take_lease(run.id, "runner", database.lease_of(run.id)))
        conductor = AggregatePrecacher(database, Agents(), host=self.host())
        self.assertEqual(1, conductor.prune(500))
        self.assertEqual({left.id, run.id, young.id}, {each.id for each in conductor.list()})
        with self.assertRaisesRegex(errors.ConfigError, "no job"):
            conductor.status(done.id)
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            self.assertEqual(3, connection.execute("SELECT COUNT(DISTINCT job) FROM cells").fetchone()[0])


class JournalTest(DatabaseCase):
    def test_readers_and_the_writer_do_not_wait_for_each_other_on_a_local_filesystem(self) -> None:
        self.start(self.database())
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            self.assertEqual("wal", connection.execute("PRAGMA journal_mode").fetchone()[0])

    def test_network_filesystems_are_told_by_the_list_of_mounts(self) -> None:
        listing = (
            "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
            "40 22 0:45 / /srv rw,relatime shared:9 - nfs4 10.0.0.1:/srv rw,vers=4.2\n"
            "41 22 0:46 / /home/a\\040b rw - fuse.sshfs x rw\n"
            "42 22 0:47 / /tmp rw - tmpfs tmpfs rw\n"
            "nonsense\n"
        )
        found = {
            minor: mounts.is_listed_as_network(listing, os.makedev(0, minor)) for minor in (45, 46, 47, 48)
        }
        self.assertEqual({45: True, 46: True, 47: False, 48: False}, found)
        self.assertFalse(mounts.is_listed_as_network(listing, os.makedev(8, 1)))

    def test_on_a_network_filesystem_no_memory_is_shared(self) -> None:
        listing = self.directory / "mountinfo"
        device = os.stat(self.directory).st_dev
        listing.write_text(f"40 22 {os.major(device)}:{os.minor(device)} / /srv rw - nfs4 server:/srv rw\n")
        self.assertTrue(mounts.is_network(str(self.directory), mountinfo=str(listing)))
        self.assertFalse(mounts.is_network(str(self.directory), mountinfo="/nonexistent"))


class LeaseTest(DatabaseCase):
    def test_a_runner_of_this_machine_that_died_is_known_to_be_dead(self) -> None:
        script = "from imagecache_lib.precache import lease; print(lease.new_runner('a/b'))"
        done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
        dead = lease.Lease(done.stdout.strip(), 5)
        self.assertTrue(dead.is_free)
        self.assertIn("a_b, process", dead.conductor)

    def test_a_runner_that_may_live_is_not_taken_for_dead(self) -> None:
        own = lease.new_runner("here")
        name, boot, namespace, pid, started, number = own.split("/")
        for runner in (
            own,
            "/".join((name, "another-boot", namespace, "999999999", started, number)),
            "/".join((name, boot, "another-namespace", "999999999", started, number)),
            "nonsense",
            "",
            "/////",
        ):
            with self.subTest(runner=runner):
                self.assertFalse(lease.Lease(runner, 1).is_free)
        self.assertTrue(lease.Lease("/".join((name, boot, namespace, pid, "1", number)), 1).is_free)
        self.assertTrue(lease.Lease(None, 1).is_free)
        self.assertLessEqual(len(lease.new_runner("h" * 300)), 255)

    def test_terms_of_today_are_read_by_the_release_before(self) -> None:
        database = self.database()
        work = self.start(database)
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            (terms,) = connection.execute("SELECT terms FROM jobs WHERE id = ?", (work.id,)).fetchone()
        self.assertEqual(
            {"concurrency", "host_rate", "total_rate", "deadline", "pin_until", "retries", "jitter"},
            set(json.loads(terms)),
        )
