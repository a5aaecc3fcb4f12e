# SPDX-License-Identifier: Apache-2.0
"""The hosts that have to look before a base is unlinked: those that registered or are in Nova's registry."""

from __future__ import annotations

from imagecache_lib.nova import compute_nodes
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import Hosts
from imagecache_lib.store.membership import HostFile

#: What the id begins with of a host that only Nova's registry names.
BY_NOVA = "compute_nodes:"


def of(cache: CacheStore, hosts: Hosts) -> dict[str, HostFile | None]:
    """Return every member by id. Its value is None if its file cannot be read.

    A host that runs Nova and did not use this library yet may have disks on bases in this cache, in instance
    directories that only it mounts: it acknowledges nothing until it has registered.
    """
    members = hosts.all()
    names = {member.name for member in members.values() if member is not None}
    for name in compute_nodes.living(cache):
        if name not in names and name != cache.host.name:
            members[BY_NOVA + name] = HostFile(BY_NOVA + name, name)
    return members
