# SPDX-License-Identifier: Apache-2.0
"""The driver at work: ``PYTHONPATH=examples python -m libvirt_driver URI INSTANCES_DIRECTORY IMAGE_FILE``."""

from __future__ import annotations

import argparse
import dataclasses
import socket
import uuid

import libvirt

import imagecache_lib as ic

from .driver import LibvirtDriver
from .guest import Flavor, Guest

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="libvirt_driver", description=__doc__)
    parser.add_argument("uri", help="libvirt's, such as qemu:///system")
    parser.add_argument("instances", help="an existing directory that QEMU's user can reach")
    parser.add_argument("image", help="a bootable image, raw or qcow2")
    given = parser.parse_args()

    host = socket.gethostname()
    driver = LibvirtDriver(
        libvirt.open(given.uri),
        ic.FileSource({"image": ic.FileImage(given.image)}),
        host=host,
        instances_path=given.instances,
        remove_unused_original_minimum_age_seconds=0,
    )
    for finding in driver.cache.preflight():
        print(f"{finding.severity.value}: {finding.text} {finding.next_step}")
    guest = Guest(str(uuid.uuid4()), host, "image", Flavor(swap_mb=64, ephemeral_gb=(1,)))
    print("cached:", driver.cache_images(["image"])["image"])
    driver.spawn(guest)
    print("running:", *(disk.target for disk in driver.disks(guest).present()))
    print("evicted:", *(base.name for base in driver.periodic([guest]).evicted))
    second = dataclasses.replace(guest, uuid=str(uuid.uuid4()))
    driver.spawn(second)
    driver.destroy(second)
    guest = driver.resize(guest, dataclasses.replace(guest.flavor, root=2 * guest.flavor.root))
    print("resized:", driver.disks(guest).present()[0].virtual_size // MIB, "MiB")
    driver.destroy(guest)
    print("evicted:", *sorted(base.name for base in driver.periodic([]).evicted))


if __name__ == "__main__":
    main()
