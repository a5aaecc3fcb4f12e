# SPDX-License-Identifier: Apache-2.0
"""What is in the cache, for people: every base with its evidence and its pins. Nothing is changed."""

from __future__ import annotations

import contextlib
import dataclasses
import os

from imagecache_lib import errors, model
from imagecache_lib.store import base_attributes, layout, pins, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import Hosts
from imagecache_lib.upkeep import inventory


@dataclasses.dataclass(frozen=True)
class CachedBase:
    """A base image, as a listing shows it.

    :param name: its name in the cache.
    :param kind: ``original``, ``resized``, ``swap`` or ``ephemeral``.
    :param allocated: bytes on disk.
    :param apparent: its length in bytes.
    :param last_use: epoch seconds by the filesystem's clock.
    :param links: how many names the file has.
    :param image_id: the image it was made from, or None if neither a record nor a pin names it.
    :param origin: ``fetched``, ``adopted`` or ``generated``, or None if there is no evidence, so that it is
        checked before its first use.
    :param source_format: what the source's content was.
    :param stored_format: qemu's name of what lies in the cache.
    :param virtual_size: in bytes.
    :param digest: of the source's data, if it was checked.
    :param inspected: its content was inspected as a disk.
    :param certificates: ids of the certificates that vouch for it.
    :param pins: who wants it to stay.
    :param image_name: the image service's name of the image when it was fetched, if that is known.
    :param damaged: a scrub found that the disk changed its content. No new disk is made from it.
    """

    name: str
    kind: str
    allocated: int
    apparent: int
    last_use: float
    links: int = 1
    image_id: str | None = None
    origin: str | None = None
    source_format: str | None = None
    stored_format: str | None = None
    virtual_size: int | None = None
    digest: model.Digest | None = None
    inspected: bool = False
    certificates: tuple[str, ...] = ()
    pins: tuple[pins.Pin, ...] = ()
    image_name: str | None = None
    damaged: bool = False


@dataclasses.dataclass(frozen=True)
class PinnedImage:
    """A pin, whether its image is in the cache or not.

    :param name: name of the image's base.
    :param image_id: the image, or None if the pin does not tell.
    :param pin: who pins it, and until when.
    :param cached: the base is in the cache.
    """

    name: str
    image_id: str | None
    pin: pins.Pin
    cached: bool


@dataclasses.dataclass(frozen=True)
class RegisteredHost:
    """A host that shares the cache, as a listing shows it.

    :param id: what :meth:`ImageCacheManager.forget_host` takes.
    :param name: its name, or None if its file cannot be read.
    :param is_this: it is the one that asks.
    :param blocks: how many bases in the trash wait for it.
    """

    id: str
    name: str | None
    is_this: bool
    blocks: int


def listed(cache: CacheStore) -> tuple[CachedBase, ...]:
    """Return every base, sorted by name."""
    return tuple(_described(cache, entry) for entry in inventory.take(cache).bases)


def _described(cache: CacheStore, entry: inventory.Entry) -> CachedBase:
    record = name = None
    with contextlib.suppress(errors.CacheEntryError):  # only QEMU's user may be able to read it
        opened = cache.open_base(entry.name)
        if opened is not None:
            with contextlib.closing(opened):
                record, name = cache.record_of(opened), base_attributes.read_name(opened.fd)
    pinned = pins.read(cache, entry.name)
    base = CachedBase(
        name=entry.name,
        kind=entry.kind.value,
        allocated=entry.allocated,
        apparent=entry.apparent,
        last_use=entry.last_use,
        links=entry.links,
        image_id=(pinned.image_id or None) if pinned is not None else None,
        pins=pinned.pins if pinned is not None else (),
        image_name=name,
    )
    if record is None:
        return base
    return dataclasses.replace(
        base,
        image_id=record.image_id or base.image_id,
        origin=record.origin.value,
        source_format=record.source_format,
        stored_format=record.stored_format,
        virtual_size=record.virtual_size,
        digest=record.digest if record.digest_checked else None,
        inspected=record.inspected is not None,
        certificates=record.certificates,
        damaged=record.damaged,
    )


def all_pins(cache: CacheStore) -> tuple[PinnedImage, ...]:
    """Return every pin, by base and owner. One that cannot be read has the owner :data:`pins.UNREADABLE`."""
    return tuple(
        PinnedImage(name, held.image_id or None, pin, os.path.lexists(cache.layout.base(name)))
        for name in pins.names(cache)
        if (held := pins.read(cache, name)) is not None
        for pin in held.pins
    )


def registered(cache: CacheStore, hosts: Hosts) -> tuple[RegisteredHost, ...]:
    """Return every registered host, by name."""
    entries = {entry.id for entry in trash.find(cache)}
    found = [
        RegisteredHost(
            host_id,
            host.name if host is not None else None,
            host_id == hosts.id,
            len(entries - host.cleared) if host is not None else len(entries),
        )
        for host_id, host in hosts.all().items()
    ]
    return tuple(sorted(found, key=lambda host: (host.name or "", host.id)))


def name_of(cache: CacheStore, reference: str) -> str:
    """Return the name of the base that is meant: an image id's, unless it is the name of one that is there.

    :raises ImageRejected: neither is possible.
    """
    name = named(reference)
    return name if os.path.lexists(cache.layout.base(name)) else layout.base_name(reference)


def named(reference: str) -> str:
    """Return the name of a base, whether it is there or not: the one that is given, or that of an image's id.

    :raises ImageRejected: neither is possible.
    """
    # What Nova has in flight is no base, though it has a name of its own.
    no_base = (layout.Kind.UNKNOWN, layout.Kind.FOREIGN_STAGE)
    if isinstance(reference, str) and layout.classify(reference) not in no_base:
        return reference
    return layout.base_name(reference)  # which refuses what is no text
