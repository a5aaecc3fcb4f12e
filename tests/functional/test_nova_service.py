# SPDX-License-Identifier: Apache-2.0
"""A whole Nova with the adapter as its driver, asked through its API, with guests that boot.

What cannot run here, and why: volumes, for want of Cinder; ports, for want of Neutron; trusted certificates,
for want of a key manager; KVM, which is not there. Nova's tests of those run through the adapter in
:mod:`tests.functional.test_nova_suites`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from imagecache_lib.store import layout
from imagecache_lib.testing import bootdisk
from tests.lab import glance as glance_lab
from tests.lab import kernel, libvirt, mariadb, nova_hosts, nova_service, rabbit, server
from tests.lab.nova_client import NovaClient
from tests.support import campaign

#: Tests that boot guests for minutes.
long = pytest.mark.skipif(not campaign.WHOLE, reason="make campaigns boots these guests, for minutes")

#: A pass every few seconds, for which a base is old as soon as nothing uses it.
EAGER = {
    "manager_interval": 2,
    "remove_unused_original_minimum_age_seconds": 0,
    "remove_unused_resized_minimum_age_seconds": 0,
}


@dataclasses.dataclass(frozen=True)
class Cloud:
    """Nova, who asks it, and where its images are."""

    nova: nova_service.NovaService
    libvirt: libvirt.Libvirt
    client: NovaClient
    glance: glance_lab.Glance
    home: pathlib.Path

    @property
    def bases(self) -> set[str]:
        return {path.name for path in (self.nova.instances / "_base").iterdir()} - {".imagecache"}

    def image(self, greeting: str, **properties: str) -> str:
        """Upload an image whose guests greet with this word, and count how often they booted."""
        path = self.home / f"{greeting}.raw"
        bootdisk.write_boot_disk(str(path), greeting=greeting, stays=True)
        return self.upload(path, **properties)

    def upload(self, data: bytes | pathlib.Path, disk_format: str = "raw", **properties: str) -> str:
        return self.glance.upload(
            data, disk_format=disk_format, token=glance_lab.ADMIN, visibility="public", **properties
        )

    def downloads(self, image: str) -> int:
        return len(self.glance.downloads(image))

    def wait_for_conductor(self, notification: str, times: int) -> None:
        """Wait until the conductor has said something so many times."""
        server.wait_until(
            lambda: self.nova.log("nova-conductor").count(f'"{notification}"') >= times,
            f"the conductor says {notification}",
            seconds=240,
        )

    def wait_for_eviction(self, image: str) -> None:
        """Wait until an eager pass has removed the base of an image that nothing uses any more."""
        name = layout.base_name(image)
        server.wait_until(lambda: name not in self.bases, "the unused base is removed", seconds=400)

    def services(self, host: str) -> list[str]:
        """Return the ids of a host's services."""
        found = self.client.call("GET", f"/os-services?host={host}")["services"]
        return [str(each["id"]) for each in found]

    def disks(self, guest: str) -> list[pathlib.Path]:
        return sorted(
            path for path in (self.nova.instances / guest).glob("disk*") if path.name != "disk.info"
        )


@pytest.fixture
def cloud(stage: Cloud) -> Cloud:
    """Tests share it: they look at their own images."""
    stage.nova.have_compute()
    return stage


@pytest.fixture
def stage(running: Cloud) -> Iterator[Cloud]:
    """The same with any nova-compute, or none yet. The guests of a test end with it."""
    yield running
    running.client.delete(*(each["id"] for each in running.client.call("GET", "/servers")["servers"]))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    # Not below pytest's directory, which only its user may enter: QEMU runs as another.
    with (
        tempfile.TemporaryDirectory(prefix="imagecache-", dir="/var/tmp") as name,
        contextlib.ExitStack() as stack,
    ):
        home = pathlib.Path(name)
        home.chmod(0o755)
        homes = {part: home / part for part in ("libvirt", "glance", "rabbit", "mariadb", "nova")}
        for path in homes.values():
            path.mkdir()
        images = stack.enter_context(glance_lab.running_glance(homes["glance"], tells=True))
        hypervisor = stack.enter_context(libvirt.running_libvirt(homes["libvirt"]))
        nova = stack.enter_context(
            nova_service.running_nova(
                homes["nova"],
                libvirt=hypervisor,
                glance=images,
                rabbit=stack.enter_context(rabbit.running_rabbit(homes["rabbit"])),
                mariadb=stack.enter_context(mariadb.running_mariadb(homes["mariadb"])),
            )
        )
        yield Cloud(nova, hypervisor, NovaClient(nova.url), images, tmp_path_factory.mktemp("images"))


