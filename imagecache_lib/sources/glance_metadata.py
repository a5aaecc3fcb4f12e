# SPDX-License-Identifier: Apache-2.0
"""What Glance says of an image, from the JSON document of ``GET /v2/images/{id}``.

``os_hash_algo`` and ``os_hash_value`` come with API 2.7 (Rocky); before there is only the md5 ``checksum``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import requests

from imagecache_lib import errors, model
from imagecache_lib.sources import answers, body
from imagecache_lib.sources.interface import SourceRefused

#: Most bytes of metadata. Glance's default limits allow some hundred KiB.
_LARGEST_METADATA = 4 * 2**20
_HEX = re.compile(r"[0-9a-f]+")
#: Keys of the metadata that have a field of their own in :class:`Image`.
_MAPPED = frozenset(
    {
        "id",
        "disk_format",
        "container_format",
        "size",
        "virtual_size",
        "status",
        "checksum",
        "os_hash_algo",
        "os_hash_value",
        "locations",
        "direct_url",
        "stores",
    }
)
#: Properties in which HTTP sources note what a server said. The owner of an image may have set others of
#: these names, which would be taken for it.
_ANSWERS = frozenset({answers.ETAG, answers.HINTED_SIZE})


def read_metadata(answer: requests.Response, image_id: str) -> object:
    """Return the parsed JSON document of an answer.

    :raises SourceError: the document is too long, or not JSON.
    """
    collected = bytearray()
    for chunk in body.read(answer, image_id):
        collected += chunk
        if len(collected) > _LARGEST_METADATA:
            raise _nonsense(image_id, f"the metadata have more than {_LARGEST_METADATA} bytes")
    try:
        return json.loads(collected)
    except (ValueError, RecursionError):
        raise _nonsense(image_id, "the metadata are not JSON") from None


def image_from_metadata(image_id: str, metadata: object) -> model.Image:
    """Turn the JSON document of ``GET /v2/images/{id}`` into an :class:`Image`.

    :raises SourceError: the document is not the metadata of that image.
    """
    if not isinstance(metadata, dict) or metadata.get("id") != image_id:
        raise _nonsense(image_id, "the metadata are not those of this image")
    fields = _Fields(image_id, metadata)
    return model.Image(
        id=image_id,
        disk_format=fields.text("disk_format"),
        size=fields.length("size"),
        digest=_digest(fields),
        virtual_size=fields.length("virtual_size"),
        container_format=fields.text("container_format"),
        status=fields.text("status") or "active",
        locations=fields.locations(),
        stores=tuple(name for name in (fields.text("stores") or "").split(",") if name),
        properties=MappingProxyType(
            {key: value for key, value in metadata.items() if key not in _MAPPED | _ANSWERS}
        ),
    )


class _Fields:
    """Reads typed values out of metadata that a user of the image service may have written."""

    def __init__(self, image_id: str, metadata: Mapping[str, Any]) -> None:
        self.image_id = image_id
        self._metadata = metadata

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise _nonsense(self.image_id, f"{key} in the metadata is not text")
        return value

    def length(self, key: str) -> int | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _nonsense(self.image_id, f"{key} in the metadata is not a number of bytes")
        return value

    def locations(self) -> tuple[str, ...]:
        listed = self._metadata.get("locations") or []
        if not isinstance(listed, list):
            raise _nonsense(self.image_id, "locations in the metadata is not a list")
        urls = [entry.get("url") for entry in listed if isinstance(entry, dict)]
        urls.append(self.text("direct_url"))
        return tuple(dict.fromkeys(url for url in urls if isinstance(url, str)))


def _digest(fields: _Fields) -> model.Digest | None:
    algorithm, value = fields.text("os_hash_algo"), fields.text("os_hash_value")
    md5 = fields.text("checksum")
    digest = model.Digest(algorithm, value) if algorithm and value else None
    if md5 and (digest is None or not digest.hex_length):
        # hashing_algorithm is the server's option, and may name what this host's OpenSSL lacks.
        digest = model.Digest("md5", md5)
    if digest is None:
        return None
    if not digest.hex_length:
        raise SourceRefused(
            f"its digest is a {digest.algorithm[:40]!r}, which this host cannot compute",
            image=fields.image_id,
            next_step="set hashing_algorithm in Glance to one that all hosts have, such as sha512",
        )
    if len(digest.value) != digest.hex_length or not _HEX.fullmatch(digest.value):
        raise _nonsense(fields.image_id, f"the {digest.algorithm} in the metadata is not one")
    return digest


def _nonsense(image_id: str, cause: str) -> errors.SourceError:
    return errors.SourceError(
        cause, image=image_id, next_step="check that the endpoint is a Glance v2 API, and what lies between"
    )
