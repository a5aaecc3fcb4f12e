# SPDX-License-Identifier: Apache-2.0
"""What lies under an overlay, from what this cache knows: its header only says which files are meant.

A header names its base image in one of the ways that QEMU writes: an absolute path, one that is relative to
the overlay's directory, ``file:`` with an absolute path, or ``json:`` with raw or qcow2 on a file with an
absolute path and nothing else. Between an overlay and its base there may be more overlays, such as external
snapshots leave, if they lie in the overlay's own directory. Everything else is refused: a guest may have
written the header.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from collections.abc import Iterator

from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import header as qcow2_header
from imagecache_lib.formats.qcow2.header import Header, HeaderError, Incompatible, NotQcow2
from imagecache_lib.formats.qemu_img import DiskFile
from imagecache_lib.nova import disk_info
from imagecache_lib.store import layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import attributes
from imagecache_lib.system.bounded import Bounded
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.translate import translated

#: As much of a disk as a qcow2 header that any tool writes.
HEADER_BYTES = 65536

#: A chain of more files than this is refused: no disk in use has so many overlays.
_DEEPEST = 64

#: QEMU takes what stands before a colon for a protocol, unless a slash stands before that.
_PROTOCOL = re.compile(r"[^/:]*:")

_BASES = (layout.Kind.ORIGINAL, layout.Kind.RESIZED, layout.Kind.SWAP, layout.Kind.EPHEMERAL)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One overlay.

    :param path: absolute path.
    :param header: its header.
    """

    path: str
    header: Header


@dataclasses.dataclass(frozen=True)
class Chain:
    """A disk and what lies under it.

    :param layers: the overlays, the disk itself first.
    :param base: the name in the cache of the base image under them, or None if there is none.
    :param base_format: the format that the header above it says it has, by QEMU's name, or None if the header
        does not say.
    """

    layers: tuple[Layer, ...]
    base: str | None = None
    base_format: str | None = None

    @property
    def has_snapshots(self) -> bool:
        """Whether the disk has internal snapshots, which need the base as much as the disk itself does."""
        return self.layers[0].header.snapshot_count > 0


@dataclasses.dataclass(frozen=True)
class _Named:
    """What a header names: a path, absolute or relative to the file with the header, and a format or None."""

    path: str
    format: str | None


class ChainReader:
    """Reads chains of overlays. Safe to share between threads.

    :param cache: in which the base images lie.
    """

    def __init__(self, cache: CacheStore) -> None:
        self._cache = cache
        self._formats = disk_info.DiskInfo(cache.config, cache.host)
        # A guest may have written the path of a directory on a mount that does not answer.
        self._bounded = Bounded()

    def read(self, target: str, header: Header) -> Chain:
        """Return a disk and what lies under it.

        :param header: the disk's.
        :raises NoSpaceError, BackendError: a file cannot be read; or a header names anything but another
            overlay in the disk's directory or a base image of this cache.
        """
        layers = [Layer(target, header)]
        while layers[-1].header.backing_file is not None:
            top = layers[-1]
            named = _parse(top, target)
            found = self._base(top, named)
            if found is not None:
                return Chain(tuple(layers), found, named.format)
            if len(layers) == _DEEPEST:
                raise _refused(target, f"it stands on more than {_DEEPEST} files", "find out what made them")
            layers.append(self._next(top, named, target))
        return Chain(tuple(layers))

    def stated(self, target: str, header: Header) -> DiskFile:
        """Return an overlay with all that lies under it as qemu-img is to open them.

        The base is the file that the cache has under that name. Its format is what its record says, and the
        header must say the same, since the guest has read it as that.

        :param header: the overlay's.
        :raises NoSpaceError, BackendError: as :meth:`read`; or the format of the base is not said.
        """
        chain = self.read(target, header)
        below: DiskFile | None = None
        if chain.base is not None:
            base = self._cache.layout.base(chain.base)
            if not os.path.lexists(base):
                raise _refused(
                    target,
                    f"its base image {base!r} is not here",
                    "have that made first, with ensure_backing (imagecache disk repair)",
                )
            below = DiskFile(base, self._format_of(target, chain))
        for layer in reversed(chain.layers):
            below = DiskFile(layer.path, "qcow2", below)
        assert below is not None  # a chain has a disk
        return below

    def _format_of(self, target: str, chain: Chain) -> str:
        assert chain.base is not None  # only asked for one
        record = self._cache.evidence_of(chain.base)
        format = chain.base_format if record is None else record.stored_format
        if format is None or chain.base_format not in (None, format):
            raise _refused(
                target,
                f"its header says {chain.base_format or 'nothing'} of the format of its base image"
                + ("" if record is None else f", which is {format}"),
                "rebase it with an explicit backing format, after finding out what its guest has read",
            )
        return format

    def _base(self, top: Layer, named: _Named) -> str | None:
        """Return the name of the base that a header names, or None if it names no base of this cache."""
        name = os.path.basename(named.path)
        if layout.classify(name) not in _BASES:
            return None
        directory = os.path.dirname(os.path.join(os.path.dirname(top.path), named.path))
        return name if self._is_same(directory, self._cache.layout.base_path) else None

    def _is_same(self, directory: str, ours: str) -> bool:
        """Whether a directory that a header names is one of ours, however it is reached."""
        if directory == ours:
            return True
        real = self._bounded.call(lambda: os.path.realpath(directory))
        return real == [os.path.realpath(ours)]

    def _next(self, top: Layer, named: _Named, target: str) -> Layer:
        """Return the overlay in the disk's directory that a header names.

        :raises BackendError: it names something else.
        """
        directory = os.path.dirname(top.path)
        named_directory = os.path.dirname(os.path.join(directory, named.path))
        below = os.path.join(directory, os.path.basename(named.path))
        if named.format not in (None, "qcow2") or not self._is_same(named_directory, directory):
            raise _names_no_base(top, target, self._cache)
        if named.format is None:
            raise _refused(
                target,
                f"nothing says which format {below!r} under it has, so that a guest could choose it",
                "rebase it with an explicit backing format",
            )
        try:
            # Only the directory's own file of that name, whatever a link there may lead to.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with translated(below), Descriptor(below, flags) as fd:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise _names_no_base(top, target, self._cache)
                data = os.pread(fd, HEADER_BYTES, 0)
                marked = attributes.read(fd, disk_info.FORMAT_MARK)
            header = qcow2_header.parse(data)
        except (NotQcow2, HeaderError) as error:
            raise _names_no_base(top, target, self._cache) from error
        except errors.BackendError as error:
            if isinstance(error.__cause__, OSError):
                raise _refused(
                    target,
                    f"the file {below!r} under it cannot be read: {error.cause}",
                    "copy the whole chain of files, or flatten the disk where it was made",
                ) from error
            raise
        if (marked or self._formats.format_of(below) or "qcow2") != "qcow2":
            # Its guest wrote the header.
            raise _names_no_base(top, target, self._cache)
        if header.incompatible_features & Incompatible.DATA_FILE:
            raise _refused(target, f"the data of {below!r} is in another file", "convert it if it is trusted")
        return Layer(below, header)


