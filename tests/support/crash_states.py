# SPDX-License-Identifier: Apache-2.0
"""Every state of a directory that a power cut may leave, of a recorded run. Pure: no file is touched.

The rules are those of ALICE (Pillai and others, OSDI 2014) and CrashMonkey (Mohan and others, OSDI 2018), for
a filesystem that promises no more than POSIX does: of what was done since the last sync any part may be
there. A part is one change of names, one piece of 4 KiB of a file's data, one change of its size, or one of
its attributes. fsync(2) of a file makes its data, size and attributes durable, fdatasync(2) its data and
size, and fsync of a directory its names: never the names of a file that was synced. link(2) and rename(2)
are atomic.

Two rules more say that the filesystem itself is whole afterwards: a directory that is not empty is not gone,
and where a file moved into a directory, that directory is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

#: What a disk writes in one go.
PIECE = 4096

ROOT = 0


@dataclasses.dataclass(frozen=True)
class Names:
    """Names that change in one step.

    :param changes: of each name its directory, itself, and the node it means then, if any.
    :param makes: the node of a directory that is made by it, or None.
    """

    changes: tuple[tuple[int, str, int | None], ...]
    makes: int | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """A part of a file's data, within one piece."""

    node: int
    offset: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Size:
    """A file's size. ``exact``: as ftruncate(2) sets it; otherwise a write made it at least this."""

    node: int
    size: int
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An extended attribute, or the mode, of a file. The value None removes it."""

    node: int
    name: str
    value: bytes | None


@dataclasses.dataclass(frozen=True)
class SyncFile:
    """fsync(2) of a file. ``attributes`` is False for fdatasync(2)."""

    node: int
    attributes: bool = True


@dataclasses.dataclass(frozen=True)
class SyncDirectory:
    """fsync(2) of a directory."""

    node: int


@dataclasses.dataclass(frozen=True)
class Mark:
    """The recorded program said that it had come so far."""

    text: str


Step = Names | Data | Size | Attribute | SyncFile | SyncDirectory | Mark


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a state."""

    data: bytes = b""
    attributes: tuple[tuple[str, bytes], ...] = ()


#: A state: each path below the root, and its file with the number of its node, or None for a directory.
State = Mapping[str, tuple[int, File] | None]


