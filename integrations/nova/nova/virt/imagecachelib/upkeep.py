# SPDX-License-Identifier: Apache-2.0
"""Nova's periodic pass over the cache, and what the cache takes of the disk."""

from __future__ import annotations

import os

import nova.conf
from nova import objects
from nova.virt.imagecachelib.caches import Caches
from nova.virt.libvirt import imagecache
from oslo_log import log as logging

import imagecache_lib as ic
from imagecache_lib import nova as translate

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


class ImageCacheManager(imagecache.ImageCacheManager):
    """The library's pass in the place of Nova's. When it runs, and for which instances, stays Nova's."""

    def __init__(self, caches: Caches) -> None:
        super().__init__()
        self.caches = caches

    def update(self, context, all_instances) -> None:
        if not os.path.isdir(CONF.instances_path):
            return  # no instance was ever here

        def bdms(uuids):
            return objects.BlockDeviceMappingList.bdms_by_instance_uuid(context, uuids)

        report = self.caches.manager().verify_base_images(translate.instances(all_instances, bdms=bdms))
        for base in report.evicted:
            LOG.info("Removed base image %(name)s: %(why)s", {"name": base.name, "why": base.reason})

    def get_disk_usage(self) -> int:
        try:
            return self.caches.manager().get_disk_usage()
        except ic.ImageCacheError as error:
            # What is reported of the host goes on without, as with Nova's own.
            LOG.warning("The disk usage of the image cache is not known: %s", error)
            return 0
