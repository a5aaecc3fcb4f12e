# SPDX-License-Identifier: Apache-2.0
"""What a driver inside Nova reports: Nova's instances as :class:`imagecache_lib.Instance`.

Nothing of Nova is imported: any object with the attributes of ``nova.objects.Instance`` will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from imagecache_lib import model

#: Keys of ``system_metadata`` under which Nova keeps ids of images: the one that the instance's image was
#: made from, and kernel and ramdisk as they were when it was booted.
_IMAGE_KEYS = ("image_base_image_ref", "image_kernel_id", "image_ramdisk_id")


def instances(found: Iterable[Any]) -> tuple[model.Instance, ...]:
    """Translate an ``InstanceList``, of this host or of all that share its storage."""
    return tuple(instance(each) for each in found)


def instance(found: Any) -> model.Instance:
    """Translate one instance.

    Its task state does not matter: the names that a directory has while its instance is resized or deleted
    (``_resize``, ``_del``) are always looked for, since a state may change while the pass is under way.

    :param found: a ``nova.objects.Instance``; of its flavor, ``swap`` (MiB) and ``ephemeral_gb`` count.
    """
    metadata: Mapping[str, str] = getattr(found, "system_metadata", None) or {}
    referred = [found.image_ref, getattr(found, "kernel_id", None), getattr(found, "ramdisk_id", None)]
    referred += [metadata.get(key) for key in _IMAGE_KEYS]
    flavor = getattr(found, "flavor", None)
    ephemeral_gb = int(getattr(flavor, "ephemeral_gb", 0) or 0)
    return model.Instance(
        uuid=found.uuid,
        host=found.host or "",
        images=tuple(dict.fromkeys(image_id for image_id in referred if image_id)),
        directories=(found.name,) if getattr(found, "name", None) else (),
        swap_mb=int(getattr(flavor, "swap", 0) or 0),
        ephemerals=(model.Ephemeral(ephemeral_gb),) if ephemeral_gb else (),
    )
