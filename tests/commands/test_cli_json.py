# SPDX-License-Identifier: Apache-2.0
"""What commands print with ``-f json`` is what the documentation's schema says, and nothing else."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jsonschema
import pytest

from imagecache_lib.cli.main import COMMANDS
from tests.commands.test_cli import IMAGE, Cli
from tests.commands.test_cli_operator import age, damage
from tests.commands.test_precache_cli import JobsCli

SCHEMA = json.loads((pathlib.Path(__file__).parents[2] / "doc/source/admin/output-schema.json").read_text())

#: Nothing that a program would read: they change something, or print something else.
NO_RESULT = {
    "agent",
    "cache report",
    "complete",
    "help",
    "host forget",
    "image evict",
    "image pin",
    "image unpin",
}


def check(command: str, found: Any) -> None:
    """Check a command's output: the schema holds, and it names each key that is there."""
    schema = SCHEMA["properties"][command]
    jsonschema.validate(found, {**schema, "$defs": SCHEMA["$defs"]})
    item = schema.get("items", schema)
    known = SCHEMA["$defs"][item["$ref"].rpartition("/")[2]] if "$ref" in item else item
    for row in found if isinstance(found, list) else [found]:
        assert set(row) == set(known["properties"]), command


def test_the_schema_is_one_and_has_all_commands() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    described = {command.replace(" --long", "") for command in SCHEMA["properties"]}
    assert described == set(COMMANDS) - NO_RESULT


@pytest.fixture
def cli(tmp_path: pathlib.Path) -> JobsCli:
    return JobsCli(tmp_path)


def filled(cli: Cli) -> pathlib.Path:
    """Have a disk, a pin and a damaged base image. Returns a report of no instances."""
    source = ("--file", str(cli.data), "--digest", cli.digest)
    check("image cache", cli.json("image", "cache", IMAGE, *source))
    disk = str(cli.instances / "vm/disk")
    check("disk create", cli.json("disk", "create", IMAGE, disk))
    check("disk repair", cli.json("disk", "repair", disk))
    cli.cache("other")
    age(cli, "other")
    cli.run("image", "pin", IMAGE, "--for", "7d")
    cli.run("image", "pin", "later")
    damage(cli, IMAGE)
    check("cache scrub", cli.json("cache", "scrub", code=10))
    report = cli.instances.parent / "instances.json"
    report.write_text(json.dumps([{"uuid": "a-uuid", "host": os.uname().nodename, "images": [IMAGE]}]))
    return report


def test_commands_about_the_cache_print_what_the_schema_says(cli: JobsCli) -> None:
    report = str(filled(cli))
    for words, code in (
        (("image", "list"), 0),
        (("image", "show", IMAGE), 0),
        (("image", "explain", IMAGE), 0),
        (("image", "pins"), 0),
        (("cache", "usage"), 0),
        (("df",), 0),
        (("prune", "--dry-run"), 0),
        (("host", "list"), 0),
        (("history", IMAGE), 0),
        (("cache", "check"), 10),
        (("cache", "audit"), 10),
    ):
        command = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        check(command, cli.json(*words, code=code))
    check("image list --long", cli.json("image", "list", "--long"))
    check("cache verify", cli.json("cache", "verify", "--instances", report, code=10))
    cli.run("cache", "verify", "--instances", report, "--evict", code=10)
    check("disk forget", cli.json("disk", "forget", str(cli.instances / "vm")))


def test_commands_about_jobs_print_what_the_schema_says(cli: JobsCli) -> None:
    check("precache plan", cli.json("precache", "plan", IMAGE, "--file", str(cli.data)))
    check("precache start", cli.json(*cli.start()))
    check("precache list", cli.json("precache", "list"))
    check("precache status", cli.json("precache", "status", "--last"))
    check("precache resume", cli.json("precache", "resume", "--last", "--file", str(cli.data)))
    check("precache cancel", cli.json("precache", "cancel", "--last"))
