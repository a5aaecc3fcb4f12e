# SPDX-License-Identifier: Apache-2.0
"""The hosts that share a cache. Each writes its own file and no other host's, so that nothing needs a clock.

On shared storage no host can see all references alone: another may have instance directories that this
one does not mount. So a base in the trash is unlinked only when every registered host has seen it there,
then read its own references, and cleared it. A silent host blocks that until an operator forgets it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Collection, Container, Iterable, Mapping

from imagecache_lib import errors
from imagecache_lib.store import trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.membership import HostFile, parse
from imagecache_lib.system import durable

LOG = logging.getLogger(__name__)

#: What every release calls a member's file. A copy of one under another name is nobody's, and would be waited
#: for without end.
_FILE = re.compile(r"([0-9a-f]{32})\.json")


@dataclasses.dataclass(frozen=True, order=True)
class HostRef:
    """A registered host.

    :param name: its name, or its id where its file cannot be read.
    :param id: what :meth:`Hosts.forget` takes.
    """

    name: str
    id: str


class Hosts:
    """This host's file, and a look at the others'."""

    def __init__(self, cache: CacheStore) -> None:
        self._cache = cache
        self.id = cache.host_id

    @property
    def mark(self) -> str:
        """What the ids of this host's trash entries begin with."""
        return self.id[:8]

    def register(self) -> None:
        """Have a file, before the first lease: from then on nothing is unlinked without this host.

        Something that is no file of this host, and that cannot be replaced, makes it a member all the same:
        the others cannot read it, and keep everything.

        :raises OSError: it cannot be written.
        """
        if self._read(self.id) is not None:
            return
        try:
            self.write(HostFile(self.id, self._cache.host.name))
        except OSError as error:
            if not os.path.lexists(self._cache.layout.host(self.id)):
                raise
            LOG.warning("The other hosts wait for this one, whose file cannot be written: %s", error)

    def own(self) -> HostFile:
        """Return this host's file as it is now."""
        return self._read(self.id) or HostFile(self.id, self._cache.host.name)

    def write(self, own: HostFile) -> None:
        """Replace this host's file."""
        durable.write_file(self._cache.layout.host(self.id), own.to_json())

    def all(self) -> dict[str, HostFile | None]:
        """Return every registered host by id; None for one whose file cannot be read."""
        found: dict[str, HostFile | None] = {}
        for entry in os.listdir(self._cache.layout.hosts):
            if (member := _FILE.fullmatch(entry)) is not None:
                found[member[1]] = self._read(member[1])
        return found

    def forget(self, host_id: str) -> None:
        """Remove the file of a host that will not come back.

        This host itself stays a member. What a host saw of its disks is remembered, should it come back.

        :raises ConfigError: there is no such host.
        """
        unknown = errors.ConfigError(
            f"no host with the id {errors.shown(host_id)} is registered",
            next_step="list the hosts to see the ids",
        )
        # An id is a name in one directory, and nothing that leads elsewhere.
        if not isinstance(host_id, str) or host_id not in self.all():
            raise unknown
        if host_id == self.id:
            self.register()
            return
        try:
            os.unlink(self._cache.layout.host(host_id))
        except FileNotFoundError:
            raise unknown from None

    def forget_roots(self, kept: Collection[str]) -> None:
        """Forget what each disk root was, but for these."""
        own = self.own()
        roots = {path: root for path, root in own.roots.items() if path in kept}
        if roots != dict(own.roots):
            self.write(dataclasses.replace(own, roots=roots))

    def acknowledge(
        self, entries: Iterable[str], *, revoked: Container[str], among: Iterable[trash.TrashEntry]
    ) -> None:
        """Say that nothing here refers to these entries, which were in the trash before the reading.

        :param revoked: entries whose acknowledgement is withdrawn, since that is no longer so.
        :param among: everything that is in the trash. An acknowledgement of any other entry is forgotten.
        """
        own = self.own()
        cleared = {*entries, *own.cleared}
        there = frozenset(each.id for each in among if each.id in cleared and each.id not in revoked)
        if there != own.cleared:
            self.write(dataclasses.replace(own, cleared=there))

    def pending_acks(self, entry: str, hosts: Mapping[str, HostFile | None]) -> list[HostRef]:
        """Return the other hosts that have not cleared an entry of the trash.

        :param hosts: as :meth:`all` returned it.
        """
        return sorted(
            HostRef(host.name if host is not None else host_id, host_id)
            for host_id, host in hosts.items()
            if host_id != self.id and (host is None or entry not in host.cleared)
        )

    def _read(self, host_id: str) -> HostFile | None:
        try:
            data = durable.read_file(self._cache.layout.host(host_id))
        except OSError:
            return None
        return parse(host_id, data) if data is not None else None
