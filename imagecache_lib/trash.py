# SPDX-License-Identifier: Apache-2.0
"""Base images that were renamed away and are not yet proven unreferenced.

The rename takes the name, so that no new overlay can come to depend on the file: a spawn looks at the name
again before its disk appears. Only then is it read once more who refers to it. Nothing is lost until the
unlink, and whoever misses the base meanwhile links it back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os

from imagecache_lib import durable, evidence, layout, store

_ID_LENGTH = 32


@dataclasses.dataclass(frozen=True)
class Trashed:
    """One file in the trash.

    :param name: the base it was.
    :param path: where it is now.
    """

    name: str
    path: str

    @property
    def entry(self) -> str:
        """Its name in the trash."""
        return os.path.basename(self.path)


def throw(cache: store.CacheStore, name: str) -> Trashed | None:
    """Rename a base into the trash. None: it is gone already.

    :raises OSError: as rename(2).
    """
    thrown = Trashed(name, cache.layout.trashed(name, durable.new_id()))
    try:
        os.rename(cache.layout.base(name), thrown.path)
    except FileNotFoundError:
        return None
    return thrown


def find(cache: store.CacheStore, name: str | None = None) -> list[Trashed]:
    """Return what lies in the trash, of one base or of all. What has a strange name is not ours to touch."""
    try:
        entries = os.listdir(cache.layout.trash)
    except FileNotFoundError:
        return []
    found = []
    for entry in entries:
        base, _, trash_id = entry.rpartition(".")
        known = layout.classify(base) is not layout.Kind.UNKNOWN and len(trash_id) == _ID_LENGTH
        if known and name in (None, base):
            found.append(Trashed(base, os.path.join(cache.layout.trash, entry)))
    return found


def restore(cache: store.CacheStore, thrown: Trashed) -> bool:
    """Link a file back to its name. False: the name is taken by another file, or the file is gone.

    The trash's own name goes afterwards; a crash in between leaves one file with two names, which
    :func:`is_restored` tells.
    """
    try:
        os.link(thrown.path, cache.layout.base(thrown.name), follow_symlinks=False)
    except FileExistsError:
        if not is_restored(cache, thrown):
            return False
    except FileNotFoundError:
        return False
    durable.sync_directory(cache.layout.base_path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(thrown.path)
    return True


def is_restored(cache: store.CacheStore, thrown: Trashed) -> bool:
    """Whether the file has its base name back."""
    try:
        return os.path.samefile(thrown.path, cache.layout.base(thrown.name))
    except FileNotFoundError:
        return False


def unlink(cache: store.CacheStore, thrown: Trashed) -> None:
    """Remove a file for good, and its record unless the name has a base again."""
    found = os.stat(thrown.path, follow_symlinks=False)
    os.unlink(thrown.path)
    cache.host.trace("evict:unlinked")
    record = cache.layout.record(thrown.name)
    data = durable.read_file(record)
    described = evidence.parse(data) if data is not None else None
    is_its_own = described is None or described.inode == found.st_ino
    if is_its_own and not os.path.lexists(cache.layout.base(thrown.name)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(record)
