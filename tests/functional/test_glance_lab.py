# SPDX-License-Identifier: Apache-2.0
"""What the lab's Glance really does: the facts that the Glance source is built on, and that the lab works."""

from __future__ import annotations

import hashlib
import pathlib
import random
import subprocess

import pytest

from tests.lab import glance as glance_lab

DATA = random.Random(1).randbytes(300_000)


@pytest.fixture(scope="module")
def image_id(glance: glance_lab.Glance) -> str:
    return glance.upload(DATA)


def test_metadata_carry_a_sha512_and_the_old_md5(glance: glance_lab.Glance, image_id: str) -> None:
    metadata = glance.metadata(image_id)
    assert metadata["os_hash_algo"] == "sha512"
    assert metadata["os_hash_value"] == hashlib.sha512(DATA).hexdigest()
    assert metadata["checksum"] == hashlib.md5(DATA).hexdigest()
    assert (metadata["size"], metadata["status"]) == (len(DATA), "active")


def test_glance_reads_the_virtual_size_of_a_qcow2(glance: glance_lab.Glance, tmp_path: pathlib.Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk", "5G"], check=True)
    assert glance.metadata(glance.upload(tmp_path / "disk", disk_format="qcow2"))["virtual_size"] == 5 * 2**30


def test_data_come_from_an_offset_but_without_a_validator(glance: glance_lab.Glance, image_id: str) -> None:
    answer = glance.call("GET", f"/images/{image_id}/file", headers={"Range": "bytes=299990-"})
    assert answer.status_code == 206
    assert answer.content == DATA[299_990:]
    assert answer.headers["Content-Range"] == "bytes 299990-299999/300000"
    assert "ETag" not in answer.headers


def test_an_offset_beyond_the_end_is_refused(glance: glance_lab.Glance, image_id: str) -> None:
    answer = glance.call("GET", f"/images/{image_id}/file", headers={"Range": "bytes=300000-"})
    assert answer.status_code == 416


def test_an_image_without_data_answers_with_no_content(glance: glance_lab.Glance) -> None:
    assert glance.call("GET", f"/images/{glance.create()}/file").status_code == 204


def test_another_project_does_not_see_a_private_image(glance: glance_lab.Glance, image_id: str) -> None:
    assert glance.call("GET", f"/images/{image_id}", token=glance_lab.STRANGER).status_code == 404
    public = glance.upload(b"for all", visibility="public", token=glance_lab.ADMIN)
    assert glance.call("GET", f"/images/{public}/file", token=glance_lab.STRANGER).content == b"for all"


def test_without_a_token_nothing_is_told(glance: glance_lab.Glance, image_id: str) -> None:
    assert glance.call("GET", f"/images/{image_id}", token="").status_code == 401


def test_each_download_is_logged_by_the_time_its_answer_begins(glance: glance_lab.Glance) -> None:
    image_id = glance.upload(b"data")
    assert glance.downloads(image_id) == []
    glance.call("GET", f"/images/{image_id}/file", headers={"Range": "bytes=1-"})
    glance.call("GET", f"/images/{image_id}/file")
    assert [request.range for request in glance.downloads(image_id)] == ["bytes=1-", None]
