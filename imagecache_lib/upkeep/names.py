# SPDX-License-Identifier: Apache-2.0
"""Which cached names occur in texts that came out of headers. Pure: values in, names out."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Iterable, Mapping

from imagecache_lib.store import layout
from imagecache_lib.upkeep import headers

_LENGTH = 40
_RUN = re.compile(rb"[0-9a-f]{40,}")

#: A run of digits that is longer holds no reference of any program: a guest may write megabytes of them. Only
#: parts of it are looked at, so close together that each name in it has one.
_LONG_RUN = 4 * _LENGTH
_PART = _LENGTH // 2

#: A backing file's name has at most 1,023 bytes.
_LONG = 4096


class Names:
    """Finds the names of bases in texts.

    :param names: the names to look for.
    """

    def __init__(self, names: Collection[str]) -> None:
        encoded = {name.encode() for name in names}
        self._known = frozenset(encoded)
        # Names that begin with a sha1, the resized ones of an original beside it.
        self._by_original: dict[bytes, list[bytes]] = {}
        for name in encoded:
            if _RUN.fullmatch(name[:_LENGTH]):
                self._by_original.setdefault(name[:_LENGTH], []).append(name)
        # Names that are no sha1 are few, and looked for one by one.
        self._short = [name for name in encoded if not _RUN.match(name)]

    def find(self, texts: Iterable[bytes]) -> set[str]:
        """Return the names that occur anywhere in the texts, however they are spelled."""
        found: set[bytes] = set()
        for text in texts:
            for spelling in headers.spellings(text):
                found |= self._in(spelling)
        return {name.decode() for name in found}

    def condense(self, texts: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Make of long texts, which come out of broken headers, their beginnings and the names in them."""
        if len(texts) == 1 and len(texts[0]) <= _LONG:
            return texts
        if all(len(text) <= _LONG for text in texts):
            return texts
        return (*(text[:_LONG] for text in texts), *(name.encode() for name in self.find(texts)))

    def exact(self, reference: bytes) -> str | None:
        """Return the name that a reference as it stands ends in, if it is a plain path of one."""
        name = reference.rpartition(b"/")[2]
        if name in self._known:
            return name.decode()
        return None

    def _in(self, text: bytes) -> set[bytes]:
        found = {name for name in self._short if name in text}
        for run in _RUN.finditer(text):
            # A name is found wherever it begins, even within a longer run of hex digits.
            digits, start = run.group(), run.start()
            for original in self._originals_in(digits):
                found |= self._beginning_with(original, digits, text, start)
        return found

    def _originals_in(self, digits: bytes) -> set[bytes]:
        """Return the sha1s that occur in a run of digits, and of a long run some more that may."""
        if len(digits) <= _LONG_RUN:
            windows = {digits[at : at + _LENGTH] for at in range(len(digits) - _LENGTH + 1)}
            return windows.intersection(self._by_original)
        parts = {digits[at : at + _PART] for at in range(0, len(digits) - _PART + 1, _LENGTH - _PART + 1)}
        found: set[bytes] = set()
        for part in parts.intersection(self._parts):
            found |= self._parts[part]
        return found

    @functools.cached_property
    def _parts(self) -> Mapping[bytes, set[bytes]]:
        """The sha1s by each part of them that may be looked at."""
        parts: dict[bytes, set[bytes]] = {}
        for original in self._by_original:
            for at in range(_LENGTH - _PART + 1):
                parts.setdefault(original[at : at + _PART], set()).add(original)
        return parts

    def _beginning_with(self, original: bytes, digits: bytes, text: bytes, start: int) -> set[bytes]:
        found: set[bytes] = set()
        at = digits.find(original)
        while at >= 0:
            # Whatever follows: a name that is read out of a longer one keeps a base for nothing, at worst.
            found.update(name for name in self._by_original[original] if text.startswith(name, start + at))
            at = digits.find(original, at + 1)
        return found


def lasting(references: Iterable[bytes]) -> set[str]:
    """Return the names that references end in and that bases may have, there or not."""
    found = set()
    for reference in references:
        name = reference.rpartition(b"/")[2]
        if layout.NAME_PATTERN.fullmatch(name):
            found.add(os.fsdecode(name))
    return found
