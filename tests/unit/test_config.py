# SPDX-License-Identifier: Apache-2.0
"""A configuration that cannot work is refused when it is made, with the option's name."""

from __future__ import annotations

import dataclasses
import pathlib
import unittest
from typing import Any

from imagecache_lib import CacheConfig, errors

#: What no path can be, or what is no text: a byte zero, half of a surrogate pair, other types.
_NO_PATHS: tuple[Any, ...] = ("/a\0b", "/\ud800", "relative", "", b"/bytes", pathlib.Path("/path"), 5)


class TestPaths(unittest.TestCase):
    def assert_refused(self, name: str, value: Any) -> None:
        with self.subTest(name, value=value), self.assertRaisesRegex(errors.ConfigError, f"^{name} is "):
            CacheConfig(**{"instances_path": "/instances", name: value})

    def test_a_value_that_can_be_no_absolute_path_is_refused(self) -> None:
        for value in _NO_PATHS:
            for name in ("instances_path", "lock_path", "certificates_path"):
                self.assert_refused(name, value)
            self.assert_refused("disk_roots", ("/instances", value))
        self.assert_refused("instances_path", None)

    def test_a_value_that_can_be_no_directorys_name_is_refused(self) -> None:
        for value in ("a\0b", "\ud800", "", ".", "..", "a/b", b"bytes", None):
            self.assert_refused("subdirectory_name", value)
            self.assert_refused("passed_over_directories", ("backups", value))

    def test_text_is_not_taken_for_several_values(self) -> None:
        several = [
            field.name for field in dataclasses.fields(CacheConfig) if isinstance(field.default, tuple)
        ]
        self.assertIn("disk_roots", several)
        for name in several:
            for value in ("/", b"/", None, 5):
                self.assert_refused(name, value)
        for value in (5, "default=mk\0fs", "default=mk\ud800fs"):
            self.assert_refused("virt_mkfs", (value,))

    def test_text_is_neither_a_number_nor_a_choice_of_two(self) -> None:
        for field in dataclasses.fields(CacheConfig):
            if isinstance(field.default, bool):
                for value in ("no", "false", "", None, 2):
                    self.assert_refused(field.name, value)
            elif isinstance(field.default, int | float):
                for wrong in ("10", "10G", None, True, float("nan")):
                    self.assert_refused(field.name, wrong)
                large: dict[str, Any] = {"instances_path": "/instances", field.name: 2**1100}
                self.assertEqual(2**1100, getattr(CacheConfig(**large), field.name))
