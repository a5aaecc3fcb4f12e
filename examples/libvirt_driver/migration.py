# SPDX-License-Identifier: Apache-2.0
"""Cold migration. Overlays travel, bases do not: the destination makes sure of them for itself.

The source keeps its disks as ``<uuid>_resize`` until the migration is confirmed; the cache knows that name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess

import imagecache_lib as ic

from . import domain
from .driver import LibvirtDriver, translated
from .guest import Guest


def migrate_disk_and_power_off(source: LibvirtDriver, guest: Guest, destination: str) -> None:
    """Send the guest's disks.

    :param destination: the other host's instances directory. Between machines, this is rsync.
    """
    domain.stop(source.connection, guest)
    own = source.disks(guest)
    kept = f"{own.directory}_resize"
    os.rename(own.directory, kept)
    # disk.info travels with the disks: it says which format each has, so that no guest can.
    subprocess.run(["cp", "-r", "--sparse=always", kept, os.path.join(destination, guest.uuid)], check=True)


def finish_migration(destination: LibvirtDriver, guest: Guest) -> Guest:
    """Start the guest on the disks that have arrived."""
    arrived = dataclasses.replace(guest, host=destination.cache.host.name)
    own = destination.disks(arrived)
    own.make_directory()
    with translated():
        for disk in own.present():
            rebase(disk, destination.cache.config.base_path)
    destination.power_on(arrived)
    return arrived


def confirm_migration(source: LibvirtDriver, guest: Guest) -> None:
    shutil.rmtree(f"{source.disks(guest).directory}_resize")


def finish_revert_migration(source: LibvirtDriver, guest: Guest) -> None:
    own = source.disks(guest)
    os.rename(f"{own.directory}_resize", own.directory)
    source.power_on(guest)


def rebase(disk: ic.Disk, base_path: str) -> None:
    """Let an overlay look for its base in this host's cache.

    Hosts that have the same ``instances_path`` do not need this. It changes the path in the header, no more:
    ``ensure_backing`` is what decides whether the base is this image's, and brings it.
    """
    if disk.base is None:
        return
    here = os.path.join(base_path, disk.base)
    described = subprocess.run(
        ["qemu-img", "info", "--force-share", "--output=json", "-f", disk.format, disk.target],
        check=True,
        capture_output=True,
    )
    found = json.loads(described.stdout)
    if found["backing-filename"] != here:
        backing_format = found["backing-filename-format"]
        subprocess.run(
            ["qemu-img", "rebase", "-u", "-f", disk.format, "-b", here, "-F", backing_format, disk.target],
            check=True,
        )
