# SPDX-License-Identifier: Apache-2.0
"""Conditions on base images, as ``image list --filter`` takes them: ``state=reclaimable,size>1G,age>30d``."""

from __future__ import annotations

import argparse
import dataclasses
import operator
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from imagecache_lib.cli import values

if TYPE_CHECKING:
    from imagecache_lib.diagnostics.survey import SurveyedBase

#: What a base image's state may be called.
STATES = ("in_use", "pinned", "unknown", "young", "reclaimable", "damaged")

SYNTAX = "state=STATE, size>SIZE, size<SIZE, age>DURATION, age<DURATION, name=NAME, pinned=yes|no"

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {"=": operator.eq, ">": operator.gt, "<": operator.lt}


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition.

    :param key: ``state``, ``size`` (bytes on disk), ``age`` (seconds since the last use), ``name`` or
        ``pinned``.
    :param compare: ``=``, ``>`` or ``<``.
    :param value: what it is compared with.
    """

    key: str
    compare: str
    value: Any


def conditions(text: str) -> list[Condition]:
    """Return what a command line says, conditions with commas between."""
    return [_condition(each.strip()) for each in text.split(",") if each.strip()]


def _condition(text: str) -> Condition:
    found = re.fullmatch(r"(state|size|age|name|pinned)\s*([=<>])\s*(.+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no condition: write {SYNTAX}")
    key, compare, said = found[1], found[2], found[3]
    if (key in ("size", "age")) == (compare == "="):
        wanted = "< or >" if compare == "=" else "="
        raise argparse.ArgumentTypeError(f"{text!r} is no condition: {key} is compared with {wanted}")
    if key == "size":
        return Condition(key, compare, values.size(said))
    if key == "age":
        return Condition(key, compare, values.duration(said))
    if key == "pinned":
        if said not in ("yes", "no"):
            raise argparse.ArgumentTypeError(f"{text!r} is no condition: pinned is yes or no")
        return Condition(key, compare, said == "yes")
    if key == "state":
        said = said.replace(" ", "_").replace("-", "_")
        if said not in STATES:
            raise argparse.ArgumentTypeError(f"{said!r} is no state: it is one of {', '.join(STATES)}")
    return Condition(key, compare, said)


def meets(found: SurveyedBase, wanted: Iterable[Condition], now: float) -> bool:
    """Whether a base image meets all conditions.

    :param now: epoch seconds, from which ages are counted.
    """
    return all(_meets(found, each, now) for each in wanted)


def _meets(found: SurveyedBase, wanted: Condition, now: float) -> bool:
    if wanted.key == "state":
        # A damaged base image is in a state of use too, and is found by both.
        return wanted.value in (found.shown_state, found.state.value)
    has = {
        "size": found.base.allocated,
        "age": now - found.base.last_use,
        "name": found.base.image_name,
        "pinned": any(reason.code == "pinned" for reason in found.reasons),
    }
    return _COMPARE[wanted.compare](has[wanted.key], wanted.value)
