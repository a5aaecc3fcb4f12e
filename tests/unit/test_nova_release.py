# SPDX-License-Identifier: Apache-2.0
"""The driver for Nova and whatever it is tested with are of one release of Nova."""

from __future__ import annotations

import ast
import pathlib
import re
import tomllib
import unittest

ROOT = pathlib.Path(__file__).parent.parent.parent
INTEGRATION = ROOT / "integrations/nova"


def release_of_the_driver() -> str:
    """Return the release that the driver starts under. Its module cannot be imported without Nova."""
    module = ast.parse((INTEGRATION / "nova/virt/imagecachelib/checks.py").read_text())
    (found,) = (
        node.value.value
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "TESTED"
        and isinstance(node.value, ast.Constant)
    )
    assert isinstance(found, str)
    return found


class NovaReleaseTest(unittest.TestCase):
    def test_the_wheel_has_the_number_of_the_release_that_it_starts_under_and_demands_it(self) -> None:
        project = tomllib.loads((INTEGRATION / "pyproject.toml").read_text())["project"]
        self.assertEqual(release_of_the_driver(), project["version"].split(".")[0])
        self.assertIn(f"nova=={release_of_the_driver()}.*", project["dependencies"])

    def test_it_is_tested_and_measured_with_that_release(self) -> None:
        lists = [
            *(ROOT / "tests/lab").glob("nova*requirements.txt"),
            ROOT / "benchmarks/nova-requirements.txt",
        ]
        self.assertGreater(len(lists), 3)
        for path in lists:
            pinned = re.findall(r"^nova==(\d+)\.", path.read_text(), re.MULTILINE)
            self.assertEqual([release_of_the_driver()], pinned, path.name)

    def test_the_documented_package_has_that_number(self) -> None:
        page = (ROOT / "doc/source/admin/with-nova.rst").read_text()
        self.assertEqual([release_of_the_driver()], re.findall(r"^    Version: (\d+)\.", page, re.MULTILINE))
