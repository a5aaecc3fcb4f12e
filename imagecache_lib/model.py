# SPDX-License-Identifier: Apache-2.0
"""The values that pass between the parts. All are frozen; all sizes are bytes unless named otherwise.

Three sizes of one file are told apart everywhere: *virtual* (what the guest
sees), *apparent* (``st_size``) and *allocated* (``st_blocks * 512``).
"""

from __future__ import annotations

import dataclasses
import enum
import numbers
import os
import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

from imagecache_lib import errors

#: The most bytes that a file can have: the kernel's loff_t is signed.
MOST_BYTES = 2**63 - 1

#: How an image's data may be compressed as a whole.
COMPRESSIONS = ("gzip", "xz", "zstd", "bzip2")

#: Names of :mod:`hashlib`, by what others call them without what separates letters and digits.
_ALGORITHMS = {
    "md5": "md5",
    "sha1": "sha1",
    "blake2b": "blake2b",
    "blake2b512": "blake2b",
    "blake2s": "blake2s",
    "blake2s256": "blake2s",
    **{f"{family}{bits}": f"sha{bits}" for family in ("sha", "sha2") for bits in (224, 256, 384, 512)},
    **{f"sha3{bits}": f"sha3_{bits}" for bits in (224, 256, 384, 512)},
}
_SEPARATORS = re.compile(r"[-_ ]")


@dataclasses.dataclass(frozen=True)
class Digest:
    """A content digest.

    :param algorithm: a :mod:`hashlib` name, such as ``sha512`` (Glance's ``os_hash_algo``). Upper case, and
        the spellings of RFC 9530 (``sha-512``), OpenSSL (``SHA2-512``, ``BLAKE2b512``) and others are turned
        into that.
    :param value: hex, which is turned into lower case.
    """

    algorithm: str
    value: str

    def __post_init__(self) -> None:
        # What a source that is not typed states is checked where its description is.
        if isinstance(self.algorithm, str):
            name = self.algorithm.strip().lower()
            object.__setattr__(self, "algorithm", _ALGORITHMS.get(_SEPARATORS.sub("", name), name))
        if isinstance(self.value, str):
            object.__setattr__(self, "value", self.value.strip().lower())

    @property
    def hex_length(self) -> int:
        """How many hexadecimal digits the value must have; 0 for an algorithm that not all hosts have."""
        import hashlib  # heavy, and not needed to pass a digest on

        if self.algorithm not in hashlib.algorithms_guaranteed:
            return 0
        try:
            return hashlib.new(self.algorithm, usedforsecurity=False).digest_size * 2
        except ValueError:
            return 0  # this host's OpenSSL forbids it

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"


@dataclasses.dataclass(frozen=True)
class Image:
    """What a source says of an image. None of it is trusted before it is checked.

    :param id: any non-empty text of at most 1,024 UTF-8 bytes without control characters.
    :param disk_format: Glance's name for it (``raw``, ``qcow2``, ``vmdk``, ``vhd``, ``iso``, ...).
        With None the source claims no format, and the content decides.
    :param size: length of the data in bytes, or None if the source does not say.
    :param digest: digest of the data as stored at the source, or None if the source has none.
    :param virtual_size: size of the disk that a guest would see, in bytes, as the source claims it; or None.
    :param container_format: Glance's (``bare``, ``ovf``, ``aki``, ...).
    :param status: Glance's image status; only ``active`` images have data.
    :param locations: URLs under which the image service stores the data (``rbd://fsid/pool/image/snap``).
    :param stores: names of the image service's stores that hold it.
    :param converted_from: the data is a conversion of an image of this format, as other caches have it.
        With None the data is the image's own.
    :param compression: how the data is compressed: one of :data:`imagecache_lib.model.COMPRESSIONS`. It is
        decompressed while it arrives; ``size`` and ``digest`` are of the compressed data. With None it is
        not, as far as the source knows.
    :param properties: everything else the source said, such as ``img_signature``.
    """

    id: str
    disk_format: str | None = None
    size: int | None = None
    digest: Digest | None = None
    virtual_size: int | None = None
    container_format: str | None = "bare"
    status: str = "active"
    locations: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    converted_from: str | None = None
    compression: str | None = None
    properties: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))


