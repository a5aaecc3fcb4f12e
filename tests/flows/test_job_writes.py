# SPDX-License-Identifier: Apache-2.0
"""Writes of the job database whose answer gets lost, or that another transaction is before: made once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence

from imagecache_lib import errors
from imagecache_lib.precache import job, retries
from imagecache_lib.precache.database import Change, JobDatabase
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.precache.precacher import AggregatePrecacher
from imagecache_lib.precache.retries import AnswerLost, Contended, Duplicate, Tries
from imagecache_lib.system.host import System
from imagecache_lib.system.trace import TracePoint
from tests.flows.test_job_database import CACHED, Agents, DatabaseCase

ID = "5" * 32

#: The moments at which the connection breaks, of one try each: nothing was stored, or everything was.
BEFORE, AFTER = TracePoint.JOBS_COMMIT, TracePoint.JOBS_COMMITTED
LOSSES = ((AFTER,), (BEFORE,), (BEFORE, AFTER), (AFTER, BEFORE), (AFTER, AFTER))


class LostAnswersCase(DatabaseCase):
    def setUp(self) -> None:
        super().setUp()
        self.breaks: list[TracePoint] = []
        self.pauses: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def host(self) -> System:
        return dataclasses.replace(super().host(), trace=self.reached)

    def database(self) -> JobDatabase:
        found = JobDatabase(self.path, busy=0.05, host=self.host())
        self.addCleanup(found.close)
        return found

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self.meanwhile()

    def reached(self, point: TracePoint) -> None:
        if self.breaks and point is self.breaks[0]:
            del self.breaks[0]
            raise ConnectionResetError("the connection broke")

    @contextlib.contextmanager
    def losing(self, *points: TracePoint) -> Iterator[None]:
        """Lose an answer at each of these moments during the body, unless it is over before."""
        self.breaks, self.pauses = list(points), []
        with self.assertLogs("imagecache_lib.precache.retries", "WARNING") as logged:
            yield
        self.assertEqual(len(points) - len(self.breaks), len(self.pauses))
        self.assertIn(len(self.pauses), (len(points), 1 + points.index(AFTER) if AFTER in points else 0))
        self.breaks = []
        self.assertEqual(1, len(logged.output))
        self.assertIn("the connection broke", logged.output[0])

    def losses(self) -> Iterator[Sequence[TracePoint]]:
        for points in LOSSES:
            with self.subTest(points=points):
                yield points

    def rows(self, statement: str) -> list[tuple[object, ...]]:
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(statement).fetchall()


class LostAnswersTest(LostAnswersCase):
    def test_a_job_whose_answer_got_lost_is_stored_once(self) -> None:
        database, made = self.database(), []
        for points in self.losses():
            with self.losing(*points):
                work = self.start(database)
            made.append(work)
            self.assertEqual({each.id for each in made}, {each.id for each in database.summaries()})
            self.assertEqual(len(made), len(database.summaries()))
            self.assertEqual({"one": {"image-a": job.OPEN}, "two": {"image-a": job.OPEN}}, work.cells)
        self.assertEqual([(2 * len(made),)], self.rows("SELECT COUNT(*) FROM cells"))

    def test_a_caller_that_asks_again_with_its_id_starts_one_job(self) -> None:
        conductor = AggregatePrecacher(self.database(), Agents(), host=self.host())
        terms = job.Terms(concurrency=5, deadline=9000.0)
        first = conductor.start("racks", ["one"], ["image-a"], terms, job_id=ID)
        self.now += 5
        self.assertEqual(first, conductor.start("racks", ["one"], ["image-a"], terms, job_id=ID))
        for aggregate, host, image, other in (
            ("shelves", "one", "image-a", terms),
            ("racks", "two", "image-a", terms),
            ("racks", "one", "image-b", terms),
            ("racks", "one", "image-a", job.Terms(concurrency=5)),
        ):
            with self.assertRaisesRegex(errors.ConfigError, f"another job has the id {ID}"):
                conductor.start(aggregate, [host], [image], other, job_id=ID)
        for odd in ("", "5", ID + "5", "x" * 32, f"{ID[:-2]}/5"):
            with self.assertRaisesRegex(errors.ConfigError, "no job can have the id"):
                conductor.start("racks", ["one"], ["image-a"], terms, job_id=odd)
        self.assertEqual([ID], [each.id for each in conductor.list()])
        self.assertEqual(first, conductor.status(ID))

    def test_a_cancel_whose_answer_got_lost_is_one(self) -> None:
        database = self.database()
        for points in self.losses():
            work = self.start(database)
            with self.losing(*points):
                database.cancel(work.id)
            self.assertTrue(database.is_cancelled(work.id))

    def test_a_lease_whose_answer_got_lost_is_its_takers_and_no_others(self) -> None:
        database = self.database()
        for points in self.losses():
            work = self.start(database)
            seen = database.lease_of(work.id)
            with self.losing(*points):
                self.assertTrue(database.take_lease(work.id, "mine", seen))
            self.assertEqual(
                ("mine", 1), (database.lease_of(work.id).runner, database.lease_of(work.id).beat)
            )
            self.assertFalse(database.take_lease(work.id, "another", seen))
            with self.losing(*points):
                database.release_lease(work.id, "mine")
            self.assertEqual((None, 2), (database.lease_of(work.id).runner, database.lease_of(work.id).beat))

    def test_a_lease_that_another_takes_meanwhile_is_the_others(self) -> None:
        database = self.database()
        work = self.start(database)
        seen = database.lease_of(work.id)
        self.meanwhile = lambda: self.change("UPDATE jobs SET runner = 'another', beat = 1")
        with self.losing(BEFORE):
            self.assertFalse(database.take_lease(work.id, "mine", seen))
        self.assertEqual("another", database.lease_of(work.id).runner)

    def test_deleted_jobs_are_counted_though_the_answer_got_lost(self) -> None:
        database = self.database()
        kept = self.start(database)
        for points in self.losses():
            for _old in range(3):
                self.start(database)
            self.change(f"UPDATE cells SET result = 'cached' WHERE job <> '{kept.id}'")
            with self.losing(*points):
                self.assertEqual(3, database.prune(5000.0))
            self.assertEqual([kept.id], [each.id for each in database.summaries()])

    def resumable(self, database: JobDatabase) -> str:
        """Return the id of a job that failed and was cancelled, whose lease is "mine"."""
        work = self.start(database)
        self.assertTrue(database.take_lease(work.id, "mine", database.lease_of(work.id)))
        self.change(f"UPDATE cells SET result = 'error', reason = 'no room' WHERE job = '{work.id}'")
        database.cancel(work.id)
        return work.id

    def test_a_resume_whose_answer_got_lost_is_one_attempt(self) -> None:
        database = self.database()
        for points in self.losses():
            job_id = self.resumable(database)
            with self.losing(*points):
                database.retry(job_id, "mine")
            found = database.get(job_id)
            self.assertEqual((1, False), (found.attempt, found.cancelled))
            self.assertEqual({job.OPEN}, {found.cells[name]["image-a"] for name in found.hosts})

    def test_a_cancel_between_a_resume_and_its_second_try_stays(self) -> None:
        database = self.database()
        job_id = self.resumable(database)
        self.meanwhile = lambda: self.change("UPDATE jobs SET cancelled = 1")
        with self.losing(AFTER):
            database.retry(job_id, "mine")
        self.assertEqual((1, True), (database.get(job_id).attempt, database.get(job_id).cancelled))

    def test_results_that_are_written_again_stay_what_they_were(self) -> None:
        database = self.database()
        work = self.start(database)
        self.assertTrue(database.take_lease(work.id, "mine", database.lease_of(work.id)))
        changes = [Change(0, 0, CACHED), Change(1, 0, job.Cell(None, "", 3, 9))]
        self.breaks = [AFTER]
        with self.assertRaises(JobDatabaseError):
            database.keep(work.id, "mine", changes)  # its writer tries again
        once = database.get(work.id)
        self.assertFalse(database.keep(work.id, "mine", changes))
        self.assertEqual(once, database.get(work.id))
        self.assertEqual(CACHED, once.cells["one"]["image-a"])

    def test_a_run_all_of_whose_answers_get_lost_now_and_then_has_every_result(self) -> None:
        conductor = AggregatePrecacher(self.database(), Agents(), host=self.host())
        work = conductor.start("racks", [f"host-{number}" for number in range(50)], ["image-a"])
        self.breaks = [AFTER, BEFORE, AFTER, AFTER]
        ended = conductor.run(work.id)
        self.assertEqual([], self.breaks)
        self.assertEqual(50, ended.count()[job.Result.CACHED])
        self.assertEqual(ended, conductor.status(work.id))

    def test_a_job_that_may_be_stored_is_named_once_the_tries_are_over(self) -> None:
        database = self.database()
        hidden = self.directory / "hidden"
        # As where a server restarts: it does not answer at all.
        self.meanwhile = lambda: pathlib.Path(self.path).rename(hidden) if not hidden.exists() else None
        self.breaks = [AFTER]
        with self.assertRaisesRegex(AnswerLost, "is gone; job [0-9a-f]{32} may be stored") as caught:
            self.start(database)
        self.assertEqual(retries.MOST_TRIES - 1, len(self.pauses))
        hidden.rename(self.path)
        (stored,) = database.summaries()
        self.assertIn(stored.id, str(caught.exception))

    def test_a_database_that_comes_back_in_time_has_the_job_once(self) -> None:
        database, hidden = self.database(), self.directory / "hidden"

        def restart() -> None:
            if len(self.pauses) == 1:
                pathlib.Path(self.path).rename(hidden)
            elif len(self.pauses) == 4:
                hidden.rename(self.path)

        self.meanwhile, self.breaks = restart, [AFTER]
        work = self.start(database)
        self.assertEqual([work.id], [each.id for each in database.summaries()])


class TriesTest(LostAnswersCase):
    def tried(self, *failures: Exception, deadline: float | None = None) -> int:
        """Return how many tries it took to fail like this and then not to."""
        pending, made = list(failures), 0
        for again in Tries(self.host(), "it may be stored", deadline=deadline):
            with again:
                made += 1
                if pending:
                    raise pending.pop(0)
                break
        return made

    def test_tries_are_further_and_further_apart(self) -> None:
        with self.assertRaises(Contended):
            self.tried(*(Contended("another was first") for _try in range(20)))
        self.assertEqual(retries.MOST_TRIES - 1, len(self.pauses))
        self.assertEqual([0.1, 0.2, 0.4, 0.8], [round(each, 3) for each in self.pauses[:4]])
        self.assertEqual(sorted(self.pauses), self.pauses)
        self.assertLessEqual(sum(self.pauses), retries.LONGEST)

    def test_two_that_met_do_not_meet_again(self) -> None:
        pauses: list[float] = []
        for chance in (0.0, 0.999):
            host = System(sleep=pauses.append, monotonic=lambda: 0.0, random=functools.partial(float, chance))
            for failures, again in enumerate(Tries(host, "")):
                with again:
                    if failures:
                        break
                    raise Contended("another was first")
        self.assertEqual([0.05, 0.15], [round(each, 2) for each in pauses])

    def test_a_database_that_answers_slowly_is_not_asked_for_long(self) -> None:
        def slow() -> None:
            self.now += 12

        self.meanwhile = slow
        with self.assertRaises(Contended):
            self.tried(*(Contended("another was first") for _try in range(20)))
        self.assertEqual(3, len(self.pauses))

    def test_no_pause_is_longer_than_the_time_that_is_left(self) -> None:
        with self.assertRaises(Contended):
            self.tried(*(Contended("another was first") for _try in range(20)), deadline=self.now + 0.25)
        self.assertEqual([0.1, 0.15], [round(each, 3) for each in self.pauses])

    def test_after_a_deadline_there_is_one_try(self) -> None:
        self.assertEqual(1, self.tried(deadline=self.now - 1))
        with self.assertRaises(Contended):
            self.tried(Contended("another was first"), deadline=self.now)
        self.assertEqual([], self.pauses)

    def test_what_does_not_pass_is_told_at_once(self) -> None:
        for failure in (JobDatabaseError("no"), Duplicate("no"), ValueError("no"), errors.ConfigError("no")):
            with self.assertRaises(type(failure)):
                self.tried(failure)
        self.assertEqual([], self.pauses)

    def test_a_database_that_restarts_after_a_lost_answer_is_waited_for(self) -> None:
        self.assertEqual(4, self.tried(AnswerLost("a"), JobDatabaseError("b"), JobDatabaseError("c")))
        with self.assertRaisesRegex(AnswerLost, "^no room; it may be stored"):
            self.tried(AnswerLost("a"), *(JobDatabaseError("no room") for _try in range(20)))
        for failure in (Duplicate("no"), ValueError("no")):
            with self.assertRaises(type(failure)):
                self.tried(AnswerLost("a"), failure)
