# SPDX-License-Identifier: Apache-2.0
"""Count what ran: ``summary.py RESULTS SUITE... -- FAILED_STEP...``.

Reads ``RESULTS/SUITE.xml`` (pytest's junit report) or ``RESULTS/SUITE.subunit`` (stestr's). A suite that ran
nothing, or left no report, counts as a failure; so does a failed step that is not explained by a failed test.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import sys
from typing import Any
from xml.etree import ElementTree

import subunit
import testtools


@dataclasses.dataclass
class Count:
    """The tests of one suite, and why some were skipped.

    :param missing: tests that were to run and left no trace: their process died. They count as failed.
    """

    passed: int = 0
    failed: int = 0
    missing: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def skipped(self) -> int:
        return self.reasons.total()


def count_junit(path: pathlib.Path) -> Count:
    count = Count()
    for case in ElementTree.parse(path).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            count.failed += 1
        elif skip is not None:
            count.reasons[skip.get("message") or "no reason given"] += 1
        else:
            count.passed += 1
    return count


def count_subunit(path: pathlib.Path) -> Count:
    count = Count()
    seen: set[str] = set()

    def add(test: dict[str, Any]) -> None:
        status = test["status"]
        seen.add(test["id"])
        if status in ("success", "xfail"):
            count.passed += 1
        elif status == "skip":
            reason = test["details"].get("reason")
            count.reasons[reason.as_text().strip() if reason else "no reason given"] += 1
        elif status != "exists":
            count.failed += 1

    with path.open("rb") as stream:
        sink = testtools.StreamToDict(add)
        sink.startTestRun()
        subunit.ByteStreamToStreamResult(stream).run(sink)
        sink.stopTestRun()
    listed = set(path.with_suffix(".listed").read_text().split())
    skipped_classes = tuple(_class_of(test) for test in seen if test.startswith("setUpClass "))
    count.missing = sum(not test.startswith(skipped_classes) for test in listed - seen)
    count.failed += count.missing
    return count


def _class_of(set_up: str) -> str:
    """Return the prefix of the ids of a class's tests, of ``setUpClass (package.module.Class)``."""
    return set_up.partition("(")[2].rstrip(")") + "."


def read(results: pathlib.Path, suite: str) -> Count:
    for suffix, reader in (("xml", count_junit), ("subunit", count_subunit)):
        path = results / f"{suite}.{suffix}"
        if path.is_file() and path.stat().st_size:
            return reader(path)
    return Count()


def main(arguments: list[str]) -> int:
    separator = arguments.index("--")
    results, suites = pathlib.Path(arguments[0]), arguments[1:separator]
    failed_steps = arguments[separator + 1 :]
    total = Count()
    print(f"{'suite':<12}{'passed':>8}{'failed':>8}{'skipped':>8}")
    for suite in suites:
        count = read(results, suite)
        print(f"{suite:<12}{count.passed:>8}{count.failed:>8}{count.skipped:>8}")
        for reason, times in count.reasons.most_common():
            print(f"    skipped {times}: {reason}")
        if count.missing:
            print(f"    {count.missing} were to run and did not: their process died")
        if not count.passed + count.failed:
            print(f"    {suite} ran nothing")
            count.failed += 1
        total.passed += count.passed
        total.failed += count.failed
        total.reasons += count.reasons
    for step in failed_steps:
        print(f"step failed: {step}")
    if failed_steps and not total.failed:
        total.failed = len(failed_steps)
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
