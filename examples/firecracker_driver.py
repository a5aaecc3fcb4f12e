# SPDX-License-Identifier: Apache-2.0
"""A driver for Firecracker's microVMs: no libvirt, no qcow2.

Each VM has two drives: the image's base itself, which all VMs of that image read and none can write, and a
raw disk of its own. Nothing on disk says that a VM needs its base, as an overlay does, so the VM pins it.

Try it: ``firecracker_driver.py INSTANCES_DIRECTORY IMAGE_FILE KERNEL_FILE``. It prints the configuration that
``firecracker --config-file`` takes, and starts nothing: Firecracker needs KVM.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid

import imagecache_lib as ic


class FirecrackerDriver:
    def __init__(self, instances_path: str, source: ic.ImageSource, **options: object) -> None:
        self.root = instances_path
        config = ic.CacheConfig(instances_path=instances_path, **options)
        self.cache = ic.ImageCacheManager(config, source, backend="raw")

    def path(self, vm: str, name: str = "") -> str:
        return os.path.join(self.root, vm, name)

    def create(self, vm: str, image_id: str, kernel_id: str, *, disk_gb: int) -> str:
        """Make all that a VM needs, and return the path of its configuration."""
        os.makedirs(self.path(vm))
        # The pin comes first: between a look and a pin the base could go.
        self.cache.pin(image_id, owner=vm)
        try:
            with self.cache.fetch_or_reuse(image_id) as base:
                root = base.path
            self.cache.fetch_file(kernel_id, self.path(vm, "vmlinux"))
            disk = self.cache.create_ephemeral(self.path(vm, "disk"), size_gb=disk_gb, fs="ext4")
        except ic.ImageCacheError:
            self.destroy(vm, image_id)
            raise
        return self._write_config(vm, root, disk)

    def _write_config(self, vm: str, root: str, disk: ic.Disk) -> str:
        own = {"path_on_host": disk.target, "is_root_device": False, "is_read_only": False}
        config = {
            "boot-source": {
                "kernel_image_path": self.path(vm, "vmlinux"),
                "boot_args": "console=ttyS0 reboot=k panic=1 root=/dev/vda ro",
            },
            "drives": [
                {"drive_id": "root", "path_on_host": root, "is_root_device": True, "is_read_only": True},
                {"drive_id": "own", **own},
            ],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        }
        with open(self.path(vm, "config.json"), "w") as file:
            json.dump(config, file, indent=2)
        return file.name

    def destroy(self, vm: str, image_id: str) -> None:
        """Remove a VM that has ended."""
        shutil.rmtree(self.path(vm), ignore_errors=True)
        self.cache.unpin(image_id, owner=vm)

    def periodic(self) -> ic.VerifyReport:
        """Remove the bases that no VM pins: pins are all there is to know."""
        return self.cache.verify_base_images([])


def main() -> None:
    instances, image, kernel = map(os.path.abspath, sys.argv[1:])
    source = ic.FileSource({"image": ic.FileImage(image), "kernel": ic.FileImage(kernel)})
    driver = FirecrackerDriver(instances, source)
    vm = str(uuid.uuid4())
    with open(driver.create(vm, "image", "kernel", disk_gb=1)) as file:
        print(file.read())
    for base in driver.periodic().bases:
        print(base.image_id, "-", base.reason, file=sys.stderr)
    driver.destroy(vm, "image")


if __name__ == "__main__":
    main()
