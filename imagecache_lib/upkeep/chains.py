# SPDX-License-Identifier: Apache-2.0
"""Following the backing files of disks outside of the disk roots, to the bases at their ends."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping

from imagecache_lib.store import layout
from imagecache_lib.upkeep import headers
from imagecache_lib.upkeep.facts import Overlay
from imagecache_lib.upkeep.follow import CannotTell, Follower, Looked
from imagecache_lib.upkeep.names import Names

#: A chain of backing files is followed this far. QEMU opens every file of it, and gives up long before.
_LONGEST_CHAIN = 1000


@dataclasses.dataclass(frozen=True)
class Followed:
    """How a chain was followed.

    :param is_whole: all of it was read.
    :param device: the path of a block device in it, or None if there is none.
    """

    is_whole: bool
    device: str | None = None


class Chains:
    """What the overlays of one reading lead to.

    :param names: finds the names of bases.
    :param base_path: of the cache.
    :param read: paths of the overlays below the disk roots, which are read anyway.
    """

    def __init__(self, follower: Follower, names: Names, *, base_path: str, read: Collection[str]) -> None:
        self._follower = follower
        self._names = names
        self._base_path = base_path
        self._plain = os.fsencode(base_path)
        self._overlays = read
        self._looked: dict[tuple[str, tuple[int, ...]], Looked | CannotTell | None] = {}

    @functools.cached_property
    def _real_base_path(self) -> str:
        return os.path.realpath(self._base_path)

    def lie_in_cache(self, references: Iterable[bytes]) -> bool:
        """Whether references are plain paths of files in the cache, as those of nearly all disks are."""
        return all(text.rpartition(b"/")[0] == self._plain for text in references)

    def leads_on(
        self,
        overlay: Overlay,
        targets: Mapping[tuple[int, int], str],
        names: Collection[str],
        before: Collection[str],
    ) -> bool:
        """Whether a file that has a base's name, and lies elsewhere, is no base and refers to others itself.

        :param targets: the bases' names by ``(st_dev, st_ino)``.
        :param names: what the references of the overlay end in.
        :param before: what it referred to when it was last read.
        """
        for starts, paths in self._named_in(overlay.path, overlay.references, None):
            for path in paths:
                looked = self._look(path, starts)
                if isinstance(looked, Looked):
                    if looked.references and looked.target not in targets:
                        return True
                elif set(names) < set(before):
                    return True  # it referred to others when it could be read
        return False

    def follow(self, overlay: Overlay, targets: Mapping[tuple[int, int], str], names: set[str]) -> Followed:
        """Add the names that a chain leads to outside of the roots.

        :param targets: as for :meth:`leads_on`.
        :param names: gets the names.
        """
        seen: set[tuple[str, tuple[int, ...]]] = set()
        is_whole, device = True, None
        pending = list(self._named_in(overlay.path, overlay.references, None))
        while pending:
            told = False
            starts, paths = pending.pop()
            for path in paths:
                if (path, starts) in seen or self._was_read(path, starts) or self._is_absent_base(path):
                    told = True  # what is below the disk roots was read
                    continue
                if len(seen) >= _LONGEST_CHAIN:
                    return Followed(False, device)
                seen.add((path, starts))
                looked = self._look(path, starts)
                told = told or not isinstance(looked, CannotTell)
                if isinstance(looked, CannotTell):
                    # A link to a base leads nowhere while an eviction looks who needs that. What has a base's
                    # name and lies elsewhere may be an overlay.
                    found = self._names.find([os.fsencode(looked.real)])
                    names |= found
                    told = told or (bool(found) and os.path.dirname(looked.real) == self._real_base_path)
                if looked is None:
                    continue
                if isinstance(looked, Looked) and (base := targets.get(looked.target)) is not None:
                    names.add(base)
                    continue
                if isinstance(looked, Looked) and looked.is_device:
                    device = path
                names |= self._names.find(looked.references)
                pending.extend(self._named_in(path, looked.references, looked.real))
            is_whole = is_whole and told
        return Followed(is_whole, device)

    def _named_in(
        self, path: str, references: Iterable[bytes], real: str | None
    ) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
        """Yield where in a file the disk may begin that each reference means, and the paths of that file.

        A relative one begins for QEMU in the directory through which the file was opened, and for other
        programs in the one in which it lies. Behind a prefix it begins where the program runs, which services
        do at the root.

        :param real: the file's path without links, or None if it has yet to be asked for.
        """
        for text in references:
            starts = headers.starts(text)
            for named in headers.named_files(path, text):
                meant = [_spelled(named)]
                if not text.startswith(b"/"):
                    real = self._follower.real(path) if real is None else real
                    meant += [_spelled(each) for each in headers.named_files(real, text) if real]
                if not headers.is_plain(text):
                    meant += [_spelled(each) for each in headers.named_files("/", text)]
                yield starts, tuple(dict.fromkeys(meant))

    def _was_read(self, path: str, starts: tuple[int, ...]) -> bool:
        """Whether a file was read below the disk roots, where its own references are followed.

        Those of one that is pinned raw are not: but what this disk's header names is the file as it is.
        """
        return path in self._overlays and starts == (0,) and self._follower.pinned(path) != "raw"

    def _is_absent_base(self, path: str) -> bool:
        """Whether a path is that of a base which is gone. One that is there may be an overlay itself."""
        directory, name = os.path.split(os.path.normpath(path))
        if directory != self._base_path or not layout.NAME_PATTERN.fullmatch(os.fsencode(name)):
            return False
        if os.path.dirname(path) == directory:
            return not os.path.lexists(path)
        return isinstance(self._look(path), CannotTell)

    def _look(self, path: str, starts: tuple[int, ...] = (0,)) -> Looked | CannotTell | None:
        key = path, starts
        if key not in self._looked:
            answer = self._follower.look(path, starts)
            self._looked[key] = answer if isinstance(answer, Looked | CannotTell) else None
        return self._looked[key]


def _spelled(path: str) -> str:
    """Return a path spelled shorter. ``..`` stays: behind a link it is another directory than it seems."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return "/" + "/".join(parts)
