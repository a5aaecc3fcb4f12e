# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows of the commands is what they print."""

from __future__ import annotations

import unittest

from imagecache_lib.cli.main import COMMANDS
from tests.support import needs, printed

#: Commands that print what a shell reads, or what the help of each command is.
ELSEWHERE = {"complete", "help"}


class OutputPageTest(unittest.TestCase):
    def setUp(self) -> None:
        self.text = printed.PAGE.read_text()

    def test_each_command_is_shown(self) -> None:
        shown = [line.command.removeprefix("imagecache ") for line in printed.lines_of(self.text)]
        for command in sorted(set(COMMANDS) - ELSEWHERE):
            self.assertTrue(any(line.startswith(command) for line in shown), command)

    def test_commands_print_what_is_shown(self) -> None:
        needs.program("qemu-img")
        for line, said in printed.run_again(self.text):
            with self.subTest(line.command):
                now, then = printed.comparable(said), printed.comparable(line.shown)
                if line.command == "imagecache cache check":
                    # What else it finds depends on the machine that runs the tests.
                    self.assertLessEqual(set(then), set(now))
                elif line.command.startswith(("imagecache agent", "imagecache precache start")):
                    # They are threads that speak when they come to it.
                    self.assertEqual(sorted(then), sorted(now))
                else:
                    self.assertEqual(then, now, "make output")
