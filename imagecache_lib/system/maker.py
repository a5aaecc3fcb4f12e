# SPDX-License-Identifier: Apache-2.0
"""Which process made something, and so may undo it.

A child that is forked in the middle of a call has a copy of the whole stack. If it leaves that by an
exception (``sys.exit()``, an error of its own), every ``finally`` and every ``except`` on the way runs there
too, while the parent is still at work on the same files. So what such a clause removes, puts back or waits
for belongs to the process that made it, and to no other.
"""

from __future__ import annotations

import ctypes
import os


class Maker:
    """The process that made this object."""

    __slots__ = ("_process",)

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is that process, and not a child that was forked from it since."""
        return os.getpid() == self._process


def leave_to_parent(thing: object) -> None:
    """Keep this forked child from ever ending a thing that is its parent's, even as the child itself ends.

    Ending a database's connection speaks to the server over the parent's socket, or rolls back in the
    parent's file. So the interpreter gets a reference that nothing gives back.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
