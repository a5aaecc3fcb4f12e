# SPDX-License-Identifier: Apache-2.0
"""What a compute service tells a driver of an instance."""

from __future__ import annotations

import dataclasses

import imagecache_lib as ic

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Flavor:
    """The sizes. ``root`` is in bytes."""

    root: int = GIB
    swap_mb: int = 0
    ephemeral_gb: tuple[int, ...] = ()
    memory_mb: int = 64


@dataclasses.dataclass(frozen=True)
class Guest:
    """An instance. The service's database has it; the driver remembers nothing."""

    uuid: str
    host: str
    image_id: str
    flavor: Flavor = Flavor()
    os_type: str | None = "linux"
    kernel_id: str | None = None
    ramdisk_id: str | None = None
    rescue_id: str | None = None

    def as_instance(self) -> ic.Instance:
        """Return what the periodic pass has to know: every image that it uses, for whatever purpose."""
        images = (self.image_id, self.kernel_id, self.ramdisk_id, self.rescue_id)
        return ic.Instance(
            uuid=self.uuid,
            host=self.host,
            images=tuple(image for image in images if image is not None),
            swap_mb=self.flavor.swap_mb,
            ephemerals=tuple(ic.Ephemeral(size, self.os_type) for size in self.flavor.ephemeral_gb),
        )
