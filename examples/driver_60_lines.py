# SPDX-License-Identifier: Apache-2.0
"""A hypervisor driver in 60 lines. Try it: ``driver_60_lines.py INSTANCES_DIRECTORY IMAGE_FILE``."""

import os
import shutil
import socket
import sys
import uuid

import imagecache_lib as ic

FOR_THE_USER = (ic.ImageNotFound, ic.ImageRejected, ic.DiskTooSmallError)


class BuildAborted(Exception):
    """No other host would do better."""


class TinyDriver:
    def __init__(self, instances_path: str, source: ic.ImageSource) -> None:
        self.root = instances_path
        self.instances: dict[str, ic.Instance] = {}  # a real driver asks its hypervisor
        self.cache = ic.ImageCacheManager(ic.CacheConfig(instances_path=self.root), source, backend="qcow2")

    def disk_path(self, instance: str) -> str:
        return os.path.join(self.root, instance, "disk")

    def spawn(self, instance: str, image_id: str, size: int, *, again: bool = False) -> ic.Disk:
        os.makedirs(os.path.dirname(path := self.disk_path(instance)), exist_ok=True)
        self.instances[instance] = ic.Instance(instance, socket.gethostname(), images=(image_id,))
        try:  # "reuse" is for retries, rebuilds and evacuations, where the disk may be there already
            return self.cache.create_disk(image_id, path, size=size, if_exists="reuse" if again else "error")
        except FOR_THE_USER as error:
            raise BuildAborted(str(error)) from error  # any other ImageCacheError: try another host

    def power_on(self, instance: str) -> None:
        (image_id,) = self.instances[instance].images
        self.cache.ensure_backing(self.disk_path(instance), image_id=image_id)
        # Now start the hypervisor, with the disk's format stated and never probed.

    def destroy(self, instance: str) -> None:
        self.cache.remove_disk(self.cache.inspect_disk(self.disk_path(instance)))
        shutil.rmtree(os.path.join(self.root, instance))
        del self.instances[instance]

    def periodic(self) -> None:
        for base in self.cache.verify_base_images(list(self.instances.values())).bases:
            print("evicted" if base.evicted else "kept", base.image_id, "-", base.reason)


if __name__ == "__main__":
    driver = TinyDriver(sys.argv[1], ic.FileSource({"debian": ic.FileImage(sys.argv[2])}))
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    for instance, size, again in ((first, 2**30, False), (second, 2**30, False), (first, 2**31, True)):
        print(driver.spawn(instance, "debian", size, again=again))
    driver.power_on(first)
    driver.periodic()
    driver.destroy(first)
    driver.destroy(second)
    driver.periodic()
