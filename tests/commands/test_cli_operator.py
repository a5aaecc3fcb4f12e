# SPDX-License-Identifier: Apache-2.0
"""What an operator sees and does with the real ``imagecache`` command: tables, wrong ids, room, repairs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
import pty
import shlex
import socket
import subprocess
import termios
import threading
import time
from typing import Any

import pytest

from imagecache_lib import events
from imagecache_lib.cli import parsing, table
from imagecache_lib.cli.progress import ProgressObserver
from imagecache_lib.testing import http_faults
from imagecache_lib.testing.bad_server import BadServer
from tests.commands.test_cli import IMAGE, Cli

UUID = "318ac4fb-a140-4405-8167-ad782f983e48"
OTHER = "a0c1d7e2-77aa-4b1c-9a52-0d6c3f4be901"
NAME_ATTRIBUTE = "user.imagecache.name"


@pytest.fixture
def cli(tmp_path: pathlib.Path) -> Cli:
    return Cli(tmp_path)


def base_of(cli: Cli, image: str) -> pathlib.Path:
    return cli.instances / "_base" / hashlib.sha1(image.encode(), usedforsecurity=False).hexdigest()


def age(cli: Cli, image: str) -> None:
    base = base_of(cli, image)
    for path in (base, cli.instances / "_base/.imagecache/records" / f"{base.name}.json"):
        os.utime(path, (0, 0))


def damage(cli: Cli, image: str) -> None:
    with open(base_of(cli, image), "r+b") as stream:
        stream.write(b"wrong")


@pytest.mark.parametrize(
    "words",
    [
        ("image", "evict", "nope"),
        ("image", "show", "nope"),
        ("image", "explain", "nope"),
        ("image", "unpin", "nope"),
        ("cache", "scrub", "nope"),
    ],
)
def test_a_wrong_id_is_an_error_in_one_line(cli: Cli, words: tuple[str, ...]) -> None:
    cli.cache()
    stderr = cli.run(*words, code=3).stderr
    assert len(stderr.splitlines()) == 1
    assert "nope" in stderr


@pytest.mark.parametrize(
    "words", [("image", "list"), ("df",), ("prune",), ("cache", "verify"), ("image", "evict", IMAGE)]
)
def test_an_instances_directory_that_is_not_there_is_an_error(cli: Cli, words: tuple[str, ...]) -> None:
    stderr = cli.run("--instances-path", "/nonexistent", *words, code=7).stderr
    assert "/nonexistent" in stderr
    assert len(stderr.splitlines()) == 1


def test_an_empty_cache_is_said_to_be_empty(cli: Cli) -> None:
    found = cli.run("image", "list")
    assert (found.stdout, "no base images in" in found.stderr) == ("", True)
    assert not (cli.instances / "_base").exists()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_list_fits_the_terminal_and_what_it_shows_names_the_image(cli: Cli, width: int) -> None:
    for image, name in ((UUID, "ubuntu-24.04-server-cloudimg"), (OTHER, "\u65e5\u672c\u8a9e \x1b[2J")):
        cli.cache(image)
        os.setxattr(base_of(cli, image), NAME_ATTRIBUTE, name.encode())
    cli.environment["COLUMNS"] = str(width)
    lines = cli.run("image", "list").stdout.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= width
    assert lines[0].split()[0] == "IMAGE"
    assert "\x1b" not in "".join(lines)
    shown = next(line.split()[0] for line in lines if line.startswith("318ac4fb"))
    assert cli.json("image", "show", shown)["image"] == UUID


def test_a_name_or_first_letters_mean_an_image_only_while_they_mean_one(cli: Cli) -> None:
    for image in (UUID, OTHER):
        cli.cache(image)
        os.setxattr(base_of(cli, image), NAME_ATTRIBUTE, b"twice")
    assert "2 base images" in cli.run("image", "evict", "twice", code=3).stderr
    cli.run("image", "evict", "318", code=3)
    cli.run("image", "evict", "318a")
    cli.run("image", "evict", "twice")
    assert cli.json("image", "list") == []


def test_the_list_is_filtered(cli: Cli) -> None:
    for image in (UUID, OTHER):
        cli.cache(image)
    age(cli, OTHER)
    assert (
        cli.run("image", "list", "-q", "--filter", "state=reclaimable,size>512K,age>30d").stdout
        == f"{OTHER}\n"
    )
    assert cli.run("image", "list", "-q", "--filter", "state=young").stdout == f"{UUID}\n"
    cli.run("image", "list", "--filter", "state=odd", code=2)


def test_pins_are_listed_with_and_without_their_image(cli: Cli) -> None:
    cli.cache()
    assert "not in the cache" in cli.run("image", "pin", "later").stderr
    cli.run("image", "pin", IMAGE, "--owner", "alice")
    assert {(each["image"], each["owner"], each["cached"]) for each in cli.json("image", "pins")} == {
        ("later", "operator", False),
        (IMAGE, "alice", True),
    }


def test_damage_is_shown_wherever_one_looks(cli: Cli) -> None:
    cli.cache()
    source = ("--file", str(cli.data))
    cli.run("disk", "create", IMAGE, str(cli.instances / "vm/disk"), *source)
    damage(cli, IMAGE)
    cli.run("cache", "scrub", code=10)
    (listed,) = cli.json("image", "list")
    assert (listed["state"], listed["damaged"], listed["used_by"]) == ("damaged", True, 1)
    assert cli.json("image", "show", IMAGE)["damaged"] is True
    assert cli.json("df")["damaged"] == 1
    (fate,) = cli.json("cache", "verify", code=10)
    assert fate["damaged"] is True
    for command in ("audit", "check"):
        found = cli.json("cache", command, code=10)
        assert any("damaged" in each["finding"] for each in found), command


def test_prune_names_what_goes_and_why_the_rest_stays(cli: Cli) -> None:
    for image in (UUID, OTHER):
        cli.cache(image)
    age(cli, OTHER)
    assert "--yes" in cli.run("prune", code=2).stderr
    planned = {each["image"]: each for each in cli.json("prune", "--dry-run")}
    assert planned[OTHER]["fate"] == "would be removed"
    assert planned[UUID]["fate"] == "stays"
    assert [reason["code"] for reason in planned[UUID]["reasons"]] == ["young"]
    assert base_of(cli, OTHER).exists()
    cli.run("image", "pin", OTHER)
    assert all(each["fate"] == "stays" for each in cli.json("prune", "--yes"))
    cli.run("image", "unpin", OTHER)
    assert "free, less than" in cli.run("prune", "--yes", "--until-free", "999T", code=10).stderr
    assert not base_of(cli, OTHER).exists()
    assert base_of(cli, UUID).exists()


def test_prune_never_removes_what_a_disk_needs(cli: Cli) -> None:
    cli.cache()
    cli.run("disk", "create", IMAGE, str(cli.instances / "vm/disk"))
    age(cli, IMAGE)
    (row,) = cli.json("prune", "--yes", "--until-free", "999T", code=10)
    assert (row["fate"], row["reasons"][0]["code"]) == ("stays", "disk")
    assert base_of(cli, IMAGE).exists()


def test_a_missing_base_is_repaired(cli: Cli) -> None:
    cli.cache()
    disk = cli.instances / "vm/disk"
    cli.run("disk", "create", IMAGE, str(disk))
    base_of(cli, IMAGE).unlink()
    assert "--image" in cli.run("disk", "repair", str(disk), code=7).stderr
    assert "no source" in cli.run("disk", "repair", str(disk), "--image", IMAGE, code=7).stderr
    words = ("disk", "repair", str(disk), "--image", IMAGE, "--file", str(cli.data))
    assert cli.json(*words)["base"] == base_of(cli, IMAGE).name
    assert base_of(cli, IMAGE).exists()


def test_sizes_have_units_in_options_and_in_the_configuration(cli: Cli, tmp_path: pathlib.Path) -> None:
    cli.cache()
    cli.run("cache", "scrub", "--rate", "100M")
    file = tmp_path / "imagecache.conf"
    file.write_text("[image_cache]\nmax_cache_size = 10G\nmax_cach_size = 3\n")
    assert cli.json("--config-file", str(file), "cache", "usage")["max_cache_size"] == 10 * 2**30
    found = cli.json("--config-file", str(file), "cache", "check", code=10)
    assert any("max_cach_size" in each["finding"] for each in found)
    file.write_text("[image_cache]\nmax_cache_size = much\n")
    stderr = cli.run("--config-file", str(file), "image", "list", code=7).stderr
    assert "LocationInfo" not in stderr
    assert str(file) in stderr


def test_authentication_without_a_user_is_a_matter_of_configuration(cli: Cli) -> None:
    cli.environment["OS_AUTH_URL"] = "http://127.0.0.1:9/v3"
    assert "OS_USERNAME" in cli.run("image", "cache", IMAGE, code=7).stderr


def test_a_wrong_report_is_named_by_entry(cli: Cli, tmp_path: pathlib.Path) -> None:
    report = tmp_path / "instances.json"
    report.write_text(json.dumps([{"uuid": "u"}]))
    assert "entry 1 has no host" in cli.run("cache", "verify", "--instances", str(report), code=7).stderr


def test_each_command_has_help_with_an_example(cli: Cli) -> None:
    for command in ("image list", "df", "prune", "disk repair", "cache scrub"):
        assert "examples:" in cli.run(*command.split(), "--help").stdout, command


def test_the_list_loads_no_more_than_it_needs(cli: Cli) -> None:
    code = (
        "import sys; from imagecache_lib.cli import main; main.main(sys.argv[1:]); "
        "print([n for n in ('requests', 'sqlalchemy', 'oslo_messaging') if n in sys.modules])"
    )
    words = [*cli.command()[:1], "-c", code, "--instances-path", str(cli.instances), "image", "list"]
    found = subprocess.run(words, capture_output=True, text=True, env=cli.environment, check=True)
    assert "requests" not in found.stdout
    assert "sqlalchemy" not in found.stdout


def test_history_tells_what_became_of_an_image_that_is_gone(cli: Cli) -> None:
    cli.cache()
    age(cli, IMAGE)
    cli.run("image", "evict", IMAGE)
    shown = cli.run("history", IMAGE).stdout
    assert "WHEN" in shown and "published" in shown and "asked for" in shown
    told = json.loads(cli.run("history", base_of(cli, IMAGE).name, "-f", "json").stdout)
    assert [each["what"] for each in told] == ["fetched", "published", "moved to the trash", "evicted"]
    assert {each["image"] for each in told if each["what"] == "published"} == {IMAGE}
    assert "nothing is known of it" in cli.run("history", "nope", code=3).stderr


def test_a_report_keeps_the_history_that_it_is_given(cli: Cli, tmp_path: pathlib.Path) -> None:
    page, history = tmp_path / "page.html", tmp_path / "history.sqlite"
    words = ("cache", "report", "--html", str(page))
    cli.run(*words)
    assert "There are no base images" in page.read_text()
    cli.cache()
    cli.run(*words, "--history", str(history))
    assert "<polygon" not in page.read_text()
    cli.run(*words, "--history", str(history))
    assert '<polygon class="young"' in page.read_text()
    assert oct(page.stat().st_mode & 0o777) == "0o644"


def test_a_report_into_a_pipe_or_behind_a_link_leaves_that_what_it_is(
    cli: Cli, tmp_path: pathlib.Path
) -> None:
    cli.cache()
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("page.html")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    cli.run("cache", "report", "--html", str(pipe))
    assert pipe.is_fifo()
    reader.join()
    assert read[0].startswith("<!DOCTYPE html>")
    cli.run("cache", "report", "--html", str(link))
    assert (link.is_symlink(), (tmp_path / "page.html").is_file()) == (True, True)


def test_a_report_that_cannot_be_written_says_which_file(cli: Cli, tmp_path: pathlib.Path) -> None:
    assert "/nonexistent/x.html" in cli.run("cache", "report", "--html", "/nonexistent/x.html", code=7).stderr
    other = tmp_path / "no.sqlite"
    other.write_text("this is no database, and must stay as it is\n" * 100)
    words = ("cache", "report", "--html", str(tmp_path / "x.html"), "--history", str(other))
    assert str(other) in cli.run(*words, code=7).stderr
    assert other.read_text().startswith("this is no database")


def test_df_says_when_the_next_pass_is_due(cli: Cli, tmp_path: pathlib.Path) -> None:
    cli.cache()
    found = cli.json("df")
    assert (found["last_pass"], found["next_pass"]) == (None, None)
    report = tmp_path / "instances.json"
    report.write_text("[]")
    for _again in range(2):
        cli.run("cache", "verify", "--evict", "--instances", str(report))
    for scan in (cli.instances / "_base/.imagecache/hosts").glob("*.scan"):
        os.utime(scan, (0, 0))
    assert "overdue" in cli.run("df").stdout
    cli.run("cache", "verify", "--evict", "--instances", str(report))
    found = cli.json("df")
    assert found["last_pass"] < found["next_pass"]
    assert " in " in next(line for line in cli.run("df").stdout.splitlines() if line.startswith("next pass"))


def notes(cli: Cli) -> list[Any]:
    """Return what lies beside the files in flight."""
    stages = cli.instances / "_base/.imagecache/stage"
    return [json.loads(path.read_bytes()) for path in stages.glob("[!.]*.json")]


def test_a_second_command_says_who_fetches_the_image_and_how_far_that_is(cli: Cli) -> None:
    with BadServer() as server, contextlib.ExitStack() as ends:
        words = cli.command("image", "cache", UUID, "--http", server.put("/image", bytes(40 * 2**20)))
        server.always_fail("/image", http_faults.stalled(33 * 2**20), method="GET")
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": cli.environment}
        first = subprocess.Popen(words, stderr=subprocess.DEVNULL, **quiet)
        ends.callback(first.wait)
        ends.callback(first.kill)
        too_late = threading.Timer(300, first.kill)
        too_late.start()
        ends.callback(too_late.cancel)
        while not any(note["fetcher"]["received"] >= 32 * 2**20 for note in notes(cli)):
            assert first.poll() is None
            time.sleep(0.05)
        ours, theirs = pty.openpty()
        ends.callback(os.close, ours)
        termios.tcsetwinsize(theirs, (24, 160))  # enough for any host's name
        second = subprocess.Popen(words, stderr=theirs, **quiet)
        ends.callback(second.wait)
        ends.callback(second.kill)
        os.close(theirs)
        said = b""
        while b"40.0 MiB" not in said:
            said += os.read(ours, 4096)
    line = next(each for each in said.decode().split("\r") if "40.0 MiB" in each)
    assert line.startswith("318ac4fb")
    assert len(line) < 160
    assert f"waiting: {socket.gethostname()}, pid {first.pid} fetches it, 8" in line


def test_letters_take_as_many_columns_as_a_terminal_gives_them() -> None:
    for text, wide in (("\u65e5\u672c", 4), ("e\u0301", 1), ("\u0e01\u0e31\u0e19", 2), ("\u2602\ufe0f", 2)):
        assert table.columns_of(text) == wide, text
    assert table.padded("\u0e01\u0e31", 3) == "\u0e01\u0e31  "


def test_what_waits_is_told_in_whole_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    observer = ProgressObserver(stream, clock=lambda: 0.0)
    for received in (32 * 2**20, 33 * 2**20):
        observer(events.Waiting("n", UUID, host="compute-1", pid=1989, received=received, total=40 * 2**20))
    observer(events.Waiting("n", "swap", host="compute-1", pid=1989))
    assert stream.getvalue().splitlines() == [
        f"{UUID}: waiting: compute-1, pid 1989 fetches it, 80 %  32.0 MiB of 40.0 MiB",
        "swap: waiting: compute-1, pid 1989 fetches it",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_what_commands_print_fits_the_terminal(cli: Cli, width: int) -> None:
    cli.cache(UUID)
    cli.run("disk", "create", UUID, str(cli.instances / "vm/disk"), "--size", "1G", "--file", str(cli.data))
    cli.run("image", "pin", OTHER, "--for", "7d", "--owner", "night-shift")
    cli.environment["COLUMNS"] = str(width)
    for words, code in (
        (("image", "list"), 0),
        (("image", "pins"), 0),
        (("history", UUID), 0),
        (("cache", "verify"), 10),
        (("host", "list"), 0),
        (("prune", "--dry-run"), 0),
        (("df",), 0),
    ):
        said = cli.run(*words, code=code).stdout
        assert said.strip(), words
        # A path cannot be broken without harm.
        lines = [line for line in said.splitlines() if str(cli.instances) not in line]
        assert max(map(len, lines)) <= width, said
        assert not any(line.strip() in ("|", "+") for line in lines), said


def test_what_is_said_to_people_has_no_words_of_python(cli: Cli) -> None:
    cli.cache()
    shown = cli.run("image", "show", IMAGE).stdout
    assert not {"True", "False", "None"} & set(shown.split())
    assert (cli.json("image", "show", IMAGE)["damaged"]) is False
    assert "1 base image, 0 disks" in cli.run("cache", "audit").stderr


def test_an_operator_is_asked_for_a_report_and_told_of_the_image_by_its_id(cli: Cli) -> None:
    cli.cache()
    explained = cli.run("image", "explain", IMAGE).stdout
    assert "the driver" not in explained
    assert "give --instances FILE" in explained
    cli.run("image", "pin", IMAGE)
    assert f"image {IMAGE}: " in cli.run("image", "evict", IMAGE, code=12).stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("disk", "repair", "/nonexistent/disk"), 3, "/nonexistent/disk"),
        (("disk", "forget", "/nonexistent/disk"), 3, "no pass saw a disk"),
        (("disk", "forget", ""), 2, "the path is empty"),
        (("host", "forget", "nope"), 3, "imagecache host list"),
        (("image", "pin", ""), 2, "no image's id"),
        (("image", "list", "--sort-column", "nope"), 2, "there is no column nope"),
        (("image", "lst"), 2, "image list is one"),
        (("image",), 2, "followed by one of: cache, evict"),
        (("--instances-pth", "x", "image", "list"), 2, "--instances-path is one"),
        (("cache", "scrub", "--rate", "10X"), 2, "imagecache cache scrub --help"),
        (("help", "nope"), 2, "no command 'nope'"),
        (
            ("precache", "list", "--jobs", "mysql+pymysql://a:secret@127.0.0.1:1/x"),
            7,
            "failed: Can't connect to MySQL server on '127.0.0.1' (Connection refused)",
        ),
        (("image", "cache", "i", "--file", "f", "--digest", "sha512:00"), 2, "128 hexadecimal digits"),
        (("image", "cache", "i", "--file", "f", "--digest", "crc:00"), 2, "crc is no digest's algorithm"),
        (("image", "cache", "i", "--file", "f", "--disk-format", "qcow"), 2, "qcow2"),
        (("image", "pin", "i", "--for", "0s"), 2, "is over at once"),
        (("image", "pin", "i", "--for", "99999d"), 2, "longer than a century"),
        (("cache", "scrub", "--textfile", "x.txt"), 2, "must end in .prom"),
        (("cache", "scrub", "--textfile", "/nonexistent/x.prom"), 7, "/nonexistent/x.prom"),
        (("--log-file", "/nonexistent/log", "image", "list"), 2, "/nonexistent/log cannot be written"),
        (("agent", "--peer-key", "k"), 2, "--peer-key has no effect without --peer-cert"),
        (("agent", "--peer-cert", "c"), 2, "--peer-cert has no effect without --serve-peers"),
        (("agent", "--peer-token-file", "t"), 2, "has no effect without --peer or --serve-peers"),
        (("agent", "--trust-peers"), 2, "--trust-peers has no effect without --peer"),
        (("agent", "--file", "f"), 2, "--file"),
        (("precache", "start", ""), 2, "no image's id"),
        (("--instances-path", "", "df"), 2, "the path is empty"),
        (
            ("precache", "plan", "i", "--hosts-file", "/nonexistent"),
            7,
            "No such file or directory (/nonexistent)",
        ),
    ],
)
def test_what_is_not_there_or_misspelt_is_one_line_with_the_way_out(
    cli: Cli, words: tuple[str, ...], code: int, said: str
) -> None:
    found = cli.run(*words, code=code)
    (line,) = found.stderr.splitlines()[-1:]
    assert said in line
    assert found.stdout == ""
    assert not {"Errno", "None", "literal", "codec"} & set(line.replace("[", " ").split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\xfe", "no UTF-8 text"),
        (b"[image_cache]\nmanager_interval = soon\n", "'soon' is no number"),
        (b"[image_cache\n", "imagecache.conf:1"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_said_in_words(
    cli: Cli, tmp_path: pathlib.Path, text: bytes, said: str
) -> None:
    file = tmp_path / "imagecache.conf"
    file.write_bytes(text)
    stderr = cli.run("--config-file", str(file), "image", "list", code=7).stderr
    assert said in stderr
    assert len(stderr.splitlines()) == 1


def test_a_failure_is_told_once(cli: Cli, tmp_path: pathlib.Path) -> None:
    words = ("image", "cache", IMAGE, "--file", str(cli.data), "--digest", "sha512:" + "0" * 128)
    assert len(cli.run(*words, code=4).stderr.splitlines()) == 1
    cli.cache()
    odd = cli.instances / "_base/odd"
    odd.mkdir()
    report = tmp_path / "instances.json"
    report.write_text("[]")
    told = cli.run("cache", "verify", "--evict", "--instances", str(report), code=10).stderr
    assert told.count(str(odd)) == 1
    cli.run("disk", "create", IMAGE, str(cli.instances / "vm/disk"))
    damage(cli, IMAGE)
    found = cli.run("cache", "scrub", code=10)
    assert "granules of 64.0 KiB" in found.stdout
    assert len(found.stderr.splitlines()) == 1


def test_output_that_cannot_be_written_is_an_error_in_one_line(cli: Cli) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            cli.command("df"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=cli.environment,
            check=False,
        )
    assert found.returncode == 1
    assert found.stderr == "imagecache: error: the output cannot be written: No space left on device\n"


def test_streams_that_are_closed_harm_nothing(cli: Cli) -> None:
    words = shlex.join(cli.command("image", "cache", IMAGE, "--file", str(cli.data)))
    shell = subprocess.run(["sh", "-c", f"{words} <&- >&- 2>&-"], env=cli.environment, check=False)
    assert shell.returncode == 0
    assert base_of(cli, IMAGE).read_bytes() == cli.data.read_bytes()


def test_the_numbers_of_errors_are_left_to_programmers() -> None:
    record = logging.LogRecord("n", logging.WARNING, "", 0, "It failed: %s", (OSError(28, "No space"),), None)
    assert parsing.without_numbers(record)
    assert record.getMessage() == "It failed: No space"
