# SPDX-License-Identifier: Apache-2.0
"""From oslo.config's options to a :class:`CacheConfig`. The only module that knows oslo.config.

Options that Nova has keep Nova's name, group, default and unit, so that a ``nova.conf`` means here what it
means there. What Nova lacks is in ``[image_cache]``, beside what it has.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import socket
from collections.abc import Sequence
from typing import Any

from oslo_config import cfg, types

from imagecache_lib import config, dates, errors
from imagecache_lib.config import CacheConfig
from imagecache_lib.system.host import System

#: How oslo.config says where a value comes from.
_LOCATION = re.compile(r"LocationInfo\(location=<[^>]*>, detail='?([^')]*)'?\)")

#: How Python says that a text is no number.
_NO_NUMBER = re.compile(
    r"(?:invalid literal for int\(\) with base 10|could not convert string to float): ('[^']*')"
)

#: ``images_type`` to the name of a backend; ``default`` depends on ``use_cow_images``.
_BACKENDS = {"raw": "raw", "flat": "raw", "qcow2": "qcow2", "rbd": "rbd"}

#: Fields of CacheConfig that are options of their own name, by group.
_FIELDS = {
    "DEFAULT": (
        "instances_path",
        "force_raw_images",
        "preallocate_images",
        "default_ephemeral_format",
        "virt_mkfs",
    ),
    "compute": ("max_concurrent_disk_ops", "vmdk_allowed_types"),
    "image_cache": (
        "subdirectory_name",
        "manager_interval",
        "precache_concurrency",
        "precache_job_age_seconds",
        "remove_unused_base_images",
        "remove_unused_original_minimum_age_seconds",
        "remove_unused_resized_minimum_age_seconds",
        "disk_roots",
        "passed_over_directories",
        "lock_path",
        "certificates_path",
        "sync_copied_disks",
        "max_cache_size",
        "free_space_low",
        "free_space_high",
        "space_minimum_age_seconds",
        "scrub_rate",
        "history_age_seconds",
        "max_virtual_size",
        "decompress_images",
        "min_transfer_rate",
        "convert_cpu_time_limit",
        "convert_address_space_limit",
        "lock_timeout",
        "authorize_hits",
        "authorize_timeout",
        "stage_idle_seconds",
        "foreign_stage_idle_seconds",
        "rbd_op_timeout",
    ),
    "glance": (
        "num_retries",
        "verify_glance_signatures",
        "enable_certificate_validation",
        "default_trusted_certificate_ids",
    ),
    "libvirt": (
        "images_cpu_time_limit",
        "images_rbd_pool",
        "images_rbd_ceph_conf",
        "rbd_user",
        "rbd_connect_timeout",
        "images_rbd_glance_store_name",
        "images_rbd_glance_copy_poll_interval",
        "images_rbd_glance_copy_timeout",
    ),
    "workarounds": ("disable_deep_image_inspection", "never_download_image_if_on_rbd"),
}


class Size(types.Integer):
    """A size in bytes, or with a binary unit, such as ``20G``."""

    def __call__(self, value: Any) -> int:
        found = super().__call__(dates.parse_size(value) if isinstance(value, str) else value)
        return int(found or 0)


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """Return every option by group: the entry point ``oslo.config.opts``."""
    return [
        ("DEFAULT", _default_opts()),
        ("image_cache", [*_image_cache_opts(), *_new_opts()]),
        ("compute", _compute_opts()),
        ("glance", _glance_opts()),
        ("libvirt", _libvirt_opts()),
        ("workarounds", _workarounds_opts()),
    ]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register each option that ``conf`` does not have yet.

    An option that is registered already, such as one of Nova's, is left as it is, and its value is used. Nova
    registers its options when the module ``nova.conf`` is imported, and fails if an option exists by then:
    import ``nova.conf`` before this function is called.
    """
    for group, options in list_opts():
        for option in options:
            try:
                conf.register_opt(option, group=None if group == "DEFAULT" else group)
            except cfg.DuplicateOptError:
                continue


