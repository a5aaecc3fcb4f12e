# SPDX-License-Identifier: Apache-2.0
"""Running an outside program: within limits, no longer than its caller waits, and knowing how it ended.

The command is ``prlimit … timeout … sh -c …``, all of which a POSIX host with util-linux and coreutils has:

* prlimit(1) sets the limits, since oslo.concurrency's own ``ProcessLimits`` starts another Python for them;
* timeout(1) ends what takes too long even after this process has died, and gives its children the default
  disposition of SIGCHLD, which a child otherwise inherits from a service that ignores it. It kills them all:
  asked to end, a program may stay, as the first process of a namespace does, and timeout(1) is content once
  the shell has ended;
* the shell says how the program ended, behind a word that no program can guess. The exit status that Python
  reports does not say so: it is 0 as well where other code in this process has already waited for the
  child, or where SIGCHLD is ignored. It also has head(1), tail(1) and cat(1) read all that the program
  writes, and pass on as much as is wanted: a program that repeats a warning for each cluster of an image
  neither fills this process's memory nor waits for a full pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import resource
import secrets
import signal
import subprocess
import threading
from collections.abc import Mapping

from oslo_concurrency import processutils

from imagecache_lib import dates, errors
from imagecache_lib.system import arguments, threads
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.translate import no_space
from imagecache_lib.system.waiter import Waiter

#: Seconds between two looks whether the caller still waits for the program.
_LOOK_EVERY = 0.25

#: A program that computes all the time comes to its limit of CPU time long before this many times of it.
_WALL_PER_CPU = 10

#: Seconds beyond its limit that a program is given to be gone.
_GRACE = 5

#: Most bytes that a program may write to its standard output. A description of an image takes thousands.
_MOST_OUTPUT = 4 * 2**20

#: Most bytes at the beginning, and at the end, of what a program says on its standard error: the first line
#: that counts may be far behind others, and none that counts is between.
_HEARD = 2**16

# 3 and 4 are where the output and what is said go in the end, 5 is read for the status, and 6 leads the
# output past the reader of what is said. The program itself has none of them. Where a reader failed, the
# status is not a number.
_SCRIPT = f"""
token=$1; shift
first() {{ head -c {_MOST_OUTPUT + 1} && cat >/dev/null || echo unread >&5; }}
ends() {{ head -c {_HEARD} && printf '\\n%s\\n' "$token" && tail -c {_HEARD} || echo unheard >&5; }}
exec 3>&1 4>&2
status=$({{ {{
    {{ "$@" 3>&- 4>&- 5>&-; echo "$?" >&5; }} 2>&1 >&6 6>&- | ends >&4 3>&- 6>&-
}} 6>&1 | first >&3 4>&-; }} 5>&1)
case $status in *[!0-9]*) status=lost;; esac
printf '\\n%s %s\\n' "$token" "$status" >&2
"""

#: timeout(1) ends with one of these when it had to end the program: killed by itself, in most versions.
_TIMED_OUT = (-signal.SIGKILL, 128 + signal.SIGKILL)

_NOT_FOUND = (126, 127)

#: How execve(2) says that there is no such program, or none that this user may run.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENOEXEC, errno.ELOOP)

#: What a program says when the host failed it, and not the data: the messages of strerror(3) and ld.so(8).
_HOST_AT_FAULT = re.compile(
    r"Cannot allocate memory|[Oo]ut of memory|[Ff]ailed to allocate|Could not allocate|Permission denied"
    r"|Operation not permitted|Too many open files|Resource temporarily unavailable|Stale file handle"
    r"|Read-only file system|No such file or directory|Failed to get .*lock|Failed to lock"
    r"|error while loading shared libraries|symbol lookup error|Interrupted system call|^bwrap: "
    r"|File too large|Transport endpoint|timed out|Connection refused|Bad system call|Device or resource busy"
    r"|Text file busy|Host is down|Remote I/O error|Required key not available|Key has expired"
    r"|version `[^']*' not found|Function not implemented"
    # A program that is too old, or was built without what is needed. Two names that are quoted are cut with
    # all between them, such as those of a format and an option that it does not support.
    r"|unrecognized option|invalid option|Command not found|[Uu]nknown (?:driver|format|protocol|option)"
    r"|not whitelisted|Driver '[^']*' is not|[Ii]nvalid parameter '|does ?n[o']t support the option"
    r"|Block format ''",
    re.MULTILINE,
)

#: What ld.so(8) says where a library is there and cannot be opened: the limits of open files, and memory.
_TOO_LITTLE_TO_LOAD = re.compile(
    r"Error 2[34]\b|Too many open files|[Cc]annot allocate|failed to map segment"
)

#: What a program quotes: a name in an image, or the path of one, which proves nothing about the host. A name
#: may have quotes and line ends of its own, so that it is known to be over at the last quote of all only. The
#: quote in a word, as in "don't", and the one that ends a name in `GNU's way' begin none.
_QUOTED = re.compile(r"(?<![\w`])'.*'", re.DOTALL)

#: The same for the disk that the data lie on.
_STORAGE_AT_FAULT = re.compile(r"Input/output error|Structure needs cleaning|Bad message")

#: What timeout(1) says before the program begins where it can have no timer (RLIMIT_SIGPENDING). It goes on
#: with alarm(2), and that is no reason for which the program failed.
_OF_TIMEOUT = re.compile(r"(?:timeout: warning: [^\n]*\n)+")

#: Most characters that are shown of what a program says. A name in an image may have as many as its owner
#: wants.
_SHOWN = 500

#: What each layer of a program says, one after the other, of what is one file to the reader.
_REPEATED = re.compile(r"(Could not open the file: )\1+")


class StorageFailed(errors.BackendError):
    """The program met an I/O error: the disk is at fault and not the data."""


class NotStarted(errors.BackendError):
    """This process may start no program at present: too many files are open, or there are too many tasks."""


class DataRefused(errors.BackendError):
    """The program ran as it should, and what it says is about the data."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. Where the hard limits of this process are lower, those count.

    :param cpu: seconds of CPU time.
    :param memory: bytes of address space.
    :param wall: seconds by the clock.
    """

    cpu: int
    memory: int
    wall: int

    @classmethod
    def of(cls, cpu: int, memory: int) -> Limits:
        """Return limits whose time by the clock follows from the CPU time."""
        return cls(cpu, memory, cpu * _WALL_PER_CPU)


def run(
    words: tuple[str, ...],
    *,
    limits: Limits,
    waiter: Waiter,
    program: str,
    subject: str,
    hidden: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a program and return what it writes to its standard output.

    :param words: the program and its arguments, perhaps behind those of another that runs it.
    :param program: the program's name, with which its messages begin.
    :param waiter: the caller. Once it no longer waits, the program is ended, and the error says so.
    :param subject: path of the file that errors are about.
    :param hidden: texts that are cut from what the program says, such as paths.
    :param environment: variables besides those of this process.
    :raises DataRefused: the program failed, and its message is about the data.
    :raises NoSpaceError: the filesystem is full, or a quota is used up.
    :raises StorageFailed: the disk failed.
    :raises NotStarted: the host allows no more programs at present.
    :raises BackendError: the host is at fault (a limit, a signal, lack of memory), or it is unknown how the
        program ended, or one of the words can be no argument.
    :raises CancelledError, LockTimeoutError: the caller no longer waits.
    :raises ConfigError: the program, or one that runs it (prlimit, timeout), is not installed.
    """
    waiter.check()
    arguments.require_arguments(words, subject)
    token = secrets.token_hex(16)
    command = (
        "prlimit",
        f"--cpu={_at_most(limits.cpu, resource.RLIMIT_CPU)}",
        f"--as={_at_most(limits.memory, resource.RLIMIT_AS)}",
        "--core=0",  # it would have the data of an image, and be left where the service runs
        "--",
        *("timeout", "-s", "KILL", str(limits.wall)),
        *("sh", "-c", _SCRIPT, "sh", token, *words),
    )
    # Messages are matched, so they must not be translated.
    variables = {**os.environ, **(environment or {}), "LC_ALL": "C"}
    monotonic = waiter.system.monotonic
    began = monotonic()
    try:
        with _Watch(waiter, limits, subject) as watch:
            watch.begin()
            try:
                # A service may outlive the directory in which it was started, of which the shell complains.
                out, err = waiter.system.execute(
                    *command, cwd="/", env_variables=variables, on_execute=watch.take
                )
            except processutils.ProcessExecutionError as error:
                raise _wrapper_failed(error, limits, subject, monotonic() - began) from error
            except OSError as error:
                raise not_started("prlimit", error, subject) from error
            _require_success(str(err), token, program, subject, hidden)
    except UnicodeDecodeError as error:
        raise DataRefused(f"{program}: it wrote no text", path=subject) from error
    out = str(out)
    if len(os.fsencode(out)) > _MOST_OUTPUT:  # the rest is missing
        raise DataRefused(f"{program}: it wrote more than {dates.size(_MOST_OUTPUT)}", path=subject)
    return out


