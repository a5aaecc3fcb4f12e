# SPDX-License-Identifier: Apache-2.0
"""The real ``imagecache`` command, as operators and their scripts run it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import pty
import subprocess
import sys
from typing import Any

import pytest

from imagecache_lib import errors, events, model
from imagecache_lib.cli.instance_report import read_instances
from imagecache_lib.cli.progress import ProgressObserver
from tests.support import forked_command

IMAGE = "11111111-aaaa"
COMMAND = (sys.executable, "-m", "imagecache_lib.cli.main")


class Cli:
    """Runs the command on an instances directory of its own.

    :param installed: whether as a shell starts it. Else it is forked by a process that has loaded it.
    """

    def __init__(self, path: pathlib.Path, *, installed: bool = False) -> None:
        self.installed = installed
        self.instances = path / "instances"
        (self.instances / "vm").mkdir(parents=True)
        self.data = path / "image.raw"
        self.data.write_bytes(os.urandom(2**20))
        self.digest = "sha512:" + hashlib.sha512(self.data.read_bytes()).hexdigest()
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("OS_", "http"))
        }
        self.environment["HOME"] = str(path)

    def command(self, *words: str) -> list[str]:
        return [*COMMAND, "--instances-path", str(self.instances), *words]

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        if self.installed:
            found = subprocess.run(
                self.command(*words), capture_output=True, text=True, env=self.environment, check=False
            )
        else:
            found = forked_command.commands().run(
                self.command(*words)[len(COMMAND) :],
                environment=self.environment,
                directory=self.instances.parent,
            )
        assert found.returncode == code, (found.returncode, found.stdout, found.stderr)
        assert "Traceback" not in found.stderr
        return found

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.run(*words, "-f", "json", code=code).stdout)

    def cache(self, image: str = IMAGE) -> None:
        self.run("image", "cache", image, "--file", str(self.data), "--digest", self.digest)


@pytest.fixture
def cli(tmp_path: pathlib.Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def installed(tmp_path: pathlib.Path) -> Cli:
    return Cli(tmp_path, installed=True)


def test_names_of_files_that_are_no_text_stop_no_table_and_move_no_cursor(cli: Cli) -> None:
    cli.cache()
    odd = "od\nd \x1b[31m\udcff"
    (cli.instances / odd).mkdir()
    base = hashlib.sha1(IMAGE.encode()).hexdigest()
    (cli.instances / odd / "disk").symlink_to(cli.instances / "_base" / base)
    (cli.instances / "_base" / odd).touch()
    report = cli.instances.parent / "report.json"
    report.write_text("[]")
    for form in ("table", "csv", "value", "json"):
        found = cli.run("cache", "verify", "--instances", str(report), "-f", form, code=10)
        assert r"od\nd \x1b[31m\udcff" in found.stderr
        assert "\x1b" not in found.stderr
    assert "Traceback" not in cli.run("cache", "audit", "-f", "csv", code=10).stdout


def test_an_image_is_cached_listed_shown_pinned_and_evicted(installed: Cli) -> None:
    arguments = ("image", "cache", IMAGE, "--file", str(installed.data), "--digest", installed.digest)
    assert installed.json(*arguments) == [{"image": IMAGE, "result": "cached", "reason": None}]
    assert installed.json(*arguments) == [{"image": IMAGE, "result": "existing", "reason": None}]
    (listed,) = installed.json("image", "list", "--long")
    assert (listed["image"], listed["size"], listed["digest"]) == (IMAGE, 2**20, installed.digest)
    installed.run("image", "pin", IMAGE, "--for", "7d", "--owner", "night-shift")
    shown = installed.json("image", "show", IMAGE)
    assert shown["origin"] == "fetched"
    (pin,) = shown["pins"]
    assert (pin["owner"], pin["until"][:2]) == ("night-shift", "20")
    (reason,) = [each for each in shown["reasons"] if each["code"] == "pinned"]
    assert (reason["owner"], reason["until"]) == ("night-shift", pin["until"])
    assert "night-shift" in installed.run("image", "evict", IMAGE, code=12).stderr
    installed.run("image", "unpin", IMAGE, "--owner", "night-shift")
    installed.run("image", "evict", IMAGE)
    assert installed.json("image", "list") == []


def test_columns_can_be_chosen_for_scripts(cli: Cli) -> None:
    cli.cache()
    assert cli.run("image", "list", "-f", "value", "-c", "Image").stdout == f"{IMAGE}\n"


def test_a_disk_is_made_and_kept(cli: Cli) -> None:
    target = cli.instances / "vm/disk"
    source = ("--file", str(cli.data))
    disk = cli.json("disk", "create", IMAGE, str(target), "--size", "1G", *source)
    assert (disk["format"], disk["virtual_size"], disk["target"]) == ("qcow2", 2**30, str(target))
    assert "exists already" in cli.run("disk", "create", IMAGE, str(target), *source, code=8).stderr
    grown = cli.json("disk", "create", IMAGE, str(target), "--size", "2G", "--reuse", *source)
    assert grown["virtual_size"] == 2**31
    too_small = cli.instances / "vm/small"
    cli.run("disk", "create", IMAGE, str(too_small), "--size", "1K", *source, code=8)
    assert not too_small.exists()


def test_verify_only_says_what_it_would_do(cli: Cli, tmp_path: pathlib.Path) -> None:
    cli.cache()
    base = cli.instances / "_base" / hashlib.sha1(IMAGE.encode(), usedforsecurity=False).hexdigest()
    for path in (base, cli.instances / "_base/.imagecache/records" / f"{base.name}.json"):
        os.utime(path, (0, 0))
    nobody = tmp_path / "nobody.json"
    nobody.write_text("[]")
    unknown = cli.run("cache", "verify", "--evict", code=10)
    assert "--instances" in unknown.stderr
    assert base.exists()
    (fate,) = cli.json("cache", "verify", "--instances", str(nobody))
    assert fate["fate"] == "would be evicted"
    assert base.exists()
    (fate,) = cli.json("cache", "verify", "--instances", str(nobody), "--evict")
    assert fate["fate"] == "evicted"
    assert not base.exists()


def test_a_pass_leaves_its_figures_for_prometheus(cli: Cli, tmp_path: pathlib.Path) -> None:
    cli.cache()
    figures = tmp_path / "imagecache.prom"
    assert "--evict" in cli.run("cache", "verify", "--textfile", str(figures), code=2).stderr
    assert not figures.exists()
    cli.run("cache", "verify", "--evict", "--textfile", str(figures), code=10)
    assert "\nimagecache_bases 1.0\n" in figures.read_text()
    assert "\nimagecache_problems 1.0\n" in figures.read_text()


def test_what_instances_use_stays_and_is_explained(cli: Cli, tmp_path: pathlib.Path) -> None:
    cli.cache()
    report = tmp_path / "instances.json"
    report.write_text(json.dumps([{"uuid": "u-1", "host": "elsewhere", "images": [IMAGE]}]))
    (fate,) = cli.json("cache", "verify", "--evict", "--instances", str(report))
    assert (fate["fate"], "u-1" in fate["reason"]) == ("kept", True)
    explained = cli.json("image", "explain", IMAGE, "--instances", str(report))
    assert explained["next_pass"] == "keeps it"
    assert any("u-1" in line for line in explained["kept_by"])
    assert any("too young" in line for line in explained["kept_by"])
    assert len(explained["kept_by"]) == len(explained["to_change_that"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"uuid": "u"}]',
        '[{"uuid": "u", "host": ""}]',
        '[{"uuid": "u", "host": "h", "image": []}]',
        '[{"uuid": "u", "host": "h", "images": "one"}]',
    ],
)
def test_a_report_that_is_none_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    report = tmp_path / "instances.json"
    report.write_text(text)
    with pytest.raises(errors.ConfigError, match="report of instances"):
        read_instances(str(report))


def test_a_report_names_everything_that_an_instance_has(tmp_path: pathlib.Path) -> None:
    report = tmp_path / "instances.json"
    fields = {"uuid": "u", "host": "h", "images": ["i"], "directories": ["d"], "swap_mb": 512}
    report.write_text(json.dumps([{**fields, "ephemerals": [{"size_gb": 10, "fs": "ext4"}]}]))
    (found,) = read_instances(str(report)) or ()
    assert (found.images, found.directories, found.swap_mb) == (("i",), ("d",), 512)
    assert found.ephemerals == (model.Ephemeral(10, fs="ext4"),)


def test_usage_counts_what_is_there(cli: Cli) -> None:
    cli.cache()
    usage = cli.json("cache", "usage")
    assert usage["base_images"] == 1
    assert usage["taken_from_instances"] >= usage["base_images_on_disk"] >= 2**20


def test_check_says_what_to_do(cli: Cli) -> None:
    found = cli.json("cache", "check")
    assert not [each for each in found if each["severity"] == "error"]
    assert list(cli.instances.iterdir()) == [cli.instances / "vm"]
    (cli.instances / "vm").rmdir()
    cli.instances.rmdir()
    (finding,) = cli.json("cache", "check", code=10)
    assert finding["severity"] == "error"
    assert finding["what_to_do"].startswith("Create")


def test_audit_finds_a_disk_without_its_base_and_changes_nothing(cli: Cli) -> None:
    assert cli.json("cache", "audit") == []
    missing = cli.instances / "_base" / ("0" * 40)
    missing.parent.mkdir()
    disk = cli.instances / "vm" / "disk"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", str(missing)]
    subprocess.run([*words, str(disk), "1M"], check=True)
    before = sorted(cli.instances.rglob("*"))
    (finding,) = cli.json("cache", "audit", code=10)
    assert (finding["severity"], finding["subject"]) == ("error", str(disk))
    assert missing.name in finding["finding"]
    assert sorted(cli.instances.rglob("*")) == before


def test_hosts_are_listed_and_forgotten(cli: Cli) -> None:
    (host,) = cli.json("host", "list")
    assert host["is_this"] is True
    assert "imagecache host list" in cli.run("host", "forget", "nobody", code=3).stderr
    cli.run("host", "forget", host["id"])


def test_errors_are_one_line_and_have_a_code(cli: Cli, tmp_path: pathlib.Path) -> None:
    cases = (
        (("image", "cache", IMAGE), 7, "OS_AUTH_URL"),
        (("image", "cache", IMAGE, "--file", str(tmp_path / "gone")), 3, "not there"),
        (("image", "cache", IMAGE, "--file", str(cli.data), "--digest", "sha512:" + "0" * 128), 4, "sha512"),
        (("image", "cache", "a", "b", "--file", str(cli.data)), 2, "one image"),
        (("image", "show", IMAGE), 3, "not in the cache"),
        (("disk", "create", IMAGE, str(tmp_path / "no/such/disk"), "--file", str(cli.data)), 7, "directory"),
        (("image", "pin", IMAGE, "--for", "soon"), 2, "not a duration"),
    )
    for words, code, said in cases:
        stderr = cli.run(*words, code=code).stderr
        assert said in stderr, words
        if code != 2:
            assert len([line for line in stderr.splitlines() if "error:" in line]) == 1


def test_a_traceback_only_for_those_who_ask(cli: Cli) -> None:
    words = cli.command("--debug", "image", "show", IMAGE)
    found = subprocess.run(words, capture_output=True, text=True, env=cli.environment, check=False)
    assert (found.returncode, "Traceback" in found.stderr) == (3, True)


def test_one_bad_image_does_not_stop_the_others(cli: Cli) -> None:
    found = cli.run(
        "image", "cache", "a", "b", "--glance-endpoint", "http://127.0.0.1:9", "-f", "value", code=5
    )
    assert [line.split()[:2] for line in found.stdout.splitlines()] == [["a", "error"], ["b", "error"]]


def test_a_source_is_found_by_its_entry_point(cli: Cli, tmp_path: pathlib.Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(json.dumps({IMAGE: {"path": str(cli.data), "digest": cli.digest}}))
    words = ("image", "cache", IMAGE, "--source", "file", "--source-option", f"table={table}")
    assert cli.json(*words) == [{"image": IMAGE, "result": "cached", "reason": None}]


def test_another_package_brings_a_source(installed: Cli, tmp_path: pathlib.Path) -> None:
    package = tmp_path / "site"
    (package / "theirs-1.dist-info").mkdir(parents=True)
    (package / "theirs-1.dist-info" / "METADATA").write_text("Name: theirs\nVersion: 1\n")
    (package / "theirs-1.dist-info" / "entry_points.txt").write_text(
        "[imagecache_lib.sources]\ntheirs = theirs:Source\nbroken = theirs:Broken\nodd = theirs:Odd\n"
    )
    (package / "theirs.py").write_text(
        "from imagecache_lib.sources.file import FileImage, FileSource\n"
        "class Source(FileSource):\n"
        "    @classmethod\n"
        "    def from_options(cls, options):\n"
        "        assert options['secret'] == 'sesame'\n"
        "        return cls({options['image']: FileImage(options['path'])})\n"
        "class Broken(FileSource):\n"
        "    from_options = classmethod(lambda cls, options: options['missing'])\n"
        "class Odd:\n"
        "    from_options = classmethod(lambda cls, options: 5)\n"
    )
    installed.environment |= {"PYTHONPATH": str(package), "THEIRS": "sesame"}
    options = ("secret=env:THEIRS", f"image={IMAGE}", f"path={installed.data}")
    words = [word for option in options for word in ("--source-option", option)]
    found = installed.json("image", "cache", IMAGE, "--source", "theirs", *words)
    assert found == [{"image": IMAGE, "result": "cached", "reason": None}]
    for name, text in (("broken", "KeyError"), ("odd", "no image source"), ("absent", "theirs")):
        assert text in installed.run("image", "cache", IMAGE, "--source", name, code=7).stderr


def test_options_of_sources_are_checked(cli: Cli, tmp_path: pathlib.Path) -> None:
    for words, code, text in (
        (("--source", "file"), 7, "table"),
        (("--source", "file", "--source-option", "table"), 2, "KEY=VALUE"),
        (("--source", "file", "--source-option", "color=red"), 7, "color"),
        (("--source", "file", "--source-option", "table=env:NOT_SET"), 7, "NOT_SET"),
        (("--source", "file", "--source-option", f"table={tmp_path}/none"), 7, "No such file"),
        (("--file", str(cli.data), "--source-option", "a=b"), 2, "--source"),
    ):
        assert text in cli.run("image", "cache", IMAGE, *words, code=code).stderr


def test_the_configuration_is_oslo_configs(cli: Cli, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "nova.conf"
    file.write_text("[DEFAULT]\nuse_cow_images = false\n[image_cache]\nsubdirectory_name = _images\n")
    words = ("--config-file", str(file), "disk", "create", IMAGE, str(cli.instances / "vm/disk"))
    assert cli.json(*words, "--file", str(cli.data))["format"] == "raw"
    assert (cli.instances / "_images").is_dir()
    cli.run("--config-file", str(tmp_path / "none.conf"), "image", "list", code=7)


def test_bash_completes_it(cli: Cli) -> None:
    assert "complete -F _imagecache imagecache" in cli.run("complete").stdout
    cli.cache()
    for words, wanted in (
        (("im",), "image"),
        (("image", "l"), "list"),
        (("image", "list", "--fi"), "--filter"),
        (("image", "evict", "1"), IMAGE),
    ):
        assert cli.run("complete", "--words", "--", *words).stdout.splitlines() == [wanted], words


def test_help_without_a_command(cli: Cli) -> None:
    found = subprocess.run(COMMAND, capture_output=True, text=True, env=cli.environment, check=False)
    assert found.returncode == 0
    assert "cache verify" in found.stdout


def test_without_a_terminal_progress_is_plain_lines(cli: Cli) -> None:
    stderr = cli.run("image", "cache", IMAGE, "--file", str(cli.data)).stderr
    assert "\r" not in stderr
    assert f"Image {IMAGE} fetched" in stderr
    assert cli.run("-q", "image", "cache", "other", "--file", str(cli.data)).stderr == ""


def test_on_a_terminal_progress_is_one_line(cli: Cli) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        cli.command("image", "cache", IMAGE, "--file", str(cli.data)),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=cli.environment,
    ) as running:
        os.close(theirs)
        said = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux says EIO once the other end is closed
                break
            if not chunk:
                break
            said += chunk
    os.close(ours)
    assert running.returncode == 0
    assert b"\r11111111-aaaa: 100 %" in said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_has_rate_and_time_left() -> None:
    now = [0.0]
    for stream, wanted in (
        (Terminal(), "i:  50 %  512.0 MiB of 1.0 GiB  25.6 MiB/s, 20 s left"),
        (io.StringIO(), "i:  50 %  512.0 MiB of 1.0 GiB  25.6 MiB/s, 20 s left\n"),
    ):
        observer = ProgressObserver(stream, clock=lambda: now[0])
        now[0] = 0.0
        observer(events.Progress("n", "i", received=0, total=2**30))
        now[0] = 20.0
        observer(events.Progress("n", "i", received=2**29, total=2**30))
        assert stream.getvalue().endswith(wanted), stream.getvalue()
