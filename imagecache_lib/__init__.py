# SPDX-License-Identifier: Apache-2.0
"""The image cache that a hypervisor driver imports.

Two flows run through the package, and :mod:`imagecache_lib.manager` shows both from the top.

*Spawn.* :meth:`ImageCacheManager.create_disk` holds the image's base image: one that is there and whose
evidence (:mod:`~imagecache_lib.store.evidence`) fits is leased (:mod:`imagecache_lib.spawn.lease`); otherwise
its bytes flow once from the source through digest and inspection into a stage file
(:mod:`imagecache_lib.ingest.fetch`), which is published under the base's name
(:mod:`imagecache_lib.store.publish`). A storage backend (:mod:`imagecache_lib.backends`) makes the disk.

*Upkeep.* :meth:`ImageCacheManager.verify_base_images` lists the cache, reads who refers to what, plans, and
evicts what nothing needs (:mod:`imagecache_lib.upkeep`).

What lies on disk, and who may do what to it, is the docstring of :mod:`imagecache_lib.store.layout`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagecache_lib.admin import CacheAdmin
    from imagecache_lib.backends.interface import Feature, PendingDisk, StorageBackend
    from imagecache_lib.config import CacheConfig
    from imagecache_lib.diagnostics.audit import AuditFinding, AuditReport
    from imagecache_lib.diagnostics.catalog import CachedBase, PinnedImage, RegisteredHost
    from imagecache_lib.diagnostics.preflight import Finding, Severity
    from imagecache_lib.diagnostics.survey import Reason, State, Survey, SurveyedBase
    from imagecache_lib.errors import (
        BackendError,
        BaseInUseError,
        CacheEntryError,
        CancelledError,
        ConfigError,
        DiskExistsError,
        DiskTooSmallError,
        ImageCacheError,
        ImageNotFound,
        ImageRejected,
        LeaseLostError,
        LockTimeoutError,
        NoSpaceError,
        SourceError,
    )
    from imagecache_lib.ingest.certificates import (
        CastellanCertificates,
        CertificateStore,
        DirectoryCertificates,
    )
    from imagecache_lib.manager import ImageCacheManager
    from imagecache_lib.model import (
        BaseImage,
        CacheReport,
        CacheResult,
        Digest,
        Disk,
        Ephemeral,
        Image,
        Instance,
        Request,
    )
    from imagecache_lib.sources.file import FileImage, FileSource
    from imagecache_lib.sources.glance import GlanceSource
    from imagecache_lib.sources.http import HttpImage, HttpSource
    from imagecache_lib.sources.interface import ImageSource
    from imagecache_lib.store.history import Happening
    from imagecache_lib.store.pins import Pin
    from imagecache_lib.system.host import Host, System
    from imagecache_lib.upkeep.make_room import SpaceReport
    from imagecache_lib.upkeep.report import BaseReport, Explanation, VerifyReport
    from imagecache_lib.upkeep.scrub import ScrubbedBase, ScrubReport, Verdict

# Loaded when first used: a driver that imports the package should not pay for HTTP before it fetches.
_HOMES = {
    "AuditFinding": "diagnostics.audit",
    "AuditReport": "diagnostics.audit",
    "BackendError": "errors",
    "BaseInUseError": "errors",
    "BaseImage": "model",
    "BaseReport": "upkeep.report",
    "CacheAdmin": "admin",
    "CacheConfig": "config",
    "CacheEntryError": "errors",
    "CacheReport": "model",
    "CacheResult": "model",
    "CachedBase": "diagnostics.catalog",
    "CancelledError": "errors",
    "CastellanCertificates": "ingest.certificates",
    "CertificateStore": "ingest.certificates",
    "ConfigError": "errors",
    "Digest": "model",
    "DirectoryCertificates": "ingest.certificates",
    "Disk": "model",
    "DiskExistsError": "errors",
    "DiskTooSmallError": "errors",
    "Ephemeral": "model",
    "Explanation": "upkeep.report",
    "Feature": "backends.interface",
    "FileImage": "sources.file",
    "FileSource": "sources.file",
    "Finding": "diagnostics.preflight",
    "GlanceSource": "sources.glance",
    "Happening": "store.history",
    "Host": "system.host",
    "HttpImage": "sources.http",
    "HttpSource": "sources.http",
    "Image": "model",
    "ImageCacheError": "errors",
    "ImageCacheManager": "manager",
    "ImageNotFound": "errors",
    "ImageRejected": "errors",
    "ImageSource": "sources.interface",
    "Instance": "model",
    "LeaseLostError": "errors",
    "LockTimeoutError": "errors",
    "NoSpaceError": "errors",
    "PendingDisk": "backends.interface",
    "Pin": "store.pins",
    "PinnedImage": "diagnostics.catalog",
    "Reason": "diagnostics.survey",
    "RegisteredHost": "diagnostics.catalog",
    "Request": "model",
    "ScrubReport": "upkeep.scrub",
    "ScrubbedBase": "upkeep.scrub",
    "Severity": "diagnostics.preflight",
    "SourceError": "errors",
    "SpaceReport": "upkeep.make_room",
    "State": "diagnostics.survey",
    "StorageBackend": "backends.interface",
    "Survey": "diagnostics.survey",
    "SurveyedBase": "diagnostics.survey",
    "System": "system.host",
    "Verdict": "upkeep.scrub",
    "VerifyReport": "upkeep.report",
}

__all__ = [
    "AuditFinding",
    "AuditReport",
    "BackendError",
    "BaseImage",
    "BaseInUseError",
    "BaseReport",
    "CacheAdmin",
    "CacheConfig",
    "CacheEntryError",
    "CacheReport",
    "CacheResult",
    "CachedBase",
    "CancelledError",
    "CastellanCertificates",
    "CertificateStore",
    "ConfigError",
    "Digest",
    "DirectoryCertificates",
    "Disk",
    "DiskExistsError",
    "DiskTooSmallError",
    "Ephemeral",
    "Explanation",
    "Feature",
    "FileImage",
    "FileSource",
    "Finding",
    "GlanceSource",
    "Happening",
    "Host",
    "HttpImage",
    "HttpSource",
    "Image",
    "ImageCacheError",
    "ImageCacheManager",
    "ImageNotFound",
    "ImageRejected",
    "ImageSource",
    "Instance",
    "LeaseLostError",
    "LockTimeoutError",
    "NoSpaceError",
    "PendingDisk",
    "Pin",
    "PinnedImage",
    "Reason",
    "RegisteredHost",
    "Request",
    "ScrubReport",
    "ScrubbedBase",
    "Severity",
    "SourceError",
    "SpaceReport",
    "State",
    "StorageBackend",
    "Survey",
    "SurveyedBase",
    "System",
    "Verdict",
    "VerifyReport",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
