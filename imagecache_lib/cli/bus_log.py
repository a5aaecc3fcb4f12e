# SPDX-License-Identifier: Apache-2.0
"""What oslo.messaging logs about a broker that is away, as operators read it: once, and by its name."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

#: The logger of oslo.messaging's driver for RabbitMQ, and of the library below it.
DRIVER = "oslo.messaging._drivers.impl_rabbit"
_BELOW = "amqp"

#: What the driver's templates hold, by what they are about.
_NOT_REACHED = "Connection failed: "
_LOST = "is unreachable: "
_BACK = "Reconnected to AMQP server"

#: Seconds in which the same is said once.
_QUIET = 300.0

_NUMBER = re.compile(r"\[Errno -?\d+\] ")


class BrokerFilter(logging.Filter):
    """Rewrites what the driver says when it cannot reach the broker, or has it again.

    The driver tries on with growing pauses, and says so each time. Of the transport's URL hosts and ports are
    said, and nothing else.

    :param servers: host and port of each broker that may be meant.
    """

    def __init__(self, servers: Sequence[str]) -> None:
        super().__init__()
        self._servers = " or ".join(servers) or "an unknown address"
        self._told: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        template, facts = str(record.msg), record.args
        named = facts if isinstance(facts, dict) else {}
        if template.startswith(_NOT_REACHED) and isinstance(facts, tuple) and facts:
            return self._say_away(record, self._servers, str(facts[0]))
        if _LOST in template and "err_str" in named:
            return self._say_away(record, _server(named), str(named["err_str"]))
        if _BACK in template and named:
            self._told.clear()
            record.msg, record.args = "The message bus at %s answers again", (_server(named),)
        return True

    def _say_away(self, record: logging.LogRecord, server: str, error: str) -> bool:
        why = _NUMBER.sub("", error)
        last = self._told.get((server, why))
        if last is not None and 0 <= record.created - last < _QUIET:
            return False
        self._told[server, why] = record.created
        record.msg = "The message bus at %s is not reachable: %s; trying on"
        record.args = (server, why)
        return True


def say_plainly(servers: Sequence[str]) -> None:
    """Have the driver's messages rewritten, and leave out those that concern nobody who runs a host.

    :param servers: host and port of each broker.
    """
    driver = logging.getLogger(DRIVER)
    if not any(isinstance(each, BrokerFilter) for each in driver.filters):
        driver.addFilter(BrokerFilter(servers))
    # At each end of a connection: methods that came while a channel was closed.
    logging.getLogger(_BELOW).setLevel(logging.ERROR)


def _server(facts: dict[str, object]) -> str:
    return f"{facts.get('hostname')}:{facts.get('port')}"
