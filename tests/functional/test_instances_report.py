# SPDX-License-Identifier: Apache-2.0
"""The report of instances that the example writes from a real libvirt, and what a pass makes of it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import uuid

from tests.commands.test_cli import IMAGE, Cli
from tests.lab.libvirt import Libvirt

PROGRAM = pathlib.Path(__file__).parents[2] / "examples/instances_from_libvirt.py"

#: A domain that is defined and shut off, as Nova describes it.
_NOVA = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid>
  <metadata>
    <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>
      <nova:root type='image' uuid='{image}'/>
    </nova:instance>
  </metadata>
  <memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
</domain>
"""


def report(libvirt: Libvirt, path: pathlib.Path, uri: str | None = None) -> int:
    options = ("--connect", uri or libvirt.uri, "--host", "compute-1", "--output", str(path))
    return subprocess.run([sys.executable, str(PROGRAM), *options], check=False).returncode


def test_a_pass_keeps_the_image_of_an_instance_that_libvirt_knows(
    libvirt: Libvirt, tmp_path: pathlib.Path
) -> None:
    cli = Cli(tmp_path)
    cli.cache()
    known, definition, path = str(uuid.uuid4()), tmp_path / "domain.xml", tmp_path / "instances.json"
    definition.write_text(_NOVA.format(name="report", uuid=known, image=IMAGE))
    libvirt.virsh("define", str(definition))
    try:
        assert report(libvirt, path) == 0
        (mine,) = [each for each in json.loads(path.read_text()) if each["uuid"] == known]
        assert mine == {"uuid": known, "host": "compute-1", "images": [IMAGE]}
        (fate,) = cli.json("cache", "verify", "--instances", str(path))
        assert {"code": "instance", "instance": known} in [
            {key: each.get(key) for key in ("code", "instance")} for each in fate["reasons"]
        ]
    finally:
        libvirt.virsh("undefine", known)
    assert report(libvirt, path) == 0
    assert known not in path.read_text()


def test_without_libvirt_there_is_no_report(libvirt: Libvirt, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text("[]")
    assert report(libvirt, path, f"qemu+unix:///system?socket={tmp_path}/nothing") == 1
    assert not path.exists()
