# SPDX-License-Identifier: Apache-2.0
"""Standalone qcow2 images written natively, as QEMU reads them."""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagecache_lib.formats.qcow2 import overlay, standalone

KIB, MIB, GIB = 2**10, 2**20, 2**30

#: Where data lies in a raw file: offset, length, and whether it is zeros that were written out.
PIECES = st.lists(
    st.tuples(st.integers(0, 3 * MIB), st.sampled_from([1, 511, 512, 4096, 70_000, MIB]), st.booleans()),
    max_size=8,
)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def raw_file(path: pathlib.Path, size: int, pieces: list[tuple[int, int, bool]]) -> pathlib.Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length, zeros in pieces:
            if offset < size:
                file.seek(offset)
                inside = min(length, size - offset)
                file.write(bytes(inside) if zeros else os.urandom(inside))
    return path


def write(source: pathlib.Path, target: pathlib.Path, virtual_size: int, cluster_bits: int = 16) -> None:
    target.unlink(missing_ok=True)
    with source.open("rb") as raw, target.open("x+b") as file:
        standalone.write_standalone(raw.fileno(), file.fileno(), virtual_size, cluster_bits=cluster_bits)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    size=st.integers(0, 4 * MIB),
    pieces=PIECES,
    more=st.sampled_from([0, 512, MIB, GIB]),
    cluster_bits=st.sampled_from([9, 12, 16, 21]),
)
def test_qemu_finds_a_sound_image_with_the_content_of_the_raw_file(
    tmp_path: pathlib.Path, size: int, pieces: list[tuple[int, int, bool]], more: int, cluster_bits: int
) -> None:
    source = raw_file(tmp_path / "raw", size, pieces)
    virtual_size = -(-size // 512) * 512 + more
    write(source, target := tmp_path / "qcow2", virtual_size, cluster_bits)
    run("qemu-img", "check", "-q", "-f", "qcow2", str(target))
    os.truncate(source, virtual_size)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(source), str(target))


def test_zeros_take_no_space_whether_they_are_holes_or_not(tmp_path: pathlib.Path) -> None:
    source = raw_file(tmp_path / "raw", 64 * MIB, [(0, 64 * MIB, True), (32 * MIB, 4096, False)])
    write(source, target := tmp_path / "qcow2", GIB)
    assert os.stat(target).st_size < MIB


def test_data_beyond_one_table_is_found(tmp_path: pathlib.Path) -> None:
    # With clusters of 512 bytes a table maps 32 KiB, a refcount block 128 KiB.
    source = raw_file(tmp_path / "raw", 2 * MIB, [(0, 2 * MIB, False)])
    write(source, target := tmp_path / "qcow2", 2 * MIB, 9)
    run("qemu-img", "check", "-q", "-f", "qcow2", str(target))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(source), str(target))


def test_a_guest_may_write_everywhere(tmp_path: pathlib.Path) -> None:
    source = raw_file(tmp_path / "raw", 4 * MIB, [(MIB, 70_000, False)])
    write(source, target := tmp_path / "qcow2", GIB)
    for offset in (0, MIB, GIB - 64 * KIB):
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {offset} 64k", str(target))
        run("qemu-io", "-f", "qcow2", "-c", f"read -q -P 7 {offset} 64k", str(target))
    run("qemu-img", "check", "-q", "-f", "qcow2", str(target))


@pytest.mark.parametrize("virtual_size", [513, 2**62])
def test_a_size_that_no_qcow2_has_is_refused_before_anything_is_written(
    tmp_path: pathlib.Path, virtual_size: int
) -> None:
    source = raw_file(tmp_path / "raw", 512, [])
    with pytest.raises(overlay.OverlayError):
        write(source, tmp_path / "qcow2", virtual_size)
    assert (tmp_path / "qcow2").stat().st_size == 0
