# SPDX-License-Identifier: Apache-2.0
"""``disk.info``: which format each disk beside it has, pinned, so that a guest cannot choose it.

A guest that owns a raw disk can write a qcow2 header into it that names a file of the host as its backing
file. Whoever probes the format then hands that file to the guest. The file is Nova's, a JSON object of
absolute path to format, and stays readable by Nova.
"""

from __future__ import annotations

import json
import os

from imagecache_lib import config as config_module
from imagecache_lib import durable, errors
from imagecache_lib import host as host_module
from imagecache_lib import layout as layout_module
from imagecache_lib.spawn import locks

NAME = "disk.info"

#: One lock for all of a host's disk.info files: it is held for microseconds, and a lock file for each
#: instance directory would stay behind for ever.
LOCK = "imagecache-disk-info"


def parse(data: bytes) -> dict[str, str]:
    """Return the formats by path. What is torn or unknown pins nothing."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {path: format for path, format in found.items() if isinstance(format, str)}


class DiskInfo:
    """Reads and writes ``disk.info`` files."""

    def __init__(self, config: config_module.CacheConfig, host: host_module.Host) -> None:
        self._lock = os.path.join(config.locks_path, layout_module.lock_name(LOCK))
        self._patience = config.lock_timeout
        self._host = host

    def format_of(self, disk: str) -> str | None:
        """Return the pinned format of a disk. None: none is pinned."""
        data = durable.read_file(_beside(disk))
        return parse(data).get(disk) if data is not None else None

    def pin(self, disk: str, format: str) -> None:
        """Pin a disk's format. Other disks' entries stay.

        :raises BackendError: the file cannot be written.
        """
        self._change(disk, format)

    def forget(self, disk: str) -> None:
        """Remove a disk's entry, if it has one.

        :raises BackendError: the file cannot be written.
        """
        self._change(disk, None)

    def _change(self, disk: str, format: str | None) -> None:
        path = _beside(disk)
        with locks.waiting(
            self._lock, shared=False, host=self._host, patience=self._patience, check=lambda: None
        ):
            data = durable.read_file(path)
            formats = parse(data) if data is not None else {}
            if formats.get(disk) == format:
                return
            if format is None:
                del formats[disk]
            else:
                formats[disk] = format
            try:
                durable.write_file(path, json.dumps(formats).encode(), mode=0o644, sync=False)
            except OSError as error:
                raise errors.BackendError(
                    f"the disk's format cannot be pinned: {error.strerror}", path=path
                ) from error


def _beside(disk: str) -> str:
    return os.path.join(os.path.dirname(disk), NAME)
