# SPDX-License-Identifier: Apache-2.0
"""Jobs on real servers, MariaDB and PostgreSQL: what conductors on several machines share."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import sqlalchemy as sa
from alembic import autogenerate
from alembic.migration import MigrationContext

from imagecache_lib import errors
from imagecache_lib.precache import client, job, lease, schema
from imagecache_lib.precache.database import Change, JobDatabase
from imagecache_lib.precache.precacher import AggregatePrecacher
from imagecache_lib.system.host import System
from imagecache_lib.system.trace import TracePoint
from tests.lab.galera import running_galera
from tests.lab.mariadb import MariaDb, running_mariadb
from tests.lab.postgresql import PostgreSql, running_postgresql
from tests.lab.relay import Hold, Relay, running_relay
from tests.support.cache_case import Running, Stop
from tests.support.relay_hosts import until

Server = MariaDb | PostgreSql
CACHED = job.Cell(job.Result.CACHED, "", 7, 7)


@pytest.fixture(scope="module", params=["mariadb", "postgresql"])
def running(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running server. Tests share it."""
    # Not below pytest's directory, which only its user may enter: PostgreSQL runs as another.
    with tempfile.TemporaryDirectory(prefix="jobs-", dir="/var/tmp") as name:
        home = pathlib.Path(name)
        home.chmod(0o755)
        start = running_mariadb if request.param == "mariadb" else running_postgresql
        with start(home) as found:
            yield found


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """A server without tables."""
    engine = sa.create_engine(running.url)
    with engine.begin() as connection:
        found = sa.MetaData()
        found.reflect(connection)
        found.drop_all(connection)
    engine.dispose()
    yield running


class Agents(client.HostClient):
    """Hosts that cache everything the first time they are asked."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.before: Callable[[], object] = lambda: None

    def survey(self, host: str, image_ids: Sequence[str]) -> client.Survey:
        raise NotImplementedError

    def begin(self, host: str, task: client.HostTask) -> None:
        self.before()
        self.begun.append(host)

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        return client.TaskReport(dict.fromkeys(("image-a", "image-b"), CACHED))

    def cancel(self, host: str, job_id: str) -> None:
        raise NotImplementedError


def start(database: JobDatabase, hosts: int = 5) -> job.Job:
    names = [f"host-{number}" for number in range(hosts)]
    return database.add("racks", names, ["image-a", "image-b"], job.Terms(concurrency=hosts), now=1.5)


def test_a_job_comes_to_its_end(server: Server) -> None:
    database, agents = JobDatabase(server.url), Agents()
    work = start(database, hosts=50)
    assert AggregatePrecacher(database, agents).run(work.id).count()[job.Result.CACHED] == 100
    (listed,) = JobDatabase(server.url, change_schema=False).summaries()
    assert (listed.hosts, listed.images, listed.is_over, listed.created) == (50, 2, True, 1.5)
    assert database.prune(2.0) == 1
    assert database.summaries() == []


def test_the_longest_names_and_the_oddest_words_fit(server: Server) -> None:
    database = JobDatabase(server.url)
    image = "\N{GRINNING FACE}" * 256
    made = database.add("\N{GRINNING FACE}", ["H" * 253, "h" * 253], [image], job.Terms(), now=1.0)
    assert database.take_lease(made.id, "r" * 255, database.lease_of(made.id))
    odd = job.Cell(job.Result.ERROR, "a\0b\ud800\N{GRINNING FACE}" * 5000, job.LARGEST, job.LARGEST)
    database.keep(made.id, "r" * 255, [Change(0, 0, odd.storable())])
    found = database.get(made.id).cells["H" * 253][image]
    assert (found.result, found.received, found.total) == (odd.result, job.LARGEST, job.LARGEST)
    assert found.reason.startswith("a\N{REPLACEMENT CHARACTER}b?\N{GRINNING FACE}")


def test_two_that_start_at_the_same_moment_make_the_tables_once(server: Server) -> None:
    failures: list[BaseException] = []
    at_once = threading.Barrier(4)

    def connect() -> None:
        at_once.wait()
        try:
            JobDatabase(server.url)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=connect) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert JobDatabase(server.url).summaries() == []


def test_the_tables_are_those_that_the_release_describes(server: Server) -> None:
    JobDatabase(server.url)
    with sa.create_engine(server.url, poolclass=sa.NullPool).connect() as connection:
        difference = autogenerate.compare_metadata(MigrationContext.configure(connection), schema.METADATA)
    assert difference == []


def test_of_two_that_take_a_dead_ones_job_one_has_it(server: Server) -> None:
    database = JobDatabase(server.url)
    work = start(database)
    assert database.take_lease(work.id, "dead", database.lease_of(work.id))
    seen, at_once, taken = database.lease_of(work.id), threading.Barrier(8), []

    def take(runner: str) -> None:
        at_once.wait()
        taken.append(database.take_lease(work.id, runner, seen))

    threads = [threading.Thread(target=take, args=(f"runner-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 7 + [True]
    with pytest.raises(lease.LeaseLost):
        database.keep(work.id, "dead", [Change(0, 0, CACHED)])
    assert database.get(work.id).cells["host-0"]["image-a"].result is None


def test_a_server_that_restarts_costs_no_result(server: Server) -> None:
    database, agents = JobDatabase(server.url), Agents()
    work = start(database, hosts=1)
    agents.before = at_work = Stop()
    running = Running(lambda: AggregatePrecacher(database, agents).run(work.id))
    at_work.wait()
    server.stop()
    # Started here: a server of these tests ends with the thread that started it.
    server.start()
    at_work.go_on()
    assert running.result().count()[job.Result.CACHED] == 2


def test_a_server_that_is_gone_is_said_with_what_to_do(server: Server) -> None:
    database = JobDatabase(server.url)
    work = start(database)
    server.stop()
    try:
        with pytest.raises(errors.ConfigError, match="job database failed") as caught:
            database.get(work.id)
        assert "jobs:jobs" not in str(caught.value)
    finally:
        server.start()
    assert database.get(work.id) == work


class Losses:
    """Breaks the connection at commits: before the server learns of it, or before its answer arrives."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._pending: list[bool] = []
        self._closing = contextlib.ExitStack()

    def come(self, *answers: bool) -> None:
        """Break one connection for each: True for the answer that gets lost, False for the question."""
        self._pending = list(answers)

    @property
    def are_over(self) -> bool:
        """Whether all that were to come have come."""
        return not self._pending

    def __call__(self, reached: TracePoint) -> None:
        if reached is not TracePoint.JOBS_COMMIT or not self._pending:
            return
        if self._pending.pop(0):
            hold = self._closing.enter_context(self._relay.held_after(0))
            threading.Thread(target=self._break, args=(hold,), daemon=True).start()
        else:
            self._relay.sever()
            self._relay.mend()

    def _break(self, hold: Hold) -> None:
        until(lambda: hold.count == 1)  # the server has committed, and says so
        self._relay.sever()
        self._closing.close()
        self._relay.mend()


