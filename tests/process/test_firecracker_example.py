# SPDX-License-Identifier: Apache-2.0
"""The Firecracker example's disks. Firecracker needs KVM, so that QEMU boots them here."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib.formats import superblock
from imagecache_lib.testing import bootdisk

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "firecracker_driver.py"


@pytest.fixture
def driver(tmp_path: pathlib.Path) -> Any:
    specification = importlib.util.spec_from_file_location("firecracker_driver", EXAMPLE)
    assert specification is not None and specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    instances = tmp_path / "instances"
    instances.mkdir()
    bootdisk.write_boot_disk(str(tmp_path / "image"))
    (tmp_path / "kernel").write_bytes(b"\x7fELF and so on")
    source = ic.FileSource({name: ic.FileImage(tmp_path / name) for name in ("image", "kernel")})
    return example.FirecrackerDriver(str(instances), source, remove_unused_original_minimum_age_seconds=0)


def drives(config: str) -> dict[str, dict[str, Any]]:
    with open(config) as file:
        return {drive["drive_id"]: drive for drive in json.load(file)["drives"]}


def boot(config: str) -> str:
    """Boot a VM's drives in QEMU, read-only where the configuration says so."""
    command = bootdisk.boot_command("none", "raw")[:-2]
    for drive in drives(config).values():
        read_only = "on" if drive["is_read_only"] else "off"
        command += ["-drive", f"file={drive['path_on_host']},format=raw,if=virtio,readonly={read_only}"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return finished.stdout


def test_vms_boot_from_the_base_itself_and_cannot_write_it(driver: Any) -> None:
    configs = [driver.create(vm, "image", "kernel", disk_gb=1) for vm in ("one", "two")]
    roots = {drives(config)["root"]["path_on_host"] for config in configs}
    (base,) = map(pathlib.Path, roots)
    before = base.read_bytes()
    for config in configs:
        # A disk that could be written would count.
        assert "HELLO BOOT 0" in boot(config)
    assert base.read_bytes() == before
    own = [pathlib.Path(drives(config)["own"]["path_on_host"]) for config in configs]
    assert len(set(own)) == 2
    for disk in own:
        with disk.open("rb") as file:
            found = superblock.read(file.read(superblock.LENGTH))
        assert found is not None
        assert found.kind == "ext4"


def test_a_base_stays_as_long_as_a_vm_pins_it(driver: Any) -> None:
    for vm in ("one", "two"):
        driver.create(vm, "image", "kernel", disk_gb=1)
    driver.destroy("one", "image")
    report = driver.periodic()
    assert [base.image_id for base in report.evicted] == ["kernel"]
    assert "two" in next(base.reason for base in report.bases if not base.evicted)
    driver.destroy("two", "image")
    assert [base.image_id for base in driver.periodic().evicted] == ["image"]


def test_a_vm_that_cannot_be_made_pins_nothing(driver: Any) -> None:
    with pytest.raises(ic.ImageNotFound):
        driver.create("one", "image", "absent", disk_gb=1)
    assert not os.path.exists(driver.path("one"))
    assert [base.image_id for base in driver.periodic().evicted] == ["image"]


def test_the_command_prints_what_firecracker_takes(tmp_path: pathlib.Path, driver: Any) -> None:
    places = [str(tmp_path / name) for name in ("instances", "image", "kernel")]
    command = [sys.executable, str(EXAMPLE), *places]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert {"boot-source", "drives", "machine-config"} == set(json.loads(finished.stdout))
    assert "pinned" in finished.stderr
