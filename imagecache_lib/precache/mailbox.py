# SPDX-License-Identifier: Apache-2.0
"""The way of reports from agents to a conductor, over oslo.messaging.

A conductor at work has a *mailbox*: a queue of its own under a random name, which the tasks that it begins
carry. Agents cast to it and never wait. RabbitMQ deletes the queue :data:`_EXPIRES` seconds after its
conductor is gone (the queue argument ``x-expires``), and agents stop before that, so that nothing fills up.

oslo.messaging gives an expiry to the queues of fanouts and of replies alone. So a mailbox is the fanout queue
of a topic with one listener. The two other queues that come with every listener stay empty; they are made to
vanish with the listener.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import oslo_messaging

from imagecache_lib import errors
from imagecache_lib.precache import client, wire
from imagecache_lib.system import durable, threads

LOG = logging.getLogger(__name__)

#: Seconds after which a queue without its conductor is deleted. Longer than agents go on reporting.
_EXPIRES = int(client.WATCHED_SECONDS) + 30

#: What a mailbox wants of RabbitMQ, by oslo.messaging's options. Queues that vanish with their listener
#: cannot be replicated ones. How durable the fanout's exchange is has to be as agents have it, and is left
#: alone.
_OPTIONS = {
    "amqp_auto_delete": "true",
    "amqp_durable_queues": "false",
    "rabbit_quorum_queue": "false",
    "rabbit_stream_fanout": "false",
    "rabbit_transient_queues_ttl": str(_EXPIRES),
}

#: The version of the one message that a mailbox takes. It only grows by fields that may be ignored.
_VERSION = "1.0"

#: Seconds that the end of a run waits for its mailbox to close.
_STOP_SECONDS = 2.0


def transport(conf: Any) -> Any:
    """Return the transport that a configuration names, for mailboxes.

    :param conf: oslo.config's global configuration, of which :func:`oslo_messaging.get_rpc_transport` takes
        the rest.
    """
    url = oslo_messaging.TransportURL.parse(conf)
    if url.transport == "rabbit":
        # Options in a URL go before those of the configuration, and concern this transport alone.
        url.query.update(_OPTIONS)
    return oslo_messaging.get_rpc_transport(conf, url=url)


def _target(topic: str, mailbox: str) -> oslo_messaging.Target:
    # An exchange of its own, too: it vanishes with its last queue, so that no other mailbox may use it.
    name = f"{topic}-conductor-{mailbox}"
    return oslo_messaging.Target(exchange=name, topic=name, version=_VERSION)


class Mailbox:
    """Listens, however long the message bus takes to come up, and brings what arrives to an inbox.

    :param transport: as :func:`transport` makes it.
    :param topic: the topic that the agents listen on.
    """

    def __init__(self, transport: Any, inbox: client.Inbox, *, topic: str) -> None:
        self.name = durable.new_id()
        self._closed = threading.Event()
        self._up = threading.Event()
        self._thread: threading.Thread | None = None
        self._server = oslo_messaging.get_rpc_server(
            transport,
            _target(topic, self.name)(server="conductor"),
            [_Endpoint(inbox)],
            access_policy=oslo_messaging.ExplicitRPCAccessPolicy,
        )

    def open(self) -> None:
        """Begin to listen, and return at once."""
        try:
            self._thread = threads.start(self._run, name="imagecache-mailbox")
        except errors.BackendError as error:
            LOG.warning("Hosts have to be asked, since they cannot be heard: %s", error)

    def close(self) -> None:
        """Stop listening. A message bus that is not there does not hold this up."""
        self._closed.set()
        if self._thread is not None and self._up.is_set():
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        try:
            self._server.start()
        except Exception as error:  # kombu's and amqp's too
            LOG.warning("Hosts have to be asked, since they cannot be heard: %s", type(error).__name__)
            return
        self._up.set()
        # No thread may be left to be started for the end.
        self._closed.wait()
        self._server.stop()
        self._server.wait()


class _Endpoint:
    """What agents may say. The arguments come from the bus."""

    target = oslo_messaging.Target(version=_VERSION)

    def __init__(self, inbox: client.Inbox) -> None:
        self._inbox = inbox

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def report(self, _context: Any, told: Any) -> None:
        try:
            self._inbox.put(wire.to_report(told))
        except errors.ImageCacheError as error:
            LOG.warning("A report is dropped, its host will be asked: %s", error)


class RpcSender:
    """Brings reports to mailboxes.

    :param transport: the agent's, from :func:`oslo_messaging.get_rpc_transport`.
    :param topic: the topic that the agent listens on.
    """

    def __init__(self, transport: Any, *, topic: str) -> None:
        self._topic = topic
        # One try: what is not sent now is sent with what changes next.
        self._client = oslo_messaging.get_rpc_client(
            transport, oslo_messaging.Target(topic=topic, version=_VERSION), retry=1
        )

    def send(self, mailbox: str, told: client.HostReport) -> None:
        target = _target(self._topic, mailbox)
        try:
            self._client.prepare(exchange=target.exchange, topic=target.topic, fanout=True).cast(
                {}, "report", told=wire.from_report(told)
            )
        except Exception as error:
            # Not only its own exceptions escape oslo.messaging: kombu's, amqp's and the socket's do too.
            raise errors.BackendError(
                f"the message bus fails with {type(error).__name__}",
                next_step="check the message bus and transport_url",
            ) from error
