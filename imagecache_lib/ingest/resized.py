# SPDX-License-Identifier: Apache-2.0
"""Legacy resized bases: what old releases of Nova copied from a base image and grew, below their overlays.

A legacy resized base that is there serves the overlays that refer to it. This library never makes one:
nothing tells whether Nova grew a filesystem in it, too, and an overlay on other bytes is a broken disk
without any error.
"""

from __future__ import annotations

import os

from imagecache_lib import errors
from imagecache_lib.formats import inspection
from imagecache_lib.ingest.call import Call
from imagecache_lib.ingest.producer import BaseRequest
from imagecache_lib.store import base_attributes, evidence
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.evidence import Unmet
from imagecache_lib.store.failures import Failure
from imagecache_lib.store.stage import SealedStage
from imagecache_lib.system import durable
from imagecache_lib.system.translate import translated

_GIB = 2**30


def request(cache: CacheStore, name: str, call: Call, disk_path: str) -> BaseRequest:
    """Return what an overlay on a legacy resized base asks of a lease.

    :param name: the base's, ``<sha1>_<GiB>`` or ``<sha1>_sm``.
    :param call: of the image that the base was made from, with the format that the overlay's header states.
    :param disk_path: the overlay, for messages.
    """
    # What a new disk would have to prove of its image, this one was made without.
    requirements = evidence.Requirements(
        evidence.Use.DISK,
        stored_format=call.stored_format,
        inspected=not cache.config.disable_deep_image_inspection,
    )
    producer = ResizedProducer(cache, name, call, disk_path)
    return BaseRequest(name, requirements, producer, call.waiter, image_id=call.image_id)


class ResizedProducer:
    """Checks a legacy resized base: a :class:`~imagecache_lib.ingest.producer.Producer` that makes none."""

    def __init__(self, cache: CacheStore, name: str, call: Call, disk_path: str) -> None:
        self._cache = cache
        self._name = name
        self._call = call
        self._disk_path = disk_path
        self._unmet = "it is not here"

    def unmet(self, opened: OpenBase) -> Unmet | None:
        """Find nothing wrong: the record of such a base says all that is known of it. Returns None always."""
        return None

    def origins(self) -> tuple[str, ...]:
        """Return nothing: it is made on this host, the same for every caller."""
        return ()

    def prepare(self) -> None:
        """Do nothing: no server is asked for it."""

    def require_prepared(self) -> None:
        """Do nothing: no server is asked for it."""

    def share(self, failure: Failure) -> None:
        """Do nothing: each caller tries for itself."""

    def refuse_impossible(self) -> None:
        """Refuse to make one.

        :raises BackendError: always.
        """
        raise self._refusal()

    def authorize(self) -> None:
        """Do nothing: its disk is there already."""

    def produce(self) -> SealedStage:
        """Refuse to make one.

        :raises BackendError: always.
        """
        raise self._refusal()

    def _refusal(self) -> errors.BackendError:
        return errors.BackendError(
            f"its base {self._name} does not serve ({self._unmet}), and is not made anew: it is a resized"
            " copy that another program made",
            image=self._call.image_id,
            path=self._disk_path,
            next_step="copy the base from the host that the disk came from, or flatten the disk there and"
            " move it again",
        )

    def adopt(self, opened: OpenBase, known: evidence.Record | None) -> evidence.Record | Unmet:
        """Check a legacy resized base, and write its record.

        :returns: its record, or why it does not serve.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        found = self._adopt(opened)
        if isinstance(found, Unmet):
            self._unmet = found.reason
        return found

    def _adopt(self, opened: OpenBase) -> evidence.Record | Unmet:
        with translated(opened.path):
            try:
                finding = self._inspect(opened)
            except errors.ImageRejected as error:
                return Unmet(error.cause)
            size = finding.virtual_size or -(-opened.stat.st_size // 512) * 512
            if size < self._least():
                return Unmet(f"it has {size} bytes, and its name says {self._least()}")
            os.fsync(opened.fd)
            durable.sync_directory(os.path.dirname(opened.path))
            record = self._record(opened, finding.format, size)
            self._cache.write_record(record)
        return record

    def _inspect(self, opened: OpenBase) -> inspection.Finding:
        """Return what its content is.

        What is read as raw may hold anything but another format. What is read as another format must be safe.
        """
        config = self._cache.config
        raw = self._call.stored_format == "raw"
        strict = not raw and not config.disable_deep_image_inspection
        finding = inspection.inspect_file(opened.fd, None, inspection.Rules.of(config, strict=strict))
        if finding.format != self._call.stored_format:
            raise errors.ImageRejected(f"it is {finding.format} and not {self._call.stored_format}")
        return finding

    def _least(self) -> int:
        """Return how many bytes it has at least: it was grown to what its name says, and never cut."""
        suffix = self._name.rpartition("_")[2]
        return int(suffix) * _GIB if suffix.isdecimal() else 1

    def _record(self, opened: OpenBase, format: str, virtual_size: int) -> evidence.Record:
        return evidence.Record(
            name=opened.name,
            image_id=self._call.image_id,
            base_id=base_attributes.mark(opened.fd),
            inode=opened.stat.st_ino,
            size=opened.stat.st_size,
            origin=evidence.Origin.ADOPTED,
            source_format=format,
            stored_format=format,
            virtual_size=virtual_size,
            inspected=evidence.INSPECTION_RULES,
        )
