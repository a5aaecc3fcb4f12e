# SPDX-License-Identifier: Apache-2.0
"""One host of the relay benchmark: a real agent that takes calls on stdin and answers on stdout, a line each.

What a message bus would carry is the same; it is left out so that sixteen hosts fit one small machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
import time
from typing import Any

import imagecache_lib as ic
from imagecache_lib import events, model
from imagecache_lib.precache import client, wire
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.passing_on import PassingOn
from imagecache_lib.precache.peer import PeerServer
from imagecache_lib.precache.reporter import Reporter
from imagecache_lib.precache.watch import Watch
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.parents import Parents
from imagecache_lib.store.spool import Spools
from imagecache_lib.system.host import System

TOKEN = "a-secret-of-the-benchmark"
PORT = 9293
IMAGE = "11111111-aaaa-4bbb-8ccc-0123456789ab"


class _Line:
    """Writes lines from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def say(self, **fields: Any) -> None:
        with self._lock:
            print(json.dumps(fields), flush=True)

    def send(self, mailbox: str, told: client.HostReport) -> None:
        self.say(report=wire.from_report(told))


class _Moments:
    """An observer that notes when the image is in the cache, and when its last byte came."""

    def __init__(self) -> None:
        self.cached: float | None = None
        self.last_byte: float | None = None

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.Fetched():
                self.cached = time.monotonic()

    def watch(self, spools: Spools) -> None:
        """Note when the last byte came to the spool."""
        while self.last_byte is None:
            spool = spools.find(IMAGE)
            if spool is not None and spool.is_complete:
                self.last_byte = time.monotonic()
            time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--instances", "--name", "--url", "--digest"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    line, watch, moments = _Line(), Watch(), _Moments()
    digest = model.Digest("sha512", options.digest)
    manager = ic.ImageCacheManager(
        ic.CacheConfig(instances_path=options.instances),
        HttpSource({IMAGE: HttpImage(options.url, "raw", digest)}),
        host=System(name=options.name),
        observers=(watch, moments),
    )
    spools = manager.spools()
    server = PeerServer(manager, (options.name, PORT), token=TOKEN, spools=spools)
    server.start()
    parents = Parents(f"http://{{host}}:{PORT}", token=TOKEN)
    agent = HostAgent(manager, watch=watch, passing_on=PassingOn(manager, spools, parents))
    Reporter(agent, line).start()
    threading.Thread(target=moments.watch, args=(spools,), daemon=True).start()
    line.say(ready=True)
    for text in sys.stdin:
        call = json.loads(text)
        line.say(id=call["id"], answer=_answer(agent, moments, call["method"], call["value"]))


def _answer(agent: HostAgent, moments: _Moments, method: str, value: Any) -> dict[str, Any]:
    with wire.answering(dataclasses.replace(agent.info(), reports=True)) as answer:
        answer["result"] = None
        match method:
            case "begin":
                agent.begin(wire.to_task(value))
            case "poll":
                report = agent.poll(value)
                answer.update(result=wire.from_cells(report.cells), number=report.number)
                answer.update(attempt=report.attempt, **wire.from_route_state(report.relay))
            case "cancel":
                agent.cancel(value)
            case "release":
                agent.release(value)
            case "moments":
                answer["result"] = [moments.last_byte, moments.cached]
    return answer


if __name__ == "__main__":
    main()
