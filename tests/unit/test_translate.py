# SPDX-License-Identifier: Apache-2.0
"""What the kernel says is told as what an operator has to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import unittest

from imagecache_lib import errors
from imagecache_lib.system.translate import translated


class TestTranslation(unittest.TestCase):
    def told(self, number: int) -> errors.ImageCacheError:
        with self.assertRaises(errors.ImageCacheError) as caught, translated("/disk"):
            raise OSError(number, os.strerror(number))
        return caught.exception

    def test_a_full_filesystem_and_a_used_quota_ask_for_room(self) -> None:
        for number, what in ((errno.ENOSPC, "filesystem"), (errno.EDQUOT, "quota")):
            found = self.told(number)
            self.assertIsInstance(found, errors.NoSpaceError)
            self.assertIn(what, found.cause)

    def test_a_limit_is_no_failure_of_a_disk(self) -> None:
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG):
            with self.subTest(errno.errorcode[number]):
                found = self.told(number)
                self.assertIs(errors.BackendError, type(found))
                self.assertIn("ulimit", str(found.next_step))
                self.assertNotIn("fail", found.cause)
        for number in (errno.EIO, errno.EROFS):
            self.assertIn("check the disk", str(self.told(number).next_step))

    def test_the_limit_of_a_files_size_is_named(self) -> None:
        asks = (
            "import os, tempfile; from imagecache_lib.system.translate import translated, errors\n"
            "with tempfile.TemporaryFile() as file:\n"
            "    try:\n"
            "        with translated('/disk'): os.ftruncate(file.fileno(), 2**20)\n"
            "    except errors.BackendError as error: print(error.next_step)"
        )
        command = ["prlimit", "--fsize=65536", "--", sys.executable, "-c", asks]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        self.assertIn("ulimit -f", said)
