# SPDX-License-Identifier: Apache-2.0
"""Disks that stand alone: a reflink of the base where the filesystem can, else a sparse copy, then grown."""

from __future__ import annotations

from imagecache_lib.backends import file
from imagecache_lib.backends.interface import Feature


class RawBackend(file.FileBackend):
    """Files with the base's content. Raw, unless the base was kept in another format."""

    name = "raw"
    features = frozenset({Feature.RESIZE})
