# SPDX-License-Identifier: Apache-2.0
"""What is said of a message bus that is away. The templates are those of the installed oslo.messaging."""

from __future__ import annotations

import inspect
import logging
import unittest
from typing import Any

from oslo_messaging._drivers import impl_rabbit

from imagecache_lib.cli import bus_log

_FAILED = "Connection failed: %s (retrying in %s seconds)"
_LOST = (
    "[%(connection_id)s] AMQP server on %(hostname)s:%(port)s is unreachable: %(err_str)s. Trying again in"
)
_BACK = "[%(connection_id)s] Reconnected to AMQP server on %(hostname)s:%(port)s"
_FACTS = {"connection_id": "c", "hostname": "rabbit", "port": 5672, "err_str": "[Errno 104] Connection reset"}


class BrokerFilterTest(unittest.TestCase):
    def setUp(self) -> None:
        self.filter = bus_log.BrokerFilter(["rabbit:5672", "hare:5672"])
        self.now = 1000.0

    def said(self, template: str, *args: Any) -> str | None:
        record = logging.LogRecord("driver", logging.ERROR, "", 0, template, args, None)
        record.created = self.now
        return record.getMessage() if self.filter.filter(record) else None

    def test_the_driver_still_says_it_so(self) -> None:
        self.assertEqual(bus_log.DRIVER, impl_rabbit.LOG.name)
        source = "".join(inspect.getsource(impl_rabbit).replace("'", '"').split())
        for part in (_FAILED, "AMQP server on ", "is unreachable: ", "Reconnected to AMQP server on "):
            self.assertIn("".join(part.split()), source)

    def test_a_broker_that_is_away_is_named_once_with_the_reason(self) -> None:
        first = self.said(_FAILED, "[Errno 111] Connection refused", 1.0)
        self.assertEqual(
            "The message bus at rabbit:5672 or hare:5672 is not reachable: Connection refused; trying on",
            first,
        )
        self.now += 60
        self.assertIsNone(self.said(_FAILED, "[Errno 111] Connection refused", 3.0))
        self.assertIn("timed out", str(self.said(_FAILED, "timed out", 5.0)))
        self.now += 300
        self.assertEqual(first, self.said(_FAILED, "[Errno 111] Connection refused", 30.0))

    def test_a_broker_that_comes_back_is_named_and_may_go_again(self) -> None:
        away = "The message bus at rabbit:5672 is not reachable: Connection reset; trying on"
        self.assertEqual(away, self.said(_LOST, _FACTS))
        self.assertEqual("The message bus at rabbit:5672 answers again", self.said(_BACK, _FACTS))
        self.assertEqual(away, self.said(_LOST, _FACTS))

    def test_everything_else_is_said_as_it_is(self) -> None:
        self.assertEqual("The broker has blocked it", self.said("The broker has blocked %s", "it"))
