# SPDX-License-Identifier: Apache-2.0
"""The example driver on a real libvirtd: its guests boot from the library's disks, through a whole life."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
import pwd
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib.formats import superblock
from imagecache_lib.store import layout
from imagecache_lib.testing import bootdisk
from imagecache_lib.upkeep.report import VerifyReport
from tests.lab import bindings, kernel, server
from tests.lab import libvirt as libvirt_lab
from tests.support import needs

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="session")
def example(libvirt: libvirt_lab.Libvirt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The example's modules, and a connection for them."""
    home = tmp_path_factory.mktemp("bindings")
    bindings.load(home, "python3-libvirt", ["libvirt", "libvirtmod"])
    sys.path.append(str(EXAMPLES))
    libvirt_python = importlib.import_module("libvirt")
    domain, driver, guest, migration = (
        importlib.import_module(f"libvirt_driver.{name}")
        for name in ("domain", "driver", "guest", "migration")
    )

    class Example:
        bindings = home
        connection = libvirt_python.open(libvirt.uri)
        LibvirtDriver, Guest, Flavor = driver.LibvirtDriver, guest.Guest, guest.Flavor
        BuildAborted, Reschedule = driver.BuildAborted, driver.Reschedule

    Example.domain, Example.migration = domain, migration  # type: ignore[attr-defined]
    yield Example
    Example.connection.close()


class Compute:
    """Hosts with instances directories of their own, and the images that all of them see."""

    def __init__(self, example: Any, home: pathlib.Path) -> None:
        self.example, self.home = example, home
        self.images: dict[str, ic.FileImage] = {}
        self.started: list[Any] = []
        for image_id in ("cirros", "other", "rescue"):
            path = home / f"{image_id}.raw"
            bootdisk.write_boot_disk(str(path), greeting=image_id.upper(), stays=True)
            self.add(image_id, path)
        (home / "kernel.image").write_bytes(kernel.kernel())
        (home / "ramdisk.image").write_bytes(kernel.ramdisk("of this guest"))
        self.add("kernel", home / "kernel.image")
        self.add("ramdisk", home / "ramdisk.image")

    def add(self, image_id: str, path: str | os.PathLike[str]) -> None:
        self.images[image_id] = ic.FileImage(path)

    def host(self, name: str, directory: str | None = None) -> Any:
        path = self.home / (directory or name)
        path.mkdir(exist_ok=True)
        driver = self.example.LibvirtDriver(
            self.example.connection,
            ic.FileSource(self.images),
            host=name,
            instances_path=str(path),
            remove_unused_original_minimum_age_seconds=0,
        )
        return driver

    def guest(self, host: str = "here", **fields: Any) -> Any:
        guest = self.example.Guest(str(uuid.uuid4()), host, "cirros", self.example.Flavor(root=16 * MIB))
        self.started.append(guest)
        return dataclasses.replace(guest, **fields)

    def flavor(self, **fields: Any) -> Any:
        return self.example.Flavor(**{"root": 16 * MIB, **fields})

    def stop_all(self) -> None:
        for guest in self.started:
            self.example.domain.stop(self.example.connection, guest)


@pytest.fixture
def compute(example: Any, libvirt: libvirt_lab.Libvirt) -> Iterator[Compute]:
    home = libvirt.home / uuid.uuid4().hex
    home.mkdir()
    home.chmod(0o755)
    made = Compute(example, home)
    yield made
    made.stop_all()


def says(driver: Any, guest: Any, words: str) -> None:
    """Wait for a guest to say something on its serial console."""
    console = pathlib.Path(driver.disks(guest).path("console.log"))
    server.wait_until(
        lambda: console.exists() and words in console.read_text(errors="replace"),
        f"{guest.uuid} says {words}",
        seconds=240,
    )


def bases(driver: Any) -> set[str]:
    return {base.image_id or base.name for base in driver.cache.list_bases()}


def kept_because(report: VerifyReport, image_id: str) -> str:
    (base,) = (each for each in report.bases if each.name == layout.base_name(image_id))
    assert not base.evicted
    return base.reason


def test_a_guest_boots_and_its_base_stays_while_it_runs(compute: Compute) -> None:
    driver, guest = compute.host("here"), compute.guest()
    driver.spawn(guest)
    says(driver, guest, "CIRROS BOOT 0")
    assert "used by the disk" in kept_because(driver.periodic([]), "cirros")
    assert "used by the disk" in kept_because(driver.periodic([guest]), "cirros")
    driver.destroy(guest)
    assert [base.image_id for base in driver.periodic([]).evicted] == ["cirros"]


def test_a_running_guest_keeps_its_base_even_if_its_disk_cannot_be_found(compute: Compute) -> None:
    driver, guest = compute.host("here"), compute.guest()
    driver.spawn(guest)
    says(driver, guest, "BOOT 1")
    os.rename(driver.disks(guest).directory, compute.home / "elsewhere")
    assert "open in a running QEMU" in kept_because(driver.periodic([]), "cirros")
    driver.power_off(guest)
    assert [base.image_id for base in driver.periodic([]).evicted] == ["cirros"]


