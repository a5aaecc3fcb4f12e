# SPDX-License-Identifier: Apache-2.0
"""A conductor that does not wait long for hosts: what ``imagecache precache`` does, but for its patience.

The arguments are the job database, the agents' topic, and ``start SECONDS IMAGE HOST...`` or
``cancel JOB``: a host that is down is given up after so many seconds. What it prints is what the command
prints with ``-f json``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence

from imagecache_lib import opts
from imagecache_lib.precache import job, mailbox, rpc
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.patience import Pauses
from imagecache_lib.precache.precacher import AggregatePrecacher

#: Long enough for an agent on a busy machine to answer.
_TIMEOUT = 3.0
# The message bus comes back when the test has it come back, however long a busy machine takes.
_PAUSES = Pauses(quiet=1.5, down=0.5, longest_down=1.0, bus=150.0)


def main(jobs: str, topic: str, action: str, *words: str) -> int:
    """Do it. Returns the exit code that the command would have."""
    logging.basicConfig(level=logging.INFO)
    conf = opts.global_conf()
    hosts = rpc.RpcHostClient(
        rpc.transport(conf), topic=topic, timeout=_TIMEOUT, mailboxes=mailbox.transport(conf)
    )
    if action == "cancel":
        work = AggregatePrecacher(JobDatabase(jobs), hosts, pauses=_PAUSES).cancel(*words)
    else:
        seconds, image, *names = words
        pauses = dataclasses.replace(_PAUSES, patience=float(seconds))
        conductor = AggregatePrecacher(JobDatabase(jobs), hosts, pauses=pauses)
        work = conductor.run(conductor.start("", names, [image], job.Terms(concurrency=8)).id)
    json.dump(_rows(work), sys.stdout)
    return 10 if work.has_failed else 0


def _rows(work: job.Job) -> Sequence[object]:
    return [
        {"host": name, "image": image_id, "result": cell.result and cell.result.value, "reason": cell.reason}
        for name, cells in work.cells.items()
        for image_id, cell in cells.items()
    ]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
