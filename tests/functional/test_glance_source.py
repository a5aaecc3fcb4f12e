# SPDX-License-Identifier: Apache-2.0
"""GlanceSource against a real Glance behind uWSGI."""

from __future__ import annotations

import hashlib
import pathlib
import random
from collections.abc import Callable

import pytest
from keystoneauth1 import session as keystone_session
from keystoneauth1 import token_endpoint

from imagecache_lib import errors, model
from imagecache_lib.sources import glance, transfer
from imagecache_lib.sources.interface import CannotCopy, NotPermitted
from imagecache_lib.system import host
from tests.commands.test_precache_cli import JobsCli
from tests.lab import glance as glance_lab
from tests.lab import relay as relay_lab
from tests.lab import server
from tests.support.ports import free_port

DATA = random.Random(2).randbytes(3 * 2**20)
#: Retries at once: the waits between them are tested elsewhere.
IMPATIENT = host.System(sleep=lambda _seconds: None)


@pytest.fixture(scope="module")
def image_id(glance: glance_lab.Glance) -> str:
    return glance.upload(DATA, hw_disk_bus="virtio")


@pytest.fixture
def source(glance: glance_lab.Glance) -> glance.GlanceSource:
    return glance_source(glance.url)


def glance_source(*urls: str, token: str = glance_lab.MEMBER) -> glance.GlanceSource:
    return glance.GlanceSource(list(urls), token=token)


def keystone_source(session: object) -> glance.GlanceSource:
    return glance.GlanceSource(session=session)


def read(source: glance.GlanceSource, image: model.Image, offset: int = 0) -> bytes:
    with source.open(image, offset) as chunks:
        return b"".join(chunks)


def await_copy(source: glance.GlanceSource, image_id: str) -> None:
    """Wait for the end of the task too: while it runs, its database may be locked."""

    def done() -> bool:
        image = source.describe(image_id)
        return "second" in image.stores and "os_glance_import_task" not in image.properties

    server.wait_until(done, "the copy", seconds=240)


def fetch(source: glance.GlanceSource, image_id: str) -> bytes:
    found, image = transfer.describe(source, image_id, host=IMPATIENT)
    return b"".join(transfer.Transfer(found, image, host=IMPATIENT).chunks())


def test_describe_tells_what_glance_knows(source: glance.GlanceSource, image_id: str) -> None:
    image = source.describe(image_id)
    assert image.digest == model.Digest("sha512", hashlib.sha512(DATA).hexdigest())
    assert (image.size, image.disk_format, image.status) == (len(DATA), "raw", "active")
    assert image.properties["hw_disk_bus"] == "virtio"


def test_data_come_whole_and_from_any_offset(source: glance.GlanceSource, image_id: str) -> None:
    image = source.describe(image_id)
    assert read(source, image) == DATA
    for offset in (1, 2**20, len(DATA) - 1):
        assert read(source, image, offset) == DATA[offset:]


def test_the_command_finds_an_image_by_its_name_whatever_that_is(
    glance: glance_lab.Glance, tmp_path: pathlib.Path
) -> None:
    name = 'in:ubuntu:lts, "24.04"'
    image_id = glance.upload(DATA, name=name)
    glance.upload(DATA, name=name.upper())
    cli = JobsCli(tmp_path)
    cli.environment |= {
        "OS_AUTH_TYPE": "admin_token",
        "OS_ENDPOINT": glance.url,
        "OS_TOKEN": glance_lab.MEMBER,
    }
    (found,) = cli.json("precache", "start", name)
    assert (found["image"], found["state"]) == (image_id, "cached")


def test_any_keystoneauth_session_will_do(glance: glance_lab.Glance, image_id: str) -> None:
    session = keystone_session.Session(auth=token_endpoint.Token(glance.url, glance_lab.MEMBER))
    assert fetch(keystone_source(session), image_id) == DATA


def test_an_unknown_image_is_not_found(source: glance.GlanceSource) -> None:
    with pytest.raises(errors.ImageNotFound, match="00000000-0000-0000-0000-000000000000"):
        source.describe("00000000-0000-0000-0000-000000000000")


def test_another_tenants_private_image_is_not_found_and_its_data_neither(
    glance: glance_lab.Glance, source: glance.GlanceSource, image_id: str
) -> None:
    stranger = glance_source(glance.url, token=glance_lab.STRANGER)
    with pytest.raises(errors.ImageNotFound):
        stranger.describe(image_id)
    with pytest.raises(errors.ImageNotFound):
        read(stranger, source.describe(image_id))


def test_a_token_that_glance_refuses_is_no_missing_image_and_is_not_shown(
    glance: glance_lab.Glance, image_id: str
) -> None:
    with pytest.raises(errors.SourceError) as caught:
        glance_source(glance.url, token="expired-secret").describe(image_id)
    assert "token" in str(caught.value)
    assert "expired-secret" not in str(caught.value)


def test_an_image_whose_upload_is_not_complete_is_refused_for_now(
    glance: glance_lab.Glance, source: glance.GlanceSource
) -> None:
    queued = glance.create()
    assert source.describe(queued).status == "queued"
    with pytest.raises(errors.SourceError, match="queued"):
        transfer.describe(source, queued, host=IMPATIENT)


