# SPDX-License-Identifier: Apache-2.0
"""The command's logins at a real Keystone, for a real Glance: by ``OS_`` variables and by clouds.yaml."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest

from tests.commands.test_precache_cli import JobsCli
from tests.lab import glance as glance_lab
from tests.lab import keystone as keystone_lab
from tests.support import campaign

#: Installing a Keystone takes a minute, and starting one many seconds, of the two processors that CI has.
pytestmark = pytest.mark.skipif(not campaign.WHOLE, reason="make campaigns logs in at a real Keystone")

NAME = 'ubuntu:lts, "24.04"'
DATA = bytes(2**20)


class Cloud:
    """A Keystone with a Glance in its catalog, and one user of one project."""

    def __init__(self, identity: keystone_lab.Keystone, images: glance_lab.Glance) -> None:
        self.identity = identity
        identity.add_service("image", images.url)
        identity.add_user("operator", "secret", project="racks")
        identity.add_user("stranger", "secret", project="elsewhere")
        token = keystone_lab.login(identity.url, "operator", "secret", project="racks")
        self.image = images.upload(DATA, token=token, name=NAME)

    def variables(self, **others: str) -> dict[str, str]:
        """Return what a user sources, with other values for some."""
        known = {
            "AUTH_URL": self.identity.url,
            "USERNAME": "operator",
            "PASSWORD": "secret",
            "PROJECT_NAME": "racks",
            "USER_DOMAIN_NAME": "Default",
            "PROJECT_DOMAIN_NAME": "Default",
        }
        return {f"OS_{name}": value for name, value in {**known, **others}.items() if value}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with (
        keystone_lab.running_keystone(tmp_path_factory.mktemp("keystone")) as identity,
        glance_lab.running_glance(tmp_path_factory.mktemp("glance"), keystone=identity) as images,
    ):
        yield Cloud(identity, images)


@pytest.fixture
def cli(tmp_path: pathlib.Path) -> JobsCli:
    return JobsCli(tmp_path)


@pytest.mark.campaign
def test_a_password_a_token_and_an_entry_of_clouds_yaml_log_in(
    cli: JobsCli, cloud: Cloud, tmp_path: pathlib.Path
) -> None:
    plain = dict(cli.environment)
    token = keystone_lab.login(cloud.identity.url, "operator", "secret", project="racks")
    logins = {
        "password": cloud.variables(),
        "token": cloud.variables(USERNAME="", PASSWORD="", TOKEN=token),
        "a region": cloud.variables(REGION_NAME=keystone_lab.REGION, INTERFACE="public"),
    }
    for how, variables in logins.items():
        cli.environment = {**plain, **variables}
        (found,) = cli.json("image", "cache", cloud.image)
        assert found["result"] == "cached", how
        cli.run("image", "evict", cloud.image)
    login = {name.removeprefix("OS_").lower(): value for name, value in cloud.variables().items()}
    file = tmp_path / "clouds.yaml"
    file.write_text(json.dumps({"clouds": {"mine": {"auth": login, "region_name": keystone_lab.REGION}}}))
    cli.environment = {**plain, "OS_CLIENT_CONFIG_FILE": str(file), "OS_CLOUD": "mine"}
    (found,) = cli.json("precache", "start", NAME)
    assert (found["image"], found["state"]) == (cloud.image, "cached")


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("variables", "words", "code", "told"),
    [
        ({"PASSWORD": "wrong"}, ("image", "cache"), 7, "could not get a token"),
        ({"PROJECT_NAME": "none"}, ("image", "cache"), 7, "could not get a token"),
        ({"REGION_NAME": "far"}, ("image", "cache"), 7, "catalog"),
        ({"PASSWORD": "wrong"}, ("precache", "plan", "--host", "a"), 7, "refuses this user"),
        ({"USERNAME": "stranger", "PROJECT_NAME": "elsewhere"}, ("image", "cache"), 3, "no such image"),
        ({}, ("precache", "plan", "--aggregate", "rack-7"), 7, "the compute service is not in the catalog"),
    ],
)
def test_a_login_that_is_refused_is_one_line_with_who_must_act(
    cli: JobsCli, cloud: Cloud, variables: dict[str, str], words: tuple[str, ...], code: int, told: str
) -> None:
    cli.environment.update(cloud.variables(**variables))
    named = NAME if "--host" in words else cloud.image
    stderr = cli.run(*words, named, code=code).stderr
    assert told in stderr
    assert len(stderr.splitlines()) == 1
    assert "secret" not in stderr
