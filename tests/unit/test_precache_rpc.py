# SPDX-License-Identifier: Apache-2.0
"""What conductor and agents say to each other: over oslo.messaging's in-memory transport, and malformed."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import unittest
from collections.abc import Callable, Sequence
from typing import Any

import oslo_messaging
from oslo_config import cfg

from imagecache_lib import errors
from imagecache_lib.precache import client, job, notifications, rpc, wire
from imagecache_lib.precache.chains import HostRoute
from imagecache_lib.precache.job_events import JobEvent
from imagecache_lib.sources.route import RouteState
from tests.support.no_threads import no_more_threads

TASK = client.HostTask(
    "a1", ("image-a", "image-b"), attempt=2, rate=5, deadline=7.5, pin_until=9.0, retries=4
)
CELLS = {"image-a": job.Cell(job.Result.CACHED, "", 5, 5), "image-b": job.Cell(None, "soon", 1, None)}
WHO = client.AgentInfo("an-instance", 5.0, reports=True)
STATE = RouteState("node-3", wrong=("node-2",), mismatched=True)
SURVEY = client.Survey(("image-a",), {"image-b": 7, "image-c": None}, 99, {"image-d": "it is gone"})


REPORT = wire.from_report(client.HostReport("one", "a1", client.TaskReport(CELLS, WHO, 2, 3)))


class ScriptedAgent:
    """Answers, or raises what it was told to."""

    def __init__(self) -> None:
        self.image_ended = threading.Event()
        self.changed: list[tuple[str, client.HostReport]] = []
        self.asked: list[Any] = []
        self.raises: BaseException | None = None
        self.is_relaying = False

    def _note(self, what: Any) -> None:
        self.asked.append(what)
        if self.raises is not None:
            raise self.raises

    def info(self) -> client.AgentInfo:
        return WHO

    def survey(self, image_ids: Sequence[str]) -> client.Survey:
        self._note(image_ids)
        return SURVEY

    def begin(self, task: client.HostTask) -> None:
        self._note(task)

    def poll(self, job_id: str) -> client.TaskReport:
        self._note(job_id)
        return client.TaskReport(CELLS, WHO, attempt=2, number=7, relay=STATE)

    def cancel(self, job_id: str) -> None:
        self._note(job_id)

    def release(self, job_id: str) -> None:
        self._note(f"release {job_id}")

    def changes(self) -> Sequence[tuple[str, client.HostReport]]:
        changed, self.changed = self.changed, []
        return changed

    def unsent(self, told: client.HostReport) -> None:
        raise AssertionError(told)


class FirstRelease:
    """An agent's endpoint as the first release had it."""

    target = oslo_messaging.Target(version="1.0")

    def __init__(self) -> None:
        self.tasks: list[Any] = []

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def begin(self, _context: Any, task: Any) -> Any:
        self.tasks.append(task)
        return {"result": None}

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def poll(self, _context: Any, job_id: Any) -> Any:
        return {"result": wire.from_cells(CELLS)}


class SecondRelease(FirstRelease):
    """An agent's endpoint that knows version 1.1."""

    target = oslo_messaging.Target(version="1.1")


class StuckClient:
    """oslo.messaging's client while the broker takes no messages."""

    def __init__(self, stuck: threading.Event) -> None:
        self._stuck = stuck

    def prepare(self, **_options: Any) -> StuckClient:
        return self

    def call(self, _context: Any, _method: str, **_arguments: Any) -> Any:
        self._stuck.wait(60)