def _at_most(wanted: int, kind: int) -> int:
    """Return a limit that this process may set: one above its own hard limit takes a privilege."""
    _soft, hard = resource.getrlimit(kind)
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


class _Watch:
    """Watches a process for the body of ``with``, and kills it once the caller no longer waits for it.

    It kills, too, what outlives its limit by the clock: timeout(1) may have been killed itself.
    """

    def __init__(self, waiter: Waiter, limits: Limits, subject: str) -> None:
        self._maker = Maker()
        self._waiter = waiter
        self._limits = limits
        self._subject = subject
        self._over = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._thread: threading.Thread | None = None
        self._reason: errors.ImageCacheError | None = None

    def __enter__(self) -> _Watch:
        return self

    def begin(self) -> None:
        """Begin to watch, before there is a process: one that could not be watched is not to be started.

        :raises BackendError: no thread can be started.
        """
        self._thread = threads.start(self._watch, name="imagecache-watch")

    def take(self, process: subprocess.Popen[bytes]) -> None:
        """Watch a process that has been started."""
        self._processes.append(process)
        if self._reason is not None:
            self._kill()  # the caller stopped waiting before there was a process

    def _watch(self) -> None:
        until = self._waiter.system.monotonic() + self._limits.wall + _GRACE
        while not self._over.wait(_LOOK_EVERY):
            try:
                self._waiter.check()
                if self._waiter.system.monotonic() > until:
                    raise _took_too_long(self._limits, self._subject)
            except errors.ImageCacheError as reason:
                self._reason = reason
                self._kill()
                return

    def _kill(self) -> None:
        for process in self._processes if self._maker.is_here else ():
            if process.returncode is None:  # else the number may be another process's by now
                _kill(process)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._over.set()
        if error is not None and not isinstance(error, Exception):
            self._kill()  # nobody waits for it after an interrupt
        if self._thread is not None:  # an interrupt may come before that
            threads.join(self._thread)
        if isinstance(error, errors.ImageCacheError) and self._reason is not None:
            raise self._reason from error


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and what it started: timeout(1) leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def not_started(program: str, error: OSError, subject: str | None = None) -> errors.ImageCacheError:
    """Return what it means that a program could not be started.

    :returns: :class:`ConfigError` if there is no such program, else :class:`NotStarted`.
    """
    if error.errno in _NOT_THERE:
        return errors.ConfigError(
            f"{program} cannot be run: {error}", next_step="install util-linux and coreutils"
        )
    return NotStarted(  # too many open files, too many tasks, no memory
        f"no program can be started: {error.strerror or error}",
        path=subject,
        next_step="look at the service's own limits; another host may do it",
    )


