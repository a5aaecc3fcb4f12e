# SPDX-License-Identifier: Apache-2.0
"""The hosts that have to look before a base is unlinked: those that registered or are in Nova's registry."""

from __future__ import annotations

from imagecache_lib.nova import compute_nodes
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import Hosts
from imagecache_lib.store.membership import HostFile

#: What the id begins with of a host that only Nova's registry names.
BY_NOVA = "compute_nodes:"

#: Id of a member that stands for those that Nova's registry may name, where it cannot be read.
UNTOLD = BY_NOVA + "?"


def of(cache: CacheStore, hosts: Hosts) -> dict[str, HostFile | None]:
    """Return every member by id. Its value is None if its file cannot be read.

    A host that runs Nova and did not use this library yet may have disks on bases in this cache, in instance
    directories that only it mounts: it acknowledges nothing until it has registered. Nor do those that a
    registry may name which cannot be read.
    """
    members = hosts.all()
    names = {member.name for member in members.values() if member is not None}
    registry = compute_nodes.living(cache)
    for name in registry.names:
        if name not in names and name != cache.host.name:
            members[BY_NOVA + name] = HostFile(BY_NOVA + name, name)
    if registry.untold is not None:
        members[UNTOLD] = HostFile(UNTOLD, f"those that Nova knows of ({registry.untold})")
    return members