def config_from(conf: cfg.ConfigOpts, *, backend: str | None = None) -> CacheConfig:
    """Return the configuration that ``conf`` holds, registering what it lacks.

    :param backend: of managers that are not given one, or None for the one that ``images_type`` stands for.
    :raises ConfigError: a value cannot be read, or cannot work.
    """
    register_opts(conf)
    try:
        values: dict[str, Any] = {
            name: _plain(_group(conf, group)[name]) for group, names in _FIELDS.items() for name in names
        }
        values["backend"] = backend or _backend(conf)
        # Nova's unit is GiB.
        values["images_address_space_limit"] = conf.libvirt.images_address_space_limit * config.GIB
    except (cfg.Error, ValueError) as error:
        raise errors.ConfigError(
            f"the configuration cannot be read: {_plainly(error)}", next_step="correct the configuration file"
        ) from error
    return CacheConfig(**values)


def host_from(conf: cfg.ConfigOpts) -> System:
    """Return this machine under the name that the option ``host`` gives it.

    :raises ConfigError: the value cannot be read.
    """
    register_opts(conf)
    try:
        name = str(conf.host)
    except (cfg.Error, ValueError) as error:
        raise errors.ConfigError(
            f"the option host cannot be read: {_plainly(error)}", next_step="correct the configuration file"
        ) from error
    return dataclasses.replace(System(), name=name)


def from_files(paths: Sequence[str] = (), *, instances_path: str | None = None) -> tuple[CacheConfig, System]:
    """Return the configuration and the host that files describe.

    :param paths: paths of oslo.config files; values in later files win. Without any path, ``imagecache.conf``
        is read where oslo.config looks for the files of a project of that name, if there is one.
    :param instances_path: an instances directory to use instead of the one in the files.
    :raises ConfigError: a file cannot be read, or a value cannot work.
    """
    conf = cfg.ConfigOpts()
    _read(conf, paths)
    register_opts(conf)
    if instances_path is not None:
        conf.set_override("instances_path", os.path.abspath(instances_path))
    return config_from(conf), host_from(conf)


def misspelt(paths: Sequence[str] = ()) -> list[str]:
    """Return a sentence for each option of ``[image_cache]`` in the files that does not exist.

    Groups that are Nova's alone are not looked at: what this library does not know of them is Nova's.

    :param paths: as for :func:`from_files`.
    :raises ConfigError: a file cannot be read.
    """
    conf = cfg.ConfigOpts()
    _read(conf, paths)
    known = {option.dest for _group, options in list_opts() if _group == "image_cache" for option in options}
    found = []
    for path in conf.config_file or ():
        sections: dict[str, dict[str, list[str]]] = {}
        try:
            cfg.ConfigParser(path, sections).parse()
        except (cfg.Error, OSError) as error:
            raise errors.ConfigError(
                f"the configuration cannot be read: {error}", path=path, next_step="correct the file"
            ) from error
        for name in sorted(sections.get("image_cache", {})):
            if name.replace("-", "_") not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"; {near[0]} is one" if near else ""
                found.append(f"{path} sets {name} in [image_cache], and there is no such option{meant}.")
    return found


def global_conf(paths: Sequence[str] = ()) -> cfg.ConfigOpts:
    """Read files into oslo.config's global configuration, and return it.

    Only for the ``main`` of a process that speaks oslo.messaging, which has options of its own there.

    :raises ConfigError: a file cannot be read.
    """
    _read(cfg.CONF, paths)
    return cfg.CONF


def has_transport(paths: Sequence[str] = ()) -> bool:
    """Whether files or the environment name a message bus. oslo.messaging is not loaded to find out.

    :raises ConfigError: a file cannot be read.
    """
    conf = cfg.ConfigOpts()
    _read(conf, paths)
    conf.register_opt(cfg.StrOpt("transport_url", secret=True))
    return bool(conf.transport_url)


