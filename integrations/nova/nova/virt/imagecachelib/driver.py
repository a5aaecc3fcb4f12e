# SPDX-License-Identifier: Apache-2.0
"""The driver: Nova's, with the library's disks and the library's pass."""

from __future__ import annotations

import os

import nova.conf
from nova import exception
from nova.virt import images as nova_images
from nova.virt.imagecachelib import caches, checks, images, sources, upkeep
from nova.virt.libvirt import driver
from nova.virt.libvirt import utils as libvirt_utils

import imagecache_lib as ic
from imagecache_lib import opts
from imagecache_lib.nova import disk_info

CONF = nova.conf.CONF

#: Seconds for which a base stays that a disk is rebased onto, should the service end in between.
_REBASE = 86400


class LibvirtDriver(driver.LibvirtDriver):
    """``compute_driver = imagecachelib.LibvirtDriver``.

    :raises ConfigError: the process, Nova's release or the options cannot work; see
        :mod:`nova.virt.imagecachelib.checks`.
    """

    def __init__(self, virtapi, read_only=False):
        checks.require_native_threads()
        checks.require_tested_release(CONF)
        opts.register_opts(CONF)
        checks.require_no_contradiction(CONF)
        self.caches = caches.Caches(sources.Glance())
        super().__init__(virtapi, read_only)
        self.image_backend = images.Backend(CONF.use_cow_images, self.caches)
        self.image_cache_manager = upkeep.ImageCacheManager(self.caches)

    def init_host(self, host):
        # Not with the driver: by now the service has limited its disk operations.
        self.caches.start()
        super().init_host(host)

    def cleanup_host(self, host):
        self.caches.shutdown()
        super().cleanup_host(host)

    def cache_image(self, context, image_id):
        """Have an image in the cache. True: it was fetched; False: it was there.

        :raises NotImplementedError: the disks are clones, so that nothing need be cached; Nova's answer to
            the caller is "unsupported", the nearest that it has.
        """
        with caches.translated(image_id):
            result = self.caches.manager().cache_image(image_id, request=self.caches.request(context))
        if result is ic.CacheResult.NOT_NEEDED:
            raise NotImplementedError
        return result is ic.CacheResult.CACHED

    def _try_fetch_image_cache(
        self, image, fetch_func, context, filename, image_id, instance, size, fallback_from_host=None
    ):
        if isinstance(image, images.Cached):
            image.fallback_host, fallback_from_host = fallback_from_host, None
            if self._needs_rebase_original_qcow2_image(instance, image):
                image.original = instance.system_metadata.get("image_base_image_ref")
        super()._try_fetch_image_cache(
            image, fetch_func, context, filename, image_id, instance, size, fallback_from_host
        )

    def _try_fetch_image(self, context, path, image_id, instance, fallback_from_host=None):
        """Fetch a kernel or a ramdisk before a guest arrives by live migration."""
        try:
            with caches.translated(image_id):
                self.caches.manager().fetch_file(
                    image_id, path, request=self.caches.request(context, instance.trusted_certs)
                )
        except exception.ImageNotFound:
            if not fallback_from_host:
                raise
            # The other host's cache may have it converted; its instance directory has the very bytes.
            libvirt_utils.copy_image(src=path, dest=path, host=fallback_from_host, receive=True)

    def _disk_raw_to_qcow2(self, path):
        """Convert a disk that came from a host with raw disks, and pin that: its ``disk.info`` came along."""
        manager, converted = self.caches.manager(), f"{path}_qcow"
        nova_images.convert_image(path, converted, "raw", "qcow2")
        with disk_info.DiskInfo(manager.config, manager.host).pinned(path, "qcow2"):
            os.rename(converted, path)

    def _rebase_original_qcow2_image(self, context, instance, backend):
        """Put an unshelved disk back onto the image that its instance was made from.

        Nothing refers to that image's base between the moment it is there and the rebase: a pin does.
        """
        if not self._needs_rebase_original_qcow2_image(instance, backend):
            return
        manager = self.caches.manager()
        image_id, owner = instance.system_metadata.get("image_base_image_ref"), f"rebase-{instance.uuid}"
        with caches.translated(image_id):
            manager.pin(image_id, owner=owner, expires=manager.host.clock() + _REBASE)
        backend.only_base = True
        try:
            super()._rebase_original_qcow2_image(context, instance, backend)
        finally:
            backend.only_base = False
            manager.unpin(image_id, owner=owner)
