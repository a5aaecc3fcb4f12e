# SPDX-License-Identifier: Apache-2.0
"""Host aggregates and images by name, as an OpenStack cloud has them. The cloud is made up."""

from __future__ import annotations

import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from tests.process.test_precache_cli import JobsCli

IMAGE_ID = "318ac4fb-a140-4405-8167-ad782f983e48"
NAME = 'ubuntu, "24.04"'


class Cloud(http.server.ThreadingHTTPServer):
    """An identity, a compute and an image service at one port.

    :ivar allowed: whether the user may see host aggregates.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.allowed = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        if path == "/v3/auth/tokens":
            endpoints = [
                {"type": kind, "name": kind, "id": kind, "endpoints": [self._endpoint(kind)]}
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
        if path == "/image/v2/images":
            wanted = query.get("name") == ['in:"' + NAME.replace('"', '\\"') + '"']
            return 200, {"images": [{"id": IMAGE_ID}] if wanted else []}
        return 404, {"error": {"code": 404, "message": path}}

    def _endpoint(self, kind: str) -> dict[str, str]:
        return {
            "interface": "public",
            "url": f"{self.url}/{kind}",
            "region": "r",
            "region_id": "r",
            "id": kind,
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Cloud

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.urlsplit(self.path)
        status, told = self.server.answer(path.path.rstrip("/"), urllib.parse.parse_qs(path.query))
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("X-Subject-Token", "a-token")
        self.send_header("Content-Type", "application/json")
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
    words = ("precache", "plan", IMAGE_ID, "--aggregate", "mine", "--host", "node-9")
    assert [row["host"] for row in cli.json(*words, code=10)] == ["node-9"]