def _read(conf: cfg.ConfigOpts, paths: Sequence[str]) -> None:
    arguments = [word for path in paths for word in ("--config-file", path)]
    try:
        conf(arguments, project="imagecache", prog="imagecache")
    except UnicodeDecodeError as error:
        raise errors.ConfigError(
            "the configuration cannot be read: a file is no UTF-8 text", next_step="correct --config-file"
        ) from error
    except (cfg.Error, OSError) as error:
        raise errors.ConfigError(
            f"the configuration cannot be read: {_plainly(error)}", next_step="correct --config-file"
        ) from error


def _plainly(error: Exception) -> str:
    """Return what oslo.config says, with the file where it has an object of Python."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = _LOCATION.sub(lambda found: found[1] or "the command line", " ".join(str(error).split()))
    return _NO_NUMBER.sub(r"\1 is no number", text)


def _group(conf: cfg.ConfigOpts, group: str) -> Any:
    return conf if group == "DEFAULT" else conf[group]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _backend(conf: cfg.ConfigOpts) -> str:
    images_type = conf.libvirt.images_type
    if images_type == "default":
        return "qcow2" if conf.use_cow_images else "raw"
    try:
        return _BACKENDS[images_type]
    except KeyError:
        raise errors.ConfigError(
            f"images_type is {images_type}, for which there is no storage backend",
            next_step=f"set it in [libvirt] to default or one of {', '.join(sorted(_BACKENDS))}",
        ) from None


# -- Nova's options: names, groups, defaults and units are its; the words are ours ---------------------------


def _my_ipv4() -> str:
    """Return the address that this host would send from: as oslo.utils does, and without its imports.

    Nothing is sent. Where there is no route, oslo.utils looks further.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.0", 80))  # an address for documentation, RFC 5737
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        from oslo_utils import netutils

        return str(netutils.get_my_ipv4())


def _default_opts() -> list[cfg.Opt]:
    return [
        cfg.StrOpt(
            "state_path",
            default="/var/lib/nova",
            help="Directory of the service's state. Other options refer to it as $state_path. Inside Nova, "
            "Nova's own default applies.",
        ),
        cfg.StrOpt(
            "my_ip",
            default=_my_ipv4(),
            sample_default="<host_ipv4>",
            help="Address of this host. Other options refer to it as $my_ip, so that hosts which share "
            "storage can each have a cache of their own: subdirectory_name = _base_$my_ip.",
        ),
        cfg.HostDomainOpt(
            "host",
            default=socket.gethostname(),
            sample_default="<current_hostname>",
            help="Name of this host, as the driver names it in what it reports of its instances.",
        ),
        cfg.StrOpt(
            "instances_path",
            default="$state_path/instances",
            sample_default="$state_path/instances",
            help="Absolute path of the directory that holds the instance directories and the cache. It must "
            "exist, and be writable for the service's user.",
        ),
        cfg.BoolOpt(
            "force_raw_images",
            default=True,
            help="Convert images to raw when they are fetched. It decides at fetch time only: an image that "
            "is in the cache keeps the format it has there.",
        ),
        cfg.BoolOpt(
            "use_cow_images",
            default=True,
            help="With images_type = default: make disks as qcow2 overlays of the cached image (true), or as "
            "copies of it (false).",
        ),
        cfg.StrOpt(
            "preallocate_images",
            default="none",
            choices=[
                ("none", "Disks grow as the guest writes"),
                ("space", "The whole virtual size is allocated with fallocate(2) when a disk is made"),
            ],
            help="Whether a disk's space is allocated when it is made.",
        ),
        cfg.StrOpt(
            "default_ephemeral_format",
            help="Filesystem of ephemeral disks for which none is asked: ext2, ext3, ext4, vfat, xfs or "
            "ntfs. Unset: ext4 for linux, ntfs for windows, vfat for any other type of guest.",
        ),
        cfg.MultiStrOpt(
            "virt_mkfs",
            default=[],
            help="Command line that makes the filesystem of ephemeral disks for a type of guest, as "
            "<os_type>=<command>; %(fs_label)s and %(target)s are filled in. The type default stands for all "
            "types without a command of their own. It is split at blanks and run without a shell. What it "
            "makes may differ each time, so such disks are made in place and never shared.",
        ),
    ]


