# SPDX-License-Identifier: Apache-2.0
"""Hosts that relay images to each other: real managers and servers, each on a loopback address of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import imagecache_lib as ic
from imagecache_lib import model
from imagecache_lib.precache.peer import PeerServer
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.sources.parents import Parents
from imagecache_lib.sources.relay import RelaySource
from imagecache_lib.sources.route import Route
from imagecache_lib.system.waiter import Waiter
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import CacheCase, Running
from tests.support.ports import free_port

TOKEN = "a-secret-of-the-hosts"


def until(is_so: Callable[[], bool]) -> None:
    """Wait for something that another thread is about to do."""
    deadline = time.monotonic() + 60
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError("it does not happen")
        time.sleep(0.01)


class GatedSource(FakeSource):
    """An image service that sends no byte behind a point before a test lets it."""

    def __init__(self, images: Mapping[str, bytes], **options: Any) -> None:
        super().__init__(images, **options)
        self._gate = threading.Condition()
        self._limit: int | None = None

    def allow(self, limit: int | None) -> None:
        """Send bytes up to an offset, or all of them with None."""
        with self._gate:
            self._limit = limit
            self._gate.notify_all()

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(image, offset) as chunks:
            yield self._gated(chunks, offset)

    def _gated(self, chunks: Iterator[bytes], offset: int) -> Iterator[bytes]:
        for chunk in chunks:
            with self._gate:
                if not self._gate.wait_for(
                    lambda: self._limit is None or offset + len(chunk) <= self._limit,  # noqa: B023
                    60,
                ):
                    raise AssertionError("the test does not let it go on")
            offset += len(chunk)
            yield chunk


class RelayHost:
    """One host: a cache, what it passes on, and a server for the hosts behind it.

    :param tls: with what it serves, or None for plain HTTP.
    :param cafile: with what it verifies others, or "" if they serve plain HTTP.
    """

    def __init__(
        self,
        case: CacheCase,
        number: int,
        port: int,
        origin: ImageSource,
        *,
        tls: ssl.SSLContext | None = None,
        cafile: str = "",
        **options: Any,
    ) -> None:
        self.name = f"127.0.0.{number}"
        directory = case.directory / f"host-{number}"
        directory.mkdir(exist_ok=True)
        clocks = {name: options.pop(name) for name in ("monotonic",) if name in options}
        self.origin = origin
        self.manager = case.manager(
            origin,
            host=dataclasses.replace(case.host(), name=self.name, **clocks),
            instances_path=str(directory),
            num_retries=2,
            **options,
        )
        self.spools = self.manager.spools()
        url = f"{'https' if cafile else 'http'}://{{host}}:{port}"
        self.parents = Parents(url, token=TOKEN, verify=cafile or True, timeout=(60.0, 3.0))
        self.server: PeerServer | None = PeerServer(
            self.manager, (self.name, port), token=TOKEN, spools=self.spools, tls=tls
        )
        self.server.start()
        case.addCleanup(self.spools.close)
        case.addCleanup(self.stop)

    def stop(self) -> None:
        """End the server, and what it is sending."""
        server, self.server = self.server, None
        if server is not None:
            server.stop()

    def source(self, route: Route, *, starved: float = 20.0, cancel: Any = None) -> RelaySource:
        waiter = Waiter(self.manager.host, None, None, cancel)
        return RelaySource(self.origin, route, self.parents, self.spools, waiter, starved=starved)

    def fetch(self, image_id: str, route: Route, **options: Any) -> ic.CacheResult:
        """Cache an image along a route."""
        request = ic.Request(source=self.source(route, **options), hash_pieces=True)
        self.spools.expect([image_id])
        try:
            result = self.manager.cache_image(image_id, request=request)
            spool = self.spools.find(image_id)
            if spool is not None:
                spool.prove()
            return result
        finally:
            self.spools.settle(image_id)

    def content(self, image_id: str) -> bytes:
        with self.manager.fetch_or_reuse(image_id) as base, open(base.path, "rb") as file:
            return file.read()


class RelayCase(CacheCase):
    """Gives each test a chain of hosts, the first of which asks the image service."""

    def hosts(self, count: int, origin: ImageSource, **options: Any) -> list[RelayHost]:
        numbers = range(11, 11 + count)
        port = free_port(*(f"127.0.0.{number}" for number in numbers))
        return [RelayHost(self, number, port, origin, **options) for number in numbers]

    def chain(self, hosts: Sequence[RelayHost]) -> list[Route]:
        """Return the routes that make a chain of hosts."""
        names = [host.name for host in hosts]
        return [Route(names[:at][::-1][:3], origin=at == 0) for at in range(len(hosts))]

    def fetching(self, host: RelayHost, image_id: str, route: Route, **options: Any) -> Running:
        """Cache an image in a thread."""
        return self.running(lambda: host.fetch(image_id, route, **options))
