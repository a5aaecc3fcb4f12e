# SPDX-License-Identifier: Apache-2.0
"""Shutting a program in: no network, a view of the files that it works on and of nothing else.

With bubblewrap(1), where it is installed and the kernel lets this process make namespaces. Where not, the
program runs all the same: what is opened is stated to it, and inspected before. This is the second wall.
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


class Sandbox:
    """Shuts one program in. Whether that is possible is tried once, when it is first asked for.

    :param program: its name, looked up in PATH.
    """

    def __init__(self, program: str, host: System) -> None:
        self._program = program
        self._host = host
        self._tried: str | None = None

    def problem(self) -> str:
        """Return why it is not possible on this host, as a clause. Empty where it is possible."""
        if self._tried is None:
            self._tried = self._try()
        return self._tried

    def command(self, *, reads: tuple[str, ...], writes: tuple[str, ...]) -> tuple[str, ...]:
        """Return the words to put before the program's own. None at all where it is not possible.

        :param reads: absolute paths of the files that it may read.
        :param writes: absolute paths of the files that it may read and write.
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
