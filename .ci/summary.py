# SPDX-License-Identifier: Apache-2.0
"""Count what ran: ``summary.py RESULTS EXPECTED... -- SAID FAILED_STEP...``.

``RESULTS`` has a directory for each machine, or environment, that tests ran in. There lie pytest's junit
reports, stestr's streams, a line about the machine beside each, and the name of what ran when a process died
or was interrupted. EXPECTED is ``MACHINE:SUITE,SUITE...``, where ``testpaths`` stands for the suites of
pyproject.toml. ``SAID`` has what each step said, and FAILED_STEP is ``STEP: OUTCOME``.

What fails it: an expected suite that ran nothing; a test that was to run and left no trace; in CI, a skip
that is not in :data:`SKIPS`; a Python that setup.cfg claims and nothing ran with; what came to no end; a
failed step, whose end is shown, since not all that fails is a test. A test that failed and passed when
again.py ran it once more has passed, and is named. The last lines are those to look at: what each test said
that failed, and then their names alone, since no more than the end may be kept.
"""

from __future__ import annotations

import collections
import configparser
import dataclasses
import os
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import subunit
import testtools

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: What may be skipped in CI, by the reason that the test gives, and why.
SKIPS = {
    "this test case cannot fill its storage": "the contract runs on small filesystems in tests/functional",
    "a disk that shares its base's blocks needs no room": "that is tested where nothing is shared",
    "no cache has an image without a byte": "the contract's question has no meaning for a peer",
    "the release before is not in the history of this checkout": "a shallow clone has none, any other does",
    "a tracer's own locks would be interrupted": "it runs wherever coverage is not measured",
    "make campaigns boots these guests, for minutes": "the others of their file boot here",
    "make campaigns logs in at a real Keystone": "tests/commands logs in at services that are made up",
    "the installed qemu-img does not make this": "which options there are differs between releases of QEMU",
}


#: How much of what a failed test said is shown, in lines and in characters, and of how many tests.
SHOWN_LINES, SHOWN_CHARACTERS, SHOWN_TESTS = 25, 2500, 20


@dataclasses.dataclass
class Count:
    """The tests of one suite on one machine, and why some were skipped.

    :param failures: by their names, what those said that failed.
    :param doubtful: by their names, what those said at first that passed when they ran once more.
    :param missing: tests that were to run and left no trace: their process died. They count as failed.
    """

    passed: int = 0
    missing: int = 0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    doubtful: dict[str, str] = dataclasses.field(default_factory=dict)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def failed(self) -> int:
        return len(self.failures) + self.missing

    @property
    def skipped(self) -> int:
        return self.reasons.total()

    def run_again(self, second: Count) -> None:
        """Take in what became of failed tests that ran once more."""
        if second.passed == len(self.failures) and not second.failures and not second.reasons:
            self.passed += second.passed
            self.doubtful, self.failures = self.failures, {}


#: By machine and suite.
Counts = collections.defaultdict[tuple[str, str], Count]


def suite_of(test: str, report: pathlib.Path) -> str:
    """Return the suite that has a test: ``unit`` for ``tests.unit.test_x.Class``."""
    found = re.search(r"\btests\.(\w+)\.", test)
    return found[1] if found else report.stem


def count_junit(path: pathlib.Path, machine: str, counts: Counts) -> None:
    for case in ElementTree.parse(path).iter("testcase"):
        # Where a module cannot be imported, its name stands in the other attribute.
        name = f"{case.get('classname') or ''}.{case.get('name')}".removeprefix(".")
        count = counts[machine, suite_of(name, path)]
        skip = case.find("skipped")
        if said := [each.text or "" for tag in ("failure", "error") for each in case.iter(tag)]:
            count.failures[name] = "\n".join([*filter(None, [count.failures.get(name)]), *said])
        elif skip is not None:
            count.reasons[skip.get("message") or "no reason given"] += 1
        else:
            count.passed += 1


def count_subunit(path: pathlib.Path, machine: str, counts: Counts) -> None:
    seen: set[str] = set()

    def add(test: dict[str, Any]) -> None:
        status = test["status"]
        seen.add(test["id"])
        count = counts[machine, suite_of(test["id"], path)]
        if status in ("success", "xfail"):
            count.passed += 1
        elif status == "skip":
            reason = test["details"].get("reason")
            count.reasons[reason.as_text().strip() if reason else "no reason given"] += 1
        elif status != "exists":
            count.failures[test["id"]] = "\n".join(each.as_text() for each in test["details"].values())

    with path.open("rb") as stream:
        sink = testtools.StreamToDict(add)
        sink.startTestRun()
        subunit.ByteStreamToStreamResult(stream).run(sink)
        sink.stopTestRun()
    listed = set(path.with_suffix(".listed").read_text().split())
    skipped_classes = tuple(_class_of(test) for test in seen if test.startswith("setUpClass "))
    for test in listed - seen:
        if not test.startswith(skipped_classes):
            count = counts[machine, suite_of(test, path)]
            count.missing += 1


def _class_of(set_up: str) -> str:
    """Return the prefix of the ids of a class's tests, of ``setUpClass (package.module.Class)``."""
    return set_up.partition("(")[2].rstrip(")") + "."