def _parse(layer: Layer, target: str) -> _Named:
    """Return what a header names.

    :raises BackendError: the name is written in a way that is not followed.
    """
    assert layer.header.backing_file is not None  # only asked for one
    text = os.fsdecode(layer.header.backing_file)
    said = None
    if layer.header.backing_format is not None:
        said = layer.header.backing_format.decode("ascii", "replace")
    named = _in_words(text)
    if named is None or "\0" in named.path or (said is not None and named.format not in (None, said)):
        raise _refused(
            target,
            f"its header names {text!r}, which is no plain file in a format that it states",
            "find out where the disk came from; rebase it if it is trusted",
        )
    return _Named(named.path, named.format or said)


def _in_words(text: str) -> _Named | None:
    """Return what a backing file's name means, or None if it is written in a way that is not followed."""
    if text.startswith("json:"):
        return _in_json(text.removeprefix("json:"))
    if text.startswith("file:"):
        # Relative to the working directory of QEMU, and not to the overlay: no tool writes that on purpose.
        path = text.removeprefix("file:")
        return _Named(path, None) if os.path.isabs(path) else None
    return None if _PROTOCOL.match(text) else _Named(text, None)


def _in_json(text: str) -> _Named | None:
    try:
        # Two values for one key are two readings of one text.
        found = json.loads(text, object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError):
        return None
    pairs = list(_flat(found, "")) if isinstance(found, dict) else []
    options = dict(pairs)
    if len(options) != len(pairs):
        return None
    format, path = options.pop("driver", None), options.pop("file.filename", None)
    # Without a driver QEMU takes that from the name: what begins with a slash is a file.
    if options not in ({"file.driver": "file"}, {}) or not isinstance(path, str) or not os.path.isabs(path):
        return None
    return _Named(path, format) if format in ("raw", "qcow2") and isinstance(format, str) else None


def _unambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _flat(options: dict[str, object], above: str) -> Iterator[tuple[str, object]]:
    """Yield options by dotted keys, as QEMU takes them too."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _names_no_base(layer: Layer, target: str, cache: CacheStore) -> errors.BackendError:
    named = os.fsdecode(layer.header.backing_file or b"")
    whose = "its header" if layer.path == target else f"the header of {layer.path!r} under it"
    return _refused(
        target,
        f"{whose} names {named!r}, which is no base image in {cache.layout.base_path!r}"
        " and no overlay beside it",
        "find out where the disk came from; rebase it if it is trusted",
    )


def _refused(target: str, cause: str, next_step: str) -> errors.BackendError:
    return errors.BackendError(cause, path=target, next_step=next_step)