def _image_cache_opts() -> list[cfg.Opt]:
    return [
        cfg.IntOpt(
            "manager_interval",
            default=2400,
            min=-1,
            deprecated_group="DEFAULT",
            deprecated_name="image_cache_manager_interval",
            help="Seconds between two periodic passes, for whoever runs them. With 0 a pass runs "
            "every 60 seconds, with -1 never.",
        ),
        cfg.StrOpt(
            "subdirectory_name",
            default="_base",
            deprecated_group="DEFAULT",
            deprecated_name="image_cache_subdirectory_name",
            help="Name, not path, of the cache's directory under instances_path. Hosts that share storage "
            "and shall not share a cache include $my_ip.",
        ),
        cfg.BoolOpt(
            "remove_unused_base_images",
            default=True,
            deprecated_group="DEFAULT",
            help="Remove cached images that no instance uses. If false, passes report and remove nothing.",
        ),
        cfg.IntOpt(
            "remove_unused_original_minimum_age_seconds",
            default=86400,
            deprecated_group="DEFAULT",
            help="A cached image that was used or fetched less than this many seconds ago stays, used or "
            "not.",
        ),
        cfg.IntOpt(
            "remove_unused_resized_minimum_age_seconds",
            default=3600,
            deprecated_group="libvirt",
            help="The same for resized copies that old releases of Nova left. None are made any more.",
        ),
        cfg.IntOpt(
            "precache_concurrency",
            default=1,
            min=1,
            help="How many hosts of an aggregate fetch images ahead of need at a time.",
        ),
    ]


def _compute_opts() -> list[cfg.Opt]:
    return [
        cfg.IntOpt(
            "max_concurrent_disk_ops",
            default=0,
            min=0,
            help="How many images are fetched and converted at a time on this host, with 0 any number.",
        ),
        cfg.ListOpt(
            "vmdk_allowed_types",
            default=["streamOptimized", "monolithicSparse"],
            help="createType values of VMDK images that are accepted. Types that name other files as extents "
            "let an image's owner read files of this host.",
        ),
    ]


def _glance_opts() -> list[cfg.Opt]:
    no_rbd = (
        " Of effect where Nova's libvirt driver runs with this library as its image cache. Other drivers give"
        " their requests a source that does this."
    )
    return [
        cfg.IntOpt(
            "num_retries",
            default=3,
            min=0,
            help="How often the image service is asked again after a failure that may pass. A transfer that "
            "breaks midway is resumed, and counts as one.",
        ),
        cfg.BoolOpt(
            "verify_glance_signatures",
            default=False,
            help="Accept only images whose signature verifies.",
        ),
        cfg.BoolOpt(
            "enable_certificate_validation",
            default=False,
            help="Accept only images whose signing certificate chains to a trusted one: one of those that "
            "the request names, else of default_trusted_certificate_ids. An image that was cached without is "
            "fetched again for a request that demands it.",
        ),
        cfg.ListOpt(
            "default_trusted_certificate_ids",
            default=[],
            help="Ids of the certificates that are trusted where a request names none.",
        ),
        cfg.BoolOpt(
            "enable_rbd_download",
            default=False,
            help="Nova: read image data from the Ceph cluster instead of the image service." + no_rbd,
        ),
        cfg.StrOpt("rbd_user", default="", help="Nova: Ceph user of enable_rbd_download." + no_rbd),
        cfg.IntOpt(
            "rbd_connect_timeout",
            default=5,
            help="Nova: seconds to wait for the cluster in enable_rbd_download." + no_rbd,
        ),
        cfg.StrOpt("rbd_pool", default="", help="Nova: pool of enable_rbd_download." + no_rbd),
        cfg.StrOpt(
            "rbd_ceph_conf",
            default="",
            help="Nova: path of the cluster's configuration for enable_rbd_download." + no_rbd,
        ),
    ]


