# SPDX-License-Identifier: Apache-2.0
"""The page of ``imagecache cache report``, as a real browser shows it."""

from __future__ import annotations

import http.server
import os
import pathlib
import threading
from collections.abc import Iterator

import pytest

from imagecache_lib.cli import report_page
from tests.commands.test_cli import Cli
from tests.commands.test_cli_operator import NAME_ATTRIBUTE, OTHER, UUID, age, base_of, damage
from tests.lab.browser import Browser

MIB = 2**20


@pytest.fixture
def browser(tmp_path: pathlib.Path) -> Browser:
    (tmp_path / "browser").mkdir()
    return Browser(tmp_path / "browser")


@pytest.fixture
def cli(tmp_path: pathlib.Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def asked() -> Iterator[tuple[int, list[str]]]:
    """A web server: its port, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, paths
        server.shutdown()


def rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def filled(cli: Cli) -> None:
    """Have a damaged base image, one in use of three times its size, and one that may go."""
    for image, size in ((UUID, 1), ("in-use", 3), (OTHER, 2)):
        cli.data.write_bytes(os.urandom(size * MIB))
        cli.run("image", "cache", image, "--file", str(cli.data))
    cli.run("disk", "create", "in-use", str(cli.instances / "vm/disk"))
    cli.run("disk", "create", UUID, str(cli.instances / "vm/other"))
    damage(cli, UUID)
    cli.run("cache", "scrub", code=10)
    age(cli, OTHER)


def test_each_state_has_the_room_of_its_bytes(cli: Cli, browser: Browser, tmp_path: pathlib.Path) -> None:
    filled(cli)
    page = tmp_path / "page.html"
    cli.run("cache", "report", "--html", str(page))
    pixels = browser.pixels(page.as_uri())
    seen = {state: pixels[rgb(colour)] for state, colour in report_page.COLOURS.items()}
    whole = sum(seen.values())
    assert whole > 1000 * 200
    for state, share in (("in_use", 1 / 2), ("reclaimable", 1 / 3), ("damaged", 1 / 6)):
        assert seen[state] / whole == pytest.approx(share, abs=0.03), (state, seen)
    document = browser.document(page.as_uri())
    for text in (UUID, "used by the disk", "is damaged on disk", "nothing keeps it", "3.0 MiB"):
        assert text in document, text


def test_it_fits_a_telephone(cli: Cli, browser: Browser, tmp_path: pathlib.Path) -> None:
    filled(cli)
    page = tmp_path / "page.html"
    cli.run("cache", "report", "--html", str(page))
    pixels = browser.pixels(page.as_uri(), width=500, height=1000)
    assert pixels[rgb(report_page.COLOURS["in_use"])] > 500 * 80


def test_an_image_with_a_hostile_name_runs_and_loads_nothing(
    cli: Cli, browser: Browser, tmp_path: pathlib.Path, asked: tuple[int, list[str]]
) -> None:
    port, paths = asked
    url = f"http://127.0.0.1:{port}"
    names = [
        f"</title><script src='{url}/script'></script>",
        f'"><img src="{url}/image" onerror="document.title=1">',
        f"</style><style>@import '{url}/style';</style>",
        "<svg/onload=document.body.innerHTML='gone'>\u202e",
        f"<meta http-equiv=refresh content='0;url={url}/refresh'>",
        f"<link rel=stylesheet href={url}/link><iframe src={url}/frame>",
        "]]><!--",
    ]
    for number, name in enumerate(names):
        image = f"<b>{number}</b>&amp;"
        cli.cache(image)
        os.setxattr(base_of(cli, image), NAME_ATTRIBUTE, name.encode())
        cli.run("image", "pin", image, "--owner", f"<script>{name}")
    page = tmp_path / "page.html"
    history = tmp_path / "history.sqlite"
    for _time in range(2):
        cli.run("cache", "report", "--html", str(page), "--history", str(history))
    document = browser.document(page.as_uri())
    for tag in ("<script", "<img", "<iframe", "<link", "<b>", '<meta http-equiv="refresh'):
        assert tag not in document, tag
    assert document.count("<style") == 1
    assert "&lt;script" in document
    assert "\u202e" not in document
    assert paths == []
