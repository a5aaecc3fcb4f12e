# SPDX-License-Identifier: Apache-2.0
"""Everything that a pass decides by, read once: the bases, the trash, who needs which base, and the room."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

from imagecache_lib.store import trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import Hosts
from imagecache_lib.system import locks
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.upkeep import evict, members, policy
from imagecache_lib.upkeep.inventory import Inventory
from imagecache_lib.upkeep.references import LEASED, ReferenceReader, References


@dataclasses.dataclass(frozen=True)
class Overview:
    """The whole cache at one time.

    :param inventory: everything in ``_base``.
    :param situation: what is decided about.
    :param references: who needs what.
    :param limits: what the operator allows.
    :param reader: what read the references, and reads them anew before anything is unlinked.
    :param image_ids: for each base, also in the trash, the image it was made from, or None if no record says
        so.
    """

    inventory: Inventory
    situation: policy.Situation
    references: References
    limits: policy.Limits
    reader: ReferenceReader
    image_ids: dict[str, str | None]

    @classmethod
    def take(cls, inventory: Inventory, reader: ReferenceReader, hosts: Hosts) -> Overview:
        """Read everything else that a pass decides by, and return it.

        :param inventory: everything in ``_base``.
        :param reader: reads the references to it.
        """
        cache = reader.cache
        trashed = trash.find(cache)
        names = {*(base.name for base in inventory.bases), *(each.name for each in trashed)}
        references = reader.read(names)
        cache.host.trace(TracePoint.VERIFY_READ)
        registered = members.of(cache, hosts)
        unused = (base.name for base in inventory.bases if base.name not in references.users)
        situation = policy.Situation(
            bases=inventory.bases,
            trash=tuple(described for _entry, described in evict.describe(trashed, cache, registered, hosts)),
            space=_space(cache, inventory),
            held=_held(cache, unused),
            others=tuple(hosts.pending_acks("", registered)),
        )
        image_ids = {name: _image_id(cache, name) for name in names}
        limits = policy.Limits.of(cache.config)
        return cls(inventory, situation, references, limits, reader, image_ids)

    def decide(self) -> policy.Decided:
        """Return what a pass does by this."""
        return policy.decide(self.situation, self.references, self.limits, now=self.reader.now)


def _held(cache: CacheStore, names: Iterable[str]) -> dict[str, str]:
    """Return why bases are in use this moment, as a clause by name: locked, or about to be published."""
    names = list(names)
    locked = {name: LEASED for name in names if locks.is_taken(cache.layout.lock(name), host=cache.host)}
    published = dict.fromkeys(trash.being_published(cache), evict.PUBLISHED_NOW)
    unknown = evict.in_flight(cache)
    return {**({} if unknown is None else dict.fromkeys(names, unknown.reason)), **published, **locked}


def _space(cache: CacheStore, inventory: Inventory) -> policy.Space:
    status = os.statvfs(cache.layout.base_path)
    return policy.Space(
        used=sum(entry.allocated for entry in inventory.bases), free=status.f_bavail * status.f_frsize
    )


def _image_id(cache: CacheStore, name: str) -> str | None:
    record = cache.read_record(name)
    return record.image_id if record is not None else None