def read(results: pathlib.Path) -> Counts:
    """Count all reports."""
    counts: Counts = collections.defaultdict(Count)
    again: Counts = collections.defaultdict(Count)
    for suffix, reader in (("xml", count_junit), ("subunit", count_subunit)):
        for path in sorted(results.glob(f"*/*.{suffix}")):
            if path.stat().st_size:
                reader(path, path.parent.name, again if path.name.endswith(".again.xml") else counts)
    for where, second in again.items():
        counts[where].run_again(second)
    return counts


def expected_suites(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield machines and suites of the command line's words."""
    pytest_options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    testpaths = [path.removeprefix("tests/") for path in pytest_options["testpaths"]]
    for argument in arguments:
        machine, _, suites = argument.partition(":")
        for suite in suites.split(","):
            yield from ((machine, each) for each in (testpaths if suite == "testpaths" else [suite]))


def unproven_pythons(results: pathlib.Path) -> list[str]:
    """Return the Pythons that setup.cfg claims, and that no machine had where all testpaths ran."""
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read(ROOT / "setup.cfg")
    claimed = re.findall(r"Python :: (3\.\d+)$", metadata["metadata"]["classifier"], re.MULTILINE)
    told = "".join(path.read_text() for path in results.glob("*/parallel.machine"))
    return [version for version in claimed if f"Python {version}." not in told]


def show(counts: Counts, results: pathlib.Path) -> None:
    machines = dict.fromkeys(machine for machine, _suite in counts)
    for machine in machines:
        told = {path.read_text().strip() for path in (results / machine).glob("*.machine")}
        print(f"{machine}: {'; '.join(sorted(told)) or 'says nothing about itself'}")
        for (where, suite), count in counts.items():
            if where == machine:
                print(
                    f"  {suite:<12}{count.passed:>6} passed{count.failed:>6} failed{count.skipped:>6} skipped"
                )
                for reason, times in count.reasons.most_common():
                    print(f"      skipped {times}: {reason}")


def problems(
    counts: Counts, results: pathlib.Path, expected: list[str], failed_steps: list[str]
) -> Iterator[str]:
    """Yield what fails the run, beside failed tests."""
    for machine, suite in expected_suites(expected):
        count = counts.get((machine, suite), Count())
        if not count.passed + count.failed:
            yield f"{machine}: {suite} ran nothing"
    for (machine, suite), count in counts.items():
        if count.missing:
            yield f"{machine}: {count.missing} tests of {suite} were to run and did not: their process died"
        if os.environ.get("CI"):
            for reason in sorted(set(count.reasons) - set(SKIPS)):
                yield f"{machine}: {suite} skipped for a reason that is not in .ci/summary.py: {reason}"
    for version in unproven_pythons(results):
        yield f"setup.cfg claims Python {version}, and nothing ran with it"
    for path in sorted(results.glob("*/*.running")):
        yield f"{path.parent.name}: came to no end: {path.read_text().strip()}"
    for step in failed_steps:
        yield f"step failed: {step}"


def show_tests(tests: list[tuple[str, str, str]]) -> None:
    """Show the ends of what tests said, which name the line and the values that differ."""
    for machine, name, said in tests[:SHOWN_TESTS]:
        print(f"\n-- {machine}: {name}")
        print(_end(said))
    if len(tests) > SHOWN_TESTS:
        print(f"\nand {len(tests) - SHOWN_TESTS} more")


def show_steps(steps: list[str], said: pathlib.Path) -> None:
    """Show the ends of what failed steps said, in which no test need have failed."""
    for step in steps:
        path = said / f"{step.partition(':')[0]}.log"
        print(f"\n-- the end of step {step}")
        if path.exists():
            print(_end(path.read_text(errors="replace")))


def _end(said: str) -> str:
    return "\n".join(said.strip().splitlines()[-SHOWN_LINES:])[-SHOWN_CHARACTERS:]


def main(arguments: list[str]) -> int:
    separator = arguments.index("--")
    results, expected = pathlib.Path(arguments[0]), arguments[1:separator]
    said, failed_steps = pathlib.Path(arguments[separator + 1]), arguments[separator + 2 :]
    counts = read(results)
    show(counts, results)
    found = list(problems(counts, results, expected, failed_steps))
    print(*found, sep="\n")
    doubtful, failures = [], []
    for (machine, _suite), count in counts.items():
        doubtful += [(machine, *test) for test in count.doubtful.items()]
        failures += [(machine, *test) for test in count.failures.items()]
    if doubtful:
        print(f"WARNING: {len(doubtful)} passed only when they ran once more, and are to be mended:")
        show_tests(doubtful)
    show_steps(failed_steps, said)
    if failures:
        print("failed:")
        show_tests(failures)
        print()
        for machine, name, _said in failures[:SHOWN_TESTS]:
            print(f"failed: {machine}: {name}")
    passed, failed, skipped = (
        sum(getattr(count, what) for count in counts.values()) for what in ("passed", "failed", "skipped")
    )
    failed = failed or len(found)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
