# SPDX-License-Identifier: Apache-2.0
"""What all commands have in common: the manager they act on, and what they say when something fails."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cliff import command, lister, show

from imagecache_lib import admin, dates, errors, events, opts
from imagecache_lib.cli import formats, parsing, values
from imagecache_lib.cli.parsing import complain_in_one_line, plain
from imagecache_lib.config import CacheConfig
from imagecache_lib.observers.log import LogObserver
from imagecache_lib.sources.interface import SourceMisconfigured
from imagecache_lib.store import layout
from imagecache_lib.store import pins as model_pins
from imagecache_lib.system.atomic_file import BadTarget
from imagecache_lib.system.host import System

if TYPE_CHECKING:
    from imagecache_lib import manager
    from imagecache_lib.diagnostics.survey import Reason
    from imagecache_lib.sources.interface import ImageSource

LOG = logging.getLogger("imagecache")

#: Done, and something needs an operator.
ATTENTION = 10

#: Fewer letters than this name no image by how its id begins.
_FEWEST_LETTERS = 4


class Unknown(errors.ConfigError):
    """There is no job, host or disk of the name that the command line gives."""


_SET_UP = 7

#: Exit codes by error; the first that fits. 1 is for an error that is none of the library's.
_CODES: tuple[tuple[type[errors.ImageCacheError], int], ...] = (
    (parsing.Misused, 2),
    (errors.ImageNotFound, 3),
    (Unknown, 3),
    (errors.ImageRejected, 4),
    (SourceMisconfigured, _SET_UP),
    (errors.SourceError, 5),
    (errors.NoSpaceError, 6),
    (errors.ConfigError, _SET_UP),
    (errors.DiskExistsError, 8),
    (errors.DiskTooSmallError, 8),
    (errors.LockTimeoutError, 9),
    (errors.CancelledError, 9),
    (BadTarget, _SET_UP),
    (errors.BaseInUseError, 12),
)
_BACKEND = 11

#: The message bus took no message: nobody could be asked. Like a source that is away, it may be back later.
BUS = 5

#: Errors of the kernel that only the set-up can mend, whatever call of the library met them.
_OF_SET_UP = (errno.EACCES, errno.EPERM, errno.EROFS)


def code_of(error: errors.ImageCacheError) -> int:
    """Return the exit code for an error."""
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in _OF_SET_UP:
        return _SET_UP
    return next((code for kind, code in _CODES if isinstance(error, kind)), _BACKEND)


def _drop_output() -> None:
    """Have what could not be written go nowhere: the interpreter would try again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


class Base(command.Command):
    """A command on this host's cache."""

    #: What to exit with although nothing was raised.
    exit_code = 0

    #: The instances directory must be there. False for what says itself that it is not.
    needs_instances = True

    #: Events that the command itself tells about, so that the log need not.
    unlogged: tuple[type[events.Event], ...] = (events.Rejected, events.PassFinished)

    #: Command lines for the help, without the name of the program.
    examples: tuple[str, ...] = ()

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        complain_in_one_line(parser)
        if self.examples:
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            parser.epilog = "examples:\n" + "\n".join(f"  imagecache {line}" for line in self.examples)
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        try:
            code = super().run(parsed_args) or self.exit_code
            self.app.stdout.flush()  # what is still to be written may fail as well
            return code
        except errors.ImageCacheError as error:
            if self.app.options.debug:
                LOG.exception("It failed")
            self.complain(error)
            return code_of(error)
        except BrokenPipeError:
            raise  # whoever reads has enough; cliff ends the program as SIGPIPE would
        except OSError as error:
            if self.app.options.debug:
                LOG.exception("It failed")
            where = ""
            if error.filename is None:
                _drop_output()
                where = "the output cannot be written: "
            self.note(f"error: {where}{plain(str(error))}")
            return 1

    def complain(self, error: errors.ImageCacheError) -> None:
        """Write an error to stderr, in one line."""
        self.note("error: " + plain(str(error)))

    def note(self, text: str) -> None:
        """Write a line that is not part of the result to stderr."""
        self.app.stderr.write(f"{self.app.NAME}: {dates.plain(text)}\n")
        self.app.stderr.flush()

    def config(self) -> CacheConfig:
        """Return the configuration.

        :raises ConfigError: it cannot be read, or cannot work.
        """
        return self._configured()[0]

    def admin(self) -> admin.CacheAdmin:
        """Return what needs no image source: looking, keeping, evicting, checking.

        :raises ConfigError: the configuration cannot be read, or cannot work.
        """
        config, host = self._configured()
        return admin.CacheAdmin(config, host=host, observers=[self._log()])

    def manager(
        self,
        source: ImageSource | None = None,
        *,
        observers: Sequence[events.Observer] = (),
        progress_shown: bool = True,
    ) -> manager.ImageCacheManager:
        """Return the manager that the configuration describes.

        :param source: where images come from, or None for a manager that uses only images in the cache.
        :param observers: they hear of each event, as the log does.
        :param progress_shown: whether the terminal shows how far transfers are.
        :raises ConfigError: the configuration cannot be read, or cannot work.
        """
        from imagecache_lib import manager
        from imagecache_lib.cli import progress
        from imagecache_lib.sources import file

        config, host = self._configured()
        all_observers: list[events.Observer] = [self._log(), *observers]
        if progress_shown and self.app.options.verbose_level > 0:
            # First, so that its line is gone when the log writes one.
            all_observers.insert(0, progress.ProgressObserver(self.app.stderr))
        return manager.ImageCacheManager(
            config, source or file.FileSource({}), host=host, observers=all_observers
        )

    def _log(self) -> events.Observer:
        log = LogObserver()

        def tell(event: events.Event) -> None:
            if not isinstance(event, self.unlogged):
                log(event)

        return tell

    def _configured(self) -> tuple[CacheConfig, System]:
        options = self.app.options
        config, host = opts.from_files(options.config_file, instances_path=options.instances_path)
        if self.needs_instances and not os.path.isdir(config.instances_path):
            raise errors.ConfigError(
                "the instances directory does not exist",
                path=config.instances_path,
                next_step="correct instances_path, or create or mount it, owned by the service's user",
            )
        return config, host

    def get_epilog(self) -> str:
        """Return no text: cliff's own way reads the metadata of all that is installed, to name a plugin."""
        return ""

    def _load_hooks(self) -> None:
        # cliff looks for other packages' hooks among the entry points of all that is installed: there are
        # none.
        self._hooks = []


