# SPDX-License-Identifier: Apache-2.0
"""What a compute service calls. Each operation is the image cache's part, then libvirt's."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
from collections.abc import Iterator, Sequence

import libvirt

import imagecache_lib as ic

from . import disks, domain
from .guest import Flavor, Guest

LOG = logging.getLogger(__name__)


class BuildAborted(Exception):
    """The request itself is at fault: no other host would do better."""


class Reschedule(Exception):
    """This host cannot do it now; another may."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Tell the service what to do about an error, by who must act."""
    try:
        yield
    except (ic.ImageNotFound, ic.ImageRejected, ic.DiskTooSmallError) as error:
        raise BuildAborted(str(error)) from error
    except ic.ImageCacheError as error:
        LOG.warning("%s", error)
        raise Reschedule(str(error)) from error


class LibvirtDriver:
    """The driver of one host.

    :param host: the host's name, the same as :attr:`Guest.host` of what runs here.
    :param options: further :class:`~imagecache_lib.CacheConfig` fields.
    """

    def __init__(
        self,
        connection: libvirt.virConnect,
        source: ic.ImageSource,
        *,
        host: str,
        instances_path: str,
        **options: object,
    ) -> None:
        self.connection = connection
        config = ic.CacheConfig(instances_path=instances_path, **options)
        self.cache = ic.ImageCacheManager(config, source, backend="qcow2", host=ic.System(name=host))

    def disks(self, guest: Guest) -> disks.InstanceDisks:
        return disks.InstanceDisks(self.cache, guest)

    # [spawn]
    def spawn(self, guest: Guest, request: ic.Request | None = None, *, again: bool = False) -> None:
        """Make the guest's disks and start it.

        :param request: carries the user's token, a deadline, a way to cancel.
        :param again: a retry, or an evacuation: its disks may be there already, on shared storage.
        """
        own = self.disks(guest)
        own.make_directory()
        with translated():
            own.make(request, again=again)
        self.power_on(guest)

    def power_on(self, guest: Guest) -> None:
        own = self.disks(guest)
        with translated():
            own.ensure_backing()
        domain.start(self.connection, guest, own)

    def power_off(self, guest: Guest) -> None:
        domain.stop(self.connection, guest)

    def destroy(self, guest: Guest) -> None:
        self.power_off(guest)
        self.disks(guest).remove_everything()

    # [/spawn]
    # [rebuild]
    def rebuild(self, guest: Guest, image_id: str, request: ic.Request | None = None) -> Guest:
        """Give the guest a new root disk. Swap and ephemeral disks stay."""
        self.power_off(guest)
        self.disks(guest).remove(disks.ROOT)
        rebuilt = dataclasses.replace(guest, image_id=image_id)
        self.spawn(rebuilt, request, again=True)
        return rebuilt

    def evacuate(self, guest: Guest, request: ic.Request | None = None) -> Guest:
        """Take over a guest whose host is dead. Its disks are here if the storage is shared."""
        taken = dataclasses.replace(guest, host=self.cache.host.name)
        self.spawn(taken, request, again=True)
        return taken

    # [/rebuild]
    # [resize]
    def resize(self, guest: Guest, flavor: Flavor) -> Guest:
        """Grow the guest on this host."""
        self.power_off(guest)
        resized = dataclasses.replace(guest, flavor=flavor)
        own = self.disks(resized)
        with translated():
            self.cache.resize_disk(self.cache.inspect_disk(own.path(disks.ROOT)), flavor.root)
            own.make_swap_and_ephemerals()
        self.power_on(resized)
        return resized

    # [/resize]
    # [rescue]
    def rescue(self, guest: Guest, image_id: str, request: ic.Request | None = None) -> Guest:
        """Boot the guest from another image; its own disks follow. Report it with that image."""
        self.power_off(guest)
        rescued = dataclasses.replace(guest, rescue_id=image_id)
        with translated():
            self.disks(rescued).make_rescue(image_id, request)
        self.power_on(rescued)
        return rescued

    def unrescue(self, guest: Guest) -> Guest:
        self.power_off(guest)
        self.disks(guest).remove(disks.RESCUE)
        own = dataclasses.replace(guest, rescue_id=None)
        self.power_on(own)
        return own

    # [/rescue]
    # [shelve]
    def shelve(self, guest: Guest, snapshot: str) -> None:
        """Write the root disk into a file, which becomes an image, and give up the guest's place here."""
        self.power_off(guest)
        root = self.cache.inspect_disk(self.disks(guest).path(disks.ROOT))
        subprocess.run(
            ["qemu-img", "convert", "-f", root.format, "-O", "qcow2", root.target, snapshot], check=True
        )
        self.destroy(guest)

    def unshelve(self, guest: Guest, snapshot_id: str, request: ic.Request | None = None) -> None:
        """Make the guest anew from its snapshot, and depend on it no longer: the service deletes it."""
        own = self.disks(guest)
        own.make_directory()
        with translated():
            root = self.cache.create_disk(
                snapshot_id, own.path(disks.ROOT), size=guest.flavor.root, request=request
            )
            self.cache.flatten_disk(root)
            own.make(request, again=True)
        self.power_on(guest)

    # [/shelve]
    # [periodic]
    def periodic(self, guests: Sequence[Guest] | None) -> ic.VerifyReport:
        """Remove the bases that nobody uses.

        :param guests: all guests of all hosts that share the storage. None: the database does not answer.
        """
        instances = None if guests is None else [guest.as_instance() for guest in guests]
        return self.cache.verify_base_images(instances)  # the log has its problems

    def cache_images(self, image_ids: Sequence[str]) -> dict[str, str]:
        """Fetch images before anybody needs them. One that fails stops none of the others."""
        results = {}
        for image_id in image_ids:
            try:
                results[image_id] = self.cache.cache_image(image_id).value
            except ic.ImageCacheError as error:
                LOG.warning("%s", error)
                results[image_id] = "error"
        return results

    # [/periodic]
