# SPDX-License-Identifier: Apache-2.0
"""What the agent shows of itself: ``/metrics`` and ``/healthz`` over HTTP, and a textfile.

``/metrics`` is Prometheus' text format. ``/healthz`` is 200 while the periodic pass runs as planned and 503
otherwise, with the facts as JSON. A message bus that is away is told there, and does not make the host
unhealthy: the agent goes on trying, and starting it again would help nobody. Both are read-only, and neither
encrypted nor authenticated.
"""

from __future__ import annotations

import argparse
import http.server
import json
import logging
import re
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from imagecache_lib import errors, manager
from imagecache_lib.cli import values
from imagecache_lib.system import threads

if TYPE_CHECKING:
    from imagecache_lib.observers.metrics import MetricsObserver

LOG = logging.getLogger(__name__)

#: Seconds between two textfiles, and between two looks at what each base image is used for.
_TEXTFILE_EVERY = 60.0
_SURVEY_EVERY = 300.0

#: A pass that is later than this many intervals, and this many seconds, is overdue.
_OVERDUE_INTERVALS = 3
_OVERDUE_SECONDS = 600.0

#: Seconds that a client may keep a connection without a word.
_IDLE = 30


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about figures to the agent's command."""
    group = parser.add_argument_group("figures", "They need imagecache-lib[prometheus].")
    group.add_argument(
        "--metrics",
        type=values.address,
        metavar="HOST:PORT",
        help="serve /metrics to Prometheus and /healthz there, such as 127.0.0.1:9471",
    )
    group.add_argument(
        "--textfile",
        type=values.textfile,
        metavar="FILE",
        help="write the figures for node_exporter's textfile collector into FILE, every minute",
    )


class Health:
    """Whether the agent does its work. Safe to share between threads.

    :param interval: seconds between two passes, or less than 0 if there are none.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._passed_at: float | None = None
        self._problems = 0
        self._failure: str | None = None
        self._listening = False

    def passed(self, problems: int) -> None:
        """Note that a pass ended, and how many problems it found."""
        with self._lock:
            self._since, self._passed_at = time.monotonic(), time.time()
            self._problems, self._failure = problems, None

    def failed(self, why: str) -> None:
        """Note that a pass ended with an error."""
        with self._lock:
            self._failure = why

    def listens(self) -> None:
        """Note that the message bus answered."""
        with self._lock:
            self._listening = True

    @property
    def is_listening(self) -> bool:
        with self._lock:
            return self._listening

    def report(self) -> tuple[bool, dict[str, Any]]:
        """Return whether the agent does its work, and the facts."""
        with self._lock:
            waited = time.monotonic() - self._since
            patience = max(_OVERDUE_INTERVALS * self._interval, _OVERDUE_SECONDS)
            overdue = self._interval >= 0 and waited > patience
            healthy = self._failure is None and not overdue
            return healthy, {
                "status": "ok" if healthy else "failing",
                "last_pass": values.iso(self._passed_at),
                "pass_overdue": overdue,
                "pass_error": self._failure,
                "problems": self._problems,
                "message_bus": "connected" if self._listening else "not reached yet",
            }


class Exposition:
    """Keeps an agent's figures up to date, serves them and writes them.

    :param observer: counts what happens, into a registry of its own.
    :param address: host and port to listen on, or None to serve nothing. Port 0 stands for any free port.
    :param textfile: path of the file to write, or None to write none.
    :raises ConfigError: the address cannot be listened on, or the file cannot be written.
    """

    def __init__(
        self,
        observer: MetricsObserver,
        health: Health,
        *,
        address: tuple[str, int] | None,
        textfile: str | None,
    ) -> None:
        self._observer = observer
        self._textfile = textfile
        self._stop = threading.Event()
        self._server: _Server | None = None
        if textfile is not None:
            observer.write_textfile(textfile)
        if address is not None:
            try:
                self._server = _Server(address, observer, health)
            except OSError as error:
                raise errors.ConfigError(
                    f"{address[0]}:{address[1]} cannot be listened on: {error.strerror or error}",
                    next_step="choose another --metrics HOST:PORT",
                ) from error

    @property
    def port(self) -> int | None:
        """The port that is served, or None if nothing is."""
        return self._server.server_address[1] if self._server is not None else None

    def start(self, cache: manager.ImageCacheManager) -> None:
        """Begin to serve and to write, in threads that end with the process.

        :raises BackendError: no thread can be started.
        """
        if self._server is not None:
            threads.start(self._server.serve_forever, name="imagecache-metrics")
        threads.start(self._keep_up, cache, name="imagecache-figures")

    def stop(self) -> None:
        """Stop serving, and write the last figures."""
        self._stop.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._write()

    def survey(self, cache: manager.ImageCacheManager) -> None:
        """Look what each base image is used for now, and keep that as figures."""
        try:
            self._observer(cache.survey().as_event())
        except errors.ImageCacheError as error:
            LOG.warning("The cache cannot be looked at for its figures: %s", error)

    def _keep_up(self, cache: manager.ImageCacheManager) -> None:
        looked = float("-inf")
        while True:
            if time.monotonic() - looked >= _SURVEY_EVERY:
                self.survey(cache)
                looked = time.monotonic()
            self._write()
            if self._stop.wait(_TEXTFILE_EVERY):
                return

    def _write(self) -> None:
        if self._textfile is None:
            return
        try:
            self._observer.write_textfile(self._textfile)
        except errors.ImageCacheError as error:
            LOG.warning("%s", error)


def chosen(
    arguments: argparse.Namespace, health: Health, filesystem: str
) -> tuple[MetricsObserver, Exposition] | None:
    """Return what counts and what shows that, or None if the command line asks for neither.

    :param filesystem: a path on the cache's filesystem.
    :raises ConfigError: prometheus-client is not installed, or what is asked for cannot be had.
    """
    if arguments.metrics is None and arguments.textfile is None:
        return None
    try:
        import prometheus_client

        from imagecache_lib.observers import metrics
    except ImportError as error:
        raise errors.ConfigError(
            "--metrics and --textfile need prometheus-client",
            next_step="pip install imagecache-lib[prometheus]",
        ) from error
    # When each counter was made, which is when the agent started.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = prometheus_client.CollectorRegistry()
    observer = metrics.MetricsObserver(registry, filesystem=filesystem)
    listening = prometheus_client.Gauge(
        "imagecache_agent_listening", "1 once the message bus answered the agent", registry=registry
    )
    listening.set_function(lambda: float(health.is_listening))
    return observer, Exposition(observer, health, address=arguments.metrics, textfile=arguments.textfile)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], observer: MetricsObserver, health: Health) -> None:
        self.observer = observer
        self.health = health
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not http.server's, which asks the name service who this host is.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version = "imagecache"
    sys_version = ""
    timeout = _IDLE

    def do_GET(self) -> None:
        path = re.sub(r"\?.*", "", self.path)
        if path == "/metrics":
            from prometheus_client import exposition

            text, kind = exposition.choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, text(self.server.observer.registry), kind)
        elif path == "/healthz":
            healthy, facts = self.server.health.report()
            self._answer(200 if healthy else 503, json.dumps(facts).encode() + b"\n", "application/json")
        else:
            self._answer(404, b"There are /metrics and /healthz.\n", "text/plain; charset=utf-8")

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        LOG.debug(format, *args)
