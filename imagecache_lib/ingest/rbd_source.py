# SPDX-License-Identifier: Apache-2.0
"""An image service's data, read from the Ceph cluster that the service keeps it in.

The service is asked what the image is, and the cluster for its bytes, past the service's API: Nova's option
``enable_rbd_download``. The bytes are checked as all others are, the digest included.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from imagecache_lib import errors, model
from imagecache_lib.backends.ceph import CephCluster, RbdName
from imagecache_lib.backends.rbd import parse_location
from imagecache_lib.sources.interface import ImageSource

LOG = logging.getLogger(__name__)


class RbdSource(ImageSource):
    """Reads images with a location in a cluster there, and all others from the service itself.

    So does an image whose snapshot cannot be opened: it is gone, or denied, or the cluster does not answer. A
    transfer that breaks later is resumed as any other.

    :param service: describes the images.
    :param cluster: has them.
    """

    def __init__(self, service: ImageSource, cluster: CephCluster) -> None:
        self._service = service
        self._cluster = cluster

    def describe(self, image_id: str) -> model.Image:
        return self._service.describe(image_id)

    def known_digest(self, image_id: str) -> model.Digest | None:
        return self._service.known_digest(image_id)

    def vouches_for_digest(self, image: model.Image) -> bool:
        return self._service.vouches_for_digest(image)

    def copy_to_store(self, image: model.Image, store: str) -> None:
        self._service.copy_to_store(image, store)

    def can_resume(self, image: model.Image) -> bool:
        return self._service.can_resume(image)

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        snapshot = self._snapshot(image)
        if snapshot is None:
            with self._service.open(image, offset) as chunks:
                yield chunks
            return
        with contextlib.closing(self._cluster.chunks(snapshot, offset)) as read:
            yield _told(read, image)

    def _snapshot(self, image: model.Image) -> RbdName | None:
        """Return the snapshot that has the image, if it can be read, or None."""
        located = [found for each in image.locations if (found := parse_location(each)) is not None]
        if not located:
            return None
        try:
            ours = self._cluster.fsid()
            for fsid, snapshot in located:
                if fsid == ours:
                    self._cluster.stat(snapshot)
                    return snapshot
        except errors.BackendError as error:
            LOG.warning("Image %s is not read from Ceph, but from the image service: %s", image.id, error)
        return None


def _told(chunks: Iterator[bytes], image: model.Image) -> Iterator[bytes]:
    """Yield chunks, and turn the cluster's errors into a source's."""
    try:
        yield from chunks
    except errors.BackendError as error:
        raise errors.SourceError(
            f"its snapshot in Ceph cannot be read on: {error.cause}",
            image=image.id,
            next_step="check the cluster, then ask again",
        ) from error
