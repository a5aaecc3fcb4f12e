# SPDX-License-Identifier: Apache-2.0
"""``imagecache precache`` on one machine, without a message bus, as operators and their scripts run it."""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import pty
import signal
import socket
import subprocess
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import model
from imagecache_lib.cli import agent
from imagecache_lib.cli.base import Unknown
from imagecache_lib.cli.job_display import JobDisplay
from imagecache_lib.cli.jobs import Status
from imagecache_lib.cli.precache import Start
from imagecache_lib.precache import job
from imagecache_lib.precache.database import Change, JobDatabase
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.precache.precacher import AggregatePrecacher
from imagecache_lib.testing.sources import FakeSource
from tests.commands.test_cli import IMAGE, Cli
from tests.support.ports import free_port


class JobsCli(Cli):
    """Keeps its jobs beside its instances."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        self.environment["IMAGECACHE_JOBS"] = str(path / "jobs.sqlite")

    def use_a_bus_that_is_away(self) -> None:
        """Have a message bus that takes no message: hosts other than this one can be named, and are down."""
        self.environment["OS_DEFAULT__TRANSPORT_URL"] = f"rabbit://guest:guest@127.0.0.1:{free_port()}/"

    def start(self, *words: str) -> list[str]:
        return ["precache", "start", IMAGE, "--file", str(self.data), "--digest", self.digest, *words]

    def begin_slowly(self) -> subprocess.Popen[str]:
        """Start a job so slow that it does not end before it is told to, however busy the machine is."""
        return subprocess.Popen(
            self.command(*self.start("--rate", "1K"), "-f", "json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )


@pytest.fixture
def cli(tmp_path: pathlib.Path) -> JobsCli:
    return JobsCli(tmp_path)


def test_planned_started_and_looked_at(cli: JobsCli) -> None:
    (planned,) = cli.json("precache", "plan", IMAGE, "--file", str(cli.data))
    assert (planned["present"], planned["missing"], planned["to_fetch"]) == (0, 1, 2**20)
    (result,) = cli.json(*cli.start("--aggregate", "racks", "--pin-until", "7d"))
    assert (result["image"], result["result"], result["received"]) == (IMAGE, "cached", 2**20)
    (listed,) = cli.json("precache", "list")
    assert (listed["aggregate"], listed["state"], listed["cached"]) == ("racks", "done", 1)
    assert cli.json("precache", "status", listed["id"]) == [result]
    assert cli.json("image", "show", IMAGE)["pins"]
    (again,) = cli.json(*cli.start())
    assert again["result"] == "existing"
    (planned,) = cli.json("precache", "plan", IMAGE, "--file", str(cli.data))
    assert (planned["present"], planned["to_fetch"]) == (1, 0)


def test_a_failure_is_told_with_its_reason_and_by_the_exit_code(cli: JobsCli) -> None:
    digest = "sha512:" + "0" * 128
    words = ("precache", "start", IMAGE, "--file", str(cli.data), "--digest", digest)
    (result,) = cli.json(*words, code=10)
    assert result["result"] == "error"
    assert "sha512" in result["reason"]
    (listed,) = cli.json("precache", "list")
    assert listed["state"] == "failed"
    (result,) = cli.json("precache", "resume", listed["id"], "--file", str(cli.data))
    assert result["result"] == "cached"


def test_other_hosts_are_refused_at_once_without_a_message_bus(cli: JobsCli) -> None:
    for command in (["precache", "plan", IMAGE, "--file", str(cli.data)], cli.start()):
        (refused,) = cli.run(*command, "--host", "elsewhere", code=7).stderr.splitlines()
        assert "elsewhere" in refused
        assert "set transport_url" in refused
    many = [word for number in range(5) for word in ("--host", f"node-{number}")]
    assert "node-0, node-1, node-2 and 2 others" in cli.run(*cli.start(*many), code=7).stderr
    assert cli.json("precache", "list") == []
    (result,) = cli.json(*cli.start("--host", socket.gethostname()))
    assert result["result"] == "cached"


def test_a_job_of_other_hosts_is_neither_resumed_nor_said_to_have_stopped_without_a_message_bus(
    cli: JobsCli,
) -> None:
    database = JobDatabase(cli.environment["IMAGECACHE_JOBS"])
    own = socket.gethostname()
    work = database.add("racks", [own, "elsewhere"], [IMAGE], job.Terms(), now=time.time())
    database.close()
    refused = cli.run("precache", "resume", work.id, "--file", str(cli.data), code=7).stderr
    assert ("elsewhere" in refused, "transport_url" in refused) == (True, True)
    ended = {row["host"]: row for row in cli.json("precache", "cancel", work.id, code=10)}
    assert [row["result"] for row in ended.values()] == ["skipped", "skipped"]
    assert ended[own]["reason"] == "the job was cancelled"
    assert "could not be told" in ended["elsewhere"]["reason"]


def test_requests_that_make_no_sense(cli: JobsCli, tmp_path: pathlib.Path) -> None:
    own = socket.gethostname()
    assert "twice" in cli.run(*cli.start("--host", own, "--host", own), code=7).stderr
    assert "list of hosts" in cli.run(*cli.start("--hosts-file", str(tmp_path / "none")), code=7).stderr
    (tmp_path / "empty").write_text("# nobody\n\n")
    assert "names none" in cli.run(*cli.start("--hosts-file", str(tmp_path / "empty")), code=7).stderr
    assert "retries is 101" in cli.run(*cli.start("--retries", "101"), code=7).stderr
    assert "no job" in cli.run("precache", "status", "nonsense", code=3).stderr
    assert "message bus" in cli.run("agent", code=7).stderr


def test_a_list_of_hosts_may_have_a_byte_order_mark(cli: JobsCli, tmp_path: pathlib.Path) -> None:
    listed = tmp_path / "hosts"
    listed.write_text(f"\ufeff{socket.gethostname()}\r\n")
    words = ("precache", "plan", IMAGE, "--file", str(cli.data), "--hosts-file", str(listed))
    (row,) = cli.json(*words)
    assert row["host"] == socket.gethostname()


def test_a_message_bus_that_is_away_is_told_from_hosts_that_are(cli: JobsCli) -> None:
    cli.use_a_bus_that_is_away()
    found = cli.run("precache", "plan", IMAGE, "--host", "a", "--timeout", "1s", code=5)
    assert "the message bus has taken no message" in found.stderr
    assert "guest" not in found.stderr
    cli.environment["OS_DEFAULT__TRANSPORT_URL"] = "rabbit://guest:secret@[::1:5672/"
    stderr = cli.run("precache", "plan", IMAGE, "--host", "a", code=7).stderr
    assert (len(stderr.splitlines()), "no URL" in stderr, "secret" in stderr) == (1, True, False)


def test_hosts_come_from_a_file_too(cli: JobsCli, tmp_path: pathlib.Path) -> None:
    listed = tmp_path / "hosts"
    # Written by an editor that begins every file with a mark.
    listed.write_text("node-1\n\nnode-2  # the odd one\n", encoding="utf-8-sig")
    cli.use_a_bus_that_is_away()
    words = ("precache", "plan", IMAGE, "--hosts-file", str(listed), "--timeout", "1s")
    assert [row["host"] for row in cli.json(*words, code=5)] == ["node-1", "node-2"]


def test_a_job_is_meant_by_its_first_letters_and_by_being_the_last(cli: JobsCli) -> None:
    for name in ("one", "two"):
        cli.run(*cli.start("--aggregate", name))
    first, last = (each["id"] for each in cli.json("precache", "list"))
    assert cli.json("precache", "status", first[:20])[0]["state"] == "cached"
    assert cli.json("precache", "status", "--last")[0]["state"] == "existing"
    assert "name one job" in cli.run("precache", "status", code=2).stderr
    assert "name one job" in cli.run("precache", "status", last, "--last", code=2).stderr
    assert "there is no job fff" in cli.run("precache", "resume", "fffffffff", code=3).stderr


def test_a_job_is_watched_until_it_is_over(cli: JobsCli) -> None:
    running = subprocess.Popen(
        cli.command("-q", *cli.start("--rate", "512K")), env=cli.environment, stdout=subprocess.DEVNULL
    )
    while not pathlib.Path(cli.environment["IMAGECACHE_JOBS"]).exists() or not cli.json("precache", "list"):
        assert not running.poll()
        time.sleep(0.05)
    watched = cli.json("precache", "status", "--last", "--watch")
    assert [(each["state"], each["per_cent"]) for each in watched] == [("cached", 100)]
    assert running.wait(300) == 0


def _app() -> Any:
    return types.SimpleNamespace(stderr=io.StringIO(), options=types.SimpleNamespace(verbose_level=1))


def test_a_job_that_is_forgotten_while_it_is_watched_is_unknown(tmp_path: pathlib.Path) -> None:
    options = argparse.Namespace(jobs=str(tmp_path / "jobs.sqlite"))
    database = JobDatabase(options.jobs)
    work = database.add("racks", ["one"], [IMAGE], job.Terms(), now=1.0)
    command = Status(_app(), None)
    assert command.read_job(work.id, options) == work
    assert database.take_lease(work.id, "runner", database.lease_of(work.id))
    database.keep(work.id, "runner", [Change(0, 0, job.Cell(job.Result.CACHED))])
    database.release_lease(work.id, "runner")
    assert database.prune(2.0) == 1
    with pytest.raises(Unknown, match=work.id):
        command.read_job(work.id, options)


def test_a_job_is_done_although_it_cannot_be_looked_at_meanwhile() -> None:
    class Conductor(AggregatePrecacher):
        def status(self, job_id: str) -> job.Job:
            raise JobDatabaseError("the job database failed")

    conductor = Conductor.__new__(Conductor)
    running = threading.Thread(target=lambda: None)
    running.start()
    Start(_app(), None).show(conductor, "job", running)


def test_a_deadline_that_is_past_makes_no_job(cli: JobsCli) -> None:
    for option in ("--deadline", "--pin-until"):
        assert "is past" in cli.run(*cli.start(option, "2020-01-01T00:00"), code=2).stderr
    assert cli.json("precache", "list") == []


def test_many_hosts_one_after_the_other_are_pointed_out(cli: JobsCli) -> None:
    cli.use_a_bus_that_is_away()
    hosts = [word for number in range(11) for word in ("--host", f"node-{number}")]
    assert "--concurrency" in cli.run(*cli.start(*hosts, "--deadline", "1s"), code=10).stderr


def test_hosts_of_a_site_are_in_a_row(cli: JobsCli, tmp_path: pathlib.Path) -> None:
    listed = tmp_path / "hosts"
    listed.write_text("node-1 north\nnode-2\tsouth # far away\nnode-3   north\nnode-4\n")
    cli.use_a_bus_that_is_away()
    words = ("precache", "plan", IMAGE, "--hosts-file", str(listed), "--timeout", "1s")
    assert [row["host"] for row in cli.json(*words, code=5)] == ["node-1", "node-3", "node-2", "node-4"]
    listed.write_text("node-1 north\nnode-1 south\n")
    assert "host twice: node-1" in cli.run(*cli.start("--hosts-file", str(listed)), code=7).stderr
    listed.write_text("node-1 north pole\n")
    assert "site" in cli.run(*cli.start("--hosts-file", str(listed)), code=7).stderr
    assert "head" in cli.run(*cli.start("--host", "a", "--relay", "--heads", "0"), code=7).stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_left_goes_on_later(cli: JobsCli, number: signal.Signals) -> None:
    # Only the rest comes later.
    left = cli.begin_slowly()
    assert left.stderr is not None
    for line in left.stderr:
        if ": 1 image on 1 host" in line:
            break
    stage = cli.instances / "_base" / ".imagecache" / "stage"
    while not any(path.stat().st_size for path in stage.glob("?" * 32)):  # the data, and no notes
        assert left.poll() is None
        time.sleep(0.05)
    left.send_signal(number)
    _out, said = left.communicate(timeout=300)
    assert left.returncode == 10, said
    (listed,) = cli.json("precache", "list")
    assert listed["state"] == "not_done", said
    assert any(stage.iterdir())  # what came of the image, with which the next attempt goes on
    source = ("--file", str(cli.data), "--digest", cli.digest)
    (result,) = cli.json("precache", "resume", listed["id"], *source)
    assert result["result"] == "cached"
    assert not any(stage.iterdir())


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--rate", "1K"), id="at work"),
        pytest.param(("--jitter", "1h"), id="before its turn"),
        pytest.param(("--host", "elsewhere"), id="while the host is down"),
    ],
)
def test_interrupted_in_any_phase_it_leaves_what_can_be_resumed(
    cli: JobsCli, words: tuple[str, ...], times: int
) -> None:
    if "--host" in words:
        cli.use_a_bus_that_is_away()
    left = subprocess.Popen(
        cli.command(*cli.start(*words), "-f", "json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli.environment,
    )
    assert left.stderr is not None
    assert any(": 1 image on 1 host" in line for line in left.stderr)
    stage = cli.instances / "_base" / ".imagecache" / "stage"
    while "--rate" in words and not (stage.is_dir() and any(stage.iterdir())):
        assert left.poll() is None
        time.sleep(0.05)
    for _time in range(times):
        left.send_signal(signal.SIGINT)
    out, said = left.communicate(timeout=300)
    assert left.returncode == 10, said
    assert "Traceback" not in said
    assert [row["result"] for row in json.loads(out)] == [None]
    (listed,) = cli.json("precache", "list")
    assert listed["state"] == "not_done"
    assert f"imagecache precache resume {listed['id']}" in said
    assert "--rate" in words or not stage.is_dir() or not any(stage.iterdir())


def test_cancelled_by_another_process(cli: JobsCli) -> None:
    running = cli.begin_slowly()
    assert running.stderr is not None
    word = next(line for line in running.stderr if ": 1 image on 1 host" in line)
    cli.run("precache", "cancel", word.split()[2].rstrip(":"), code=10)
    out, _err = running.communicate(timeout=300)
    assert running.returncode == 10
    assert [(row["result"], row["reason"]) for row in json.loads(out)] == [
        ("skipped", "the job was cancelled")
    ]


def _job(cells: Mapping[str, Sequence[job.Cell]]) -> job.Job:
    hosts = {name: {f"i{number}": cell for number, cell in enumerate(row)} for name, row in cells.items()}
    return job.Job("id", "racks", ("i0", "i1"), job.Terms(), hosts)


_DONE = job.Cell(job.Result.CACHED, "", 100, 100)


def test_a_log_gets_a_line_for_each_host_that_is_done() -> None:
    stream, now = io.StringIO(), [0.0]
    display = JobDisplay(stream, lambda: now[0])
    display.show(_job({"one": [_DONE, job.Cell()], "two": [job.Cell()] * 2}))
    failed = job.Cell(job.Result.ERROR, "no room")
    display.show(_job({"one": [_DONE, failed], "two": [job.Cell()] * 2}))
    now[0] = 20.0
    display.show(_job({"one": [_DONE, failed], "two": [_DONE, job.Cell(None, "", 50, 100)]}))
    first, second = stream.getvalue().splitlines()
    assert first == "one: 2 of 2 images: no room"
    assert second.startswith("1 of 2 hosts done; images: 2 cached, 1 error; 8 B/s, ")
    assert second.endswith("left")


def test_a_terminal_shows_who_works_first_and_no_more_than_fits() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream, os.fdopen(leader, "rb", buffering=0) as screen:
        display = JobDisplay(stream, lambda: 0.0, lambda: (40, 5))
        work = {f"done-{number}": [_DONE] * 2 for number in range(5)}
        work["busy"] = [_DONE, job.Cell(None, "", 50, 100)]
        work["down"] = [job.Cell(None, "the host is down: no answer")] * 2
        display.show(_job(work))
        display.show(_job(work))
        shown = ""
        while shown.count("\n") < 8:
            shown += screen.read(4096).decode()
    first, second = shown.split("\x1b[4A")
    lines = [line.removeprefix("\r\x1b[2K").strip() for line in first.split("\n")]
    assert lines[:2] == [
        "busy: 1 of 2 images, i1 50 % of 100 B",
        "down: 0 of 2 images, the host is down: "[:39].strip(),
    ]
    assert lines[2] == "... and 5 more hosts"
    assert lines[3] == "5 of 7 hosts done; images: 11 cached"
    assert second.count("\x1b[2K") == 4


class _Cache(ic.ImageCacheManager):
    """Counts its passes."""

    def __init__(self, path: pathlib.Path, interval: int, after: threading.Event) -> None:
        config = ic.CacheConfig(instances_path=str(path), manager_interval=interval)
        super().__init__(config, FakeSource({}))
        self.asked: list[object] = []
        self._after = after

    def verify_base_images(self, instances: object, **options: object) -> object:  # type: ignore[override]
        self.asked.append(instances)
        self._after.set()
        return super().verify_base_images(instances, **options)  # type: ignore[arg-type]


def test_passes_use_what_the_provider_says_and_keep_all_if_it_fails(tmp_path: pathlib.Path) -> None:
    def fail() -> None:
        raise RuntimeError("the API is down")

    some = [model.Instance("a-uuid", "here")]
    for provider, asked in ((lambda: some, tuple(some)), (lambda: None, None), (fail, None)):
        stop = threading.Event()
        cache = _Cache(tmp_path, 0, stop)
        agent.run_passes(cache, provider, stop)
        assert cache.asked == [asked]


def test_an_interval_of_minus_one_means_never(tmp_path: pathlib.Path) -> None:
    cache = _Cache(tmp_path, -1, threading.Event())
    agent.run_passes(cache, list, threading.Event())
    assert cache.asked == []
