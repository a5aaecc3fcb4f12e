# SPDX-License-Identifier: Apache-2.0
"""What packagers and type checkers rely on."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import imagecache_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
LICENSE_LINE = "# SPDX-License-Identifier: Apache-2.0"
#: What listing needs none of: HTTP, inspectors, running programs, what makes disks, decodes and scrubs.
UNLISTED = (
    "imagecache_lib.backends",
    "imagecache_lib.formats.program",
    "imagecache_lib.ingest",
    "imagecache_lib.upkeep.scrub",
    "oslo_concurrency",
    "oslo_utils",
    "requests",
)
HEAVY = ("requests", "oslo_config", "keystoneauth1", "cliff", "oslo_messaging", "prometheus_client")


class TreeTest(unittest.TestCase):
    def test_every_python_file_says_its_license_first(self) -> None:
        missing = [
            str(path.relative_to(ROOT))
            for top in ("imagecache_lib", "tests", "benchmarks", "examples", "tools", "doc/source")
            for path in sorted((ROOT / top).rglob("*.py"))
            if not path.read_text().removeprefix("#!/usr/bin/python3\n").startswith(LICENSE_LINE)
        ]
        self.assertEqual([], missing)

    def test_the_package_tells_type_checkers_that_it_is_typed(self) -> None:
        self.assertTrue((ROOT / "imagecache_lib/py.typed").is_file())

    def test_the_command_says_in_one_line_which_extra_it_lacks(self) -> None:
        program = (
            "import sys; sys.modules['cliff'] = None; from imagecache_lib import cli; sys.exit(cli.run())"
        )
        command = [sys.executable, "-c", program]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        self.assertEqual((1, ""), (finished.returncode, finished.stdout))
        self.assertEqual("imagecache: cliff is not installed; install imagecache-lib[cli]\n", finished.stderr)

    def test_shells_and_the_documentation_see_every_public_name(self) -> None:
        self.assertLessEqual(set(imagecache_lib.__all__), set(dir(imagecache_lib)))

    def test_importing_the_package_loads_nothing_heavy(self) -> None:
        # A virt driver imports us in every compute service, used or not.
        program = f"import sys, imagecache_lib; print([m for m in {HEAVY!r} if m in sys.modules])"
        output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
        self.assertEqual("[]", output.strip())

    def test_a_command_that_lists_loads_only_what_lists(self) -> None:
        # Operators run it in loops, and shells while they complete a line.
        with tempfile.TemporaryDirectory() as instances:
            program = (
                "import sys; from imagecache_lib.cli import run; "
                f"sys.argv[1:] = ['--instances-path', {instances!r}, 'image', 'list', '-f', 'value']; "
                f"code = run(); print([m for m in {UNLISTED!r} if m in sys.modules]); sys.exit(code)"
            )
            output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
        self.assertEqual("[]", output.strip())


class ContainerTest(unittest.TestCase):
    """Building it takes a registry; what it is made of can be compared without."""

    def setUp(self) -> None:
        text = (ROOT / "examples/container/Containerfile").read_text()
        joined = re.sub(r"\\\n\s*", "", text)
        self.lines = [line for line in joined.splitlines() if line and not line.startswith("#")]

    def test_each_line_is_an_instruction(self) -> None:
        known = {"FROM", "RUN", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}
        self.assertEqual(set(), {line.split()[0] for line in self.lines} - known)

    def test_it_has_the_extras_and_the_programs_of_the_debian_package(self) -> None:
        rules = (ROOT / "debian/rules").read_text()
        (extras,) = re.findall(r"^EXTRAS := (.*)$", rules, re.MULTILINE)
        self.assertIn(f"'/src[{extras}]'", " ".join(self.lines))
        (depends,) = re.findall(r"^Depends: (.*)$", (ROOT / "debian/control").read_text(), re.MULTILINE)
        programs = {name for name in depends.split(", ") if not name.startswith("$")}
        installing = [line for line in self.lines if "apt-get install" in line]
        self.assertLessEqual(programs, set(installing[-1].split()))
