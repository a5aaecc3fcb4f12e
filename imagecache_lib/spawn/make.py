# SPDX-License-Identifier: Apache-2.0
"""Making something from a base image: a disk, or a plain file.

What is made is complete before it gets a name. Only then is the base looked at: if the base still has its own
name, what was made gets its. A base that left the cache meanwhile costs another round, within the request's
retries.
"""

from __future__ import annotations

from imagecache_lib import errors, model
from imagecache_lib.backends.interface import Feature, StorageBackend
from imagecache_lib.ingest.fit import require_fit
from imagecache_lib.ingest.producer import BaseRequest
from imagecache_lib.spawn.lease import Lease, Leases
from imagecache_lib.system import atomic_file
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated


def make_disk(
    leases: Leases,
    storage: StorageBackend,
    base: BaseRequest,
    target: str,
    size: int | None = None,
    *,
    shared: bool = True,
) -> model.Disk:
    """Make a disk from a base image, and return it.

    :param size: virtual size in bytes, or None for the base's own size.
    :param shared: whether the base may lie in the cache; if not, the disk gets a copy of its own.
    :raises DiskExistsError: the target exists.
    :raises DiskTooSmallError: the base is larger.
    :raises: whatever the request's producer raises.
    """
    # An overlay takes milliseconds, a copy as long as its size.
    lasting = Feature.OVERLAY not in storage.features
    referring = None if lasting else target
    while True:
        acquired = leases.acquire(base, lasting=lasting) if shared else leases.acquire_private_copy(base)
        with acquired as lease:
            require_fit(base.label, lease.base.virtual_size, size)
            prepare = storage.prepare_standalone if lease.private else storage.prepare
            with prepare(lease.base, target, size) as pending:
                if lease.is_current(referring):
                    return pending.commit()
        base.retries.spend(_vanished(base, lease))


def make_file(leases: Leases, base: BaseRequest, path: str, host: System, *, notes: str = "") -> None:
    """Put what a base image holds into a new file.

    :param notes: as :func:`imagecache_lib.system.atomic_file.unfinished` takes it.
    :raises DiskExistsError: the file exists.
    :raises: whatever the request's producer raises.
    """
    while True:
        with (
            leases.acquire(base, lasting=True) as lease,
            atomic_file.unfinished(path, host, notes=notes) as file,
        ):
            assert lease.base.fd is not None  # a leased base is open
            with translated(path):
                atomic_file.copy_content(lease.base.fd, file.fd, base.waiter)
            file.seal()
            if lease.is_current():
                return file.commit()
        base.retries.spend(_vanished(base, lease))


def _vanished(base: BaseRequest, lease: Lease) -> errors.BackendError:
    return errors.BackendError(
        "its base image left the cache each time a disk was made from it",
        image=base.label,
        path=lease.base.path,
        next_step="find out what removes files from the cache",
    )
