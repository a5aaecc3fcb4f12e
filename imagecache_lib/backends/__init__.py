# SPDX-License-Identifier: Apache-2.0
"""What instance disks are made of."""

from __future__ import annotations

import functools
import importlib.metadata

from imagecache_lib import errors
from imagecache_lib.backends.interface import StorageBackend
from imagecache_lib.config import CacheConfig
from imagecache_lib.system.host import System

#: Entry point group in which backends register.
GROUP = "imagecache_lib.backends"


def load_backend(name: str, config: CacheConfig, host: System) -> StorageBackend:
    """Return a new backend of that name.

    :raises ConfigError: no installed package registers one, or it cannot be loaded or configured.
    """
    try:
        found = _installed()
    except OSError as error:
        # It reads what every installed distribution says of itself, which takes descriptors and a sound disk.
        raise errors.ConfigError(
            f"what the installed packages provide cannot be read: {error}",
            next_step="check the disk that Python is installed on, and the limit of open files",
        ) from error
    if name not in found.names:
        raise errors.ConfigError(
            f"there is no storage backend {name!r}; there are: {', '.join(sorted(found.names))}",
            next_step="correct the configuration, or install the package that brings the backend",
        )
    try:
        kind: type[StorageBackend] = found[name].load()
    except (ImportError, OSError) as error:
        raise errors.ConfigError(
            f"the storage backend {name!r} cannot be loaded: {error}", next_step="install what it needs"
        ) from error
    return kind.from_config(config, host)


@functools.cache
def _installed() -> importlib.metadata.EntryPoints:
    """Return the backends of the installed packages. It reads a file of each of those: once in a process."""
    return importlib.metadata.entry_points(group=GROUP)
