# SPDX-License-Identifier: Apache-2.0
"""qemu-img is shut in: shown with a program in its place that tries everything else."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import socket
import tempfile
import unittest
from collections.abc import Iterator
from typing import Any

from imagecache_lib import CacheConfig, System, errors
from imagecache_lib.formats.qemu_img import DiskFile, QemuImg
from imagecache_lib.formats.sandbox import Sandbox
from imagecache_lib.system.waiter import Waiter

_INTRUDER = """\
#!/bin/sh
[ "$1" = --version ] && exit 0
try() { if "$@" 2>/dev/null; then echo "$*" >> {out}; else echo "refused" >> {out}; fi; }
try cat {secret}
try sh -c 'echo x > {beside}'
try sh -c 'echo x >> {source}'
try sh -c 'kill -0 {pid}'
try timeout 5 python3 -c 'import socket; socket.create_connection(("127.0.0.1", {port}), 3)'
try timeout 5 bash -c 'echo > /dev/tcp/127.0.0.1/{port}'
cat {source} > /dev/null && echo "source is readable" >> {out}
"""


@contextlib.contextmanager
def _first_in_path(directory: pathlib.Path) -> Iterator[None]:
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{directory}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


class TestSandbox(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.programs = self.directory / "programs"
        self.programs.mkdir()
        self.host = System(name="here")

    def require_possible(self) -> None:
        problem = Sandbox("qemu-img", self.host).problem()
        if problem and "CI" not in os.environ:
            self.skipTest(problem)
        self.assertEqual("", problem)

    def put(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(script)
        path.chmod(0o755)

    def test_nothing_is_reached_but_the_two_files(self) -> None:
        self.require_possible()
        source, out = self.directory / "source", self.directory / "out"
        secret, beside = self.directory / "secret", self.directory / "beside"
        for path in (source, out, secret):
            path.write_bytes(b"")
        server = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(server.close)
        facts = {
            "out": out,
            "secret": secret,
            "beside": beside,
            "source": source,
            "pid": os.getpid(),
            "port": server.getsockname()[1],
        }
        script = _INTRUDER
        for name, value in facts.items():
            script = script.replace("{" + name + "}", str(value))
        self.put("qemu-img", script)
        with _first_in_path(self.programs), contextlib.suppress(errors.BackendError):  # it changes the size
            qemu_img = QemuImg(CacheConfig(instances_path="/unused"), self.host)
            qemu_img.convert_to_raw(DiskFile(str(source), "raw"), str(out), waiter=Waiter(self.host))
        said = out.read_text().splitlines()
        self.assertEqual(["refused"] * 6 + ["source is readable"], said)
        self.assertFalse(beside.exists())

    def test_a_failure_of_the_moment_is_not_remembered_for_good(self) -> None:
        now, failing = [0.0], [OSError(errno.EMFILE, "Too many open files")]

        def execute(*command: str, **options: Any) -> tuple[str, str]:
            if failing:
                raise failing[0]
            return System().execute(*command, **options)

        self.put("bwrap", "#!/bin/sh\n[ ! -e broken ]\n".replace("broken", str(self.directory / "broken")))
        sandbox = Sandbox("qemu-img", System(name="here", execute=execute, monotonic=lambda: now[0]))
        with _first_in_path(self.programs):
            with self.assertRaisesRegex(errors.BackendError, "no program can be started"):
                sandbox.command(reads=(), writes=())
            failing.clear()
            (self.directory / "broken").touch()
            self.assertIn("does not work here", sandbox.problem())
            (self.directory / "broken").unlink()
            self.assertEqual((), sandbox.command(reads=(), writes=()))
            now[0] += 601
            self.assertIn("bwrap", sandbox.command(reads=(), writes=()))
            (self.directory / "broken").touch()
            now[0] += 601
            self.assertEqual("", sandbox.problem())

    def test_a_host_without_it_works_and_says_so(self) -> None:
        for name in ("prlimit", "timeout", "sh", "head", "tail", "cat", "qemu-img"):
            found = shutil.which(name)
            assert found is not None
            (self.programs / name).symlink_to(found)
        disk = self.directory / "disk"
        disk.write_bytes(bytes(2**20))
        before = os.environ["PATH"]
        os.environ["PATH"] = str(self.programs)
        try:
            qemu_img = QemuImg(CacheConfig(instances_path="/unused"), self.host)
            self.assertIn("not installed", qemu_img.sandbox_problem())
            self.assertEqual(2**20, qemu_img.virtual_size(DiskFile(str(disk), "raw")))
        finally:
            os.environ["PATH"] = before