@dataclasses.dataclass(frozen=True)
class Recording:
    """What was durable at first, and what happened since.

    :param directories: the names in each directory, by its node. :data:`ROOT` is the root.
    :param files: the other nodes.
    :param steps: in their order.
    """

    directories: Mapping[int, Mapping[str, int]]
    files: Mapping[int, File]
    steps: Sequence[Step]

    def cuts(self) -> list[int]:
        """Return the moments that have all states: before each sync, after each mark, and at the end.

        What may be left between two syncs may be left before the second of them too.
        """
        found = {len(self.steps)}
        for position, step in enumerate(self.steps):
            if isinstance(step, SyncFile | SyncDirectory | Mark):
                found.add(position)
        return sorted(found)

    def marks(self, cut: int) -> frozenset[str]:
        """Return what the program had said before a moment."""
        return frozenset(step.text for step in self.steps[:cut] if isinstance(step, Mark))

    def parts(self, cut: int) -> tuple[frozenset[int], tuple[int, ...]]:
        """Return the steps that are durable at a moment, and those of which any may be there."""
        durable: set[int] = set()
        waiting: list[int] = []
        for position, step in enumerate(self.steps[:cut]):
            if isinstance(step, SyncFile | SyncDirectory):
                settled = {each for each in waiting if _is_settled(self.steps[each], step)}
                durable |= settled
                waiting = [each for each in waiting if each not in settled]
            elif not isinstance(step, Mark):
                waiting.append(position)
        return frozenset(durable), tuple(waiting)

    def state(self, present: frozenset[int]) -> State:
        """Return the state in which exactly these steps are there."""
        directories = self._names(present)
        contents = {node: _Content(file) for node, file in self.files.items()}
        for position in sorted(present):
            step = self.steps[position]
            if isinstance(step, Data | Size | Attribute):
                contents.setdefault(step.node, _Content(File())).apply(step)
        found: dict[str, tuple[int, File] | None] = {}
        for path, node in _reachable(directories):
            found[path] = None if node in directories else (node, contents.get(node, _Content(File())).file())
        return found

    def _names(self, present: frozenset[int]) -> dict[int, dict[str, int]]:
        directories = {node: dict(names) for node, names in self.directories.items()}
        makers = self._makers()
        directories |= {node: {} for node in makers}
        for position in sorted(present | self._needed(present, makers)):
            step = self.steps[position]
            if isinstance(step, Names):
                for directory, name, node in step.changes:
                    names = directories[directory]
                    if node is not None:
                        names[name] = node
                    elif name in names and not directories.get(names[name]):
                        del names[name]
        return directories

    def _makers(self) -> dict[int, int]:
        """Return the positions of the steps that make directories, by the directory's node."""
        return {
            step.makes: position
            for position, step in enumerate(self.steps)
            if isinstance(step, Names) and step.makes is not None
        }

    def _needed(self, present: frozenset[int], makers: Mapping[int, int]) -> set[int]:
        """Return the steps that made the directories between which something moved."""
        found: set[int] = set()
        pending = list(present)
        while pending:
            step = self.steps[pending.pop()]
            if not isinstance(step, Names):
                continue
            between = {directory for directory, _name, _node in step.changes}
            for directory in between if len(between) > 1 or step.makes is not None else ():
                if directory in makers and makers[directory] not in found:
                    found.add(makers[directory])
                    pending.append(makers[directory])
        return found

    def all_states(
        self, cut: int, *, is_whole: Callable[[str], bool] = lambda _path: False
    ) -> Iterator[frozenset[int]]:
        """Yield what may be there at a moment; of files without a name nobody could see a part.

        :param is_whole: says of a path that nobody reads what is in a file of that name. Of a file that has
            no other name everything that waits is there, or nothing.
        """
        durable, waiting = self.parts(cut)
        names = [each for each in waiting if isinstance(self.steps[each], Names)]
        others = [each for each in waiting if not isinstance(self.steps[each], Names)]
        for chosen in _subsets(names):
            present = durable | chosen
            paths: dict[int, list[str]] = {}
            for path, node in _reachable(self._names(present)):
                paths.setdefault(node, []).append(path)
            groups: dict[int, list[int]] = {}
            for each in others:
                node = self._node(each)
                if node in paths:
                    together = all(is_whole(path) for path in paths[node])
                    groups.setdefault(-node if together else each, []).append(each)
            for choice in _subsets(list(groups)):
                yield present.union(*(groups[each] for each in choice))

    def count(self, cut: int) -> int:
        """Return how many subsets there are at a moment, those that look alike counted each."""
        return int(2 ** len(self.parts(cut)[1]))

    def some_state(self, cut: int, chance: random.Random) -> frozenset[int]:
        """Return what may be there at a moment, chosen at random.

        Half of them are near an end, where most bugs are: nearly nothing arrived, or nearly everything.
        """
        durable, waiting = self.parts(cut)
        likely = chance.choice((0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
        return durable | {each for each in waiting if chance.random() < likely}

    def _node(self, position: int) -> int:
        step = self.steps[position]
        assert isinstance(step, Data | Size | Attribute)
        return step.node


def pieces(node: int, offset: int, data: bytes) -> Iterator[Data | Size]:
    """Yield the steps of one write."""
    end = offset + len(data)
    at = offset
    while at < end:
        upto = min(end, at // PIECE * PIECE + PIECE)
        yield Data(node, at, data[at - offset : upto - offset])
        at = upto
    if data:
        yield Size(node, end)


def _is_settled(step: Step, sync: SyncFile | SyncDirectory) -> bool:
    if isinstance(step, Names):
        return isinstance(sync, SyncDirectory) and any(each[0] == sync.node for each in step.changes)
    if isinstance(step, Attribute):
        return isinstance(sync, SyncFile) and sync.attributes and step.node == sync.node
    assert isinstance(step, Data | Size)
    return isinstance(sync, SyncFile) and step.node == sync.node


def _subsets(positions: Sequence[int]) -> Iterator[frozenset[int]]:
    for choice in itertools.product((False, True), repeat=len(positions)):
        yield frozenset(itertools.compress(positions, choice))


def _reachable(directories: Mapping[int, Mapping[str, int]]) -> Iterator[tuple[str, int]]:
    pending = [("", ROOT)]
    while pending:
        path, node = pending.pop()
        for name, below in sorted(directories[node].items()):
            found = f"{path}/{name}".lstrip("/")
            yield found, below
            if below in directories:
                pending.append((found, below))


class _Content:
    def __init__(self, file: File) -> None:
        self._data = bytearray(file.data)
        self._size = len(file.data)
        self._attributes = dict(file.attributes)

    def apply(self, step: Data | Size | Attribute) -> None:
        if isinstance(step, Data):
            end = step.offset + len(step.data)
            self._data.extend(bytes(max(0, end - len(self._data))))
            self._data[step.offset : end] = step.data
        elif isinstance(step, Size):
            self._size = step.size if step.exact else max(self._size, step.size)
            if step.exact:
                del self._data[self._size :]
        elif step.value is None:
            self._attributes.pop(step.name, None)
        else:
            self._attributes[step.name] = step.value

    def file(self) -> File:
        data = bytes(self._data[: self._size])
        return File(data + bytes(self._size - len(data)), tuple(sorted(self._attributes.items())))
