# SPDX-License-Identifier: Apache-2.0
"""Tables of images in files, for those who configure a source by words and not in Python.

A table is a JSON object of objects, by image id::

    {"debian-12": {"url": "https://images/debian-12.qcow2", "disk_format": "qcow2",
                   "digest": "sha512:1f40..."}}

with ``url`` for :class:`HttpSource` and ``path`` for :class:`FileSource`; all else is optional:
``disk_format``, ``digest`` (as ``<algorithm>:<hex>``), ``compression``, and ``size`` in bytes for ``url``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from imagecache_lib import errors, model

T = TypeVar("T")

_DIGEST = re.compile(r"([A-Za-z0-9_-]+):([0-9a-fA-F]+)")


def parse_digest(text: str) -> model.Digest:
    """Return the digest that ``<algorithm>:<hex>`` is.

    :raises ValueError: it is none: not all hosts have the algorithm, or its digests have another length.
    """
    found = _DIGEST.fullmatch(text)
    if found is None:
        raise ValueError("it is no digest: write sha512:1f40...")
    digest = model.Digest(found[1], found[2])
    letters = digest.hex_length
    if not letters:
        raise ValueError(f"{found[1]} is no digest's algorithm: write sha512:1f40...")
    if len(digest.value) != letters:
        raise ValueError(
            f"a digest by {digest.algorithm} has {letters} hexadecimal digits, this has {len(digest.value)}"
        )
    return digest


def read(path: str, entry: type[T]) -> dict[str, T]:
    """Return the table that a file holds, by image id.

    :param entry: the dataclass that each image becomes; its fields are the keys that are known.
    :raises ConfigError: the file cannot be read, or is no such table; the message says where.
    """
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise _wrong(path, str(reason)) from error
    if not isinstance(table, dict):
        raise _wrong(path, "it is not an object of images by id")
    return {image_id: _entry(path, image_id, fields, entry) for image_id, fields in table.items()}


def _entry(path: str, image_id: str, fields: object, entry: type[T]) -> T:
    known: Mapping[str, Any] = {field.name: field for field in dataclasses.fields(entry)}  # type: ignore[arg-type]
    if not isinstance(fields, dict):
        raise _wrong(path, "it is not an object", image_id)
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if key not in known:
            raise _wrong(path, f"{key} is not known; it may have {', '.join(known)}", image_id)
        wanted = int if key == "size" else str
        if type(value) is not wanted:
            raise _wrong(path, f"{key} is not {'a number' if wanted is int else 'text'}", image_id)
        try:
            values[key] = parse_digest(str(value)) if key == "digest" else value
        except ValueError as error:
            raise _wrong(path, str(error), image_id) from None
    try:
        return entry(**values)
    except TypeError:
        needed = next(iter(known))
        raise _wrong(path, f"it has no {needed}", image_id) from None


def _wrong(path: str, cause: str, image_id: str | None = None) -> errors.ConfigError:
    return errors.ConfigError(
        f"the table of images cannot be used: {cause}",
        image=image_id,
        path=path,
        next_step="correct the file",
    )