@dataclasses.dataclass(frozen=True)
class BaseImage:
    """A base image in the cache, as a lease shows it.

    :param image_id: the image it was made from.
    :param name: its name in the cache (sha1 of the id, in hex).
    :param path: absolute path. Never write to it.
    :param format: how it is stored: ``raw`` or, with ``force_raw_images`` off, the source's format.
        qemu's name for it (``vpc``, not ``vhd``).
    :param virtual_size: bytes the guest would see.
    :param digest: of the source's data, if this library checked it when it made the base. None for an
        adopted base, which another program made.
    :param source_format: what the source's data was; other than ``format`` if it was converted.
    :param fd: a descriptor of the base file, open for reading for as long as the lease is held, or
        None outside a lease. Reading through it is safe whatever happens to the name.
    """

    image_id: str
    name: str
    path: str
    format: str
    virtual_size: int
    digest: Digest | None = None
    source_format: str | None = None
    fd: int | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Disk:
    """An instance disk that a backend made.

    :param target: absolute path, or the image's name for rbd.
    :param format: qemu's name of the format; pass it to the hypervisor explicitly, never let it probe.
    :param virtual_size: bytes the guest sees.
    :param base: name of the base image that the disk needs as long as it exists, or None if it needs none.
    """

    target: str
    format: str
    virtual_size: int
    base: str | None = None


class CacheResult(enum.Enum):
    """What :meth:`ImageCacheManager.cache_image` found or did."""

    #: The image was fetched, and its base image is in the cache now.
    CACHED = "cached"
    #: The base image was in the cache already, and nothing was fetched.
    EXISTING = "existing"
    #: The backend clones the image inside the image service's storage, and reads no base image.
    NOT_NEEDED = "not_needed"


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """What :meth:`ImageCacheManager.precache_image` did.

    :param received: bytes that came over the wire for it.
    :param allocated: bytes that its base image takes on disk, or 0 if it shares the extents of another one.
    """

    result: CacheResult
    received: int = 0
    allocated: int = 0


@dataclasses.dataclass(frozen=True)
class Ephemeral:
    """An ephemeral disk of an instance, as :meth:`ImageCacheManager.create_ephemeral` was asked for it."""

    size_gb: int
    os_type: str | None = None
    fs: str | None = None


@dataclasses.dataclass(frozen=True)
class Instance:
    """One instance as its driver reports it to :meth:`ImageCacheManager.verify_base_images`.

    :param uuid: its uuid, which is the default name of its directory.
    :param host: name of the host it is on. On shared storage the driver reports all hosts' instances.
    :param images: ids of all images it uses: root, kernel, ramdisk, rescue.
    :param directories: names (not paths) its disks live under beside the uuid, such as its name or
        ``<uuid>_resize``.
    :param swap_mb: size of its swap disk in MiB, 0 for none.
    :param ephemerals: its ephemeral disks.
    :raises ConfigError: ``images``, ``directories`` or ``ephemerals`` is text or no iterable, or an ephemeral
        disk is no :class:`Ephemeral`, or a size is no whole number of at least 0.

    Ids and names may be given as bytes, as ``uuid.UUID`` or as paths too, and become text.
    """

    uuid: str
    host: str
    images: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    swap_mb: int = 0
    ephemerals: tuple[Ephemeral, ...] = ()

    def __post_init__(self) -> None:
        for field in ("uuid", "host"):
            value = _as_text(getattr(self, field))
            object.__setattr__(self, field, value if isinstance(value, str) else errors.shown(value))
        for field in ("images", "directories", "ephemerals"):
            values = _several(self.uuid, field, getattr(self, field))
            object.__setattr__(self, field, tuple(_as_text(each) for each in values))
        _require_size(self.uuid, "swap_mb", self.swap_mb)
        for each in self.ephemerals:
            if not isinstance(each, Ephemeral):
                raise errors.ConfigError(
                    f"ephemerals of instance {self.uuid} hold {errors.shown(each)}, which is no Ephemeral",
                    next_step="correct the driver",
                )
            _require_size(self.uuid, "size_gb of ephemerals", each.size_gb)


def _as_text(value: Any) -> Any:
    """Return the text that a value is another form of, or the value itself if there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | os.PathLike):
        return os.fsdecode(value)
    from uuid import UUID  # it takes time to load, and hardly anyone passes one

    return str(value) if isinstance(value, UUID) else value


def _require_size(uuid: str, field: str, value: object) -> None:
    """Refuse what can be no size of a disk: what was seen is written down for the next pass.

    :raises ConfigError: it is no ``int`` of at least 0, or larger than any file.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_BYTES:
        raise errors.ConfigError(
            f"{field} of instance {uuid} is {errors.shown(value)}, and must be a whole number of at least 0",
            next_step="correct the driver",
        )


