# SPDX-License-Identifier: Apache-2.0
"""What a command logs, on a terminal and in the journal."""

from __future__ import annotations

import logging
import os
import tempfile
import unittest

from imagecache_lib import events
from imagecache_lib.cli import parsing
from imagecache_lib.observers.log import LogObserver


class LoggedTest(unittest.TestCase):
    def test_the_journal_is_told_each_lines_level(self) -> None:
        shown = {
            level: parsing.JournalFormatter().format(
                logging.LogRecord("n", level, "", 0, "one\ntwo %s", ("three",), None)
            )
            for level in (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
        }
        self.assertEqual("<3>one\n<3>two three", shown[logging.ERROR])
        self.assertEqual(["<3>", "<4>", "<6>", "<7>"], [each[:3] for each in shown.values()])

    def test_the_journal_is_the_stream_that_systemd_names(self) -> None:
        with tempfile.TemporaryFile("w") as stream:
            found = os.fstat(stream.fileno())
            self.assertTrue(parsing.is_journal(stream, f"{found.st_dev}:{found.st_ino}"))
            self.assertFalse(parsing.is_journal(stream, f"{found.st_dev}:{found.st_ino + 1}"))
            self.assertFalse(parsing.is_journal(stream, ""))

    def test_details_are_words_and_no_objects(self) -> None:
        with self.assertLogs("imagecache_lib.observers.log", "DEBUG") as logged:
            LogObserver()(events.Miss("f180", "an-image", reason="it is not in the cache"))
        self.assertEqual(
            ["Miss: name f180, image id an-image, reason it is not in the cache"],
            [record.getMessage() for record in logged.records],
        )
