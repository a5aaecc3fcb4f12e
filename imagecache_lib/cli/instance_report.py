# SPDX-License-Identifier: Apache-2.0
"""The driver's report of instances, as a command is given it: ``--instances FILE``, and the file's form."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from imagecache_lib import errors, model


def add_instances(parser: argparse._ActionsContainer, *, reads_disks: bool = False) -> None:
    """Let a command take the driver's report.

    :param reads_disks: the disks are enough for it.
    """
    without = (
        "Without it the last report counts. [] says that the disks under the disk roots are all there is."
        if reads_disks
        else "Without it nothing can go. [] says that the disks under the disk roots are all there is."
    )
    parser.add_argument(
        "--instances",
        metavar="FILE",
        help="JSON list of all instances on this host (on shared storage: on all hosts), each an object with "
        f"uuid, host, images, directories, swap_mb, ephemerals. {without}",
    )


def read_instances(path: str | None) -> tuple[model.Instance, ...] | None:
    """Return the driver's report that a file holds.

    :param path: path of the file. With None the result is None: the driver could not tell.
    :raises ConfigError: the file holds no such report. A wrong one must not evict anything.
    """
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _unreadable(path, f"it is no JSON from {where} on") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "it is no JSON text") from error
    if not isinstance(found, list):
        raise _unreadable(path, "it is not a list")
    report = []
    for number, fields in enumerate(found, start=1):
        try:
            report.append(_instance(fields))
        except ValueError as error:
            raise _unreadable(path, f"entry {number} {error}") from None
    return tuple(report)


#: What a pass says where it was given no report; and what it is to an operator, who may have no driver.
_UNREPORTED = (
    ("the driver could not tell which instances there are", "--instances FILE is missing"),
    ("find that out, or report the instances", "give --instances FILE"),
)


def to_operator(text: str, instances: Sequence[model.Instance] | None) -> str:
    """Return a text of a pass as it is said to an operator who gave that report, or None."""
    if instances is None:
        for said, meant in _UNREPORTED:
            text = text.replace(said, meant)
    return text


def _unreadable(path: str, why: str) -> errors.ConfigError:
    return errors.ConfigError(
        f"the report of instances cannot be read: {why}", path=path, next_step="correct the file"
    )


_INSTANCE_FIELDS = ("uuid", "host", "images", "directories", "swap_mb", "ephemerals")
_EPHEMERAL_FIELDS = tuple(field.name for field in dataclasses.fields(model.Ephemeral))


def _instance(fields: Any) -> model.Instance:
    """Return one entry of a report.

    :raises ValueError: what is wrong with it, to be read after "entry 1".
    """
    _require_fields(fields, _INSTANCE_FIELDS, ("uuid", "host"))
    ephemerals = fields.get("ephemerals", [])
    if not isinstance(ephemerals, list):
        raise ValueError("has ephemerals that are not a list")
    for each in ephemerals:
        _require_fields(each, _EPHEMERAL_FIELDS, ("size_gb",), "has an ephemeral disk that ")
        _number(each, "size_gb")
        for name, value in each.items():
            if name != "size_gb" and value is not None and not isinstance(value, str):
                raise ValueError(f"has an ephemeral disk whose {name} is not a text")
    return model.Instance(
        uuid=_text(fields, "uuid"),
        host=_text(fields, "host"),
        images=_texts(fields, "images"),
        directories=_texts(fields, "directories"),
        swap_mb=_number(fields, "swap_mb"),
        ephemerals=tuple(model.Ephemeral(**each) for each in ephemerals),
    )


def _require_fields(fields: Any, known: Sequence[str], needed: Sequence[str], begin: str = "") -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{begin}is not an object")
    if lacking := [name for name in needed if name not in fields]:
        raise ValueError(f"{begin}has no {lacking[0]}")
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{begin}has the unknown field {unknown[0]}")


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f"has a {name} that is not a text")
    return value


def _texts(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    found = fields.get(name, [])
    if not isinstance(found, list) or not all(isinstance(value, str) and value for value in found):
        raise ValueError(f"has {name} that are not a list of texts")
    return tuple(found)


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name, 0)
    if type(value) is not int or value < 0:
        raise ValueError(f"has a {name} that is not a whole number")
    return value
