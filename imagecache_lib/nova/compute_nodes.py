# SPDX-License-Identifier: Apache-2.0
"""Nova's registry of the hosts that share a directory of instances, kept fresh for hosts that run Nova.

``<instances_path>/compute_nodes`` is a JSON object of host name to epoch seconds. A Nova that shares the
directory takes a host that is absent there, or was silent for a day, for one without instances, and evicts
what only that host uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Mapping

from imagecache_lib import errors
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable, locks

NAME = "compute_nodes"

#: A host that was silent for so long is taken for gone.
SILENT_SECONDS = 86400

#: Nova's lock around its registry, without the prefix that all its locks have.
LOCK = "storage-registry-lock"

#: How long a pass waits for that lock, in seconds: Nova holds it for as long as a small file takes.
_PATIENCE = 5.0

#: How often entries that other hosts wrote meanwhile are put back before it is left to them.
_MOST_TURNS = 10


def refresh(cache: CacheStore) -> None:
    """Write this host's entry anew, if there is a registry. A torn one is Nova's to repair.

    :raises OSError: it cannot be written.
    """
    path = _path(cache)
    if not os.path.lexists(path):
        return  # no Nova here
    with _locked(cache, shared=False) as got:
        known = _read(path)
        if known is None or not got:
            return  # Nova writes in place: without the lock every host would get its half-written file
        mode = stat.S_IMODE(os.stat(path).st_mode)
        own = cache.host.clock()
        for _turn in range(_MOST_TURNS):
            written = {**known, cache.host.name: own}
            replaced = durable.exchange_file(path, json.dumps(written).encode(), mode=mode)
            # Where locks do not lock, another host may have written between our look and this.
            others = (_parse(replaced) if replaced is not None else None) or {}
            if others.items() <= known.items():
                return
            known = {**known, **others}


def _locked(cache: CacheStore, *, shared: bool) -> contextlib.AbstractContextManager[bool]:
    return locks.waiting(
        cache.layout.lock(LOCK),
        shared=shared,
        host=cache.host,
        stall_timeout=min(_PATIENCE, cache.config.lock_timeout),
    )


@dataclasses.dataclass(frozen=True)
class Living:
    """The hosts that the registry names.

    :param names: those that wrote their entry within a day, or whose entry does not say when they did.
    :param untold: why others cannot be told, as a clause, or None if there are no others.
    """

    names: tuple[str, ...] = ()
    untold: str | None = None


def living(cache: CacheStore) -> Living:
    """Return which hosts run Nova. A registry that is not there names none.

    One that cannot be read, or is torn, may name any: Nova truncates the file before it writes it.

    The time is what this host's clock and that of the filesystem, on shared storage the server's, agree has
    passed: with a clock that runs ahead, all other hosts would look silent.
    """
    path = _path(cache)
    if not os.path.lexists(path):
        return Living()
    try:
        known = _read(path)
        if known is None:
            with _locked(cache, shared=True):
                known = _read(path)
        if known is None:
            return Living(untold=f"{path} is damaged")
        now = min(cache.host.clock(), cache.filesystem_now())
    except OSError as error:
        return Living(untold=f"{path} cannot be read: {error.strerror}")
    except errors.BackendError as error:
        return Living(untold=f"{path} cannot be read: {error.cause}")
    return Living(tuple(sorted(name for name, then in known.items() if _may_live(then, now))))


def _may_live(then: object, now: float) -> bool:
    """Whether a host may be alive by what its entry says: unknown is no proof that it is gone."""
    return not (isinstance(then, int | float) and then <= now - SILENT_SECONDS)


def _path(cache: CacheStore) -> str:
    return os.path.join(cache.config.instances_path, NAME)


def _read(path: str) -> Mapping[str, object] | None:
    """Return the time of each host's last entry, or None if that cannot be told.

    :raises OSError: the file cannot be read.
    """
    data = durable.read_file(path)
    return _parse(data) if data is not None else None


def _parse(data: bytes) -> Mapping[str, object] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
