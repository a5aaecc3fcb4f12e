# SPDX-License-Identifier: Apache-2.0
"""``imagecache agent``: the service of one host. It caches what conductors ask for, and evicts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib.metadata
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from imagecache_lib import errors, events, manager, model
from imagecache_lib.cli import base, bus, exposition, peers, sources, values
from imagecache_lib.cli.instance_report import add_instances, read_instances, to_operator
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.watch import Watch
from imagecache_lib.store import layout
from imagecache_lib.system import threads

if TYPE_CHECKING:
    from imagecache_lib.precache import rpc

LOG = logging.getLogger(__name__)

#: Entry points that return an iterable of :class:`~imagecache_lib.Instance`, or None if they cannot tell.
PROVIDERS = "imagecache_lib.instances"

#: Seconds to wait for the message bus before the agent says that it is ready without it.
_BUS_SECONDS = 3.0
_PIECE = 0.1
#: How often a running agent looks whether it was told to stop, in seconds.
_LOOKS = 1.0

#: Seconds that calls, fetches and the pass each have to end once the agent is told to stop.
_STOP_SECONDS = 20.0

#: What an interval of 0 means, in seconds.
_EVERY_MINUTE = 60

Provider = Callable[[], Sequence[model.Instance] | None]


class Agent(base.Base):
    """Serve this host's cache: cache what conductors ask for, and run the periodic pass. Until SIGTERM."""

    unlogged = ()

    #: Seconds after which the agent has ended once it was told to stop, whatever hangs in it: a thread of a
    #: package that is not ours, for which Python waits at its end, or a server that waits for a client. The
    #: example of a systemd unit allows 60.
    longest_end = 50.0

    #: Whether something tells the agent which instances there are.
    _is_told = True

    examples = (
        "agent --instances /run/imagecache/instances.json --metrics 127.0.0.1:9471",
        "agent --instances-provider my_driver --max-bytes 200G",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        group = parser.add_argument_group("periodic pass")
        which = group.add_mutually_exclusive_group()
        add_instances(which)
        which.add_argument(
            "--instances-provider",
            metavar="NAME",
            help=f"entry point of the group {PROVIDERS} that returns the instances, instead of a file",
        )
        parser.add_argument(
            "--max-bytes",
            type=values.size,
            default=0,
            metavar="SIZE",
            help="the most that one job may bring onto this host, such as 200G (default: no limit)",
        )
        bus.add_topic(parser)
        sources.add_options(parser, one_image=False)
        peers.add_options(parser)
        exposition.add_options(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        # Loaded here: the other commands do without the extra.
        peers.check(parsed_args)
        transport = bus.require_transport(self.app.options.config_file)
        from imagecache_lib.precache import rpc

        provider = _provider(parsed_args)
        self._is_told = parsed_args.instances is not None or parsed_args.instances_provider is not None
        watch = Watch()
        config = self.config()
        health = exposition.Health(config.manager_interval or _EVERY_MINUTE)
        figures = exposition.chosen(parsed_args, health, config.instances_path)
        counting = [figures[0]] if figures is not None else []
        cache = self.manager(sources.chosen(parsed_args, []), observers=[watch, *counting])
        require_writable(cache)
        kept = peers.spools(parsed_args, cache)
        agent = HostAgent(
            cache,
            watch=watch,
            max_bytes=parsed_args.max_bytes,
            fallbacks=peers.chosen(parsed_args),
            passing_on=peers.passing_on(parsed_args, cache, kept),
        )
        served = peers.server(parsed_args, cache, kept)
        server = rpc.AgentServer(transport, agent, name=cache.host.name, topic=parsed_args.topic)
        with _until_told_to_stop() as stop:
            listener = Listener(server, health)
            if figures is not None:
                figures[1].start(cache)
            if served is not None:
                served.start()
            passes = threads.start(run_passes, cache, provider, stop, health, name="imagecache-passes")
            # Last: once it serves, the threads of oslo.messaging keep a process from ending.
            listener.start()
            if not listener.wait(stop):
                self.note("the message bus does not answer yet: the agent goes on trying")
            notify("READY=1")
            self.note(f"the agent of host {cache.host.name} is ready")
            # A signal that comes just before a wait begins does not end it.
            while not stop.wait(_LOOKS):
                continue
            notify("STOPPING=1")
            # It runs while Python waits for other threads at its end, and is not waited for itself.
            with contextlib.suppress(errors.BackendError):  # it ends in good order, or systemd ends it
                threads.start(self._leave_late, name="imagecache-leaving")
            # In this order: what is cancelled because the agent stops must not be reported as a result.
            listener.stop()
            agent.stop(_STOP_SECONDS)
            if served is not None:
                served.stop()
            if figures is not None:
                figures[1].stop()
            passes.join(_STOP_SECONDS)
        if not listener.has_stopped or passes.is_alive():
            self._leave()

    def _log(self) -> events.Observer:
        log, reported = super()._log(), () if self._is_told else None

        def tell(event: events.Event) -> None:
            if isinstance(event, events.PassFinished):
                problems = tuple(to_operator(each, reported) for each in event.problems)
                event = dataclasses.replace(event, problems=problems)
            log(event)

        return tell

    def _leave_late(self) -> None:
        time.sleep(self.longest_end)
        self._leave()

    def _leave(self) -> None:
        """End the process although threads hang: in a message bus that is gone, or in a filesystem.

        Python waits for threads of its own pools at its end, and oslo.messaging uses such pools. Nothing is
        lost: whatever is under way here may be cut at any instruction.
        """
        LOG.warning("Something hangs and is left behind")
        logging.shutdown()
        self.app.stderr.flush()
        os._exit(0)


class Listener:
    """Serves on the message bus, however long it takes to come up, in a thread of its own.

    :param server: the server that listens. It waits for the bus as long as it must, and cannot be told to
        stop meanwhile.
    :param health: told when the bus answers.
    :param pause: seconds before the server is started again after a failure.
    """

    def __init__(self, server: rpc.AgentServer, health: exposition.Health, *, pause: float = 5.0) -> None:
        self._server = server
        self._health = health
        self._pause = pause
        self._up = threading.Event()
        self._stop = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to serve, and return at once.

        :raises BackendError: no thread can be started.
        """
        threads.start(self._run, name="imagecache-listener")

    def wait(self, stop: threading.Event) -> bool:
        """Wait a little for the bus to be there, or for ``stop``. Returns whether the bus is there."""
        until = time.monotonic() + _BUS_SECONDS
        while not self._up.wait(_PIECE) and not stop.is_set() and time.monotonic() < until:
            continue
        return self._up.is_set()

    def stop(self) -> None:
        """Stop serving, and answer the calls that came, unless the message bus is not there."""
        self._stop.set()
        self._stopped.wait(_STOP_SECONDS if self._up.is_set() else 0.0)

    @property
    def has_stopped(self) -> bool:
        return self._stopped.is_set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._server.start()
            except errors.ImageCacheError as error:
                LOG.warning("The message bus is tried again: %s", error)
                self._stop.wait(self._pause)
            else:
                self._up.set()
                self._health.listens()
                # No thread may be left to be started for the end.
                self._stop.wait()
                self._server.stop()
                self._stopped.set()
                return


def require_writable(cache: manager.ImageCacheManager) -> None:
    """Refuse to serve a cache that cannot be written, before the agent tells systemd that it is ready.

    :raises ConfigError: a directory of the cache cannot be written.
    """
    cache.get_space()  # makes what is missing
    where = layout.Layout(cache.config.base_path, cache.config.locks_path)
    for path in (where.base_path, where.locks_path, where.private, where.stages, where.records):
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            # A full filesystem is what eviction is for.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise errors.ConfigError(
                    f"the cache cannot be written: {error.strerror}",
                    path=path,
                    next_step="make it writable for the service's user",
                ) from error


@contextlib.contextmanager
def _until_told_to_stop() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda _number, _frame: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, what in before.items():
            signal.signal(number, what)


def run_passes(
    cache: manager.ImageCacheManager,
    provider: Provider,
    stop: threading.Event,
    health: exposition.Health | None = None,
) -> None:
    """Run the periodic pass at once and every ``manager_interval`` seconds until ``stop`` is set.

    A pass that fails is logged, and the next one comes as planned. The manager's observers log what a pass
    finds.

    :param health: told how each pass went.
    """
    health = health or exposition.Health(cache.config.manager_interval)
    interval = cache.config.manager_interval
    while interval >= 0:
        try:
            report = cache.verify_base_images(_instances(provider))
        except errors.ImageCacheError as error:
            LOG.error("The periodic pass failed: %s", error)
            health.failed(str(error))
        except Exception as error:
            LOG.exception("The periodic pass failed")
            health.failed(type(error).__name__)
        else:
            health.passed(len(report.problems))
            LOG.info(
                "%s, %d evicted, %s",
                values.counted(len(report.bases), "base image"),
                len(report.evicted),
                values.shown(report.reclaimed),
            )
        if stop.wait(interval or _EVERY_MINUTE):
            return


def _instances(provider: Provider) -> Sequence[model.Instance] | None:
    """Return the instances, or None if the provider fails or cannot tell them. Then nothing is evicted."""
    try:
        found = provider()
    except Exception as error:
        LOG.warning("Nothing is evicted, since the instances cannot be told: %s", error)
        return None
    return None if found is None else tuple(found)


def _provider(arguments: argparse.Namespace) -> Provider:
    """Return what tells the instances: a file, read each time, an entry point, or one that cannot tell."""
    if arguments.instances_provider is None:
        path = arguments.instances
        return lambda: read_instances(path)
    found = importlib.metadata.entry_points(group=PROVIDERS, name=arguments.instances_provider)
    if not found:
        raise errors.ConfigError(
            f"there is no entry point {arguments.instances_provider!r} in {PROVIDERS}",
            next_step="install the package that provides it",
        )
    try:
        provider: Any = next(iter(found)).load()
    except Exception as error:  # another package's code
        raise errors.ConfigError(
            f"the entry point {arguments.instances_provider!r} in {PROVIDERS} cannot be loaded: {error}",
            next_step="report it to its author",
        ) from error
    return provider  # type: ignore[no-any-return]


def notify(state: str) -> None:
    """Tell systemd the state of the service, if systemd asks for it: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # "@" stands for the zero byte that begins an abstract address.
    where = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), where)
    except OSError as error:
        LOG.warning("systemd cannot be told %s: %s", state, error)
