# SPDX-License-Identifier: Apache-2.0
"""Shutting a program in: no network, a view of the files that it works on and of nothing else.

This takes bubblewrap(1), and a kernel that lets this process make namespaces. Where either is missing, the
program runs without a sandbox, which is only the second wall: the files that it opens are stated to it, and
were inspected before.
"""

from __future__ import annotations

import os
import shutil

from imagecache_lib import errors
from imagecache_lib.formats import program
from imagecache_lib.formats.program import Limits
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter

#: What programs and their libraries lie in. Read-only, and whatever of it exists.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")

_ISOLATED = ("--unshare-net", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--die-with-parent")

_TRIAL = Limits(cpu=10, memory=2**32, wall=30)

#: Seconds for which a failure is remembered: it may be the host's of that moment.
_TRY_AGAIN_AFTER = 600


class Sandbox:
    """Shuts one program in. Whether that is possible is tried when it is first asked for.

    That it is possible is remembered for good, and that it is not for ten minutes.

    :param program: the program's name, looked up in PATH.
    """

    def __init__(self, program: str, host: System) -> None:
        self._program = program
        self._host = host
        self._tried: tuple[str, float] | None = None

    def problem(self) -> str:
        """Return, as a clause, why this host cannot run a sandbox; empty if it can.

        :raises NotStarted: the host allows no more programs at present, whether in a sandbox or not.
        """
        tried = self._tried
        if tried is not None and (not tried[0] or self._host.monotonic() < tried[1]):
            return tried[0]
        problem = self._try()
        self._tried = problem, self._host.monotonic() + _TRY_AGAIN_AFTER
        return problem

    def command(self, *, reads: tuple[str, ...], writes: tuple[str, ...]) -> tuple[str, ...]:
        """Return the words to put before the program's own: an empty tuple if this host cannot run a sandbox.

        :param reads: absolute paths of the files that the program may read.
        :param writes: absolute paths of the files that the program may read and write.
        :raises NotStarted: as :meth:`problem`.
        """
        if self.problem():
            return ()
        files = [word for path in reads for word in ("--ro-bind", path, path)]
        files += [word for path in writes for word in ("--bind", path, path)]
        # The root that all of this is mounted on is memory, and nothing for a program to fill.
        return (*self._walls(), *files, "--remount-ro", "/", "--")

    def _try(self) -> str:
        if shutil.which("bwrap") is None:
            return "bubblewrap (bwrap) is not installed"
        try:
            # Run like any other program: bwrap never ends where SIGCHLD is ignored.
            program.run(
                (*self._walls(), "--", self._program, "--version"),
                limits=_TRIAL,
                waiter=Waiter(self._host),
                program="bwrap",
                subject=self._program,
            )
        except program.NotStarted:
            raise  # that says nothing of a sandbox
        except errors.ImageCacheError as error:
            return f"bubblewrap does not work here: {error.cause}"
        return ""

    def _walls(self) -> tuple[str, ...]:
        # A user namespace maps one user only, so that root in it may not open what belongs to others. Root
        # needs none to make the others, and keeps the one capability that this takes.
        who = ("--cap-add", "CAP_DAC_OVERRIDE") if os.geteuid() == 0 else ("--unshare-user",)
        places = [word for path in _SYSTEM for word in ("--ro-bind-try", path, path)]
        found = shutil.which(self._program)
        if found is not None:
            places += ["--ro-bind", os.path.abspath(found), os.path.abspath(found)]
        return ("bwrap", *_ISOLATED, *who, *places, "--dev", "/dev", "--chdir", "/")