def _several(uuid: str, field: str, values: Any) -> tuple[Any, ...]:
    """Return several values as a tuple.

    :raises ConfigError: for text, whose letters would be taken for the values, and for what is not several.
    """
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping):
        return tuple(values)
    raise errors.ConfigError(
        f"{field} of instance {uuid} is {errors.shown(values)}, and must be a tuple",
        next_step="correct the driver: a tuple of one value ends in a comma",
    )


def reported(instances: Iterable[Instance]) -> tuple[Instance, ...]:
    """Return a driver's report as a tuple.

    :raises ConfigError: it is no report: text, or anything else than instances.
    """
    found: tuple[object, ...] = tuple(instances) if isinstance(instances, Iterable) else (instances,)
    wrong = [each for each in found if not isinstance(each, Instance)]
    if not wrong:
        return cast("tuple[Instance, ...]", found)
    raise errors.ConfigError(
        f"the report of instances holds {errors.shown(wrong[0])}, which is no instance",
        next_step="correct the driver: report instances, or None if it cannot tell which there are",
    )


class CancelToken(Protocol):
    """Cancels a request: a :class:`threading.Event` will do."""

    def is_set(self) -> bool:
        """Whether the caller has given up."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is particular to one call. The manager outlives many requests; a driver's token does not.

    :param source: used instead of the manager's source.
    :param trusted_certs: ids of certificates that are trusted: some of them, a root among them, must vouch
        for the certificate that signed the image. With None no certificate is demanded.
    :param certificates: a :class:`~imagecache_lib.CertificateStore` that is asked instead of the manager's,
        such as a key manager that the caller's own credential opens. With None the manager's is asked.
    :param fallbacks: sources tried in order when the image is gone from the first, or when the first states
        another digest than it is known to demand. A fallback that fails, or whose data is not what is
        demanded, is passed over for the next.
    :param deadline: epoch seconds after which the call gives up with :class:`LockTimeoutError` or
        :class:`SourceError`. With None the call has no deadline.
    :param cancel: asked several times a second; once it is set, the call raises :class:`CancelledError`.
    :param rate: bytes per second that the call may fetch at most, or None for no limit.
    :param hash_pieces: whether the hashes of the pieces of the image's data are kept beside its base, for
        hosts to which this one passes the image on. It costs a SHA-256 of the data beside the digest.
    :param resume: with a token, the fetch goes on where an earlier one of the same data broke off, and leaves
        what came to the next one should it break off itself; if it is cancelled, only if this token is set
        then. The data of images that are decoded while they arrive is kept besides, as far as there is room.
        Only images with a digest are resumed.
    :raises ConfigError: a field has a value of another type, or a rate that is none.
    """

    source: Any = None  # ImageSource; typed loosely because sources import this module
    trusted_certs: tuple[str, ...] | None = None
    certificates: Any = None  # CertificateStore, likewise
    fallbacks: tuple[Any, ...] = ()
    deadline: float | None = None
    cancel: CancelToken | None = None
    rate: int | None = None
    hash_pieces: bool = False
    resume: CancelToken | None = None

    def __post_init__(self) -> None:
        for name in ("cancel", "resume"):
            token = getattr(self, name)
            if token is not None and not is_token(token):
                raise self._wrong(name, "a threading.Event, or something else with is_set()")
        if self.deadline is not None and (not is_number(self.deadline) or self.deadline != self.deadline):
            raise self._wrong("deadline", "a number of seconds since the epoch")
        if self.rate is not None and (not is_number(self.rate) or not self.rate > 0):
            raise self._wrong("rate", "a number of bytes per second above 0")
        for name in ("trusted_certs", "fallbacks"):
            values = getattr(self, name)
            several = isinstance(values, Collection) and not isinstance(values, str | bytes | Mapping)
            if values is not None and not several:
                raise self._wrong(name, "a tuple")

    def _wrong(self, name: str, must: str) -> errors.ConfigError:
        return errors.ConfigError(
            f"{name} of the request is {errors.shown(getattr(self, name))}, and must be {must}",
            next_step="correct the caller",
        )


def is_token(value: object) -> bool:
    """Whether it can be asked whether the caller has given up."""
    return callable(getattr(value, "is_set", None))


def is_number(value: object) -> bool:
    """Whether it is a number, and not a truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
