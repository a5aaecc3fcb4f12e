# SPDX-License-Identifier: Apache-2.0
"""Which disks the pass gets to see: an overlay anywhere else would protect nothing.

The pass walks every disk root to any depth and through symbolic links, and leaves out the directories that
are the cache's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from imagecache_lib import errors
from imagecache_lib.config import CacheConfig
from imagecache_lib.store import layout
from imagecache_lib.system import names
from imagecache_lib.system.atomic_file import BadTarget
from imagecache_lib.system.statx import Statx

_Identity = tuple[int, int]


def own_directories(config: CacheConfig) -> set[_Identity]:
    """Return ``(st_dev, st_ino)`` of the directories that hold no disks, however they are reached.

    That of lock files is none: an operator may have put it wherever other programs make disks.
    """
    return _Looks().at(*_own_paths(config))


def _own_paths(config: CacheConfig) -> tuple[str, str]:
    return config.base_path, os.path.join(config.base_path, layout.PRIVATE)


def check_seen(target: str, config: CacheConfig) -> None:
    """Refuse a place where the pass would never see a disk, since its base would go while the disk needs it.

    :param target: absolute path of a disk in an existing directory.
    :raises BadTarget: it is outside every disk root, or in a directory that is the cache's own, or below that
        of lock files, or in one that the pass passes over.
    """
    directory = os.path.dirname(target)
    real = names.real_directory(directory)
    _refuse_passed_over(target, {directory, real}, config)
    looks = _Looks()
    own, locks = looks.at(*_own_paths(config)), looks.at(config.locks_path)
    # Roots whose names are above the target's first: a look at another takes for ever if its server is gone.
    above = [
        root
        for root in config.roots
        if names.is_at_or_below(real, root) or names.is_at_or_below(directory, root)
    ]
    if above and _is_in(looks.upwards(real), looks.at(*above), own, locks, target):
        return
    roots = looks.at(*config.roots)
    if _is_in(looks.upwards(real), roots, own, locks, target):
        return
    # The pass follows links, so that what the target's path says counts too, where it means what it says.
    if os.pardir not in directory.split("/") and any(each in roots for each in looks.upwards(directory)):
        return
    raise BadTarget(
        f"the target {target} is outside every disk root ({', '.join(config.roots)}): the periodic pass would"
        " not see the disk, and would remove its base image",
        path=target,
        next_step="set disk_roots on every host to"
        f" {','.join((*config.roots, directory))}, or to a directory above {directory} in its place",
    )


def named_above(target: str, config: CacheConfig) -> tuple[str, ...]:
    """Return the disk roots whose names are above a target's, as it is spelled or without links."""
    directory = os.path.dirname(target)
    spelled = [names.is_at_or_below(directory, root) for root in config.roots]
    if all(spelled):
        return config.roots
    real = names.real_directory(directory)
    return tuple(
        root
        for root, is_spelled in zip(config.roots, spelled, strict=True)
        if is_spelled or names.is_at_or_below(real, root)
    )


def above(target: str, config: CacheConfig) -> tuple[str, ...]:
    """Return the disk roots that are above a target under whatever name: each is looked at."""
    directory = os.path.dirname(target)
    looks = _Looks()
    over = {*looks.upwards(names.real_directory(directory)), *looks.upwards(directory)}
    return tuple(root for root in config.roots if not over.isdisjoint(looks.at(root)))


def _is_in(
    upwards: Iterable[_Identity],
    roots: set[_Identity],
    own: set[_Identity],
    locks: set[_Identity],
    target: str,
) -> bool:
    """Whether a directory is a disk root, or below one.

    By identity, as the pass does it: a root may be a link, or be mounted in two places.

    :param upwards: the directory, and every one above it.
    :param own: the directories that hold no disks.
    :param locks: the directory of lock files.
    :raises BadTarget: it is below one of these, and that below a disk root.
    """
    for each in upwards:
        if each in roots:
            return True
        if each in own:
            raise _in_the_cache(target)
        if each in locks:
            raise _among_locks(target)
    return False


def check_not_in_cache(path: str, config: CacheConfig) -> None:
    """Refuse a name among the base images: only the cache makes and removes what is there.

    :param path: of a file that may be there. Where a link of that name leads to does not matter.
    :raises BadTarget: it is in the directory of base images, or below it.
    """
    if _is_in_cache(path, config):
        raise _in_the_cache(path)


