# SPDX-License-Identifier: Apache-2.0
"""Being a member of those who share a cache: one file for each host, which no other host writes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping

from imagecache_lib import errors
from imagecache_lib.store import layout
from imagecache_lib.system import durable
from imagecache_lib.system.descriptor import Descriptor


@dataclasses.dataclass(frozen=True)
class HostFile:
    """What a host says of itself.

    :param id: its file's name, without the ending.
    :param name: the host's name.
    :param roots: what each disk root was when it was last read: ``[st_dev, f_fsid]`` by path. The release
        before reads it; ``hosts/<id>.scan`` says more.
    :param cleared: entries of the trash that nothing on this host refers to.
    """

    id: str
    name: str
    roots: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    cleared: frozenset[str] = frozenset()

    def to_json(self) -> bytes:
        fields = {"name": self.name, "roots": dict(self.roots), "cleared": sorted(self.cleared)}
        return json.dumps(fields).encode() + b"\n"


def parse(host_id: str, data: bytes) -> HostFile | None:
    """Return a host's file, or None if it is torn or unknown: that host acknowledges nothing then."""
    try:
        fields = json.loads(data)
        name, cleared = fields["name"], fields["cleared"]
        roots = {str(path): (int(pair[0]), int(pair[1])) for path, pair in fields["roots"].items()}
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(cleared, list):
        return None
    return HostFile(host_id, name, roots, frozenset(str(each) for each in cleared))


def host_id(name: str) -> str:
    """Return the id that this host always has.

    Two hosts of one name differ in /etc/machine-id (see machine-id(5)), two clones of one machine in name.

    :raises ConfigError: that file is there and cannot be read. Under another id this host would register a
        second time, and for the first one eviction would wait until an operator forgets it.
    """
    try:
        machine = durable.read_file("/etc/machine-id") or b""
    except OSError as error:
        raise errors.ConfigError(
            f"the machine's id cannot be read: {error.strerror}",
            path="/etc/machine-id",
            next_step="make it readable for the service's user, and check the limit of open files",
        ) from error
    # The kernel takes any bytes for a name, and Python makes surrogates of those that are no text.
    encoded = name.encode("utf-8", "surrogatepass")
    return hashlib.sha256(machine.strip() + b"\0" + encoded).hexdigest()[:32]


def ensure(where: layout.Layout, own_id: str, name: str) -> None:
    """Have a file, if only since an operator forgot this host while it was alive.

    :raises OSError: it cannot be written.
    """
    path = where.host(own_id)
    try:
        # A network filesystem's client may answer a stat(2) from what it knew; an open(2) asks the server.
        Descriptor(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK).close()
    except FileNotFoundError:
        durable.write_file(path, HostFile(own_id, name).to_json())
    except OSError:
        return  # it is there, and what it says is not the question here