def test_a_guest_boots_from_the_api_and_the_next_one_from_the_cache(cloud: Cloud) -> None:
    image, flavor = cloud.image("FIRST"), cloud.client.flavor(swap=8, ephemeral=1)
    for _ in range(2):
        guest = cloud.client.boot(image, flavor)
        cloud.client.says(guest, "FIRST BOOT 0")
        assert [path.name for path in cloud.disks(guest)] == ["disk", "disk.eph0", "disk.swap"]
    assert cloud.downloads(image) == 1
    assert {layout.base_name(image), "swap_8", "ephemeral_1_0706d66"} <= cloud.bases


def test_a_guest_boots_the_kernel_and_the_ramdisk_of_its_image(cloud: Cloud) -> None:
    parts = {
        "kernel_id": cloud.upload(kernel.kernel(), "aki"),
        "ramdisk_id": cloud.upload(kernel.ramdisk("of this guest"), "ari"),
    }
    image = cloud.image("NOBODY", **parts)
    for _ in range(2):
        cloud.client.says(cloud.client.boot(image, cloud.client.flavor()), "RAMDISK of this guest")
    assert [cloud.downloads(each) for each in (image, *parts.values())] == [1, 1, 1]


def test_an_aggregate_has_images_before_anybody_boots_them(cloud: Cloud) -> None:
    image, client = cloud.image("AHEAD"), cloud.client
    made = client.call("POST", "/os-aggregates", {"aggregate": {"name": "racks"}})["aggregate"]["id"]
    client.call("POST", f"/os-aggregates/{made}/action", {"add_host": {"host": nova_service.HOST}})
    for times in (1, 2):
        client.call("POST", f"/os-aggregates/{made}/images", {"cache": [{"id": image}]})
        cloud.wait_for_conductor("aggregate.cache_images.end", times)
    assert (cloud.downloads(image), layout.base_name(image) in cloud.bases) == (1, True)
    client.says(client.boot(image, client.flavor()), "AHEAD BOOT 0")
    assert cloud.downloads(image) == 1


def test_a_guest_keeps_its_disk_through_all_that_is_done_to_it(cloud: Cloud) -> None:
    image, rescue, client = cloud.image("KEPT"), cloud.image("RESCUE"), cloud.client
    guest = client.boot(image, client.flavor(disk=1, swap=8, ephemeral=1), config_drive=True)
    client.says(guest, "KEPT BOOT 0")
    client.act(guest, "reboot", {"type": "HARD"}, until="ACTIVE")
    client.says(guest, "KEPT BOOT 1")
    client.act(
        guest, "resize", {"flavorRef": client.flavor(disk=2, swap=16, ephemeral=1)}, until="VERIFY_RESIZE"
    )
    client.says(guest, "KEPT BOOT 2")
    client.act(guest, "confirmResize", until="ACTIVE")
    client.act(guest, "rescue", {"rescue_image_ref": rescue}, until="RESCUE")
    client.says(guest, "RESCUE BOOT 0")
    client.act(guest, "unrescue", until="ACTIVE")
    client.says(guest, "KEPT BOOT 3")
    client.act(guest, "shelve", until="SHELVED_OFFLOADED")
    assert not (cloud.nova.instances / guest).exists()
    client.act(guest, "unshelve", until="ACTIVE")
    client.says(guest, "KEPT BOOT 4")
    assert (cloud.downloads(image), cloud.downloads(rescue)) == (1, 1)
    client.act(guest, "os-stop", until="SHUTOFF")
    drive, *disks = sorted(cloud.disks(guest), key=lambda path: path.name != "disk.config")
    assert b"meta_data.json" in drive.read_bytes()
    for path in disks:
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)


def test_a_rebuilt_guest_boots_the_other_image(cloud: Cloud) -> None:
    image, other, client = cloud.image("BEFORE"), cloud.image("AFTER"), cloud.client
    guest = client.boot(image, client.flavor())
    client.says(guest, "BEFORE BOOT 0")
    client.act(guest, "rebuild", {"imageRef": other}, until="ACTIVE")
    client.says(guest, "AFTER BOOT 0")
    assert (cloud.downloads(image), cloud.downloads(other)) == (1, 1)


def test_an_image_that_is_not_there_fails_its_guest_and_nothing_else(cloud: Cloud) -> None:
    image, client = cloud.image("GONE"), cloud.client
    cloud.glance.stored_file(image).unlink()
    guest = client.boot(image, client.flavor(), wait=False)
    with pytest.raises(AssertionError, match="the image has no data"):
        client.wait(guest, "ACTIVE")
    assert layout.base_name(image) not in cloud.bases
    client.says(client.boot(cloud.image("THERE"), client.flavor()), "THERE BOOT 0")


