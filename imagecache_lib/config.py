# SPDX-License-Identifier: Apache-2.0
"""The configuration: one frozen dataclass, passed in. Nothing here is global.

Field names are Nova's where Nova has the option. :mod:`imagecache_lib.opts` fills it from oslo.config.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re

from imagecache_lib import errors
from imagecache_lib.model import MOST_BYTES

GIB = 2**30

#: Where filers show what files were at other times: read-only, and no disks of guests.
_SNAPSHOTS = (".snapshot", ".zfs")

_CHOICES = {"preallocate_images": ("none", "space"), "authorize_hits": ("no", "open", "closed")}

#: What else lies below the instances path: Nova's locks, its registry of hosts and libvirt's snapshots of it;
#: what is the filesystem's own; and names that mean something within the cache.
_TAKEN = frozenset((*_SNAPSHOTS, "locks", "compute_nodes", "snapshots", "lost+found", ".imagecache"))

#: What the kernel shows as files.
_KERNELS = ("/proc/", "/sys/")

#: The name of an instance's directory, also while that is moved or deleted.
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(_resize|_del)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How one host caches. Sizes are bytes, times are seconds, unless a name says otherwise.

    :raises ConfigError: on construction, for a value that cannot work; the message names the field.
    """

    #: Absolute path of the directory that holds instance directories and the cache.
    instances_path: str
    #: Name of the cache's directory under ``instances_path``. It must not be one that Nova, the filesystem or
    #: an instance gives to another directory there.
    subdirectory_name: str = "_base"
    #: Absolute paths under which instance directories lie; if empty, only ``instances_path``. A pass reads
    #: every file below a disk root, so that neither ``/`` nor what the kernel shows as files can be one.
    disk_roots: tuple[str, ...] = ()
    #: Names of directories in which no disk of a guest lies, at any depth below a disk root: they are passed
    #: over, as ``.snapshot`` and ``.zfs`` are always.
    passed_over_directories: tuple[str, ...] = ()
    #: Absolute path of the directory of lock files, or None for Nova's, ``<instances_path>/locks``.
    lock_path: str | None = None
    #: Name of the storage backend, for managers that are not given one.
    backend: str = "qcow2"

    # -- fetching ------------------------------------------------------------------------------------
    #: Convert what is fetched to raw. Decides at fetch time only; a base keeps the format it has.
    force_raw_images: bool = True
    #: Unpack images whose container format is ``compressed`` while they arrive, instead of refusing them.
    decompress_images: bool = False
    #: How often a source is asked again after a failure that may pass, per endpoint round.
    num_retries: int = 3
    #: Bytes per second that a source must bring on average of a minute in which it is waited for, else the
    #: attempt counts as failed; or 0 to wait as long as anything comes.
    min_transfer_rate: int = 1024
    #: How many images one manager fetches at a time, or 0 for no limit.
    max_concurrent_disk_ops: int = 0
    #: vmdk ``createType`` values that are accepted.
    vmdk_allowed_types: tuple[str, ...] = ("streamOptimized", "monolithicSparse")
    #: Accept images whatever their owner claims them to be. Images to which other files belong stay refused.
    disable_deep_image_inspection: bool = False
    #: CPU seconds that a qemu-img which only looks may take. By the clock it may take ten times as many.
    images_cpu_time_limit: int = 30
    #: Address space that a qemu-img which only looks may take, in bytes.
    images_address_space_limit: int = 2 * GIB
    #: CPU seconds that a qemu-img which converts, or a mkfs, may take. By the clock it may take ten times as
    #: many.
    convert_cpu_time_limit: int = 3600
    #: Address space that a qemu-img which converts, or a mkfs, may take, in bytes.
    convert_address_space_limit: int = 8 * GIB
    #: Refuse an image whose virtual size is above this. The default is what ext4 can hold in one file.
    max_virtual_size: int = 16 * 2**40
    #: Demand that every image's signature verifies.
    verify_glance_signatures: bool = False
    #: Demand that the signing certificate chains to one of the trusted ones.
    enable_certificate_validation: bool = False
    #: Certificates trusted where a request names none.
    default_trusted_certificate_ids: tuple[str, ...] = ()
    #: Absolute path of a directory of certificates, ``<id>.pem``, for managers that are not given a store; or
    #: None if the host has no certificates.
    certificates_path: str | None = None

    #: Ask the request's own source before an image that is in the cache is used: ``no``, ``open`` (a source
    #: that does not answer in time changes nothing) or ``closed`` (then the image is not used).
    authorize_hits: str = "no"
    #: Seconds to wait for that answer.
    authorize_timeout: float = 10.0

    # -- disks ---------------------------------------------------------------------------------------
    #: ``none`` or ``space``: allocate a disk's whole virtual size when it is made.
    preallocate_images: str = "none"
    #: Sync the content of a copied disk before the disk gets its name. If false, a power cut soon after may
    #: take the content and leave the name; ``if_exists="reuse"`` refuses such a disk. Overlays, swap and
    #: kernels are synced always, and so is everything on filesystems without extended attributes.
    sync_copied_disks: bool = True
    #: Filesystem of ephemeral disks where the caller names none, or None to choose it by the guest's type.
    default_ephemeral_format: str | None = None
    #: Command lines to make filesystems with, by guest type: ``<os_type>=<command>``.
    virt_mkfs: tuple[str, ...] = ()

    # -- eviction ------------------------------------------------------------------------------------
    #: Whether unused base images are removed. If false, a pass reports what it would remove.
    remove_unused_base_images: bool = True
    #: Seconds since its last use for which an unused base image stays.
    remove_unused_original_minimum_age_seconds: int = 86400
    #: The same for legacy resized bases (``<sha1>_<GiB>``).
    remove_unused_resized_minimum_age_seconds: int = 3600
    #: Seconds between two periodic passes, or 0 for 60 seconds, or -1 for no passes.
    manager_interval: int = 2400
    #: Most bytes that the cache may allocate, or 0 for no limit.
    max_cache_size: int = 0
    #: Evict unused bases when less than this many bytes of the filesystem are free, or 0 for no limit.
    free_space_low: int = 0
    #: Once evicting for space, stop at this many free bytes, or 0 to stop at ``free_space_low``.
    free_space_high: int = 0

    #: Under pressure of space, unused bases go earlier than their age, but none younger than this.
    space_minimum_age_seconds: int = 3600

    #: Seconds for which it is kept what happened to base images, at least.
    history_age_seconds: int = 60 * 86400

    #: Bytes per second that a scrub reads, or 0 for no limit.
    scrub_rate: int = 32 * 2**20

    # -- waiting and crashes -------------------------------------------------------------------------
    #: Seconds to wait for another process that fetches the same image and makes no progress, before this one
    #: fetches it too.
    lock_timeout: float = 600.0
    #: A stage file is a crash's leftover when its lock is free and it was not written for so many seconds.
    stage_idle_seconds: int = 3600
    #: The same for ``.part`` and ``.converted`` files that Nova left.
    foreign_stage_idle_seconds: int = 86400

    # -- pre-caching ---------------------------------------------------------------------------------
    #: How many hosts of an aggregate are asked at a time.
    precache_concurrency: int = 1
    #: Seconds after their start when pre-cache jobs that are over are forgotten, or 0 to keep them.
    precache_job_age_seconds: int = 0

    # -- rbd -----------------------------------------------------------------------------------------
    #: Pool that instance disks are made in.
    images_rbd_pool: str = "rbd"
    #: Path of the cluster's configuration, or an empty text for librados's search path.
    images_rbd_ceph_conf: str = ""
    #: Ceph user, without ``client.``, or None for librados's default.
    rbd_user: str | None = None
    #: Seconds to wait for the cluster's monitors, or 0 for no limit.
    rbd_connect_timeout: int = 5
    #: Seconds to wait for each operation of the cluster's OSDs, unless the cluster's configuration limits it
    #: itself; or 0 for no limit.
    rbd_op_timeout: int = 120
    #: Glance's name for the rbd store that it should copy images into, or an empty text to ask for no copies.
    images_rbd_glance_store_name: str = ""
    #: Seconds between two looks at a copy that Glance makes.
    images_rbd_glance_copy_poll_interval: int = 15
    #: Seconds after which such a copy is given up.
    images_rbd_glance_copy_timeout: int = 600
    #: Refuse an image that cannot be cloned, instead of fetching and importing it.
    never_download_image_if_on_rbd: bool = False

    def __post_init__(self) -> None:
        self._require_types()
        self._require_paths()
        self._require_names()
        self._require_places()
        self._require_choices()
        if self.manager_interval < -1:
            raise _wrong("manager_interval", self.manager_interval, "must be -1 or more")
        if self.precache_concurrency < 1:
            raise _wrong("precache_concurrency", self.precache_concurrency, "must be 1 or more")
        if wrong := [command for command in self.virt_mkfs if "=" not in command]:
            raise _wrong("virt_mkfs", wrong[0], "must be <os_type>=<command>")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value < 0 and field.name != "manager_interval":
                raise _wrong(field.name, value, "must not be negative")

    def _require_types(self) -> None:
        """Refuse text in particular: its letters would be taken for values, and "no" for yes."""
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            if isinstance(default, tuple):
                if not isinstance(value, tuple | list | set | frozenset):
                    raise _wrong(field.name, value, "must be a tuple")
                if wrong := [each for each in value if not _is_text(each)]:
                    raise _wrong(field.name, wrong[0], "must be texts that a path may have")
                # What the caller changes later changes nothing here.
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(default, bool):
                if not isinstance(value, int) or value not in (False, True):
                    raise _wrong(field.name, value, "must be True or False")
            elif isinstance(default, int | float):
                if not _is_number(value):
                    raise _wrong(field.name, value, "must be a number")
                if isinstance(default, int):
                    if value != value // 1:
                        raise _wrong(field.name, value, "must be a whole number")
                    value = int(value)
                # What is larger means as much as possible, and sums of it could be no floats.
                object.__setattr__(self, field.name, min(value, MOST_BYTES) if type(value) is int else value)
            elif not _is_text(value) and not (value is None and default is None):
                raise _wrong(field.name, value, "must be text that a path may have")

    def _require_paths(self) -> None:
        for name in ("instances_path", "lock_path", "certificates_path"):
            value = getattr(self, name)
            if (value is not None or name == "instances_path") and not _is_absolute(value):
                raise _wrong(name, value, "must be an absolute path")
        for root in self.disk_roots:
            if not _is_absolute(root):
                raise _wrong("disk_roots", root, "must be absolute paths")

    def _require_names(self) -> None:
        for name in self.passed_over_directories:
            if not _is_name(name):
                raise _wrong("passed_over_directories", name, "must be names of directories, without a path")
        if not _is_name(self.subdirectory_name):
            raise _wrong("subdirectory_name", self.subdirectory_name, "must be one directory's name")
        if self.subdirectory_name in _TAKEN or _UUID.fullmatch(self.subdirectory_name):
            raise _wrong("subdirectory_name", self.subdirectory_name, "must be no other directory's name")
        if _plain(self.locks_path) == _plain(self.base_path):
            raise _wrong("lock_path", self.lock_path, "must not be the directory of base images")

    def _require_places(self) -> None:
        """Refuse disk roots that hold more than disks of guests."""
        roots = [("instances_path", self.instances_path), *(("disk_roots", each) for each in self.disk_roots)]
        for name, root in roots:
            # A pass would read every file of the host, and wait for what the kernel only shows as files.
            if _plain(root) in ("/", "/dev") or f"{_plain(root)}/".startswith(_KERNELS):
                raise _wrong(name, root, "must be a directory of instances")
            if f"{_plain(root)}/".startswith(f"{_plain(self.base_path)}/"):
                raise _wrong(name, root, "must not be among the base images")

    def _require_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _wrong(name, getattr(self, name), f"must be one of {', '.join(choices)}")

    @functools.cached_property
    def base_path(self) -> str:
        """Absolute path of the directory of base images."""
        return os.path.join(self.instances_path, self.subdirectory_name)

    @functools.cached_property
    def locks_path(self) -> str:
        """Absolute path of the directory of lock files."""
        return self.lock_path or os.path.join(self.instances_path, "locks")

    @functools.cached_property
    def passed_over(self) -> frozenset[str]:
        """Names of directories in which no pass looks for disks."""
        return frozenset((*_SNAPSHOTS, *self.passed_over_directories))

    @functools.cached_property
    def roots(self) -> tuple[str, ...]:
        """Absolute paths of every disk root."""
        return self.disk_roots or (self.instances_path,)


def _is_absolute(value: object) -> bool:
    return _is_path(value) and os.path.isabs(str(value))


def _is_text(value: object) -> bool:
    return value == "" or _is_path(value)


def _plain(path: str) -> str:
    # POSIX lets two slashes at the beginning mean something else, which Linux does not.
    return "/" + os.path.normpath(path).strip("/")


def _is_name(value: object) -> bool:
    """Whether a value can be the name of an entry of a directory."""
    return _is_path(value) and "/" not in str(value) and value not in (".", "..")


def _is_number(value: object) -> bool:
    return type(value) is int or (isinstance(value, float) and not math.isnan(value))


def _is_path(value: object) -> bool:
    """Whether a value is text that can be a path, in the encoding that this process gives to paths."""
    try:
        return isinstance(value, str) and "\0" not in value and os.fsencode(value) != b""
    except UnicodeEncodeError:
        return False


def _wrong(field: str, value: object, why: str) -> errors.ConfigError:
    return errors.ConfigError(
        f"{field} is {errors.shown(value)} and {why}", next_step="correct the configuration"
    )
