# SPDX-License-Identifier: Apache-2.0
"""What the documentation refers to is there: drawings of today's text, tests under the names it gives."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import pathlib
import re
import textwrap
import unittest

import imagecache_lib

ROOT = pathlib.Path(__file__).parents[2]
DOC = ROOT / "doc" / "source"

#: Text in italics at the beginning of a term or after a comma in it, as the FAQ writes messages.
_MESSAGE = re.compile(r"(?:^|, )\*([^*]+)\*")
#: Where Python's source breaks a text into literals, or fills in a value.
_BROKEN = re.compile(r"\"\s*\n\s*f?\"")
_FILLED = re.compile(r"\{[^{}]*\}|%s|%d")

_CODE = re.compile(r"\.\. code-block:: python\n\n((?:(?: +[^\n]*)?\n)+)")
#: What `make` builds below doc/build is not there before.
_PATH = re.compile(
    r"``((?:examples|tools|tests|doc/source|benchmarks|integrations|imagecache_lib)/[\w./-]+)``", re.ASCII
)

_TEST = re.compile(r"``(?:(?P<file>[a-z]+/test_\w+\.py)(?:::)?)?(?P<test>test_\w+)?``")


class TestDrawings(unittest.TestCase):
    def test_each_drawing_was_made_from_the_text_beside_it(self) -> None:
        sources = sorted(DOC.rglob("*.dot"))
        self.assertTrue(sources)
        for source in sources:
            with self.subTest(source.name):
                drawn = source.with_suffix(".svg").read_text()
                made_from = hashlib.sha256(source.read_bytes()).hexdigest()
                self.assertIn(f"sha256:{made_from}", drawn, "run: make drawings")


class TestReferences(unittest.TestCase):
    def test_the_tests_that_pages_name_exist(self) -> None:
        """A name without a file is in the file that was named last."""
        for page, most_likely in (("reference/threat-model.rst", 30), ("contributor/fleet-faults.rst", 60)):
            file, named = "", 0
            for found in _TEST.finditer((DOC / page).read_text()):
                file = found["file"] or file
                if not (found["file"] or found["test"]):
                    continue
                with self.subTest(page=page, file=file, test=found["test"]):
                    code = (ROOT / "tests" / file).read_text()
                    self.assertIn(f"def {found['test']}(" if found["test"] else "def test_", code)
                named += 1
            self.assertGreater(named, most_likely)


class TestCode(unittest.TestCase):
    """Code of pages is Python, and what it takes from the library is there, with its parameters."""

    def test_names_of_the_library_are_there(self) -> None:
        looked_at = 0
        for page in (ROOT / "README.rst", *sorted(DOC.rglob("*.rst"))):
            for match in _CODE.finditer(page.read_text()):
                looked_at += 1
                tree = ast.parse(textwrap.dedent(match[1]))
                names: dict[str, object] = {"ic": imagecache_lib}
                for node in ast.walk(tree):
                    with self.subTest(page=page.name, code=ast.unparse(node)[:60]):
                        self.look(node, names)
        self.assertGreater(looked_at, 12)

    def look(self, node: ast.AST, names: dict[str, object]) -> None:
        match node:
            case ast.ImportFrom(module=str(module)) if module.startswith("imagecache_lib"):
                for each in node.names:
                    try:
                        found: object = importlib.import_module(f"{module}.{each.name}")
                    except ModuleNotFoundError:
                        found = getattr(importlib.import_module(module), each.name)
                    names[each.asname or each.name] = found
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in names:
                getattr(names[name], attribute)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="cache"), attr=method)):
                taken = inspect.signature(getattr(imagecache_lib.ImageCacheManager, method)).parameters
                self.assertLessEqual({each.arg for each in node.keywords if each.arg}, set(taken))

    def test_paths_of_the_checkout_are_there(self) -> None:
        for page in (*ROOT.glob("*.rst"), *sorted(DOC.rglob("*.rst"))):
            for path in _PATH.findall(page.read_text()):
                with self.subTest(page=page.name):
                    self.assertTrue((ROOT / path).exists(), path)


class TestBenchmarks(unittest.TestCase):
    def test_what_an_operator_feels_was_measured(self) -> None:
        page = (DOC / "reference" / "benchmarks.rst").read_text()
        measured = (DOC / "reference" / "benchmarks" / "results.inc").read_text()
        felt = page.partition("What an operator feels")[2].partition("How it was measured")[0]
        figures = re.findall(r"[\d.]+ (?:MiB|ms|µs|s)\b", felt.partition("=====\nwhat")[2])
        self.assertGreater(len(figures), 8)
        for figure in figures:
            with self.subTest(figure):
                self.assertIn(figure, measured)


class TestFaq(unittest.TestCase):
    def test_each_message_is_one_that_the_program_can_say(self) -> None:
        sources = [
            _FILLED.sub("...", _BROKEN.sub("", path.read_text()))
            for path in (ROOT / "imagecache_lib").rglob("*.py")
        ]
        lines = (DOC / "admin" / "faq.rst").read_text().splitlines()
        messages = [found for line in lines for found in _MESSAGE.findall(line)]
        self.assertGreater(len(messages), 30)
        for message in messages:
            with self.subTest(message):
                parts = [part.strip(" ,:") for part in message.split("...") if part.strip(" ,:")]
                self.assertTrue(
                    any(all(part in source for part in parts) for source in sources), "no source has it"
                )
