# SPDX-License-Identifier: Apache-2.0
"""libvirt's side: the XML of a domain, and starting and stopping it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from xml.etree import ElementTree as ET

import libvirt

import imagecache_lib as ic

from . import disks
from .guest import Guest


def definition(guest: Guest, on: disks.InstanceDisks, disks_seen: Sequence[ic.Disk]) -> str:
    """Return the domain's XML. The format of each disk is stated, so that nobody probes."""
    domain = ET.Element("domain", type="qemu")  # "kvm" where there is KVM

    def add(parent: ET.Element, tag: str, text: str = "", **attributes: str) -> ET.Element:
        child = ET.SubElement(parent, tag, attributes)
        child.text = text
        return child

    add(domain, "name", guest.uuid)
    add(domain, "uuid", guest.uuid)
    add(domain, "memory", str(guest.flavor.memory_mb), unit="MiB")
    boot = add(domain, "os")
    add(boot, "type", "hvm", arch="x86_64", machine="pc")
    if guest.kernel_id is not None:
        add(boot, "kernel", on.path(disks.KERNEL))
        if guest.ramdisk_id is not None:
            add(boot, "initrd", on.path(disks.RAMDISK))
        add(boot, "cmdline", "root=/dev/vda console=ttyS0")
    devices = add(domain, "devices")
    for number, disk in enumerate(disks_seen):
        device = add(devices, "disk", type="file", device="disk")
        add(device, "driver", name="qemu", type=disk.format, cache="none")
        add(device, "source", file=disk.target)
        add(device, "target", dev=f"vd{'abcdefgh'[number]}", bus="virtio")
    serial = add(devices, "serial", type="file")
    add(serial, "source", path=on.path(disks.CONSOLE))
    add(devices, "memballoon", model="none")
    return ET.tostring(domain, encoding="unicode")


def start(connection: libvirt.virConnect, guest: Guest, on: disks.InstanceDisks) -> None:
    """Start the guest with the disks that it has."""
    # Made by us, it stays readable for us: libvirt gives it to QEMU's user and, unlike a disk, not back.
    with contextlib.suppress(FileExistsError), open(on.path(disks.CONSOLE), "x"):
        os.chmod(on.path(disks.CONSOLE), 0o644)
    connection.createXML(definition(guest, on, on.present()))


def stop(connection: libvirt.virConnect, guest: Guest) -> None:
    """Stop the guest. One that does not run is fine."""
    with gone_is_fine():
        connection.lookupByUUIDString(guest.uuid).destroy()


def is_running(connection: libvirt.virConnect, guest: Guest) -> bool:
    with gone_is_fine():
        return bool(connection.lookupByUUIDString(guest.uuid).isActive())
    return False


@contextlib.contextmanager
def gone_is_fine():
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