def _libvirt_opts() -> list[cfg.Opt]:
    return [
        cfg.StrOpt(
            "images_type",
            default="default",
            choices=[
                ("raw", "Files with the image's content"),
                ("flat", "The same"),
                ("qcow2", "Overlays of the cached image"),
                ("lvm", "Not supported: refused when the configuration is read"),
                ("rbd", "Images in a Ceph cluster"),
                ("ploop", "Not supported: refused when the configuration is read"),
                ("default", "qcow2 or raw, as use_cow_images says"),
            ],
            help="What instance disks are made of.",
        ),
        cfg.IntOpt(
            "images_cpu_time_limit",
            default=30,
            help="CPU seconds that a qemu-img may take which only looks at an image.",
        ),
        cfg.IntOpt(
            "images_address_space_limit",
            default=2,
            help="Address space in GiB that a qemu-img may take which only looks at an image.",
        ),
        cfg.StrOpt("images_rbd_pool", default="rbd", help="Pool in which instance disks are made."),
        cfg.StrOpt(
            "images_rbd_ceph_conf",
            default="",
            help="Path of the Ceph cluster's configuration. Empty: librados's default.",
        ),
        cfg.StrOpt(
            "images_rbd_glance_store_name",
            default="",
            help="Name of the image service's store in the same cluster. Where it is set, the image service "
            "is asked to copy an image there that cannot be cloned from where it is.",
        ),
        cfg.IntOpt(
            "images_rbd_glance_copy_poll_interval",
            default=15,
            help="Seconds between two looks whether such a copy is done.",
        ),
        cfg.IntOpt(
            "images_rbd_glance_copy_timeout",
            default=600,
            help="Seconds after which such a copy is given up.",
        ),
        cfg.StrOpt("rbd_user", help="Ceph user, without client. in front. Unset: librados's default."),
        cfg.IntOpt(
            "rbd_connect_timeout",
            default=5,
            help="Seconds to wait for the monitors of the Ceph cluster. With 0 there is no limit.",
        ),
    ]


def _workarounds_opts() -> list[cfg.Opt]:
    return [
        cfg.BoolOpt(
            "disable_deep_image_inspection",
            default=False,
            help="Do not refuse images whose content is not what it is said to be. Images to which other "
            "files belong are refused all the same.",
        ),
        cfg.BoolOpt(
            "never_download_image_if_on_rbd",
            default=False,
            help="With images_type = rbd: refuse an image that cannot be cloned, instead of fetching it and "
            "importing it into the cluster.",
        ),
        cfg.BoolOpt(
            "reserve_disk_resource_for_image_cache",
            default=False,
            help="For the driver, which reports disk space: count what the cache has allocated as reserved. "
            "It asks ImageCacheManager.get_disk_usage for it, and ImageCacheManager.get_space for what is "
            "promised to images in flight; the library itself does nothing with this option.",
        ),
    ]


# -- what Nova lacks -----------------------------------------------------------------------------------------


