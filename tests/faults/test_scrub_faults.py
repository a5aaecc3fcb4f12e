# SPDX-License-Identifier: Apache-2.0
"""What condemns a base: wrong bytes, or a read that the disk fails twice. Nothing else does."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

import imagecache_lib as ic
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource
from tests.support import needs, recorded_calls

ID = "image"
CONTENT = os.urandom(2**20)

SCRUB = """
import json, sys
import imagecache_lib as ic
config = ic.CacheConfig(instances_path=sys.argv[1], scrub_rate=0)
(found,) = ic.CacheAdmin(config, "qcow2", observers=[]).scrub().bases
print(json.dumps([found.verdict.value, found.detail, found.stays]))
"""


def manager(instances: pathlib.Path, **options: object) -> ic.ImageCacheManager:
    config = ic.CacheConfig(instances_path=str(instances), scrub_rate=0, **options)  # type: ignore[arg-type]
    return ic.ImageCacheManager(config, FakeSource({ID: CONTENT}), observers=())


def scrubbed(
    instances: pathlib.Path, fault: str = "", *, calls: str = "preadv,preadv2"
) -> tuple[str, str, str | None]:
    """Scrub in a process of which some calls that read the base fail.

    :param calls: the system calls that do.
    """
    words: list[str | pathlib.Path] = [sys.executable, "-c", SCRUB, instances]
    if fault:
        words = [
            needs.program("strace"),
            "-f",
            "-qq",
            "-o",
            os.devnull,
            "-P",
            instances / "_base" / layout.base_name(ID),
            "-e",
            f"inject={calls}:{fault}",
            *words,
        ]
    said = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout
    verdict, detail, stays = json.loads(said)
    return verdict, detail, stays


@pytest.fixture
def instances(tmp_path: pathlib.Path) -> pathlib.Path:
    """An instances directory whose one base a disk needs."""
    (tmp_path / "vm").mkdir()
    manager(tmp_path).create_disk(ID, str(tmp_path / "vm" / "disk"))
    return tmp_path


def is_marked(instances: pathlib.Path) -> bool:
    record = instances / "_base/.imagecache/records" / f"{layout.base_name(ID)}.json"
    return bool(json.loads(record.read_bytes())["damaged"])


@pytest.mark.parametrize("calls", ["preadv,preadv2", "lseek"])
def test_a_read_that_fails_once_condemns_nothing(instances: pathlib.Path, calls: str) -> None:
    """The data, or the kernel's list of where there are any."""
    assert scrubbed(instances, "error=EIO:when=1", calls=calls) == ("sound", "its checksums match", None)
    assert not is_marked(instances)


def test_a_read_that_fails_twice_is_damage(instances: pathlib.Path) -> None:
    verdict, detail, stays = scrubbed(instances, "error=EIO")
    assert (verdict, detail) == ("damaged", "it cannot be read: Input/output error")
    assert stays is not None and "used by the disk" in stays
    assert is_marked(instances)


@pytest.mark.parametrize("error", ["ETIMEDOUT", "ESTALE", "ENOTCONN", "EACCES", "ENOMEM"])
def test_a_server_that_does_not_answer_condemns_nothing(instances: pathlib.Path, error: str) -> None:
    verdict, detail, _stays = scrubbed(instances, f"error={error}")
    assert verdict == "unverifiable"
    assert "cannot be read now" in detail
    assert not is_marked(instances)


def test_a_sound_scrub_takes_the_mark_back(instances: pathlib.Path) -> None:
    assert scrubbed(instances, "error=EIO")[0] == "damaged"
    assert scrubbed(instances)[0] == "sound"
    assert not is_marked(instances)
    (instances / "other").mkdir()
    source = FakeSource({ID: CONTENT})
    cache = ic.ImageCacheManager(ic.CacheConfig(instances_path=str(instances)), source, observers=())
    cache.create_disk(ID, str(instances / "other" / "disk"))
    assert source.opens == 0


def test_a_damaged_base_stays_as_long_as_it_is_leased(tmp_path: pathlib.Path) -> None:
    holder = manager(tmp_path)
    with holder.fetch_or_reuse(ID) as base:
        with open(base.path, "r+b") as file:
            file.write(b"x" if CONTENT[:1] != b"x" else b"y")
        (found,) = manager(tmp_path, lock_timeout=0.5).scrub().bases
        assert found.verdict is ic.Verdict.DAMAGED
        assert found.stays is not None and found.stays.startswith("leased")
        assert os.path.exists(base.path)
    (found,) = manager(tmp_path).scrub().bases
    assert found.stays is None
    assert not os.path.exists(base.path)


def test_damage_is_told_and_removed_though_it_cannot_be_marked(tmp_path: pathlib.Path) -> None:
    """As on a full filesystem."""
    manager(tmp_path).cache_image(ID)
    base = tmp_path / "_base" / layout.base_name(ID)
    with open(base, "r+b") as file:
        file.write(b"x" if CONTENT[:1] != b"x" else b"y")

    def scrub() -> None:
        (found,) = manager(tmp_path, space_minimum_age_seconds=0).scrub().bases
        assert found.verdict is ic.Verdict.DAMAGED
        assert found.stays is None

    # The first rename of a scrub gives the record its name.
    options = ["-o", os.devnull, "-e", "signal=none", "-e", "trace=rename"]
    assert recorded_calls.attached(scrub, [*options, "-e", "inject=rename:error=ENOSPC:when=1"]) == 0
    assert not base.exists()
