# SPDX-License-Identifier: Apache-2.0
"""Whether two downloads are of the same data, so that one may go on where the other broke off."""

from __future__ import annotations

import hashlib

from imagecache_lib import model
from imagecache_lib.sources.answers import ETAG


def identity(image: model.Image) -> str:
    """Return a digest of which data an image has, as its source says; empty if that cannot be told for sure.

    Only the digest of the whole tells a splice of two versions, so that data without one has no identity. An
    entity tag has to be the same besides.
    """
    if image.digest is None or image.size is None or image.converted_from is not None:
        return ""
    algorithm, value = image.digest.algorithm, image.digest.value.lower()
    said = (image.id, image.size, algorithm, value, image.properties.get(ETAG))
    return hashlib.sha256(repr(said).encode("utf-8", "replace")).hexdigest()
