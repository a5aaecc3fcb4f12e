# SPDX-License-Identifier: Apache-2.0
"""Agents behind oslo.messaging: RPC over RabbitMQ or whatever else its transport URL names.

Who may ask whom is the message bus's affair: its vhost, users, TLS. An agent listens on one topic, under its
host's name. oslo.messaging registers options of its own on the global configuration, so it has to be given
that one; only the ``main`` of a process should.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import oslo_messaging
from oslo_config import cfg

from imagecache_lib import errors
from imagecache_lib.precache import client, job, wire
from imagecache_lib.precache.agent import HostAgent

TOPIC = "imagecache"

#: Raise the minor number for what an older side may ignore, the major for what it must not.
VERSION = "1.0"

#: Seconds that an agent may take to answer. To survey it asks the image service.
_TIMEOUT = 10.0
_SURVEY_TIMEOUT = 60.0

#: What oslo.messaging's dispatcher raises in the agent for a call that it does not know.
_OTHER_VERSION = frozenset({"UnsupportedVersion", "NoSuchMethod"})


def transport(conf: Any) -> Any:
    """Return the transport that a configuration names, for the two classes below.

    :param conf: oslo.config's global configuration.
    :raises ConfigError: what it names does not work.
    """
    try:
        return oslo_messaging.get_rpc_transport(conf)
    except (oslo_messaging.MessagingException, cfg.Error) as error:
        raise errors.ConfigError(
            f"transport_url does not work: {type(error).__name__}", next_step="correct it"
        ) from error


class RpcHostClient(client.HostClient):
    """Reaches agents over a transport.

    :param transport: from :func:`oslo_messaging.get_rpc_transport`.
    :param topic: that the agents listen on.
    :param timeout: seconds to wait for an answer.
    :param version: that agents must speak.
    """

    def __init__(
        self, transport: Any, *, topic: str = TOPIC, timeout: float = _TIMEOUT, version: str = VERSION
    ) -> None:
        self._timeout = timeout
        # One try: whoever asks decides whether and when to ask again. The default is to try for ever.
        self._client = oslo_messaging.get_rpc_client(
            transport, oslo_messaging.Target(topic=topic, version=version), timeout=timeout, retry=1
        )

    def survey(self, host: str, image_ids: Sequence[str]) -> client.Survey:
        timeout = max(self._timeout, _SURVEY_TIMEOUT)
        return wire.to_survey(self._call(host, "survey", timeout, image_ids=list(image_ids)))

    def begin(self, host: str, task: client.HostTask) -> None:
        self._call(host, "begin", self._timeout, task=wire.from_task(task))

    def poll(self, host: str, job_id: str) -> Mapping[str, job.Cell]:
        return wire.to_cells(self._call(host, "poll", self._timeout, job_id=job_id))

    def cancel(self, host: str, job_id: str) -> None:
        self._call(host, "cancel", self._timeout, job_id=job_id)

    def _call(self, host: str, method: str, timeout: float, **arguments: Any) -> Any:
        try:
            answer = self._client.prepare(server=host, timeout=timeout).call({}, method, **arguments)
        except oslo_messaging.RemoteError as error:
            raise _remote(host, error) from None
        except oslo_messaging.MessagingTimeout:
            raise client.HostDown(
                f"host {host} gave no answer within {timeout:.0f} s",
                next_step="start its agent, and check that it uses the same transport and topic",
            ) from None
        except Exception as error:
            # Not only its own exceptions escape oslo.messaging: kombu's, amqp's and the socket's do too.
            raise client.HostDown(
                f"host {host} cannot be asked, the message bus fails with {type(error).__name__}",
                next_step="check the message bus and transport_url",
            ) from error
        return wire.result_of(answer)


def _remote(host: str, error: Any) -> errors.ImageCacheError:
    if error.exc_type in _OTHER_VERSION:
        return client.HostUnsupported(
            f"the agent of host {host} speaks another version", next_step="upgrade it"
        )
    return errors.BackendError(
        f"the agent of host {host} failed with {error.exc_type}", next_step="read its log"
    )


class _Endpoint:
    """What a conductor may call. The arguments come from the bus."""

    target = oslo_messaging.Target(version=VERSION)

    def __init__(self, agent: HostAgent) -> None:
        self._agent = agent

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def survey(self, _context: Any, image_ids: Any) -> Any:
        return wire.answered(lambda: wire.from_survey(self._agent.survey(wire.to_image_ids(image_ids))))

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def begin(self, _context: Any, task: Any) -> Any:
        return wire.answered(lambda: self._agent.begin(wire.to_task(task)))

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def poll(self, _context: Any, job_id: Any) -> Any:
        return wire.answered(lambda: wire.from_cells(self._agent.poll(wire.to_job_id(job_id))))

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def cancel(self, _context: Any, job_id: Any) -> Any:
        return wire.answered(lambda: self._agent.cancel(wire.to_job_id(job_id)))


class AgentServer:
    """Serves an agent on a transport.

    :param transport: from :func:`oslo_messaging.get_rpc_transport`.
    :param name: the host's, under which conductors know it.
    :param topic: to listen on.
    """

    def __init__(self, transport: Any, agent: HostAgent, *, name: str, topic: str = TOPIC) -> None:
        self._server = oslo_messaging.get_rpc_server(
            transport,
            oslo_messaging.Target(topic=topic, server=name),
            [_Endpoint(agent)],
            access_policy=oslo_messaging.ExplicitRPCAccessPolicy,
        )

    def start(self) -> None:
        """Listen, in threads.

        :raises BackendError: the bus does not let it.
        """
        try:
            self._server.start()
        except Exception as error:
            raise errors.BackendError(
                f"the message bus fails with {type(error).__name__}",
                next_step="check the message bus and transport_url",
            ) from error

    def stop(self) -> None:
        """Take no more calls, and answer those that came."""
        self._server.stop()
        self._server.wait()