class FailingClient(StuckClient):
    """oslo.messaging's client while something fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def call(self, _context: Any, _method: str, **_arguments: Any) -> Any:
        raise self._error


class RpcTest(unittest.TestCase):
    def setUp(self) -> None:
        # oslo.messaging's own options live on the global configuration, whoever is given.
        if not cfg.CONF._args:
            cfg.CONF([], project="imagecache-test", default_config_files=[])
        transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=f"fake://{self.id()}/")
        self.addCleanup(transport.cleanup)
        self.agent = ScriptedAgent()
        server = rpc.AgentServer(transport, self.agent, name="one")  # type: ignore[arg-type]
        server.start()
        self.addCleanup(server.stop)
        self.transport = transport
        self.client = rpc.RpcHostClient(transport, timeout=60.0)

    def test_what_is_said_arrives(self) -> None:
        self.assertEqual(SURVEY, self.client.survey("one", ["image-a"]))
        self.assertEqual(WHO, self.client.begin("one", TASK))
        report = self.client.poll("one", "a1")
        self.assertEqual((CELLS, WHO, 2, 7), (report.cells, report.agent, report.attempt, report.number))
        self.assertEqual(STATE, report.relay)
        self.client.cancel("one", "a1")
        self.client.release("one", "a1")
        self.assertEqual([("image-a",), TASK, "a1", "a1", "release a1"], self.agent.asked)

    def test_a_route_arrives_as_names_of_hosts(self) -> None:
        task = dataclasses.replace(
            TASK, report_to="0" * 32, relay=HostRoute(("node-1", "10.0.0.7"), origin=True)
        )
        self.client.begin("one", task)
        self.assertEqual([task], self.agent.asked)

    def test_what_an_agent_says_by_itself_arrives_while_it_is_listened_to(self) -> None:
        inbox: queue.SimpleQueue[client.HostReport] = queue.SimpleQueue()
        told = client.HostReport("one", "a1", client.TaskReport(CELLS, WHO, attempt=2, number=3, relay=STATE))
        ours = rpc.RpcHostClient(self.transport, mailboxes=self.transport)
        with ours.listening(inbox) as box:
            assert box is not None
            # It begins to listen in a thread of its own: what is said before that is said to nobody.
            heard: client.HostReport | None = None
            for _ in range(120):
                self.agent.changed = [(box, told)]
                self.agent.image_ended.set()
                with contextlib.suppress(queue.Empty):
                    heard = inbox.get(timeout=0.5)
                    break
        assert heard is not None
        self.assertEqual((told, WHO), (heard, heard.report.agent))

    def test_without_a_transport_for_it_nobody_is_listened_to(self) -> None:
        with self.client.listening(queue.SimpleQueue()) as box:
            self.assertIsNone(box)

    def test_an_agent_of_the_second_release_is_begun_without_a_mailbox(self) -> None:
        transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=f"fake://{self.id()}-second/")
        self.addCleanup(transport.cleanup)
        second = SecondRelease()
        server = oslo_messaging.get_rpc_server(
            transport,
            oslo_messaging.Target(topic=rpc.TOPIC, server="second"),
            [second],
            access_policy=oslo_messaging.ExplicitRPCAccessPolicy,
        )
        server.start()
        self.addCleanup(server.stop)
        task = dataclasses.replace(TASK, deadline_in=5.0, report_to="0" * 32, relay=HostRoute(("node-1",)))
        ours = rpc.RpcHostClient(transport, timeout=60.0)
        ours.begin("second", task)
        self.assertEqual(5.0, second.tasks[0]["deadline_in"])
        self.assertNotIn("report_to", second.tasks[0])
        self.assertNotIn("relay", second.tasks[0])
        ours.release("second", "a1")  # it passes nothing on, and says no more than that

    def test_an_error_arrives_as_the_kind_that_says_who_acts(self) -> None:
        for error in (
            client.UnknownTask("never heard of it"),
            client.HostUnsupported("no cache"),
            errors.NoSpaceError("it is full", image="image-a", path="/srv", next_step="make room"),
            errors.ImageRejected("bad"),
        ):
            with self.subTest(error=error):
                self.agent.raises = error
                with self.assertRaises(type(error)) as caught:
                    self.client.poll("one", "a1")
                self.assertIs(type(error), type(caught.exception))
                self.assertEqual(str(error), str(caught.exception))

    def test_a_subclass_arrives_as_what_it_is_a_kind_of(self) -> None:
        self.agent.raises = wire.Malformed("no")
        with self.assertRaises(errors.BackendError):
            self.client.poll("one", "a1")

    def test_a_failure_that_nobody_foresaw_arrives_without_its_details(self) -> None:
        self.agent.raises = KeyError("secret")
        with self.assertRaisesRegex(errors.BackendError, "failed with KeyError") as caught:
            self.client.poll("one", "a1")
        self.assertNotIn("secret", str(caught.exception))
        self.assertNotIn("Traceback", str(caught.exception))

    def test_a_call_that_the_agent_does_not_understand_is_its_failure_and_not_the_buses(self) -> None:
        class Later(rpc.RpcHostClient):
            def poll(self, host: str, job_id: str) -> client.TaskReport:
                return self._call(host, "poll", 60.0, job_id=job_id, more=1)  # type: ignore[no-any-return]

        with self.assertRaisesRegex(errors.BackendError, "agent of host one failed with TypeError"):
            Later(self.transport, timeout=60.0).poll("one", "a1")

    def test_exceptions_of_an_agent_and_of_the_bus_are_told_apart(self) -> None:
        remote = type("TimeoutError_Remote", (TimeoutError,), {})
        for raised, kind in (
            (TypeError("no such argument"), errors.BackendError),
            (type("KeyError_Remote", (KeyError,), {})("x"), errors.BackendError),
            (remote("of the agent"), errors.BackendError),
            (ConnectionResetError("gone"), client.BusDown),
            (oslo_messaging.MessageDeliveryFailure("gone"), client.BusDown),
            (oslo_messaging.MessagingTimeout("late"), client.HostDown),
        ):
            ours = rpc.RpcHostClient(self.transport)
            ours._client = FailingClient(raised)
            with self.subTest(raised=raised), self.assertRaises(kind) as caught:
                ours.poll("one", "a1")
            self.assertIs(kind, type(caught.exception))

    def test_a_bus_that_takes_no_messages_holds_nobody_up(self) -> None:
        stuck = threading.Event()
        self.addCleanup(stuck.set)
        ours = rpc.RpcHostClient(self.transport, timeout=0.1, publish_seconds=0.1)
        ours._client = StuckClient(stuck)
        with self.assertRaisesRegex(client.BusDown, "taken no message"):
            ours.poll("one", "a1")

    def test_a_conductor_without_a_thread_for_a_call_knows_nothing_of_the_host(self) -> None:
        ours = rpc.RpcHostClient(self.transport, timeout=60.0, mailboxes=self.transport)
        with no_more_threads():
            with self.assertLogs(level="WARNING") as logged, ours.listening(queue.SimpleQueue()):
                pass
            with self.assertRaisesRegex(client.BusDown, "cannot be asked now, no thread can be started"):
                ours.poll("one", "a1")
        self.assertIn("Hosts have to be asked", logged.output[0])
        self.assertEqual(CELLS, ours.poll("one", "a1").cells)

    def test_an_agent_of_the_first_release_gets_what_it_understands(self) -> None:
        transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=f"fake://{self.id()}-old/")
        self.addCleanup(transport.cleanup)
        old = FirstRelease()
        server = oslo_messaging.get_rpc_server(
            transport,
            oslo_messaging.Target(topic=rpc.TOPIC, server="old"),
            [old],
            access_policy=oslo_messaging.ExplicitRPCAccessPolicy,
        )
        server.start()
        self.addCleanup(server.stop)
        ours = rpc.RpcHostClient(transport, timeout=60.0)
        task = dataclasses.replace(TASK, deadline_in=5.0, pin_for=9.0)
        self.assertIsNone(ours.begin("old", task))
        self.assertEqual([wire.from_task(TASK, version="1.0")], old.tasks)
        report = ours.poll("old", "a1")
        self.assertEqual((CELLS, None), (report.cells, report.agent))

    def test_a_conductor_of_the_first_release_understands_the_answers(self) -> None:
        plain = oslo_messaging.get_rpc_client(
            self.transport, oslo_messaging.Target(topic=rpc.TOPIC, version="1.0", server="one"), timeout=60
        )
        answer = plain.call({}, "begin", task=wire.from_task(TASK, version="1.0"))
        self.assertEqual((None, "error" in answer), (answer["result"], False))
        self.assertEqual([TASK], self.agent.asked)
        self.agent.raises = client.HostBusy("later")
        error = plain.call({}, "begin", task=wire.from_task(TASK, version="1.0"))["error"]
        self.assertEqual(("HostBusy", "later"), (error["kind"], error["cause"]))

    def test_a_host_that_does_not_answer_is_down(self) -> None:
        with self.assertRaisesRegex(client.HostDown, "no answer"):
            rpc.RpcHostClient(self.transport, timeout=0.2).poll("two", "a1")

    def test_nobody_says_where_to_fetch_from_or_what_to_write(self) -> None:
        plain = oslo_messaging.get_rpc_client(
            self.transport, oslo_messaging.Target(topic=rpc.TOPIC, version="1.0", server="one"), timeout=60
        )
        for extra in ("source", "path", "url", "fallbacks"):
            answer = plain.call({}, "begin", task={**wire.from_task(TASK), extra: "http://evil/"})
            self.assertIn(extra, answer["error"]["cause"])
        with self.assertRaises(Exception):  # noqa: B017  the in-memory transport raises what the agent did
            plain.call({}, "begin", task=wire.from_task(TASK), path="/etc/passwd")
        with self.assertRaises(Exception):  # noqa: B017
            plain.call({}, "stop")
        self.assertEqual([], self.agent.asked)


class WireTest(unittest.TestCase):
    def test_tasks_that_make_no_sense_are_refused(self) -> None:
        good = wire.from_task(TASK)
        for name, value in (
            ("job_id", ""),
            ("job_id", 5),
            ("job_id", "a\nb"),
            ("job_id", "a" * 1000),
            ("image_ids", []),
            ("image_ids", "image-a"),
            ("image_ids", [1]),
            ("image_ids", ["a", "a"]),
            ("image_ids", [str(number) for number in range(1001)]),
            ("rate", -1),
            ("rate", 1.5),
            ("rate", True),
            ("retries", 10**6),
            ("attempt", None),
            ("deadline", "tomorrow"),
            ("deadline", float("nan")),
            ("deadline", float("inf")),
            ("pin_until", -1),
            ("pin_until", 10**400),
            ("report_to", "reply_of_another_service"),
            ("report_to", 5),
            ("relay", "node-1"),
            ("relay", {"parents": ["node-1"]}),
            ("relay", {"parents": "node-1", "origin": True}),
            ("relay", {"parents": ["http://evil/"], "origin": True}),
            ("relay", {"parents": ["node-1:80"], "origin": True}),
            ("relay", {"parents": [5], "origin": True}),
            ("relay", {"parents": ["node-1"] * 17, "origin": True}),
            ("relay", {"parents": [], "origin": True, "url": "http://evil/"}),
            ("relay", {"parents": [], "origin": 1}),
        ):
            with self.subTest(name=name, value=value), self.assertRaises(wire.Malformed):
                wire.to_task({**good, name: value})
        with self.assertRaises(errors.ImageRejected):
            wire.to_task({**good, "image_ids": ["a\0"]})
        other: tuple[object, ...] = (None, [], "task", {})
        for found in other:
            with self.subTest(found=found), self.assertRaises(wire.Malformed):
                wire.to_task(found)

    def test_answers_that_make_no_sense_are_refused(self) -> None:
        parsers: tuple[tuple[Callable[[Any], Any], Sequence[Any]], ...] = (
            (
                wire.to_survey,
                (
                    None,
                    {},
                    {"present": [], "missing": [], "free": 1, "problems": {}},
                    {"present": [], "missing": {}, "free": "much", "problems": {}},
                ),
            ),
            (wire.to_cells, (None, {"a": None}, {"a": {"result": "perhaps"}}, {"a": {"received": -5}})),
            (wire.result_of, (None, [], {"error": "text"})),
            (
                wire.to_report,
                (
                    None,
                    {},
                    {**REPORT, "agent": None},
                    {**REPORT, "agent": {"instance": "a", "clock": 10**400}},
                    {**REPORT, "agent": {"instance": "a", "clock": float("nan")}},
                    {**REPORT, "host": 5},
                    {**REPORT, "job_id": "a\nb"},
                    {**REPORT, "number": -1},
                    {**REPORT, "attempt": "1"},
                    {**REPORT, "cells": []},
                    {**REPORT, "relay": 5},
                    {**REPORT, "relay": {"parent": "a/b", "wrong": []}},
                    {**REPORT, "relay": {"parent": None, "wrong": "node-1"}},
                    {**REPORT, "cells": {"a": {"result": "perhaps"}}},
                ),
            ),
        )
        for parse, wrong in parsers:
            for found in wrong:
                with self.subTest(parse=parse.__name__, found=found), self.assertRaises(wire.Malformed):
                    parse(found)

    def test_an_error_of_an_unknown_kind_is_the_operators(self) -> None:
        with self.assertRaisesRegex(errors.BackendError, "from the future"):
            wire.result_of({"error": {"kind": "os.system", "cause": "from the future"}})


class RecordingNotifier:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def info(self, _context: Any, event_type: str, payload: dict[str, Any]) -> None:
        self.sent.append((event_type, payload))


class NotificationTest(unittest.TestCase):
    def test_novas_events_with_novas_fields(self) -> None:
        sent = RecordingNotifier()
        notify = notifications.JobNotifier(sent)
        failed = job.Cell(job.Result.ERROR, "no room")
        one = {"a": CELLS["image-a"], "b": failed, "c": job.Cell(job.Result.UNSUPPORTED)}
        work = job.Job(
            "j1", "racks", ("a", "b", "c"), job.Terms(), {"one": one, "two": dict.fromkeys("abc", job.Cell())}
        )
        notify(JobEvent("start", work))
        notify(JobEvent("progress", work, "one", 1))
        notify(JobEvent("end", work, index=2))
        self.assertEqual(
            [f"aggregate.cache_images.{kind}" for kind in ("start", "progress", "end")],
            [event_type for event_type, _payload in sent.sent],
        )
        common: dict[str, object] = {"id": None, "uuid": None, "name": "racks", "job_id": "j1"}
        whole = {**common, "hosts": ["one", "two"], "metadata": {}, "image_ids": ["a", "b", "c"]}
        self.assertEqual(whole, sent.sent[0][1])
        self.assertEqual(whole, sent.sent[2][1])
        self.assertEqual(
            {**common, "host": "one", "images_cached": ["a"], "images_failed": ["b"], "index": 1, "total": 2},
            sent.sent[1][1],
        )
