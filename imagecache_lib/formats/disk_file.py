# SPDX-License-Identifier: Apache-2.0
"""What an outside program is told to open: one file, in one format, on one backing file or none.

Nothing of this description comes from the content of the file, so that the program looks nothing up there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from imagecache_lib import errors

#: Formats that are opened at all, by QEMU's names: those of which :mod:`imagecache_lib.formats.contained` can
#: tell that one file is all of them.
FORMATS = frozenset(("raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi"))

#: How a format is read where a file can be read in several ways. Of the sizes that a VHD states, it is the
#: current one that its writer means, in bytes; a geometry cannot express most sizes.
_READ_AS: dict[str, dict[str, str]] = {"vpc": {"force_size_calc": "current_size"}}


@dataclasses.dataclass(frozen=True)
class DiskFile:
    """A disk as it is opened.

    :param path: absolute path of the one file that has its data.
    :param format: QEMU's name of its format.
    :param backing: the backing file, or None to open no backing file, whatever the header of the file names.
    :raises BackendError: the format is not in :data:`FORMATS`, or the path cannot be expressed.
    """

    path: str
    format: str
    backing: DiskFile | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise errors.BackendError(
                f"a file in format {self.format!r} is not opened: whether it is all of the disk is not known",
                path=self.path,
                next_step=f"convert it to one of {', '.join(sorted(FORMATS))}",
            )
        try:
            self._utf8_path()
        except UnicodeError:
            raise errors.BackendError(
                f"the path {self.path!r} is not valid UTF-8, and qemu-img takes no other",
                next_step="rename what it consists of",
            ) from None

    def files(self) -> Iterator[DiskFile]:
        """Yield this file and its backing files, from the top down."""
        yield self
        if self.backing is not None:
            yield from self.backing.files()

    def to_option(self) -> str:
        """Return the disk as a ``json:`` file name (QEMU's manual, "Disk Images") with drivers and files."""
        return f"json:{json.dumps(self._node())}"

    def _utf8_path(self) -> str:
        # The locale of this process may have another encoding, and the path's bytes are what counts.
        return os.fsencode(self.path).decode()

    def _node(self) -> dict[str, Any]:
        return {
            "driver": self.format,
            "file": {"driver": "file", "filename": self._utf8_path()},
            "backing": None if self.backing is None else self.backing._node(),
            **_READ_AS.get(self.format, {}),
        }