def _wrapper_failed(
    error: processutils.ProcessExecutionError, limits: Limits, subject: str, took: float
) -> errors.ImageCacheError:
    status = error.exit_code if isinstance(error.exit_code, int) else 1
    if status in _TIMED_OUT and took >= limits.wall:
        return _took_too_long(limits, subject)
    if status in _NOT_FOUND:
        return errors.ConfigError(
            f"timeout or sh cannot be run: {str(error.stderr).strip()}", next_step="install coreutils"
        )
    if 0 <= status <= 128:
        return errors.BackendError(
            f"the program could not be started: {str(error.stderr).strip() or f'exit status {status}'}",
            path=subject,
            next_step="look at the service's own limits; another host may do it",
        )
    return _by_signal(-status if status < 0 else status - 128, subject)


def _took_too_long(limits: Limits, subject: str) -> errors.BackendError:
    return errors.BackendError(
        f"it was ended after {limits.wall} seconds, which is the limit",
        path=subject,
        next_step="find out what the host is busy with, or raise the limit",
    )


def _by_signal(number: int, subject: str) -> errors.BackendError:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return errors.BackendError(
        f"it was ended by {name}, which may be one of its resource limits or a lack of memory",
        path=subject,
        next_step="look into the host's log; another host may do it",
    )


