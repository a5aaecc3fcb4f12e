# SPDX-License-Identifier: Apache-2.0
"""The tests. CONTRIBUTING.rst says what each directory is for."""

from __future__ import annotations

import pathlib
import unittest

from tests.support import execve_rule

HERE = pathlib.Path(__file__).parent

#: Directories whose tests need nothing but the machine. The others are pytest's alone.
UNITTEST_SUITES = ("unit", "flows", "contract", "property")


def load_tests(
    loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None
) -> unittest.TestSuite:
    """Tell unittest's discovery, which is stestr's, where to look."""
    for suite in UNITTEST_SUITES:
        found = loader.discover(
            str(HERE / suite), pattern=pattern or "test*.py", top_level_dir=str(HERE.parent)
        )
        tests.addTests(found)
    return tests


# All that the tests make the library run is held to it.
execve_rule.install()
execve_rule.install_in_children()
