# SPDX-License-Identifier: Apache-2.0
"""The disks of one instance: which there are, how each is made, and what it needs before it is started."""

from __future__ import annotations

import os
import shutil

import imagecache_lib as ic

from .guest import Guest

ROOT, SWAP, RESCUE, KERNEL, RAMDISK, CONSOLE = (
    "disk",
    "disk.swap",
    "disk.rescue",
    "kernel",
    "ramdisk",
    "console.log",
)


class InstanceDisks:
    """The files in an instance's directory."""

    def __init__(self, cache: ic.ImageCacheManager, guest: Guest) -> None:
        self._cache = cache
        self._guest = guest
        self.directory = os.path.join(cache.config.instances_path, guest.uuid)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def make_directory(self) -> None:
        """Make the directory. QEMU runs as another user and must get through, whatever our umask is."""
        os.makedirs(self.directory, exist_ok=True)
        os.chmod(self.directory, 0o755)

    # -- making --------------------------------------------------------------------------------------

    def make(self, request: ic.Request | None, *, again: bool = False) -> None:
        """Make everything that the guest needs.

        :param again: something may be there: keep it, grow it, and make what is missing.
        """
        guest, cache = self._guest, self._cache
        cache.create_disk(
            guest.image_id,
            self.path(ROOT),
            size=guest.flavor.root,
            if_exists="reuse" if again else "error",
            request=request,
        )
        self.make_swap_and_ephemerals()
        for image_id, name in ((guest.kernel_id, KERNEL), (guest.ramdisk_id, RAMDISK)):
            if image_id is not None and not os.path.exists(self.path(name)):
                cache.fetch_file(image_id, self.path(name), request=request)

    def make_swap_and_ephemerals(self) -> None:
        """Make those of the flavor that are missing. They have no image."""
        flavor = self._guest.flavor
        if flavor.swap_mb and not os.path.exists(self.path(SWAP)):
            self._cache.create_swap(self.path(SWAP), size_mb=flavor.swap_mb)
        for number, size_gb in enumerate(flavor.ephemeral_gb):
            if not os.path.exists(path := self.path(f"disk.eph{number}")):
                # Disks of one guest must differ in their labels.
                self._cache.create_ephemeral(
                    path, size_gb=size_gb, os_type=self._guest.os_type, label=f"ephemeral{number}"
                )

    def make_rescue(self, image_id: str, request: ic.Request | None) -> None:
        self._cache.create_disk(image_id, self.path(RESCUE), if_exists="reuse", request=request)

    # -- using ---------------------------------------------------------------------------------------

    def present(self) -> list[ic.Disk]:
        """Return the disks that are there, in the order in which the guest sees them."""
        names = [ROOT, SWAP, *(f"disk.eph{number}" for number in range(len(self._guest.flavor.ephemeral_gb)))]
        paths = [self.path(name) for name in (RESCUE, *names)]
        return [self._cache.inspect_disk(path) for path in paths if os.path.exists(path)]

    def ensure_backing(self) -> None:
        """Make sure of every base that the disks refer to: they may have come from another host."""
        images = {self.path(ROOT): self._guest.image_id, self.path(RESCUE): self._guest.rescue_id}
        for disk in self.present():
            # Of an ephemeral disk, the guest's type says which filesystem it was made with.
            self._cache.ensure_backing(
                disk.target, image_id=images.get(disk.target), os_type=self._guest.os_type
            )

    def remove(self, *names: str) -> None:
        """Remove some disks; those that are gone are fine."""
        for name in names:
            if os.path.lexists(path := self.path(name)):
                self._cache.remove_disk(self._cache.inspect_disk(path))

    def remove_everything(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
