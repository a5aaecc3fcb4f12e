# SPDX-License-Identifier: Apache-2.0
"""A number that tells filesystems apart, also after a boot gave their devices other numbers."""

from __future__ import annotations

import os
import zlib

#: proc_pid_mountinfo(5): one line for each mount, the fields after the dash being type, source and options.
_MOUNTS = "/proc/self/mountinfo"


class FilesystemIds:
    """Looks numbers up, once for each device."""

    def __init__(self) -> None:
        self._found: dict[int, int] = {}
        self._sources: dict[str, bytes] | None = None

    def of(self, fd: int, device: int) -> int:
        """Return the number of an open file's filesystem, or 0 if it has none or cannot be asked now.

        It is ``f_fsid`` of statvfs(3). Network filesystems and FUSE have none, and most get the next free
        device number when they are mounted: what they are mounted from tells them apart.

        :param device: ``st_dev`` of the file.
        """
        found = self._found.get(device)
        if found is None:
            try:
                found = int(os.fstatvfs(fd).f_fsid)
            except OSError:
                # A number made otherwise would be that of another filesystem, and be remembered as such.
                return 0
            self._found[device] = found = found or self._source(device)
        return found

    def _source(self, device: int) -> int:
        if self._sources is None:
            self._sources = _read()
        source = self._sources.get(f"{os.major(device)}:{os.minor(device)}")
        return 0 if source is None else 2**32 + zlib.crc32(source)


def _read() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with open(_MOUNTS, "rb") as lines:
            for line in lines:
                mount, _dash, what = line.partition(b" - ")
                fields = mount.split()
                if len(fields) > 2:
                    found[fields[2].decode("ascii", "replace")] = b" ".join(what.split()[:2])
    except OSError:
        return {}
    return found