def _require_success(err: str, token: str, program: str, subject: str, hidden: tuple[str, ...]) -> None:
    # Behind it may be what the shell itself, or a process that outlives it, has to say.
    ending = re.search(rf"\n{token} (\d+)\n", err)
    if ending is None:
        raise errors.BackendError(
            f"{program}: how it ended is not known, so that its work is not used",
            path=subject,
            next_step="find out what ended it; another host may do it",
        )
    status = int(ending[1])
    if status == 0:
        return
    said = _heard(err[: ending.start()], token).strip()
    if warned := _OF_TIMEOUT.match(said):
        said = said[warned.end() :]
    if status in _NOT_FOUND:
        if _TOO_LITTLE_TO_LOAD.search(said):
            raise errors.BackendError(
                f"{program} cannot be run: {_printable(said)}",
                path=subject,
                next_step="look at the limits of the service and of programs; another host may do it",
            )
        raise errors.ConfigError(
            f"{program} cannot be run: {_printable(said)}",
            next_step=f"install {program} with all its libraries",
        )
    if status > 128:
        raise _by_signal(status - 128, subject)
    line = f"{program}: {told(said, program, hidden)}"
    own = _own_words(said, hidden)
    if "No space left on device" in own or "Disk quota exceeded" in own:
        raise no_space(subject, quota="Disk quota exceeded" in own)
    if _STORAGE_AT_FAULT.search(own):
        raise StorageFailed(line, path=subject, next_step="check the disk")
    if _HOST_AT_FAULT.search(own) or not _marked(said, program):
        raise errors.BackendError(line, path=subject, next_step="mend the host; another one may do it")
    raise DataRefused(line, path=subject)


def _heard(err: str, token: str) -> str:
    """Return what a program said, or whole lines at its beginning and its end if more than that was said."""
    first, _mark, last = err.partition(f"\n{token}\n")
    if len(os.fsencode(last)) < _HEARD:
        return first + last
    return "\n".join((first.rpartition("\n")[0] or first, last.partition("\n")[2]))


def _own_words(said: str, hidden: tuple[str, ...]) -> str:
    """Return what a program says without what it quotes: an image's owner may have chosen that."""
    for text in sorted(hidden, key=len, reverse=True):
        said = said.replace(text, "")
    return _QUOTED.sub("''", said)


def told(said: str, program: str, hidden: tuple[str, ...]) -> str:
    """Return the line that tells what went wrong: the first that the program begins with its own name.

    :param hidden: texts to leave out, such as the paths of files that are gone when an operator reads this.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    marked = _marked(said, program)
    grave = [line for line in marked if not line.startswith(f"{program}: warning: ")]
    line = (grave or marked or lines or ["failed, and does not say why"])[0]
    while line.startswith(f"{program}: "):
        line = line.removeprefix(f"{program}: ")
    for text in sorted(hidden, key=len, reverse=True):
        line = line.replace(f"'{text}'", "the file").replace(text, "the file")
    return _printable(_REPEATED.sub(r"\1", line))


def _marked(said: str, program: str) -> list[str]:
    """Return the lines that the program itself wrote, which begin with its name."""
    return [line for line in map(str.strip, said.splitlines()) if line.startswith(f"{program}: ")]


def _printable(line: str) -> str:
    """Return a line as it can be shown anywhere: an image may have chosen its characters, and how many."""
    shown = "".join(each if each.isprintable() else "?" for each in line[: _SHOWN + 1])
    return shown if len(line) <= _SHOWN else f"{shown[:_SHOWN]}..."