def test_data_of_an_image_that_has_none_are_refused(
    glance: glance_lab.Glance, source: glance.GlanceSource
) -> None:
    queued = glance.create()
    with pytest.raises(errors.ImageRejected, match="no data"):
        read(source, source.describe(queued))


def test_a_deactivated_image_is_rejected_and_its_data_not_permitted(
    glance: glance_lab.Glance, source: glance.GlanceSource
) -> None:
    image_id = glance.upload(b"withdrawn")
    image = source.describe(image_id)
    path = f"/images/{image_id}/actions/deactivate"
    glance.call("POST", path, token=glance_lab.ADMIN).raise_for_status()
    with pytest.raises(errors.ImageRejected, match="deactivated"):
        transfer.describe(source, image_id, host=IMPATIENT)
    with pytest.raises(NotPermitted):
        read(source, image)


def test_an_image_deleted_after_it_was_described_is_not_found(
    glance: glance_lab.Glance, source: glance.GlanceSource
) -> None:
    image_id = glance.upload(b"soon gone")
    image = source.describe(image_id)
    glance.delete(image_id)
    with pytest.raises(errors.ImageNotFound):
        read(source, image)


def test_a_broken_transfer_goes_on_where_it_broke(
    glance: glance_lab.Glance, relay_to: Callable[[str], relay_lab.Relay]
) -> None:
    image_id = glance.upload(DATA)
    relay = relay_to(glance.url)
    source = glance_source(relay.url)
    image = source.describe(image_id)
    relay.cut_after(1_000_000, 700_000)
    assert b"".join(transfer.Transfer(source, image, host=IMPATIENT).chunks()) == DATA
    assert relay.resets == 2
    offsets = [request.range for request in glance.downloads(image_id)]
    assert offsets[0] is None
    starts = [int(value.removeprefix("bytes=").rstrip("-")) for value in offsets[1:] if value]
    assert len(starts) == len(offsets) - 1
    # A reset throws away what had arrived but was not read yet, so the exact offsets vary.
    assert 0 < starts[0] <= 1_000_000
    assert starts[0] < starts[1] <= starts[0] + 700_000


def test_a_kept_connection_that_is_dead_when_used_again_goes_unseen(
    glance: glance_lab.Glance, relay_to: Callable[[str], relay_lab.Relay], image_id: str
) -> None:
    relay = relay_to(glance.url)
    relay.reset_reused()
    source = glance_source(relay.url)
    for _ in range(5):
        assert read(source, source.describe(image_id)) == DATA
    assert relay.resets > 0


def test_many_requests_in_a_row_survive_what_uwsgi_does_to_connections(
    source: glance.GlanceSource, image_id: str
) -> None:
    for _ in range(100):
        source.describe(image_id)


def test_an_endpoint_that_is_down_is_passed_over(glance: glance_lab.Glance, image_id: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    assert fetch(glance_source(nobody, glance.url), image_id) == DATA


def test_data_that_the_store_lost_are_an_error_that_names_the_image(
    glance: glance_lab.Glance, source: glance.GlanceSource
) -> None:
    image_id = glance.upload(DATA)
    image = source.describe(image_id)
    glance.stored_file(image_id).unlink()
    with pytest.raises(errors.ImageCacheError, match=image_id):
        read(source, image)


def test_data_that_the_store_truncated_never_pass_as_whole(
    glance: glance_lab.Glance, source: glance.GlanceSource
) -> None:
    image_id = glance.upload(DATA)
    stored = glance.stored_file(image_id)
    with stored.open("r+b") as damaged:
        damaged.truncate(2**20)
    with pytest.raises(errors.ImageCacheError, match=image_id):
        fetch(source, image_id)


def test_an_image_is_copied_into_another_store(
    glance: glance_lab.Glance, source: glance.GlanceSource
) -> None:
    image_id = glance.upload(DATA)
    image = source.describe(image_id)
    assert image.stores == ("disk",)
    # By default Glance's policy lets only administrators copy.
    with pytest.raises(CannotCopy, match="copy_image"):
        source.copy_to_store(image, "second")
    glance_source(glance.url, token=glance_lab.ADMIN).copy_to_store(image, "second")
    await_copy(source, image_id)
    assert source.describe(image_id).status == "active"


def test_a_store_that_glance_does_not_have_is_refused(glance: glance_lab.Glance, image_id: str) -> None:
    source = glance_source(glance.url, token=glance_lab.ADMIN)
    with pytest.raises(CannotCopy, match="nowhere"):
        source.copy_to_store(source.describe(image_id), "nowhere")


def test_hosts_that_ask_for_one_copy_at_once_all_get_it(glance: glance_lab.Glance) -> None:
    source = glance_source(glance.url, token=glance_lab.ADMIN)
    image = source.describe(glance.upload(DATA))
    for _host in range(3):
        source.copy_to_store(image, "second")
    await_copy(source, image.id)
    source.copy_to_store(image, "second")
