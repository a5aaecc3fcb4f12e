# SPDX-License-Identifier: Apache-2.0
"""The package's modules stand in layers: what ``tools/house.py`` counts as wrong is absent."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import tempfile
import types
import unittest
from typing import Any, ClassVar

ROOT = pathlib.Path(__file__).parents[2]


def load_house() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


house = load_house()


class TestLayers(unittest.TestCase):
    checkout: ClassVar[Any]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.checkout = house.Checkout(ROOT)

    def test_no_module_imports_from_a_higher_layer(self) -> None:
        self.assertEqual([], house.upward_arrows(self.checkout))

    def test_no_package_imports_another_of_its_layer(self) -> None:
        self.assertEqual([], house.sideways_arrows(self.checkout))

    def test_no_modules_import_each_other_in_a_circle(self) -> None:
        self.assertEqual([], house.import_circles(self.checkout))


class TestFiguresTellWrongFromRight(unittest.TestCase):
    """Each figure sees an instance of what it counts, in a package made for it."""

    def checkout(self, **modules: str) -> object:
        root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        package = root / house.PACKAGE
        package.mkdir()
        for name, text in ({"__init__": ""} | modules).items():
            (package / f"{name}.py").write_text(text)
        return house.Checkout(root)

    def test_an_import_for_type_checkers_only_is_an_arrow(self) -> None:
        checkout = self.checkout(
            errors="if TYPE_CHECKING:\n    from imagecache_lib import manager\n",
            manager="def f():\n    from imagecache_lib.errors import E\n",
        )
        self.assertEqual(["errors -> manager"], house.upward_arrows(checkout))
        self.assertEqual(["errors <-> manager"], house.import_circles(checkout))

    def test_a_named_callable_type_is_a_callable(self) -> None:
        checkout = self.checkout(
            model="Act = Callable[[], None]\nclass P(Protocol):\n    def __call__(self) -> None: ...\n",
            manager="def f(a: Act, b: P, c: int, *d: Callable[[], int]) -> None: ...\n",
        )
        self.assertEqual(["manager.f(a)", "manager.f(b)", "manager.f(d)"], house.injected_callables(checkout))

    def test_text_that_another_function_found_wrong_counts_and_a_value_does_not(self) -> None:
        checkout = self.checkout(
            model="""
def name(x) -> str | None:
    return x.name
def fault(x) -> str | None:
    return f"{x} is bad" if x else None
def passed_on(x) -> str | None:
    found = fault(x)
    return found
""",
            manager="",
        )
        self.assertEqual(["model.fault", "model.passed_on"], house.text_verdicts(checkout))