def check_no_base(path: str, config: CacheConfig) -> None:
    """Refuse a file that is one of the cache's own under whatever name: each disk made from it would change.

    A driver may give a guest a base image itself, by a symbolic or a hard link or a mount of the file, to be
    read and never written.

    :param path: of a file that may be there.
    :raises BadTarget: it is in the directory of base images, or a link leads there, or it is another name of
        a base image.
    :raises OSError: the directory of base images cannot be listed.
    """
    if _is_in_cache(path, config) or (os.path.islink(path) and _is_in_cache(os.path.realpath(path), config)):
        raise _in_the_cache(path)
    try:
        found = os.stat(path)
    except OSError:
        return  # what is wanted of it fails by itself
    if not (found.st_nlink > 1 or _may_be_mounted(path)) or not os.path.isdir(config.base_path):
        return
    with os.scandir(config.base_path) as entries:
        for entry in entries:
            if entry.inode() == found.st_ino and os.path.samestat(entry.stat(follow_symlinks=False), found):
                raise _in_the_cache(path)


def _may_be_mounted(path: str) -> bool:
    """Whether what a path leads to may be a file that is mounted there, and has another name elsewhere."""
    real, statx = os.path.realpath(path), Statx()
    file, directory = statx.mount_at(real), statx.mount_at(os.path.dirname(real))
    return file is None or directory is None or file[0] == 0 or file[0] != directory[0]


def _is_in_cache(path: str, config: CacheConfig) -> bool:
    looks = _Looks()
    own = looks.at(config.base_path)
    directory = names.real_directory(os.path.dirname(path) or os.curdir)
    return any(each in own for each in looks.upwards(directory))


def _in_the_cache(target: str) -> BadTarget:
    return BadTarget(
        "it is a file of the cache, or in a directory that is the cache's own, where no disk is ever looked"
        " for",
        path=target,
        next_step="choose an instance directory, and make the disk there from its image",
    )


def _among_locks(target: str) -> BadTarget:
    # The pass reads what is there, for other programs' disks. That of the release before does not.
    return BadTarget(
        "it is below the directory of lock files, where a host with an earlier release looks for no disk",
        path=target,
        next_step="set lock_path to one that is above no instances, or name one below it in disk_roots",
    )


def is_below_roots(path: str, config: CacheConfig) -> bool:
    """Whether a file lies below a disk root, and not only behind a link that lies there."""
    real = os.path.realpath(os.path.dirname(path))
    if any(names.is_at_or_below(real, root) for root in config.roots):
        return True  # without a look at the others, which may not answer
    return any(names.is_at_or_below(real, os.path.realpath(root)) for root in config.roots)


def notes_for(target: str, config: CacheConfig) -> str:
    """Return the directory for a note of where a file is in the making, or "" if the pass sees it there."""
    try:
        check_seen(target, config)
    except errors.BackendError:
        return layout.Layout(config.base_path, config.locks_path).stages
    return ""


def _refuse_passed_over(target: str, directories: set[str], config: CacheConfig) -> None:
    """Refuse a target in a directory that the pass passes over by its name.

    :param directories: the target's directory by its names.
    """
    passed_over = config.passed_over
    for directory in directories:
        if passed_over.isdisjoint(directory.split("/")):
            continue
        for root in {*config.roots, *map(os.path.realpath, config.roots)}:
            below = os.path.relpath(directory, root).split("/")
            if below[0] != os.pardir and (over := sorted(passed_over.intersection(below))):
                raise BadTarget(
                    f"the target is below a directory {over[0]}, which is passed over where disks are looked"
                    " for",
                    path=target,
                    next_step="choose an instance directory, or take the name out of passed_over_directories",
                )


class _Looks:
    """Identities of directories, each looked at once."""

    def __init__(self) -> None:
        self._found: dict[str, _Identity | None] = {}

    def at(self, *paths: str) -> set[_Identity]:
        """Return the identities of those that are there: nothing else can be above a directory that is."""
        return {identity for path in paths if (identity := self._at(path)) is not None}

    def upwards(self, directory: str) -> Iterator[_Identity]:
        """Yield a directory's identity, and that of every one above it."""
        while True:
            if (identity := self._at(directory)) is not None:
                yield identity
            above = os.path.dirname(directory)
            if above == directory:
                return
            directory = above

    def _at(self, path: str) -> _Identity | None:
        if path not in self._found:
            try:
                status = os.stat(path)
            except OSError:
                self._found[path] = None
            else:
                self._found[path] = (status.st_dev, status.st_ino)
        return self._found[path]
