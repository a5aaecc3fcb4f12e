# SPDX-License-Identifier: Apache-2.0
"""Every option that the installed qemu-img makes images with, through ``create_disk`` in every mode.

What a guest sees is compared with what ``qemu-img convert`` makes of the same image. A sample by default; the
whole with ``IMAGECACHE_CAMPAIGN=1``.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import shutil
import subprocess
from collections.abc import Iterator

import pytest

import imagecache_lib as ic
from imagecache_lib.testing.sources import FakeSource
from tests.support import campaign

MIB = 2**20

#: Options for each format, as lists of alternatives; the whole is their product, the sample one of each.
_OPTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "qcow2": (
        ("compat=1.1", "compat=0.10", "extended_l2=on", "compression_type=zstd"),
        ("", "cluster_size=512", "cluster_size=4096", "cluster_size=2M"),
        ("", "preallocation=metadata", "preallocation=falloc", "preallocation=full", "lazy_refcounts=on"),
        ("", "refcount_bits=1", "refcount_bits=64"),
    ),
    "vmdk": (
        ("subformat=monolithicSparse", "subformat=streamOptimized"),
        ("", "adapter_type=lsilogic", "hwversion=6", "compat6=on", "zeroed_grain=on", "toolsversion=10"),
    ),
    "vpc": (("subformat=dynamic", "subformat=fixed"), ("", "force_size=on")),
    "vhdx": (
        ("subformat=dynamic", "subformat=fixed"),
        ("", "log_size=1M", "log_size=16M"),
        ("", "block_size=1M", "block_size=32M", "block_state_zero=off"),
    ),
    "vdi": (("static=off", "static=on"),),
    "raw": (("",), ("preallocation=off", "preallocation=full")),
}
_CLAIMS = {"vpc": ("vhd", "vpc"), "raw": ("raw",)}


def _options(format: str) -> list[str]:
    alternatives = _OPTIONS[format]
    every = [",".join(filter(None, chosen)) for chosen in itertools.product(*alternatives)]
    if campaign.WHOLE:
        return every
    first = [options[0] for options in alternatives]
    sample = []
    for at, options in enumerate(alternatives):
        for option in options:
            chosen = [*first[:at], option, *first[at + 1 :]]
            sample.append(",".join(filter(None, chosen)))
    return list(dict.fromkeys(sample))


def _cases() -> Iterator[tuple[str, str, int]]:
    sizes = campaign.pick(sample=(3 * MIB + 512,), whole=(3 * MIB, 3 * MIB + 512, 68 * MIB))
    for format in _OPTIONS:
        for options in _options(format):
            for size in sizes:
                yield format, options, size


def _qemu(*words: str | os.PathLike[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(words, capture_output=True, check=False)


def _make(directory: pathlib.Path, format: str, options: str, size: int) -> pathlib.Path | None:
    """Return an image that a guest has written to here and there. None if qemu-img does not make it."""
    path = directory / "image"
    more = ("-o", options) if options else ()
    if _qemu("qemu-img", "create", "-q", "-f", format, *more, path, str(size)).returncode:
        return None
    chance = random.Random(f"{format} {options} {size}")
    if "streamOptimized" in options:
        raw = directory / "raw"
        raw.write_bytes(chance.randbytes(MIB) + bytes(size - 2 * MIB) + chance.randbytes(MIB))
        made = _qemu("qemu-img", "convert", "-f", "raw", "-O", format, *more, raw, path)
        assert made.returncode == 0, made.stderr
        return path
    commands = []
    for number in range(12):
        at = chance.randrange(0, size - 65536) // 512 * 512
        commands += ["-c", f"write -q -P {number + 1} {at} {chance.choice((512, 4096, 65536))}"]
    commands += ["-c", f"write -q -P 99 {size - 512} 512"]
    written = _qemu("qemu-io", "-f", format, *commands, path)
    assert written.returncode == 0, written.stderr
    return path


def _expected(directory: pathlib.Path, format: str, image: pathlib.Path) -> bytes:
    out = directory / "expected"
    read = "driver=vpc,force_size_calc=current_size" if format == "vpc" else f"driver={format}"
    command = ("convert", "-O", "raw", "--image-opts", f"{read},file.driver=file,file.filename={image}")
    made = _qemu("qemu-img", *command, out)
    assert made.returncode == 0, made.stderr
    return out.read_bytes()


def _disk(directory: pathlib.Path, image: bytes, claimed: str | None, force_raw: bool, backend: str) -> bytes:
    instances = directory / "instances"
    (instances / "vm").mkdir(parents=True)
    try:
        config = ic.CacheConfig(instances_path=str(instances), force_raw_images=force_raw)
        source = FakeSource({"image": image}, disk_format=claimed)
        manager = ic.ImageCacheManager(config, source, backend, observers=())
        disk = manager.create_disk("image", str(instances / "vm" / "disk"))
        out = directory / "found"
        made = _qemu("qemu-img", "convert", "-f", disk.format, "-O", "raw", disk.target, out)
        assert made.returncode == 0, made.stderr
        return out.read_bytes()
    finally:
        shutil.rmtree(instances)


@pytest.mark.campaign
@pytest.mark.parametrize(("format", "options", "size"), list(_cases()))
def test_a_guest_sees_what_qemu_img_converts(
    tmp_path: pathlib.Path, format: str, options: str, size: int
) -> None:
    path = _make(tmp_path, format, options, size)
    if path is None:
        pytest.skip("the installed qemu-img does not make this")
    expected = _expected(tmp_path, format, path)
    image = path.read_bytes()
    claims = _CLAIMS.get(format, (format,))
    ways = itertools.product((*claims, None), (True, False), ("qcow2", "raw"))
    for claimed, force_raw, backend in ways:
        found = _disk(tmp_path, image, claimed, force_raw, backend)
        assert found == expected, (claimed, force_raw, backend)


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64")
@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "cluster_size=512"])
@pytest.mark.parametrize("commands", ["savevm one", "savevm one\ndelvm one"])
def test_an_image_whose_machine_was_saved(tmp_path: pathlib.Path, options: str, commands: str) -> None:
    path = _make(tmp_path, "qcow2", options, 3 * MIB)
    assert path is not None
    drive = f"if=none,id=d,file={path},format=qcow2"
    machine = ["-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "16", "-monitor", "stdio"]
    disk = ["-drive", drive, "-device", "virtio-blk-pci,drive=d"]
    subprocess.run(
        ["qemu-system-x86_64", *machine, *disk],
        input=f"{commands}\nquit\n".encode(),
        capture_output=True,
        check=True,
        timeout=120,
    )
    expected = _expected(tmp_path, "qcow2", path)
    for force_raw in (True, False):
        assert _disk(tmp_path, path.read_bytes(), "qcow2", force_raw, "qcow2") == expected