@pytest.mark.parametrize("losses", [(True,), (False,), (True, True), (False, True)])
def test_a_server_whose_answer_gets_lost_stores_a_job_once(server: Server, losses: tuple[bool, ...]) -> None:
    JobDatabase(server.url).close()
    with running_relay(f"http://127.0.0.1:{server.port}") as relay:
        lost = Losses(relay)
        url = sa.make_url(server.url).set(port=relay.port).render_as_string(hide_password=False)
        database = JobDatabase(url, host=System(trace=lost))
        lost.come(*losses)
        work = start(database)
        assert [work] == [database.get(each.id) for each in database.summaries()]
        seen = database.lease_of(work.id)
        lost.come(*losses)
        assert database.take_lease(work.id, "mine", seen)
        assert lost.are_over
        assert not database.take_lease(work.id, "another", seen)
        failed = job.Cell(job.Result.ERROR, "no room", 7, 7)
        database.keep(
            work.id, "mine", [Change(host, image, failed) for host in range(5) for image in range(2)]
        )
        lost.come(*losses)
        database.cancel(work.id)
        assert (lost.are_over, database.is_cancelled(work.id)) == (True, True)
        lost.come(*losses)
        database.retry(work.id, "mine")
        assert (lost.are_over, database.get(work.id).attempt, database.is_cancelled(work.id)) == (
            True,
            1,
            False,
        )
        database.keep(
            work.id, "mine", [Change(host, image, CACHED) for host in range(5) for image in range(2)]
        )
        lost.come(*losses)
        database.release_lease(work.id, "mine")
        assert (lost.are_over, database.lease_of(work.id).runner) == (True, None)
        lost.come(*losses)
        assert database.prune(2.0) == 1
        assert (lost.are_over, database.summaries()) == (True, [])
        database.close()


def test_a_later_release_changed_the_tables(server: Server) -> None:
    database = JobDatabase(server.url)
    work = start(database)
    assert database.take_lease(work.id, "runner", database.lease_of(work.id))
    with sa.create_engine(server.url, poolclass=sa.NullPool).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0099'")
    with pytest.raises(errors.ConfigError, match="upgrade"):
        JobDatabase(server.url)
    with pytest.raises(errors.ConfigError, match="upgrade"):
        database.keep(work.id, "runner", [])


def test_conductors_at_two_nodes_of_a_cluster_share_jobs() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="jobs-", dir="/var/tmp") as name,
        contextlib.ExitStack() as closing,
    ):
        nodes = closing.enter_context(running_galera(pathlib.Path(name)))
        databases = [JobDatabase(node.url) for node in nodes]
        for database in databases:
            closing.callback(database.close)
        work = start(databases[0])
        # What one node wrote, the other may read a moment later.
        until(lambda: any(each.id == work.id for each in databases[1].summaries()))
        for turn in range(5):
            assert take_at_once(databases, work.id, f"turn-{turn}") == [False, True]
        runner = str(databases[0].lease_of(work.id).runner)
        databases[0].release_lease(work.id, runner)
        until(lambda: databases[1].lease_of(work.id).runner is None)
        agents = Agents()
        agents.before = at_work = Stop()
        running = Running(lambda: AggregatePrecacher(databases[1], agents).run(work.id))
        at_work.wait()
        databases[0].cancel(work.id)
        until(lambda: databases[1].is_cancelled(work.id))
        at_work.go_on()
        assert running.result().is_over
        until(lambda: databases[0].is_over(work.id))
        assert databases[0].get(work.id).cells == databases[1].get(work.id).cells


def take_at_once(databases: Sequence[JobDatabase], job_id: str, name: str) -> list[bool]:
    """Have a conductor at each database take a job at the same moment. Returns which have it, sorted."""
    until(lambda: len({database.lease_of(job_id) for database in databases}) == 1)
    seen, at_once = databases[0].lease_of(job_id), threading.Barrier(len(databases))

    def take(database: JobDatabase, runner: str) -> bool:
        at_once.wait()
        return database.take_lease(job_id, runner, seen)

    running = [
        Running(lambda database=database, number=number: take(database, f"{name}-{number}"))  # type: ignore[misc]
        for number, database in enumerate(databases)
    ]
    return sorted(each.result() for each in running)
