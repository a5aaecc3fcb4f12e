# SPDX-License-Identifier: Apache-2.0
"""Agents behind oslo.messaging: RPC over RabbitMQ or whatever else its transport URL names.

The message bus alone controls access, by its vhost, users and TLS. An agent listens on one topic, under its
host's name. oslo.messaging registers options of its own on the global configuration, so it has to be given
that one, which only the ``main`` of a process should do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import oslo_messaging
from oslo_config import cfg

from imagecache_lib import errors
from imagecache_lib.precache import client, wire
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.mailbox import Mailbox, RpcSender
from imagecache_lib.precache.reporter import Reporter
from imagecache_lib.system import threads

TOPIC = "imagecache"

#: What agents of the first releases speak. All calls but ``begin`` are the same in it.
_OLDEST = wire.VERSIONS[-1]

#: Seconds that an agent may take to answer. To survey it asks the image service, for ten seconds at most; the
#: agents of the first release did so for twenty.
_TIMEOUT = 10.0
SURVEY_TIMEOUT = 25.0

#: Seconds beyond that for the message bus to take the message. A RabbitMQ under an alarm takes none, and the
#: timeout of oslo.messaging only bounds the wait for the answer.
_PUBLISH_SECONDS = 5.0

#: How many calls may hang in a message bus that takes no messages. Each has a thread of its own.
_MOST_STUCK = 256

#: What oslo.messaging's dispatcher raises in the agent for a call that it does not know.
_OTHER_VERSION = frozenset({"UnsupportedVersion", "NoSuchMethod"})

#: How oslo.messaging names the exceptions that it raises here in place of an agent's.
_REMOTE = "_Remote"


def transport(conf: Any) -> Any:
    """Return the transport that a configuration names, for the two classes below.

    :param conf: oslo.config's global configuration.
    :raises ConfigError: the transport that it names does not work.
    """
    try:
        return oslo_messaging.get_rpc_transport(conf)
    except (oslo_messaging.MessagingException, cfg.Error) as error:
        # The text of the error may quote the URL, and with it a password.
        why = "it is no URL of a message bus, such as rabbit://user:password@host:5672/vhost"
        if isinstance(error, oslo_messaging.DriverLoadFailure):
            why = f"there is no driver for {error.driver}"
        raise errors.ConfigError(f"transport_url does not work: {why}", next_step="correct it") from error


def servers(transport: Any) -> list[str]:
    """Return host and port of each broker that a transport may use."""
    url = oslo_messaging.TransportURL.parse(transport.conf)
    return [f"{host.hostname}:{host.port}" if host.port else str(host.hostname) for host in url.hosts]


class RpcHostClient(client.HostClient):
    """Reaches agents over a transport.

    :param transport: from :func:`oslo_messaging.get_rpc_transport`.
    :param topic: the topic that the agents listen on.
    :param timeout: seconds to wait for an answer.
    :param survey_timeout: seconds to wait for the answer to a survey.
    :param publish_seconds: seconds beyond that to wait for the message bus to take the message.
    :param version: the protocol version that agents must speak, but for its minor number.
    :param mailboxes: a transport as :func:`imagecache_lib.precache.mailbox.transport` makes it, on which to
        listen to agents that report by themselves, or None to ask all agents.
    """

    def __init__(
        self,
        transport: Any,
        *,
        topic: str = TOPIC,
        timeout: float = _TIMEOUT,
        survey_timeout: float = SURVEY_TIMEOUT,
        publish_seconds: float = _PUBLISH_SECONDS,
        version: str = _OLDEST,
        mailboxes: Any | None = None,
    ) -> None:
        self._topic = topic
        self._mailboxes = mailboxes
        self._timeout = timeout
        self._survey_timeout = survey_timeout
        self._publish_seconds = publish_seconds
        self._version = version
        self._stuck = threading.BoundedSemaphore(_MOST_STUCK)
        # One try: the caller decides whether and when to ask again. The default is to try for ever.
        self._client = oslo_messaging.get_rpc_client(
            transport, oslo_messaging.Target(topic=topic, version=version), timeout=timeout, retry=1
        )

    @contextlib.contextmanager
    def listening(self, inbox: client.Inbox) -> Iterator[str | None]:
        if self._mailboxes is None:
            yield None
            return
        mailbox = Mailbox(self._mailboxes, inbox, topic=self._topic)
        mailbox.open()
        try:
            yield mailbox.name
        finally:
            mailbox.close()

    def survey(self, host: str, image_ids: Sequence[str]) -> client.Survey:
        answer = self._call(host, "survey", self._survey_timeout, image_ids=list(image_ids))
        return dataclasses.replace(wire.to_survey(wire.result_of(answer)), agent=wire.agent_of(answer))

    def begin(self, host: str, task: client.HostTask) -> client.AgentInfo | None:
        for version in _versions_for(task):
            fields = wire.from_task(task, version=version)
            try:
                answer = self._call(host, "begin", self._timeout, version=version, task=fields)
            except client.HostUnsupported:
                # It may speak the version before.
                if version == _OLDEST:
                    raise
                continue
            wire.result_of(answer)
            return wire.agent_of(answer)
        raise AssertionError("the oldest version either answers or raises")

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        return wire.to_poll(self._call(host, "poll", self._timeout, job_id=job_id))

    def cancel(self, host: str, job_id: str) -> None:
        wire.result_of(self._call(host, "cancel", self._timeout, job_id=job_id))

    def release(self, host: str, job_id: str) -> None:
        with contextlib.suppress(client.HostUnsupported):  # an earlier agent passes nothing on
            wire.result_of(self._call(host, "release", self._timeout, version=wire.VERSION, job_id=job_id))

    def _call(self, host: str, method: str, timeout: float, version: str = "", **arguments: Any) -> Any:
        target = self._client.prepare(server=host, timeout=timeout, version=version or self._version)
        try:
            return self._bounded(host, target, method, arguments, timeout)
        except errors.ImageCacheError:
            raise
        except oslo_messaging.RemoteError as error:
            raise _failure_of(host, error.exc_type or type(error).__name__) from None
        except oslo_messaging.MessagingTimeout:
            raise client.HostDown(
                f"host {host} gave no answer within {timeout:.0f} s",
                next_step="start its agent, and check that it uses the same transport and topic",
            ) from None
        except Exception as error:
            if _is_the_agents(error):
                raise _failure_of(host, type(error).__name__.removesuffix(_REMOTE)) from error
            # Not only its own exceptions escape oslo.messaging: kombu's, amqp's and the socket's do too.
            raise client.BusDown(
                f"host {host} cannot be asked, the message bus fails with {type(error).__name__}",
                next_step="check the message bus and transport_url",
            ) from error

    def _bounded(
        self, host: str, target: Any, method: str, arguments: Mapping[str, Any], timeout: float
    ) -> Any:
        """Return what a target answers, or give the call up when the bus takes no message for too long.

        :raises BusDown: the message bus takes no messages, or no thread can be started to give it one.
        """
        answers: list[Any] = []
        failures: list[Exception] = []

        def run() -> None:
            try:
                answers.append(target.call({}, method, **arguments))
            except Exception as error:
                failures.append(error)
            finally:
                self._stuck.release()

        if self._stuck.acquire(timeout=timeout + self._publish_seconds):
            try:
                caller = threads.start(run, name=f"imagecache-call-{host}")
            except errors.BackendError as error:
                self._stuck.release()
                raise client.BusDown(
                    f"host {host} cannot be asked now, {error.cause}", next_step=error.next_step
                ) from error
            except BaseException:
                self._stuck.release()
                raise
            caller.join(timeout + self._publish_seconds)
        if failures:
            raise failures[0]
        if not answers:
            raise client.BusDown(
                f"host {host} cannot be asked, the message bus has taken no message for "
                f"{timeout + self._publish_seconds:.0f} s",
                next_step="check the message bus: it is away, or has run out of memory or disk",
            )
        return answers[0]


def _is_the_agents(error: Exception) -> bool:
    """Return whether an exception that a call raised says that the agent failed, and not the message bus.

    oslo.messaging raises an agent's builtin exceptions anew as a class of its own making, called
    ``TypeError_Remote``, or as they are over its in-memory transport. A bus fails with an :exc:`OSError` or
    with exceptions of its own.
    """
    kind = type(error)
    name = kind.__name__
    return (
        name.endswith(_REMOTE)
        or name in _OTHER_VERSION
        or (kind.__module__ == "builtins" and not isinstance(error, OSError))
    )


def _failure_of(host: str, kind: str) -> errors.ImageCacheError:
    if kind in _OTHER_VERSION:
        return client.HostUnsupported(
            f"the agent of host {host} speaks another version", next_step="upgrade it"
        )
    return errors.BackendError(f"the agent of host {host} failed with {kind}", next_step="read its log")


def _versions_for(task: client.HostTask) -> Sequence[str]:
    """Return the protocol versions to try for a task, the newest first: those that say more than it needs
    are left out."""
    if task.relay is not None:
        return wire.VERSIONS
    return wire.VERSIONS[1:] if task.report_to is not None else wire.VERSIONS[2:]


class _Endpoint:
    """What a conductor may call. The arguments come from the bus."""

    target = oslo_messaging.Target(version=wire.VERSION)

    def __init__(self, agent: HostAgent) -> None:
        self._agent = agent

    def _who(self) -> client.AgentInfo:
        return dataclasses.replace(self._agent.info(), reports=True)

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def survey(self, _context: Any, image_ids: Any) -> Any:
        with wire.answering(self._who()) as answer:
            answer["result"] = wire.from_survey(self._agent.survey(wire.to_image_ids(image_ids)))
        return answer

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def begin(self, _context: Any, task: Any) -> Any:
        with wire.answering(self._who()) as answer:
            self._agent.begin(wire.to_task(task))
            answer["result"] = None
        return answer

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def poll(self, _context: Any, job_id: Any) -> Any:
        with wire.answering(self._who()) as answer:
            report = self._agent.poll(wire.to_job_id(job_id))
            answer.update(result=wire.from_cells(report.cells), attempt=report.attempt, number=report.number)
            answer.update(wire.from_route_state(report.relay))
        return answer

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def cancel(self, _context: Any, job_id: Any) -> Any:
        with wire.answering(self._who()) as answer:
            self._agent.cancel(wire.to_job_id(job_id))
            answer["result"] = None
        return answer

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def release(self, _context: Any, job_id: Any) -> Any:
        with wire.answering(self._who()) as answer:
            self._agent.release(wire.to_job_id(job_id))
            answer["result"] = None
        return answer


class AgentServer:
    """Serves an agent on a transport, and reports to conductors what changes.

    :param transport: from :func:`oslo_messaging.get_rpc_transport`.
    :param name: the host's name, under which conductors know it.
    :param topic: the topic to listen on.
    """

    def __init__(self, transport: Any, agent: HostAgent, *, name: str, topic: str = TOPIC) -> None:
        self._server = oslo_messaging.get_rpc_server(
            transport,
            oslo_messaging.Target(topic=topic, server=name),
            [_Endpoint(agent)],
            access_policy=oslo_messaging.ExplicitRPCAccessPolicy,
        )
        self._reporter = Reporter(agent, RpcSender(transport, topic=topic))

    def start(self) -> None:
        """Begin to listen, in threads, as soon as the message bus is there. Waits for it as long as it takes.

        :raises BackendError: the message bus refuses the listener, or no thread can be started. Can be called
            again.
        """
        self._reporter.start()
        try:
            self._server.start()
        except Exception as error:
            raise errors.BackendError(
                f"the message bus fails with {type(error).__name__}",
                next_step="check the message bus and transport_url",
            ) from error

    def stop(self) -> None:
        """Stop reporting, take no more calls, and answer those that came."""
        self._reporter.stop()
        self._server.stop()
        self._server.wait()
