# SPDX-License-Identifier: Apache-2.0
"""Whose a disk is, by the directory in which it lies. Pure: what a driver reports in, uuids out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from imagecache_lib import model
from imagecache_lib.upkeep.scan import plain_names

#: A uuid, however it is written.
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def key(name: str) -> str:
    """Return what a uuid, or a directory's name, is compared by: a uuid is the same one in capitals."""
    return name.lower() if UUID.fullmatch(name) else name


class Owners:
    """The instances of a report by the names of their directories.

    Where a disk root is says nothing of whose a disk is: users give instances any names.

    :param report: the instances.
    :param roots: paths of the disk roots.
    """

    def __init__(self, report: Iterable[model.Instance], roots: Iterable[str]) -> None:
        self._instances: dict[str, set[str]] = {}
        for each in report:
            for name in plain_names(each):
                self._instances.setdefault(key(name), set()).add(each.uuid)
        self._roots = sorted({root.rstrip("/") + "/" for root in roots}, key=len, reverse=True)
        self._by_directory: dict[str, frozenset[str]] = {}

    def one_of(self, path: str) -> str | None:
        """Return the uuid of the one instance that a disk may be of, or None."""
        owners = self.of(path)
        return next(iter(owners)) if len(owners) == 1 else None

    def of(self, path: str) -> frozenset[str]:
        """Return the uuids of the instances that a file or a directory may be of.

        Each has a name of a directory in which it lies, or if none has, the name that it has itself.
        """
        if not self._instances:
            return frozenset()
        directory, _slash, name = path.rpartition("/")
        owners = self._by_directory.get(directory)
        if owners is None:
            # What is read below a disk root has a path that begins as the disk root is spelled.
            whole = f"{directory}/"
            root = next((each for each in self._roots if whole.startswith(each)), "")
            parts = whole[len(root) :].split("/")
            owners = frozenset(owner for part in parts for owner in self._named(part))
            self._by_directory[directory] = owners
        return owners or frozenset(self._named(name))

    def _named(self, name: str) -> Collection[str]:
        """Return the uuids of the instances whose directory may have a name."""
        plain = name.removesuffix("_resize").removesuffix("_del")
        return self._instances.get(key(name)) or self._instances.get(key(plain)) or ()
