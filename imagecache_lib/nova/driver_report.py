# SPDX-License-Identifier: Apache-2.0
"""What a driver inside Nova reports: Nova's instances as :class:`imagecache_lib.Instance`.

Nothing of Nova is imported: any object with the attributes of ``nova.objects.Instance`` will do.

What is not loaded is not asked for: Nova's pass loads instances without flavor and ``system_metadata``, and
each of them would cost a call to the conductor per instance. What is missing of the report by that is read
from the disks. Swap and ephemeral disks are in the block device mappings, which one call returns for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from imagecache_lib import model

#: Returns the block device mappings of instances by uuid:
#: ``BlockDeviceMappingList.bdms_by_instance_uuid(context, uuids)``.
Mappings = Callable[[list[str]], Mapping[str, Iterable[Any]]]

#: Keys of ``system_metadata`` under which Nova keeps ids of images: the one that the instance's image was
#: made from, and kernel and ramdisk as they were when it was booted.
_IMAGE_KEYS = ("image_base_image_ref", "image_kernel_id", "image_ramdisk_id")

#: What Nova raises for an instance that was deleted after the list was made.
_GONE = "InstanceNotFound"


def instances(found: Iterable[Any], *, bdms: Mappings | None = None) -> tuple[model.Instance, ...]:
    """Translate an ``InstanceList``, of this host or of all that share its storage.

    An instance that was deleted meanwhile is passed over; its disks are read as long as they are there.

    :param bdms: called once, with the uuids of all instances: where swap and ephemeral disks are looked up;
        or None to look them up in the flavors, of those instances that have theirs loaded.
    """
    listed = list(found)
    mappings = bdms([each.uuid for each in listed]) if bdms is not None and listed else None
    translated = []
    for each in listed:
        try:
            own = None if mappings is None else tuple(mappings.get(each.uuid) or ())
            translated.append(instance(each, bdms=own))
        except Exception as error:
            if not _is_gone(error):
                raise
    return tuple(translated)


def instance(found: Any, *, bdms: Sequence[Any] | None = None) -> model.Instance:
    """Translate one instance.

    Its task state does not matter: the names that a directory has while its instance is resized or deleted
    (``_resize``, ``_del``) are always looked for, since a state may change while the pass is under way.

    :param found: a ``nova.objects.Instance``.
    :param bdms: its block device mappings, or None if ``swap`` (MiB) and ``ephemeral_gb`` of its flavor
        count.
    """
    metadata: Mapping[str, str] = _loaded(found, "system_metadata") or {}
    referred = [_loaded(found, key) for key in ("image_ref", "kernel_id", "ramdisk_id")]
    referred += [metadata.get(key) for key in _IMAGE_KEYS]
    name = getattr(found, "name", None)
    swap_mb, ephemerals = _of_flavor(found) if bdms is None else _of_mappings(found, bdms)
    return model.Instance(
        uuid=found.uuid,
        host=_loaded(found, "host") or "",
        images=tuple(dict.fromkeys(image_id for image_id in referred if image_id)),
        directories=(name,) if name else (),
        swap_mb=swap_mb,
        ephemerals=ephemerals,
    )


def _loaded(found: Any, name: str) -> Any:
    """Return an attribute, or None if it is not loaded: reading it would load it."""
    is_set = getattr(found, "obj_attr_is_set", None)
    if is_set is not None and not is_set(name):
        return None
    return getattr(found, name, None)


def _of_flavor(found: Any) -> tuple[int, tuple[model.Ephemeral, ...]]:
    flavor = _loaded(found, "flavor")
    ephemeral_gb = int(getattr(flavor, "ephemeral_gb", 0) or 0)
    ephemerals = (model.Ephemeral(ephemeral_gb, _loaded(found, "os_type")),) if ephemeral_gb else ()
    return int(getattr(flavor, "swap", 0) or 0), ephemerals


def _of_mappings(found: Any, bdms: Sequence[Any]) -> tuple[int, tuple[model.Ephemeral, ...]]:
    """Return what the mappings say, told apart as nova/block_device.py does: blank, local, of a format."""
    swap_mb, ephemerals = 0, []
    for bdm in bdms:
        if (_loaded(bdm, "source_type"), _loaded(bdm, "destination_type")) != ("blank", "local"):
            continue
        size, fs = int(_loaded(bdm, "volume_size") or 0), _loaded(bdm, "guest_format")
        if fs == "swap":
            swap_mb = swap_mb or size  # Nova allows one
        elif size:
            ephemerals.append(model.Ephemeral(size, _loaded(found, "os_type"), fs))
    return swap_mb, tuple(ephemerals)


def _is_gone(error: Exception) -> bool:
    return any(kind.__name__ == _GONE for kind in type(error).__mro__)