def test_what_libvirt_does_to_a_bases_owner_harms_nothing(compute: Compute) -> None:
    driver, first, second = compute.host("here"), compute.guest(), compute.guest()
    driver.spawn(first)
    says(driver, first, "BOOT 1")
    base = pathlib.Path(driver.cache.config.base_path, layout.base_name("cirros"))
    before = base.read_bytes(), base.stat().st_ino
    assert base.owner() == "libvirt-qemu"
    driver.spawn(second)
    says(driver, second, "CIRROS BOOT 0")
    driver.periodic([first, second])
    assert (base.read_bytes(), base.stat().st_ino) == before


def test_a_guest_keeps_what_it_wrote_when_it_is_stopped_and_resized(compute: Compute) -> None:
    driver, guest = compute.host("here"), compute.guest()
    driver.spawn(guest)
    says(driver, guest, "BOOT 1")
    guest = driver.resize(guest, compute.flavor(root=32 * MIB, swap_mb=8))
    says(driver, guest, "CIRROS BOOT 1")
    root, swap = driver.disks(guest).present()
    assert (root.virtual_size, swap.virtual_size) == (32 * MIB, 8 * MIB)


def test_a_flavor_that_is_too_small_aborts_the_build(compute: Compute) -> None:
    driver = compute.host("here")
    guest = compute.guest(flavor=compute.flavor(root=MIB))
    with pytest.raises(compute.example.BuildAborted, match="image cirros"):
        driver.spawn(guest)


def test_a_rescued_guest_boots_the_other_image_and_then_its_own(compute: Compute) -> None:
    driver, guest = compute.host("here"), compute.guest()
    driver.spawn(guest)
    says(driver, guest, "BOOT 1")
    rescued = driver.rescue(guest, "rescue")
    says(driver, rescued, "RESCUE BOOT 0")
    assert "disk.rescue" in kept_because(driver.periodic([]), "rescue")
    guest = driver.unrescue(rescued)
    says(driver, guest, "CIRROS BOOT 1")
    assert [base.image_id for base in driver.periodic([guest]).evicted] == ["rescue"]


def test_swap_and_ephemeral_disks_are_formatted_and_shared(compute: Compute) -> None:
    driver = compute.host("here")
    flavor = compute.flavor(swap_mb=8, ephemeral_gb=(1, 1))
    one, two = compute.guest(flavor=flavor), compute.guest(flavor=flavor)
    driver.spawn(one)
    driver.spawn(two)
    says(driver, two, "CIRROS BOOT 0")
    _root, swap, first, second = driver.disks(one).present()
    assert (swap.base, first.base, second.base) == ("swap_8", "ephemeral_1_0706d66", None)
    driver.power_off(one)
    found = []
    for disk in (swap, first, second):
        flat = compute.home / "flat"
        command = ["qemu-img", "convert", "-f", disk.format, "-O", "raw", disk.target, flat]
        subprocess.run(command, check=True)
        with flat.open("rb") as file:
            read = superblock.read(file.read(superblock.LENGTH))
        assert read is not None
        found.append((read.kind, read.label))
    assert found == [("swap", None), ("ext4", "ephemeral0"), ("ext4", "ephemeral1")]
    driver.destroy(one)
    assert driver.periodic([two]).evicted == ()
    driver.destroy(two)
    assert len(driver.periodic([]).evicted) == 3


def test_a_guest_boots_its_own_kernel_and_ramdisk(compute: Compute) -> None:
    driver, guest = compute.host("here"), compute.guest(kernel_id="kernel", ramdisk_id="ramdisk")
    driver.spawn(guest)
    says(driver, guest, "root=/dev/vda console=ttyS0")
    says(driver, guest, "RAMDISK of this guest")
    assert driver.periodic([guest]).evicted == ()
    driver.destroy(guest)
    assert len(driver.periodic([]).evicted) == 3


def test_a_rebuilt_guest_boots_the_new_image(compute: Compute) -> None:
    driver, guest = compute.host("here"), compute.guest(flavor=compute.flavor(swap_mb=8))
    driver.spawn(guest)
    says(driver, guest, "BOOT 1")
    guest = driver.rebuild(guest, "other")
    says(driver, guest, "OTHER BOOT 0")
    assert [base.image_id for base in driver.periodic([guest]).evicted] == ["cirros"]


def test_a_guest_migrates_with_its_disks_and_without_its_bases(compute: Compute) -> None:
    here, there = compute.host("here"), compute.host("there")
    guest = compute.guest(flavor=compute.flavor(swap_mb=8, ephemeral_gb=(1, 1)))
    here.spawn(guest)
    says(here, guest, "BOOT 1")
    migration = compute.example.migration
    migration.migrate_disk_and_power_off(here, guest, there.cache.config.instances_path)
    arrived = migration.finish_migration(there, guest)
    says(there, arrived, "CIRROS BOOT 1")
    assert bases(there) == {"cirros", "swap_8", "ephemeral_1_0706d66"}
    # Until it is confirmed the source may have to take the guest back.
    assert here.periodic([]).evicted == ()
    migration.confirm_migration(here, guest)
    assert len(here.periodic([]).evicted) == 3
    assert there.periodic([arrived]).evicted == ()


