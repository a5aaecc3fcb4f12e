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

    def test_each_field_refuses_what_is_of_another_type(self) -> None:
        odd: tuple[Any, ...] = (3, 1.5, b"bytes", ["list"], ("tuple",), {"key": 1}, {1}, object(), True)
        for field in dataclasses.fields(CacheConfig):
            for value in (*odd, None, "\0", "\ud800"):
                try:
                    made = CacheConfig(**{"instances_path": "/instances", field.name: value})
                except errors.ConfigError as error:
                    self.assertTrue(str(error).startswith(f"{field.name} is "), str(error))
                    continue
                kept = getattr(made, field.name)
                default = field.default
                expected = type(None) | str if default is None else type(default)
                number = isinstance(default, float) and isinstance(kept, int)
                self.assertTrue(number or isinstance(kept, expected), f"{field.name} is {kept!r}")

    def test_several_values_are_kept_as_they_were(self) -> None:
        given = ["/instances", "/data"]
        config = CacheConfig(instances_path="/instances", disk_roots=given)  # type: ignore[arg-type]
        given.clear()
        self.assertEqual(("/instances", "/data"), config.disk_roots)
        self.assertEqual(hash(config), hash(dataclasses.replace(config)))

    def test_a_count_is_a_whole_number(self) -> None:
        self.assertEqual("3", repr(CacheConfig(instances_path="/i", num_retries=3.0).num_retries))  # type: ignore[arg-type]
        for value in (1.5, float("inf"), float("-inf")):
            self.assert_refused("num_retries", value)

    def test_a_name_that_another_directory_has_is_refused(self) -> None:
        uuid = "6c0d3f5e-1111-4222-8333-0123456789ab"
        names = (
            "locks",
            "compute_nodes",
            "snapshots",
            "lost+found",
            ".snapshot",
            ".zfs",
            ".imagecache",
            uuid,
        )
        for name in (*names, f"{uuid}_resize", f"{uuid.upper()}_del"):
            self.assert_refused("subdirectory_name", name)
        for name in ("_base", "_base_192.0.2.1", "cache", "locks2", f"{uuid}_base"):
            self.assertEqual(name, CacheConfig(instances_path="/i", subdirectory_name=name).subdirectory_name)
        self.assert_refused("lock_path", "/instances//_base/")

    def test_what_is_no_directory_of_instances_is_no_disk_root(self) -> None:
        for root in ("/", "//", "/./", "/instances/..", "/proc", "/proc/1/root", "/sys", "//sys/fs", "/dev/"):
            self.assert_refused("disk_roots", ("/instances", root))
            self.assert_refused("instances_path", root)
        for root in ("/instances/_base", "/instances//_base/.imagecache/stage"):
            self.assert_refused("disk_roots", (root,))
        for root in ("/processes", "/dev/shm", "/instances/_base2", "/instances"):
            self.assertEqual((root,), CacheConfig(instances_path="/instances", disk_roots=(root,)).roots)

    def test_text_is_neither_a_number_nor_a_choice_of_two(self) -> None:
        for field in dataclasses.fields(CacheConfig):
            if isinstance(field.default, bool):
                for value in ("no", "false", "", None, 2):
                    self.assert_refused(field.name, value)
            elif isinstance(field.default, int | float):
                for wrong in ("10", "10G", None, True, float("nan")):
                    self.assert_refused(field.name, wrong)
                for large in (2**1100, 10**5000):
                    options: dict[str, Any] = {"instances_path": "/instances", field.name: large}
                    self.assertEqual(2**63 - 1, getattr(CacheConfig(**options), field.name))
                self.assert_refused(field.name, -(10**5000))
