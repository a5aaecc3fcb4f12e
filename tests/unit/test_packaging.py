# SPDX-License-Identifier: Apache-2.0
"""What packagers and type checkers rely on."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LICENSE_LINE = "# SPDX-License-Identifier: Apache-2.0"
HEAVY = ("requests", "oslo_config", "keystoneauth1", "cliff", "oslo_messaging", "prometheus_client")


class TreeTest(unittest.TestCase):
    def test_every_python_file_says_its_license_first(self) -> None:
        missing = [
            str(path.relative_to(ROOT))
            for top in ("imagecache_lib", "tests", "benchmarks", "examples", "tools", "doc/source")
            for path in sorted((ROOT / top).rglob("*.py"))
            if not path.read_text().startswith(LICENSE_LINE)
        ]
        self.assertEqual([], missing)

    def test_the_package_tells_type_checkers_that_it_is_typed(self) -> None:
        self.assertTrue((ROOT / "imagecache_lib/py.typed").is_file())

    def test_importing_the_package_loads_nothing_heavy(self) -> None:
        # A virt driver imports us in every compute service, used or not.
        program = f"import sys, imagecache_lib; print([m for m in {HEAVY!r} if m in sys.modules])"
        output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
        self.assertEqual("[]", output.strip())
