# SPDX-License-Identifier: Apache-2.0
"""Run the tests once more that failed in CI: ``again.py STATUS REPORT``, of pytest and its junit report.

For suites that are not there to show races: a busy machine may keep a server or a program from an answer in
time. What fails twice fails. What passes now is counted as passed, and .ci/summary.py names it with what it
said at first: a test that fails sometimes is to be mended, and may tell of a race in the library. Outside of
CI, where more than a few failed, and after a run that did not come to its end, none runs again.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from xml.etree import ElementTree

#: pytest ran all tests, and some failed.
FAILED = 1

#: More than these have another reason than a machine that is busy.
MOST = 4


def failed_tests(report: pathlib.Path) -> Iterator[str]:
    """Yield the ids of the tests of a report that failed, as pytest takes them. Some may come twice."""
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            file, name = case.get("file"), case.get("name")
            if not file:
                # A module that cannot be imported has neither file nor tests.
                yield (case.get("name") or "").replace(".", "/") + ".py"
                continue
            module = file.removesuffix(".py").replace("/", ".")
            in_class = (case.get("classname") or "").removeprefix(module).strip(".")
            yield "::".join(filter(None, [file, *in_class.split("."), name]))


def main(status: int, report: pathlib.Path) -> int:
    # A test that took too long ended pytest with the same status, and there is no report.
    if not os.environ.get("CI") or status != FAILED or not report.exists():
        return status
    failed = list(dict.fromkeys(failed_tests(report)))
    if not 0 < len(failed) <= MOST:
        return status
    print(f"\n{len(failed)} failed, and run once more:", *failed, sep="\n  ", flush=True)
    pytest = (sys.executable, "-m", "pytest", "-q", f"--junitxml={report.with_suffix('.again.xml')}")
    return subprocess.run([*pytest, *failed], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), pathlib.Path(sys.argv[2])))
