# SPDX-License-Identifier: Apache-2.0
"""What all commands have in common: the manager they act on, and what they say when something fails."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

from cliff import command, lister, show

from imagecache_lib import errors, events, manager, model, opts
from imagecache_lib.cli import progress
from imagecache_lib.observers.log import LogObserver
from imagecache_lib.sources import file
from imagecache_lib.sources.interface import ImageSource

LOG = logging.getLogger("imagecache")

#: Done, and something needs an operator.
ATTENTION = 10

#: Exit codes by error; the first that fits. 1 is for an error that is none of the library's, 2 for a wrong
#: command line.
_CODES: tuple[tuple[type[errors.ImageCacheError], int], ...] = (
    (errors.ImageNotFound, 3),
    (errors.ImageRejected, 4),
    (errors.SourceError, 5),
    (errors.NoSpaceError, 6),
    (errors.ConfigError, 7),
    (errors.DiskExistsError, 8),
    (errors.DiskTooSmallError, 8),
    (errors.LockTimeoutError, 9),
    (errors.CancelledError, 9),
)
_BACKEND = 11


def code_of(error: errors.ImageCacheError) -> int:
    """Return the exit code for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), _BACKEND)


class Base(command.Command):
    """A command on this host's cache."""

    #: What to exit with although nothing was raised.
    exit_code = 0

    def run(self, parsed_args: argparse.Namespace) -> int:
        try:
            return super().run(parsed_args) or self.exit_code
        except errors.ImageCacheError as error:
            if self.app.options.debug:
                LOG.exception("It failed")
            self.complain(error)
            return code_of(error)

    def complain(self, error: errors.ImageCacheError) -> None:
        """Write an error to stderr, in one line."""
        self.note("error: " + " ".join(str(error).split()))

    def note(self, text: str) -> None:
        """Write a line that is not part of the result to stderr."""
        self.app.stderr.write(f"{self.app.NAME}: {text}\n")
        self.app.stderr.flush()

    def manager(
        self,
        source: ImageSource | None = None,
        *,
        observers: Sequence[events.Observer] = (),
        progress_shown: bool = True,
    ) -> manager.ImageCacheManager:
        """Return the manager that the configuration describes.

        :param source: where images come from. With None the manager finds no image that is not cached.
        :param observers: told beside the log.
        :param progress_shown: tell how far transfers are.
        :raises ConfigError: the configuration cannot be read, or cannot work.
        """
        options = self.app.options
        config, host = opts.from_files(options.config_file, instances_path=options.instances_path)
        all_observers: list[events.Observer] = [LogObserver(), *observers]
        if progress_shown and options.verbose_level > 0:
            # First, so that its line is gone when the log writes one.
            all_observers.insert(0, progress.ProgressObserver(self.app.stderr))
        return manager.ImageCacheManager(
            config, source or file.FileSource({}), host=host, observers=all_observers
        )


class BaseLister(Base, lister.Lister):
    """A command that shows a table."""


class BaseShow(Base, show.ShowOne):
    """A command that shows one thing."""


def add_instances(parser: argparse._ActionsContainer) -> None:
    """Let a command take the driver's report."""
    parser.add_argument(
        "--instances",
        metavar="FILE",
        help="JSON list of all instances on this host (on shared storage: on all hosts), each an object with "
        "uuid, host, images, directories, swap_mb, ephemerals. Without it nothing can go. [] says that the "
        "disks under the disk roots are all there is.",
    )


def read_instances(path: str | None) -> tuple[model.Instance, ...] | None:
    """Return the driver's report that a file holds.

    :param path: path of the file. With None the result is None: the driver could not tell.
    :raises ConfigError: the file holds no such report. A wrong one must not evict anything.
    """
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
        if not isinstance(found, list):
            raise TypeError("it is not a list")
        return tuple(_instance(each) for each in found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise errors.ConfigError(
            f"the report of instances cannot be read: {error}", path=path, next_step="correct the file"
        ) from error


def _instance(fields: Any) -> model.Instance:
    instance = model.Instance(
        uuid=_text(fields["uuid"]),
        host=_text(fields["host"]),
        images=_texts(fields.get("images", [])),
        directories=_texts(fields.get("directories", [])),
        swap_mb=int(fields.get("swap_mb", 0)),
        ephemerals=tuple(model.Ephemeral(**each) for each in fields.get("ephemerals", [])),
    )
    known = {"uuid", "host", "images", "directories", "swap_mb", "ephemerals"}
    if unknown := set(fields) - known:
        raise TypeError(f"an instance has the unknown field {min(unknown)!r}")
    return instance


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not a name")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list")
    return tuple(_text(value) for value in values)


def worst(codes: Sequence[int]) -> int:
    """Return the exit code of several tries: that of the first that failed."""
    return next((code for code in codes if code), 0)
