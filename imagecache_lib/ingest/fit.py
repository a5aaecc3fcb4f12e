# SPDX-License-Identifier: Apache-2.0
"""Whether an image fits on the disk that is to be made of it."""

from __future__ import annotations

from imagecache_lib import dates, errors


def require_fit(label: str, virtual_size: int, size: int | None) -> None:
    """Refuse an image that is larger than the disk that is to be made of it.

    :param label: what the message calls the image.
    :param virtual_size: of the image, in bytes.
    :param size: virtual size of the disk in bytes, or None for the image's own size.
    :raises DiskTooSmallError: the image is larger than the disk.
    """
    if size is not None and size < virtual_size:
        least, asked = dates.sizes(virtual_size, size)
        raise errors.DiskTooSmallError(
            f"its virtual size is {least} and the disk shall have {asked}",
            image=label,
            next_step="choose a larger disk (flavor)",
            size=size,
            virtual_size=virtual_size,
        )
