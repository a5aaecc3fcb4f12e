# SPDX-License-Identifier: Apache-2.0
"""The systemd units that the project ships: their restrictions are tight, and take nothing from the cache.

A real systemd applies them. What it does not try: the agent's readiness on a real bus, which tests/process
does without a unit, and the timers.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.lab import systemd
from tests.lab.systemd import host
from tests.support import needs

__all__ = ["host"]

UNITS = pathlib.Path(__file__).parents[2] / "examples/systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
MIB = 2**20
INSTANCES = "/var/lib/nova/instances"

#: Prints, as JSON, the references that a pass reads, whether qemu-img is shut in, and what a conversion
#: gives.
PROBE = """
import json, os, sys
import imagecache_lib as ic
from imagecache_lib.formats.qemu_img import QemuImg
from imagecache_lib.sources.file import FileImage
config = ic.CacheConfig(instances_path="/var/lib/nova/instances")
source = ic.FileSource({"vmdk": FileImage(config.instances_path + "/image.vmdk", "vmdk")})
manager = ic.ImageCacheManager(config, source, backend="qcow2")
report = manager.verify_base_images([], dry_run=True)
reasons = {base.name: base.reason for base in report.bases}
shut_in = QemuImg(config, manager.host).sandbox_problem()
with manager.fetch_or_reuse("vmdk") as base:
    content = open(base.path, "rb").read(6)
manager.evict_image("vmdk")
told = {"reasons": reasons, "problems": list(report.problems), "sandbox": shut_in}
told["read"] = content.decode()
print(json.dumps(told))
"""


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_is_exposed_to_little(name: str) -> None:
    analyze = needs.program("systemd-analyze")
    command: list[str | pathlib.Path] = [
        analyze,
        "security",
        "--offline=true",
        "--no-pager",
        "--threshold=40",
        UNITS / name,
    ]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout[-300:] + judged.stderr


def test_systemd_finds_no_fault_with_the_units(tmp_path: pathlib.Path) -> None:
    analyze = needs.program("systemd-analyze")
    for path in UNITS.iterdir():
        # The commands are not installed here; any will do.
        text = path.read_text().replace("/usr/local/bin/imagecache-instances", "/bin/true")
        (tmp_path / path.name).write_text(text.replace("/usr/local/bin/imagecache", "/bin/true"))
    units: list[str | pathlib.Path] = [
        path for path in sorted(tmp_path.iterdir()) if path.suffix in (".service", ".timer")
    ]
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    verified = subprocess.run(
        [analyze, "verify", "--man=no", *units], capture_output=True, text=True, env=environment, check=False
    )
    own = [line for line in verified.stderr.splitlines() if "imagecache-" in line]
    assert (verified.returncode, own) == (0, [])


def without_its_command(name: str, command: str) -> str:
    """Return a shipped unit with its restrictions, for another command that ends by itself."""
    kept, skip = [], False
    for line in (UNITS / name).read_text().splitlines():
        begins = line.startswith(
            ("ExecStart=", "Type=", "Restart=", "RestartSec=", "After=", "Wants=", "Install")
        )
        if not begins and not skip:
            kept.append(line)
        skip = (begins or skip) and line.endswith("\\")
        if line == "[Service]":
            kept += ["Type=oneshot", f"ExecStart={command}"]
    return "\n".join(kept) + "\n"


@contextlib.contextmanager
def loop_device(image: pathlib.Path) -> Iterator[str]:
    needs.root()
    made = subprocess.check_output(["losetup", "--find", "--show", image], text=True).strip()
    try:
        yield made
    finally:
        subprocess.run(["losetup", "--detach", made], check=True)


def overlay(path: pathlib.Path, base: str) -> None:
    command = [
        "qemu-img",
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        f"{INSTANCES}/_base/{base}",
    ]
    subprocess.run([*command, path, str(MIB)], check=True)


@pytest.fixture
def disks(host: pathlib.Path) -> Iterator[pathlib.Path]:
    """Instances whose disks lie in the instances directory, behind links elsewhere, and on a block device."""
    instances = host / "instances"
    bases = instances / "_base"
    bases.mkdir()
    places = {
        "here": instances / "a",
        "tmp": pathlib.Path("/tmp"),
        "var-tmp": host,
        "home": pathlib.Path("/home"),
    }
    made = []
    names = {place: f"{number:040x}" for number, place in enumerate([*places, "device"], 1)}
    for name in [*names.values(), "f" * 40]:
        (bases / name).write_bytes(bytes(MIB))
    for place, directory in places.items():
        (instances / place).mkdir()
        directory.mkdir(exist_ok=True)
        disk = directory / f"imagecache-disk-{os.getpid()}-{place}"
        overlay(disk, names[place])
        made.append(disk)
        disk.chmod(0o644)
        (instances / place / "disk").symlink_to(disk)
    volume = host / "volume"
    overlay(volume, names["device"])
    with volume.open("r+b") as file:
        file.truncate(4 * MIB)
    raw = host / "image.raw"
    raw.write_bytes(b"vmdk!\n" + bytes(MIB - 6))
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run([*convert, raw, instances / "image.vmdk"], check=True)
    with loop_device(volume) as device:
        os.chmod(device, 0o664)
        (instances / "device").mkdir()
        (instances / "device/disk").symlink_to(device)
        subprocess.run(
            ["chown", "--recursive", "--no-dereference", f"{systemd.UID}:{systemd.UID}", instances],
            check=True,
        )
        yield host
    for disk in made:
        disk.unlink()


def test_a_pass_reads_the_same_references_inside_the_units_restrictions(disks: pathlib.Path) -> None:
    (disks / "probe.py").write_text(PROBE)
    command = f"{sys.executable} {disks}/probe.py"
    plain = f"[Service]\nType=oneshot\nUser={systemd.USER}\nExecStart={command}\n"
    outside = json.loads(
        systemd.run_unit("plain.service", {"plain.service": plain}, home=disks).splitlines()[-1]
    )
    used = [name for name, reason in outside["reasons"].items() if reason.startswith("used by the disk")]
    assert len(used) == 5, outside
    assert (outside["sandbox"], outside["read"], outside["problems"]) == ("", "vmdk!\n", [])
    for name in ("imagecache-agent.service", "imagecache-verify.service", "imagecache-scrub.service"):
        unit = without_its_command(name, command)
        said = systemd.run_unit(name, {name: unit}, home=disks)
        assert json.loads(said.splitlines()[-1]) == outside, name


def test_a_unit_writes_nowhere_but_where_it_has_to(host: pathlib.Path) -> None:
    script = "import os, sys; print([p for p in sys.argv[1:] if os.access(p, os.W_OK)])"
    (host / "probe.py").write_text(script)
    places = f"{INSTANCES} /run/imagecache /tmp /var/tmp /usr /etc /home"
    unit = without_its_command("imagecache-verify.service", f"{sys.executable} {host}/probe.py {places}")
    said = systemd.run_unit("imagecache-verify.service", {"imagecache-verify.service": unit}, home=host)
    assert said.strip() == f"['{INSTANCES}', '/run/imagecache']"