@pytest.fixture
def second(cloud: Cloud) -> Iterator[nova_hosts.SecondHost]:
    """A second compute host, which no guest is put on once the test is over."""
    with tempfile.TemporaryDirectory(prefix="second-", dir="/var/tmp") as name:
        home = pathlib.Path(name)
        home.chmod(0o755)
        with nova_hosts.second_host(cloud.nova, cloud.libvirt, home) as running:
            try:
                yield running
            finally:
                (service,) = cloud.services(nova_hosts.NAME)
                cloud.client.call("PUT", f"/os-services/{service}", {"status": "disabled"})


@pytest.mark.campaign
@long
def test_guests_move_between_hosts(cloud: Cloud, second: nova_hosts.SecondHost) -> None:
    client, here, there = cloud.client, nova_service.HOST, nova_hosts.NAME
    image, gone = cloud.image("MOVED"), cloud.image("LOST")
    flavor = client.flavor(swap=8, ephemeral=1)
    moved, lost = (client.boot(each, flavor, host=here) for each in (image, gone))
    for guest, greeting in ((moved, "MOVED"), (lost, "LOST")):
        client.says(guest, f"{greeting} BOOT 0")
    # Whoever has not what Glance lost gets it from the other host.
    cloud.glance.delete(gone, token=glance_lab.ADMIN)
    for guest, greeting in ((moved, "MOVED"), (lost, "LOST")):
        client.act(guest, "migrate", {"host": there}, until="VERIFY_RESIZE")
        client.says(guest, f"{greeting} BOOT 1")
        client.act(guest, "confirmResize", until="ACTIVE")
        assert client.show(guest)["OS-EXT-SRV-ATTR:host"] == there
        assert not (cloud.nova.instances / guest).exists()
    bases = {path.name for path in (second.instances / "_base").iterdir()}
    assert {layout.base_name(image), layout.base_name(gone), "swap_8"} <= bases
    assert (cloud.downloads(image), cloud.downloads(gone)) == (2, 1)
    client.act(lost, "os-migrateLive", {"host": here, "block_migration": "auto"}, until="ACTIVE")
    assert client.show(lost)["OS-EXT-SRV-ATTR:host"] == here
    client.act(lost, "reboot", {"type": "HARD"}, until="ACTIVE")
    client.says(lost, "LOST BOOT 2")
    second.fail()
    (service,) = cloud.services(there)
    client.call("PUT", f"/os-services/{service}", {"forced_down": True})
    client.act(moved, "evacuate", {"host": here}, until="ACTIVE")
    client.says(moved, "MOVED BOOT 0")
    assert cloud.downloads(image) == 2


def test_guests_go_over_from_novas_driver_and_back(stage: Cloud) -> None:
    """With each driver, the periodic pass removes what no guest uses."""
    nova, client = stage.nova, stage.client
    flavor = client.flavor(swap=8, ephemeral=1)
    theirs, ours, unused = stage.image("THEIRS"), stage.image("OURS"), stage.image("UNUSED")
    nova.have_compute(nova_service.NOVAS)
    first = client.boot(theirs, flavor)
    client.says(first, "THEIRS BOOT 0")

    nova.have_compute(nova_service.OURS, image_cache=EAGER)
    client.act(first, "reboot", {"type": "HARD"}, until="ACTIVE")
    client.says(first, "THEIRS BOOT 1")
    second, third = client.boot(theirs, flavor), client.boot(ours, flavor)
    client.delete(client.boot(unused, flavor))
    stage.wait_for_eviction(unused)
    assert {layout.base_name(each) for each in (theirs, ours)} <= stage.bases

    nova.have_compute(nova_service.NOVAS, image_cache=EAGER)
    client.act(third, "reboot", {"type": "HARD"}, until="ACTIVE")
    client.says(third, "OURS BOOT 1")
    client.delete(third)
    stage.wait_for_eviction(ours)
    assert {layout.base_name(theirs), "swap_8", "ephemeral_1_0706d66"} <= stage.bases
    for guest, said in ((first, "THEIRS BOOT 2"), (second, "THEIRS BOOT 1")):
        client.act(guest, "reboot", {"type": "HARD"}, until="ACTIVE")
        client.says(guest, said)
    assert (stage.downloads(theirs), stage.downloads(ours)) == (1, 1)
