# SPDX-License-Identifier: Apache-2.0
"""Making a disk inside the image service's own storage, for backends that can, without moving the data.

If the image is not in the right store, the image service may be asked to copy it there; it does so once for
the whole fleet, since later spawns find it.
"""

from __future__ import annotations

from imagecache_lib import errors, events, model
from imagecache_lib.backends.interface import CannotClone, StorageBackend
from imagecache_lib.ingest import decompress
from imagecache_lib.ingest.call import Call
from imagecache_lib.sources import checked, transfer
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import evidence
from imagecache_lib.store.directory import CacheStore


def clone(
    call: Call,
    backend: StorageBackend,
    target: str,
    size: int | None,
    cache: CacheStore,
) -> model.Disk | None:
    """Clone a disk. Returns the disk, or None if it cannot be cloned and the image may be fetched instead.

    :raises CannotClone: the disk cannot be cloned, and fetching the image is forbidden; the cause says why.
    :raises: whatever else the backend's :meth:`~imagecache_lib.StorageBackend.clone` raises.
    """
    try:
        return _clone(call, backend, target, size, cache)
    except (errors.ImageNotFound, errors.SourceError) as error:
        # The source cannot be asked; what the cache has still serves.
        if cache.config.never_download_image_if_on_rbd:
            raise
        reason = error.cause
    except CannotClone as error:
        reason = error.cause
    if cache.config.never_download_image_if_on_rbd:
        raise CannotClone(
            f"it cannot be cloned, and fetching it is forbidden: {reason}",
            image=call.image_id,
            path=target,
            next_step="store it as raw in the disks' cluster, or turn never_download_image_if_on_rbd off",
        )
    cache.observers(events.NotCloned(call.name, call.image_id, reason=reason))
    return None


def _clone(
    call: Call,
    backend: StorageBackend,
    target: str,
    size: int | None,
    cache: CacheStore,
) -> model.Disk:
    if call.demands_signature:
        raise CannotClone("its signature is demanded, and what is cloned is not read")
    source, image = call.ask()
    if decompress.compression_of(image, evidence.Use.DISK, cache.config) is not None:
        raise CannotClone("it is compressed")
    try:
        return backend.clone(image, target, size)
    except CannotClone as error:
        if error.store is None:
            raise
        copied = _copied(call, source, image, error, cache)
    return backend.clone(copied, target, size)


def _copied(
    call: Call,
    source: ImageSource,
    image: model.Image,
    why: CannotClone,
    cache: CacheStore,
) -> model.Image:
    """Have the image copied into the store that makes it possible to clone it, and wait for that."""
    config, host, store = cache.config, cache.host, why.store
    assert store is not None
    try:
        checked.copy_to_store(source, image, store)
    except errors.SourceError as error:
        raise CannotClone(f"{why.cause}; {error.cause}") from error
    until = host.monotonic() + config.images_rbd_glance_copy_timeout
    while store not in image.stores:
        call.check()
        if store in str(image.properties.get("os_glance_failed_import", "")).split(","):
            raise CannotClone(f"{why.cause}; copying it into the store {store} failed")
        if host.monotonic() >= until:
            raise CannotClone(
                f"{why.cause}; it was not in the store {store} after"
                f" {config.images_rbd_glance_copy_timeout} s"
            )
        host.sleep(config.images_rbd_glance_copy_poll_interval)
        _source, image = transfer.describe(
            source,
            image.id,
            host=host,
            retries=config.num_retries,
            deadline=call.request.deadline,
            cancel=call.request.cancel,
        )
    return image
