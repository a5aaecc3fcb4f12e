# SPDX-License-Identifier: Apache-2.0
"""What stands in for ``ssh`` and ``scp`` where hosts are mount namespaces of one machine."""

from __future__ import annotations

import pathlib

# Options and then the host and the command, which a shell there reads: what sshd does with it.
_SSH = """#!/bin/sh
while :; do case "$1" in -o) shift 2;; -*) shift;; *) break;; esac; done
host=$1; shift
exec nsenter --mount --target "$(cat "{hosts}/$host/process")" sh -c "$*"
"""

# One file, whose name is the last word.
_SCP = """#!/bin/sh
while :; do case "$1" in -*) shift;; *) break;; esac; done
case "$1" in
*:*) exec ssh "${{1%%:*}}" "cat '${{1#*:}}'" >"$2";;
*) exec ssh "${{2%%:*}}" "cat >'${{2#*:}}'" <"$1";;
esac
"""


def write(directory: pathlib.Path, hosts: pathlib.Path) -> None:
    """Write both programs.

    :param directory: an existing one, for a ``PATH``.
    :param hosts: has a directory for each name and address of a host, with the id of a process there.
    """
    for name, script in (("ssh", _SSH), ("scp", _SCP)):
        (directory / name).write_text(script.format(hosts=hosts))
        (directory / name).chmod(0o755)
