# SPDX-License-Identifier: Apache-2.0
"""An OpenStack cloud as the environment names it: logins, host aggregates, images by name.

keystoneauth and openstacksdk are the real ones, and speak HTTP; the services that answer them are made up.
"""

from __future__ import annotations

import http.server
import json
import pathlib
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.commands.test_precache_cli import JobsCli

IMAGE_ID = "318ac4fb-a140-4405-8167-ad782f983e48"
NAME = 'ubuntu, "24.04"'
DATA = bytes(2**20)


class Cloud(http.server.ThreadingHTTPServer):
    """An identity, a compute and an image service at one port.

    :ivar allowed: whether the user may see host aggregates.
    :ivar asked: the Authorization header and the path of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.allowed = True
        self.asked: list[tuple[str | None, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        if path == "/v3/auth/tokens":
            endpoints = [
                {"type": kind, "name": kind, "id": kind, "endpoints": self._endpoints(kind)}
                for kind in ("compute", "image")
            ]
            token = {"methods": ["password"], "expires_at": "2999-01-01T00:00:00.000000Z", "user": {}}
            return 201, {"token": {**token, "catalog": endpoints}}
        if path == "/v3":
            links = [{"rel": "self", "href": f"{self.url}/v3/"}]
            return 200, {"version": {"id": "v3.14", "status": "stable", "links": links}}
        if path == "/compute/os-aggregates":
            if not self.allowed:
                return 403, {"forbidden": {"code": 403, "message": "no"}}
            racks = [("rack-7", ["node-1", "node-2"]), ("empty", []), ("twice", ["a"]), ("twice", ["b"])]
            return 200, {
                "aggregates": [
                    {"id": number, "name": name, "hosts": hosts} for number, (name, hosts) in enumerate(racks)
                ]
            }
        if path == f"/image/v2/images/{IMAGE_ID}":
            size = {"size": len(DATA), "disk_format": "raw", "container_format": "bare"}
            return 200, {"id": IMAGE_ID, "name": NAME, "status": "active", **size}
        if path == f"/image/v2/images/{IMAGE_ID}/file":
            return 200, DATA
        if path == "/image/v2/images":
            wanted = query.get("name") == [f"eq:{NAME}"]
            others = [{"id": str(uuid.uuid4()), "name": NAME.upper()}]
            return 200, {"images": [{"id": IMAGE_ID, "name": NAME}, *others] if wanted else []}
        return 404, {"error": {"code": 404, "message": path}}

    def _endpoints(self, kind: str) -> list[dict[str, str]]:
        """Return where a service is: publicly in one region, internally in another."""
        return [
            {
                "interface": interface,
                "url": f"{self.url}/{kind}",
                "region": region,
                "region_id": region,
                "id": f"{kind}-{interface}",
            }
            for interface, region in (("public", "r"), ("internal", "far"))
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Cloud

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.urlsplit(self.path)
        self.server.asked.append((self.headers.get("Authorization"), path.path))
        status, told = self.server.answer(path.path.rstrip("/"), urllib.parse.parse_qs(path.query))
        body = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("X-Subject-Token", "a-token")
        kind = "octet-stream" if isinstance(told, bytes) else "json"
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Cloud() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def cli(tmp_path: pathlib.Path, cloud: Cloud) -> JobsCli:
    found = JobsCli(tmp_path)
    for name, value in {
        "AUTH_URL": f"{cloud.url}/v3",
        "USERNAME": "operator",
        "PASSWORD": "secret",
        "PROJECT_NAME": "admin",
        "USER_DOMAIN_NAME": "Default",
        "PROJECT_DOMAIN_NAME": "Default",
    }.items():
        found.environment[f"OS_{name}"] = value
    return found


def test_an_aggregate_and_an_image_are_named_as_the_cloud_names_them(cli: JobsCli) -> None:
    cli.use_a_bus_that_is_away()
    words = ("precache", "start", NAME, "--aggregate", "rack-7", "--deadline", "1s")
    found = cli.json(*words, code=10)
    assert {(row["host"], row["image"]) for row in found} == {("node-1", IMAGE_ID), ("node-2", IMAGE_ID)}
    (listed,) = cli.json("precache", "list")
    assert (listed["aggregate"], listed["hosts"]) == ("rack-7", 2)


@pytest.mark.parametrize(
    ("image", "aggregate", "code", "told"),
    [
        (NAME, "rack-8", 7, "no host aggregates are called rack-8"),
        (NAME, "empty", 7, "has no hosts"),
        (NAME, "twice", 7, "2 host aggregates"),
        ("debian", "rack-7", 3, "no image has that name"),
    ],
)
def test_what_the_cloud_does_not_have_makes_no_job(
    cli: JobsCli, image: str, aggregate: str, code: int, told: str
) -> None:
    stderr = cli.run("precache", "start", image, "--aggregate", aggregate, code=code).stderr
    assert told in stderr
    assert len(stderr.splitlines()) == 1
    assert cli.json("precache", "list") == []


def test_a_user_who_may_not_see_aggregates_is_told(cli: JobsCli, cloud: Cloud) -> None:
    cloud.allowed = False
    stderr = cli.run("precache", "plan", IMAGE_ID, "--aggregate", "rack-7", code=7).stderr
    assert "the compute service refuses this user" in stderr


def test_hosts_that_are_named_need_no_compute_service(cli: JobsCli) -> None:
    cli.use_a_bus_that_is_away()
    words = ("precache", "plan", IMAGE_ID, "--aggregate", "mine", "--host", "node-9", "--timeout", "1s")
    assert [row["host"] for row in cli.json(*words, code=5)] == ["node-9"]


@pytest.fixture
def nobody(tmp_path: pathlib.Path) -> JobsCli:
    """Return a command whose environment names no cloud."""
    return JobsCli(tmp_path)


def test_an_entry_of_clouds_yaml_says_where_and_how(
    nobody: JobsCli, cloud: Cloud, tmp_path: pathlib.Path
) -> None:
    login = {
        "auth_url": f"{cloud.url}/v3",
        "username": "operator",
        "password": "secret",
        "project_name": "admin",
        "user_domain_name": "Default",
        "project_domain_name": "Default",
    }
    mine = {"auth": login, "interface": "internal", "region_name": "far"}
    wrong = {"auth": login, "interface": "internal", "region_name": "nowhere"}
    basic = {"endpoint": f"{cloud.url}/image", "username": "operator", "password": "secret"}
    clouds = {
        "mine": mine,
        "wrong": wrong,
        "open": {"auth_type": "none", "auth": {"endpoint": f"{cloud.url}/image"}},
        "basic": {"auth_type": "http_basic", "auth": basic},
    }
    file = tmp_path / "clouds.yaml"
    file.write_text(json.dumps({"clouds": clouds}))
    nobody.environment["OS_CLIENT_CONFIG_FILE"] = str(file)
    for name in ("mine", "open", "basic"):
        nobody.environment["OS_CLOUD"] = name
        (found,) = nobody.json("image", "cache", IMAGE_ID)
        assert found["result"] == "cached", name
        nobody.run("image", "evict", IMAGE_ID)
    assert ("Basic b3BlcmF0b3I6c2VjcmV0", f"/image/v2/images/{IMAGE_ID}/file") in cloud.asked
    nobody.environment["OS_CLOUD"] = "mine"
    nobody.use_a_bus_that_is_away()
    rows = nobody.json("precache", "plan", NAME, "--aggregate", "rack-7", "--timeout", "1s", code=5)
    assert [row["host"] for row in rows] == ["node-1", "node-2"]
    for name, told in (("wrong", "not in the catalog"), ("theirs", "theirs")):
        nobody.environment["OS_CLOUD"] = name
        stderr = nobody.run("precache", "plan", NAME, "--aggregate", "rack-7", code=7).stderr
        assert told in stderr
        assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"AUTH_URL": "keystone"}, "OS_AUTH_URL is no http or https URL"),
        ({"AUTH_TYPE": "none", "ENDPOINT": ""}, "OS_ENDPOINT is not set"),
        ({"AUTH_TYPE": "v3token", "TOKEN": ""}, "OS_TOKEN is not set"),
        ({"AUTH_TYPE": "v3oidcaccesstoken"}, "identity_provider"),
        ({"AUTH_TYPE": "nope"}, "nope"),
        ({"CACERT": "/nonexistent"}, "OS_CACERT names no file (/nonexistent)"),
    ],
)
def test_a_login_that_cannot_work_is_refused_before_anyone_is_asked(
    cli: JobsCli, cloud: Cloud, variables: dict[str, str], told: str
) -> None:
    cli.environment |= {f"OS_{name}": value for name, value in variables.items()}
    stderr = cli.run("image", "cache", IMAGE_ID, code=7).stderr
    assert told in stderr
    assert len(stderr.splitlines()) == 1
    assert not cloud.asked
