# SPDX-License-Identifier: Apache-2.0
"""The rule that all tests keep notices what breaks it."""

from __future__ import annotations

import json
import subprocess
import sys
import unittest

from tests.support import execve_rule
from tests.support.execve_rule import fault_of

_FILE = {"driver": "file", "filename": "/disk"}


def _stated(**node: object) -> str:
    return f"json:{json.dumps(node)}"


class TestRule(unittest.TestCase):
    def test_what_keeps_it(self) -> None:
        base = {"driver": "raw", "file": _FILE, "backing": None}
        for words in (
            ["qemu-img", "--version"],
            ["prlimit", "--", "sh", "qemu-img", "info", _stated(**base)],
            ["qemu-img", "rebase", "-b", "", _stated(driver="qcow2", file=_FILE, backing=base)],
            ["mkfs.ext4", "/disk"],
        ):
            self.assertIsNone(fault_of(words), words)

    def test_what_breaks_it(self) -> None:
        for words in (
            ["qemu-img", "info", "/disk"],
            ["qemu-img", "info", "-f", "qcow2", "/disk"],
            ["qemu-img", "convert", _stated(driver="raw", file=_FILE, backing=None), "/other"],
            ["qemu-img", "info", _stated(driver="qcow2", file=_FILE)],
            ["qemu-img", "info", _stated(file=_FILE, backing=None)],
            ["qemu-img", "info", _stated(driver="qcow2", file="/disk", backing=None)],
            ["qemu-img", "info", _stated(driver="qcow2", file=_FILE, backing={"driver": "raw"})],
            ["qemu-io", "/disk"],
        ):
            self.assertIsNotNone(fault_of(words), words)


class TestChildren(unittest.TestCase):
    def test_a_python_that_a_test_starts_keeps_the_rule(self) -> None:
        # As the library would: the frame that starts the program has its name.
        code = (
            "import os, subprocess, imagecache_lib\n"
            "name = os.path.join(os.path.dirname(imagecache_lib.__file__), 'made_up.py')\n"
            "exec(compile(\"subprocess.run(['qemu-img', 'info', '/disk'])\", name, 'exec'))\n"
        )
        try:
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        finally:
            noted = execve_rule.take_notes()
        self.assertIn("no file is stated", noted)
        self.assertNotEqual(0, child.returncode)
        self.assertIn("Violation", child.stderr)
