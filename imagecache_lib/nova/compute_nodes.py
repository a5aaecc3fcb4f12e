# SPDX-License-Identifier: Apache-2.0
"""Nova's registry of the hosts that share a directory of instances, kept fresh for hosts that run Nova.

``<instances_path>/compute_nodes`` is a JSON object of host name to epoch seconds. A Nova that shares the
directory takes a host that is absent there, or was silent for a day, for one without instances, and evicts
what only that host uses.
"""

from __future__ import annotations

import json
import os
import stat

from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable, locks

NAME = "compute_nodes"

#: A host that was silent for so long is taken for gone.
SILENT_SECONDS = 86400

#: Nova's lock around its registry, without the prefix that all its locks have.
LOCK = "storage-registry-lock"


def refresh(cache: CacheStore) -> None:
    """Write this host's entry anew, if there is a registry. A torn one is Nova's to repair.

    :raises OSError: it cannot be written.
    """
    path = os.path.join(cache.config.instances_path, NAME)
    if not os.path.lexists(path):
        return  # no Nova here
    with locks.waiting(
        cache.layout.lock(LOCK),
        shared=False,
        host=cache.host,
        stall_timeout=cache.config.lock_timeout,
    ) as got:
        data = durable.read_file(path)
        known = _parse(data) if data is not None else None
        if known is None or not got:
            return  # Nova writes in place: without the lock every host would get its half-written file
        known[cache.host.name] = cache.host.clock()
        mode = stat.S_IMODE(os.stat(path).st_mode)
        durable.write_file(path, json.dumps(known).encode(), mode=mode)


def living(cache: CacheStore) -> list[str]:
    """Return the names of the hosts that wrote their entry within a day, by this host's clock.

    A registry that is not there or cannot be read names none.
    """
    try:
        data = durable.read_file(os.path.join(cache.config.instances_path, NAME))
    except OSError:
        return []
    known = (_parse(data) if data is not None else None) or {}
    now = cache.host.clock()
    return sorted(
        name for name, then in known.items() if isinstance(then, int | float) and now - then < SILENT_SECONDS
    )


def _parse(data: bytes) -> dict[str, object] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
