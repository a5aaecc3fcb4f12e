# SPDX-License-Identifier: Apache-2.0
"""Which conductor runs a job. No clocks of two machines are compared.

The job's row names its *runner* and carries a number, the *beat*, that the runner raises every few seconds.
A conductor that wants to run the job looks at both: once they have not changed for :data:`SECONDS` by its own
clock, the runner is taken for dead, and one statement puts the newcomer in its place if they are still what
was seen. The old runner, should it wake up, finds another name in the row with its next beat, and writes
nothing more.

Nothing depends on the lease but work done twice and results told twice: agents take the same task from two
conductors as one, and a result that is there stays.
"""

from __future__ import annotations

import dataclasses
import os

from imagecache_lib.system import durable

#: A runner that has not raised its beat for so many seconds is taken for dead.
SECONDS = 30.0

#: How often a runner raises it.
BEAT_SECONDS = 5.0

_LONGEST_NAME = 64


class LeaseLost(Exception):
    """Another conductor runs the job now."""


@dataclasses.dataclass(frozen=True)
class Lease:
    """What a job's row says.

    :param runner: the name that :func:`new_runner` made, or None while no conductor runs the job.
    :param beat: a number that the runner raises as long as it lives.
    """

    runner: str | None
    beat: int

    @property
    def is_free(self) -> bool:
        """Whether the job has no runner, or one that is known to be dead."""
        return self.runner is None or _is_known_dead(self.runner)

    @property
    def conductor(self) -> str:
        """The name of the runner, for people."""
        name, _boot, _namespace, pid, *_more = [*(self.runner or "").split("/"), "", "", "", ""]
        return f"{name or 'an unknown host'}, process {pid or 'unknown'}"


def new_runner(name: str) -> str:
    """Return a name for one run of this process. From it, processes on this machine can see that it died.

    :param name: the conductor's host.
    """
    pid = os.getpid()
    words = (name[:_LONGEST_NAME].replace("/", "_"), _boot(), _namespace(), pid, _started(pid))
    return "/".join([*map(str, words), durable.new_id()])


def _is_known_dead(runner: str) -> bool:
    """Return whether a runner is gone. Returns False if it lives, or is not to be seen from here."""
    words = runner.split("/")
    if len(words) != 6 or not words[3].isdigit():
        return False
    _name, boot, namespace, pid, started, _id = words
    if not boot or not namespace or (boot, namespace) != (_boot(), _namespace()):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's
    return _started(int(pid)) not in (started, None)


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when a process began, in clock ticks after the boot, as proc(5) has it.

    Returns an empty text for a zombie, which runs no job, and None if that cannot be told: the process is
    gone, or /proc hides it.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            # The command, in parentheses, may hold anything.
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]
