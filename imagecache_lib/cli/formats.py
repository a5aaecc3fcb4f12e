# SPDX-License-Identifier: Apache-2.0
"""How results are written: a table, or cliff's formats for programs.

cliff finds its formats among the entry points of all installed packages, which takes longer than most
commands do. These are the ones that there are, each loaded when it is made.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

#: Class of each format. cliff's own are as its entry points name them.
_CLASSES = {
    "csv": "cliff.formatters.commaseparated:CSVLister",
    "json": "cliff.formatters.json_format:JSONFormatter",
    "shell": "cliff.formatters.shell:ShellFormatter",
    "table": "imagecache_lib.cli.table:Table",
    "value": "cliff.formatters.value:ValueFormatter",
    "yaml": "cliff.formatters.yaml_format:YAMLFormatter",
}

LIST = ("csv", "json", "table", "value", "yaml")
SHOW = ("json", "shell", "table", "value", "yaml")


@dataclasses.dataclass(frozen=True)
class Format:
    """One format, as cliff expects it of an extension.

    :param obj: the formatter.
    """

    name: str
    obj: Any


class Formats:
    """Some formats by name, as cliff expects it of an extension manager."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._formats = {name: Format(name, _made(_CLASSES[name])) for name in names}

    def names(self) -> list[str]:
        return list(self._formats)

    def __iter__(self) -> Iterator[Format]:
        return iter(self._formats.values())

    def __getitem__(self, name: str) -> Format:
        return self._formats[name]


def _made(where: str) -> Any:
    module, _colon, name = where.partition(":")
    return getattr(importlib.import_module(module), name)()