def test_a_migration_that_is_reverted_goes_on_where_it_was(compute: Compute) -> None:
    here, there = compute.host("here"), compute.host("there")
    guest = compute.guest()
    here.spawn(guest)
    says(here, guest, "BOOT 1")
    migration = compute.example.migration
    migration.migrate_disk_and_power_off(here, guest, there.cache.config.instances_path)
    here.periodic([guest])
    there.destroy(dataclasses.replace(guest, host="there"))
    migration.finish_revert_migration(here, guest)
    says(here, guest, "CIRROS BOOT 1")


def test_a_guest_whose_host_is_dead_goes_on_from_shared_storage(compute: Compute) -> None:
    dead, alive = compute.host("dead", "shared"), compute.host("alive", "shared")
    guest = compute.guest("dead")
    dead.spawn(guest)
    says(dead, guest, "BOOT 1")
    dead.power_off(guest)  # as the fence did
    guest = alive.evacuate(guest)
    says(alive, guest, "CIRROS BOOT 1")
    assert guest.host == "alive"
    assert alive.periodic([guest]).evicted == ()


def test_an_unshelved_guest_goes_on_from_its_snapshot_and_needs_it_no_longer(compute: Compute) -> None:
    driver, guest = compute.host("here"), compute.guest(flavor=compute.flavor(swap_mb=8))
    driver.spawn(guest)
    says(driver, guest, "BOOT 1")
    snapshot = compute.home / "snapshot.qcow2"
    driver.shelve(guest, str(snapshot))
    assert not pathlib.Path(driver.disks(guest).directory).exists()
    request = ic.Request(source=ic.FileSource({"snapshot": ic.FileImage(snapshot)}))
    driver.unshelve(guest, "snapshot", request)
    says(driver, guest, "CIRROS BOOT 1")
    evicted = [base.image_id for base in driver.periodic([guest]).evicted]
    assert "snapshot" in evicted


def test_images_are_cached_before_anybody_asks(compute: Compute) -> None:
    driver = compute.host("here")
    assert driver.cache_images(["cirros", "nobody's", "other"]) == {
        "cirros": "cached",
        "nobody's": "error",
        "other": "cached",
    }
    assert driver.cache_images(["cirros"]) == {"cirros": "existing"}
    assert driver.periodic(None).evicted == ()


def test_a_cache_on_a_filesystem_of_its_own_serves_guests(compute: Compute, small_ext4: pathlib.Path) -> None:
    instances = compute.home / "here"
    cache = instances / "_base"
    cache.mkdir(parents=True)
    subprocess.run(["mount", "--bind", small_ext4, cache], check=True)
    try:
        driver, guest = compute.host("here"), compute.guest()
        driver.spawn(guest)
        says(driver, guest, "CIRROS BOOT 0")
        report = driver.periodic([guest])
        assert report.problems == ()
        assert "used by the disk" in kept_because(report, "cirros")
        assert driver.cache.get_disk_usage() == 0
        driver.destroy(guest)
        assert [base.image_id for base in driver.periodic([]).evicted] == ["cirros"]
    finally:
        compute.stop_all()
        subprocess.run(["umount", cache], check=True)


def test_a_service_user_runs_all_of_it_beside_libvirts_own(
    compute: Compute, example: Any, libvirt: libvirt_lab.Libvirt
) -> None:
    python, environment = service_python(compute.home, example.bindings)
    instances = compute.home / "of-nova"
    instances.mkdir()
    os.chown(instances, NOVA, NOVA)
    finished = subprocess.run(
        [*AS_NOVA, python, "-m", "libvirt_driver", libvirt.uri, instances, compute.home / "cirros.raw"],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[-2:] == [
        "resized: 2048 MiB",
        "evicted: " + " ".join(sorted([layout.base_name("image"), "ephemeral_1_0706d66", "swap_64"])),
    ]
    assert lines[-3] == "evicted:"


#: Any user but root and QEMU's. libvirt wants its clients to have a name.
NOVA = pwd.getpwnam("nobody").pw_uid
AS_NOVA = [
    "setpriv",
    f"--reuid={NOVA}",
    f"--regid={NOVA}",
    "--clear-groups",
    "--",
    "sh",
    "-c",
    'umask 077; exec "$@"',
    "sh",
]


def service_python(home: pathlib.Path, bindings_at: pathlib.Path) -> tuple[str, dict[str, str]]:
    """Return a Python that the service's user can run, which root's own may not be, and its environment."""
    reachable = home / "bindings"
    reachable.mkdir()
    for path in bindings_at.iterdir():
        (reachable / path.name).symlink_to(os.path.realpath(path))
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), *packages, str(reachable)]),
    }
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        command = [*AS_NOVA, python, "-c", "import imagecache_lib, libvirt"]
        if not subprocess.run(command, env=environment, cwd="/", capture_output=True, check=False).returncode:
            return python, environment
    needs.lack("no Python is there that another user can run")
