# SPDX-License-Identifier: Apache-2.0
"""The message bus between conductors and agents, where the configuration has a ``transport_url``."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from imagecache_lib import errors, opts
from imagecache_lib.cli import bus_log

_TOPIC = "imagecache"


def add_topic(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses the topic to a command."""
    parser.add_argument(
        "--topic", default=_TOPIC, help="that agents listen on; the same for all (default: %(default)s)"
    )


def transport(config_files: Sequence[str]) -> Any | None:
    """Return the transport that the configuration names, or None if it names none.

    :raises ConfigError: the transport that it names does not work.
    """
    if not opts.has_transport(config_files):
        return None
    # What oslo.service says of its own future, whose event loop is not used here, is no operator's concern.
    logging.getLogger("oslo_service").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from imagecache_lib.precache import rpc
    except ImportError:
        raise errors.ConfigError(
            "transport_url is set, and oslo.messaging is not installed",
            next_step="install imagecache-lib[messaging]",
        ) from None
    try:
        found = rpc.transport(opts.global_conf(config_files))
    except ValueError:  # of the parser of URLs; its text may quote a password
        raise errors.ConfigError(
            "transport_url does not work: it is no URL", next_step="correct it"
        ) from None
    bus_log.say_plainly(rpc.servers(found))
    return found


def mailboxes(config_files: Sequence[str]) -> Any:
    """Return the transport on which a conductor listens to agents, where there is a message bus."""
    from imagecache_lib.precache import mailbox

    return mailbox.transport(opts.global_conf(config_files))


def job_notifier(config_files: Sequence[str], host: str) -> Callable[[Any], None]:
    """Return an observer of jobs that sends notifications, or none if no driver is configured.

    :raises ConfigError: the configuration cannot be read.
    """
    import oslo_messaging

    from imagecache_lib.observers import notifications
    from imagecache_lib.precache.notifications import JobNotifier

    bus = oslo_messaging.get_notification_transport(opts.global_conf(config_files))
    return JobNotifier(notifications.notifier(bus, host=host))


def require_transport(config_files: Sequence[str]) -> Any:
    """Return the transport that the configuration names.

    :raises ConfigError: the configuration names none, or one that does not work.
    """
    found = transport(config_files)
    if found is None:
        raise errors.ConfigError(
            "an agent needs a message bus",
            next_step="set transport_url in the configuration file, or "
            "OS_DEFAULT__TRANSPORT_URL in the environment",
        )
    return found
