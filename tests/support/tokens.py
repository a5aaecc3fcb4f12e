# SPDX-License-Identifier: Apache-2.0
"""Tokens with which callers cancel, set at moments that a test chooses."""

from __future__ import annotations


class Looks:
    """A token that is set once it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        self._left = looks

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0