def _new_opts() -> Sequence[cfg.Opt]:
    """Options whose defaults are those of :class:`CacheConfig`."""
    default = {field.name: field.default for field in dataclasses.fields(CacheConfig)}

    def integer(name: str, words: str) -> cfg.Opt:
        return cfg.IntOpt(name, default=default[name], min=0, help=words)

    def size(name: str, words: str) -> cfg.Opt:
        return cfg.Opt(name, type=Size(min=0), default=default[name], help=f"{words} 20G stands for 20 GiB.")

    return [
        cfg.ListOpt(
            "disk_roots",
            default=[],
            help="Absolute paths of all directories under which instance directories lie. Empty: only "
            "instances_path. Every one is read for references before an image is removed; while one is not "
            "mounted, nothing is removed.",
        ),
        cfg.ListOpt(
            "passed_over_directories",
            default=[],
            help="Names of directories, at any depth below the disk roots, in which no disk of a guest lies: "
            "backups, or what a filer shows as snapshots under another name than .snapshot and .zfs, which "
            "are always passed over. What refers to an image from there does not keep it.",
        ),
        cfg.StrOpt(
            "lock_path",
            help="Absolute path of the directory of lock files. Unset: the directory locks under "
            "instances_path, which is where Nova's image cache has its own.",
        ),
        cfg.StrOpt(
            "certificates_path",
            help="Absolute path of a directory with the certificates of signed images, <id>.pem each: those "
            "that signed them and those that are trusted. Unset: only what the driver provides, such as a "
            "key manager.",
        ),
        size(
            "max_cache_size",
            "Bytes that the cache may allocate. Above, unused images go before their age. 0 sets no limit.",
        ),
        size(
            "free_space_low",
            "Bytes of the filesystem that shall stay free. Below, unused images go "
            "before their age, and nothing is fetched that would not fit. With 0 there is no limit.",
        ),
        size(
            "free_space_high",
            "Bytes that shall be free again once images are removed for "
            "free_space_low. 0: as many as free_space_low says.",
        ),
        integer(
            "space_minimum_age_seconds",
            "No lack of space removes an image that was used or fetched "
            "less than this many seconds ago: its disk may be on its way from another host.",
        ),
        size(
            "min_transfer_rate",
            "Bytes per second that a source of images must bring on average of a minute in which "
            "it is waited for. An attempt that brings less counts as failed, so that a server which trickles "
            "does not hold an image's lock for ever. With 0 there is no limit.",
        ),
        size(
            "scrub_rate",
            "Bytes per second that a scrub reads of the cached images to find what the "
            "disk damaged. It looks at 100 GiB in 53 minutes with the default. With 0 there is no limit.",
        ),
        integer(
            "history_age_seconds",
            "Seconds for which imagecache history knows what happened to base images, at least. Of one host "
            "no more than 18 MiB are kept.",
        ),
        cfg.BoolOpt(
            "sync_copied_disks",
            default=default["sync_copied_disks"],
            help="Sync the content of a raw disk that is a copy of an image before the disk gets its name. "
            "Without, making a disk does not wait for the storage; if the host loses power soon after, the "
            "disk may be there without its content, and is refused where it would be reused.",
        ),
        size("max_virtual_size", "Bytes above which an image's virtual size is refused."),
        cfg.BoolOpt(
            "decompress_images",
            default=default["decompress_images"],
            help="Unpack images whose container_format is compressed (gzip, xz, zstd or bzip2 of one disk) "
            "while they arrive. If false, they are refused.",
        ),
        integer(
            "convert_cpu_time_limit", "CPU seconds that a qemu-img or mkfs may take which makes something."
        ),
        size(
            "convert_address_space_limit",
            "Address space in bytes that a qemu-img or mkfs may take which makes something.",
        ),
        cfg.FloatOpt(
            "lock_timeout",
            default=default["lock_timeout"],
            min=0,
            help="Seconds to wait for another process that fetches the same image and gets no further, "
            "before it is fetched a second time.",
        ),
        cfg.StrOpt(
            "authorize_hits",
            default=default["authorize_hits"],
            choices=[
                ("no", "What is in the cache is used without asking"),
                ("open", "Ask; if there is no answer in time, use it"),
                ("closed", "Ask; if there is no answer in time, do not use it"),
            ],
            help="Whether the image service is asked, with the token of the request, before a disk is made "
            "of an image that is in the cache. An image that was deleted there is refused then, too. Disks "
            "that exist keep their base image without asking.",
        ),
        cfg.FloatOpt(
            "authorize_timeout",
            default=default["authorize_timeout"],
            min=0,
            help="Seconds to wait for the answer to authorize_hits.",
        ),
        integer(
            "stage_idle_seconds",
            "Seconds without a write after which a file in flight whose lock is free "
            "is removed as the leftover of a crash.",
        ),
        integer(
            "precache_job_age_seconds",
            "When a pre-cache job is started, jobs that are over and were started more than this many "
            "seconds ago are forgotten. 0: never.",
        ),
        integer("foreign_stage_idle_seconds", "The same for .part and .converted files that Nova left."),
        integer(
            "rbd_op_timeout",
            "Seconds to wait for each operation of a Ceph cluster's OSDs, before the disk or the download "
            "that needs it fails. If ceph.conf has a rados_osd_op_timeout, that counts instead. With 0 there "
            "is no limit: a cluster without OSDs, or a pool that is full, is waited for.",
        ),
    ]
