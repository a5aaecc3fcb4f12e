# SPDX-License-Identifier: Apache-2.0
"""What stands in for programs that nova-compute calls.

``ssh`` and ``scp`` enter mount namespaces, which are the hosts of one machine here. ``genisoimage`` makes a
disk that has the files, and that no guest reads.
"""

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


_GENISOIMAGE = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && drive=$2; shift; done
exec tar -cf "$drive" -C "$1" .
"""


def write(directory: pathlib.Path, hosts: pathlib.Path) -> None:
    """Write the programs.

    :param directory: an existing one, for a ``PATH``.
    :param hosts: has a directory for each name and address of a host, with the id of a process there.
    """
    programs = {"ssh": _SSH.format(hosts=hosts), "scp": _SCP.format(), "genisoimage": _GENISOIMAGE}
    for name, script in programs.items():
        (directory / name).write_text(script)
        (directory / name).chmod(0o755)