class BaseLister(Base, lister.Lister):
    """A command that shows a table."""

    #: Columns that a narrow table does without, the least important first.
    droppable: tuple[str, ...] = ()

    #: Columns for programs only.
    machine_only: tuple[str, ...] = ()

    def _load_formatter_plugins(self) -> Any:
        return formats.Formats(formats.LIST)

    def produce_output(
        self, parsed_args: argparse.Namespace, column_names: Sequence[str], data: Iterable[Sequence[Any]]
    ) -> int:
        parsed_args.droppable = self.droppable
        if parsed_args.formatter == "table" and not parsed_args.columns:
            hidden = {column_names.index(name) for name in self.machine_only if name in column_names}
            column_names = _without(column_names, hidden)
            data = [_without(row, hidden) for row in data]
        unsortable = [name for name in parsed_args.sort_columns if not _is_column(name, column_names)]
        try:
            if unsortable:
                raise ValueError
            return super().produce_output(parsed_args, column_names, data)
        except UnicodeError:
            raise
        except ValueError as error:
            raise parsing.Misused(
                f"there is no column {', '.join(unsortable or parsed_args.columns)}",
                next_step=f"name some of: {', '.join(column_names)}",
            ) from error


class BaseShow(Base, show.ShowOne):
    """A command that shows one thing."""

    def _load_formatter_plugins(self) -> Any:
        return formats.Formats(formats.SHOW)


def _is_column(name: str, column_names: Sequence[str]) -> bool:
    """Whether cliff finds a column by that name, which may be written as a table's head has it."""
    return name.lower().replace(" ", "_") in column_names


def _without(row: Sequence[Any], hidden: Collection[int]) -> list[Any]:
    return [value for index, value in enumerate(row) if index not in hidden]


def base_of(cache: admin.CacheAdmin, said: str) -> str:
    """Return the name of the base image that an operator means.

    That is an image's id, the name of a base image, or what only one base image in the cache has: an image's
    name, or the first letters of its id or of the base's name.

    :raises ImageNotFound: there is none, or there are several.
    """
    bases = cache.list_bases()
    with contextlib.suppress(errors.ImageRejected):
        exact = {said, layout.base_name(said)}
        if found := [base for base in bases if base.name in exact]:
            return found[0].name
    if not said:
        raise errors.ImageNotFound("an image's id must not be empty", next_step="see: imagecache image list")
    named = [base.name for base in bases if base.image_name == said]
    begun = [
        base.name
        for base in bases
        if len(said) >= _FEWEST_LETTERS
        and (base.name.startswith(said) or (base.image_id or "").startswith(said))
    ]
    found_names = named or begun
    if len(found_names) == 1:
        return found_names[0]
    if found_names:
        raise errors.ImageNotFound(
            f"{len(found_names)} base images in the cache are meant by it",
            image=values.printable(said),
            next_step="give the whole id; see: imagecache image list -f value -c image -c name",
        )
    raise errors.ImageNotFound(
        "it is not in the cache", image=values.printable(said), next_step="see: imagecache image list"
    )


def pin_facts(pins: Iterable[model_pins.Pin]) -> values.Facts:
    """Return pins for a column."""
    held = tuple(pins)
    return values.Facts(
        [{"owner": pin.owner, "until": values.iso(pin.expires)} for pin in held],
        (
            f"{pin.owner} until {values.Date(pin.expires).human_readable()}" if pin.expires else pin.owner
            for pin in held
        ),
    )


def reason_facts(reasons: Iterable[Reason]) -> values.Facts:
    """Return reasons for a column: their code and facts for programs, clauses for people."""
    held = tuple(reasons)
    return values.Facts(
        [
            {
                "code": reason.code,
                "text": reason.text,
                **{
                    key: values.iso(value) if key == "until" and isinstance(value, int | float) else value
                    for key, value in reason.facts.items()
                },
            }
            for reason in held
        ],
        (reason.text for reason in held),
    )


def worst(codes: Sequence[int]) -> int:
    """Return the exit code of several tries: that of the first that failed."""
    return next((code for code in codes if code), 0)
