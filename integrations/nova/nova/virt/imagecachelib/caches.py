# SPDX-License-Identifier: Apache-2.0
"""The driver's image cache, what is particular to each call of it, and its errors as Nova's."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import nova.conf
from nova import exception
from nova.compute import utils as compute_utils
from nova.virt.imagecachelib import sources

import imagecache_lib as ic
from imagecache_lib import opts
from imagecache_lib.backends.interface import CannotClone
from imagecache_lib.sources.interface import NotPermitted

CONF = nova.conf.CONF

#: Image types whose disks stay Nova's. Their kernels, and what is cached for them, go through the library.
_NOVAS = ("lvm", "ploop")


class DiskOps:
    """Nova's own limit of disk operations, so that the library's draw on it too.

    Nova puts the semaphore in its place when the service starts, which is after the driver was made.
    """

    def __init__(self) -> None:
        self._taken: list[object] = []

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        limit = compute_utils.disk_ops_semaphore
        unlimited = isinstance(limit, compute_utils.UnlimitedSemaphore)
        if not unlimited and not limit.acquire(blocking, timeout):
            return False
        self._taken.append(None if unlimited else limit)
        return True

    def release(self) -> None:
        limit = self._taken.pop()
        if limit is not None:
            limit.release()


def configuration() -> ic.CacheConfig:
    """Return what Nova's configuration says of the cache as it is now.

    :raises ConfigError: it cannot work.
    """
    return opts.config_from(CONF, backend="raw" if CONF.libvirt.images_type in _NOVAS else None)


class Caches:
    """The manager of the configured cache, and of others that existing disks name.

    A driver has one of these, and gives it to the objects that it makes of its disks and of its pass.

    :param glance: where the images come from.
    :raises ConfigError: the configuration cannot work. It is read once.
    """

    def __init__(self, glance: sources.Glance) -> None:
        self.config = configuration()
        self._glance = glance
        self._managers: dict[str, ic.ImageCacheManager] = {}
        self._making = threading.Lock()

    def manager(self, subdirectory: str | None = None) -> ic.ImageCacheManager:
        """Return the manager of a cache.

        :param subdirectory: the name of the cache's directory, or None for the one that is configured.
        :raises ConfigError: it cannot be one.
        """
        name = subdirectory or self.config.subdirectory_name
        with self._making:
            if name not in self._managers:
                self._managers[name] = ic.ImageCacheManager(
                    dataclasses.replace(self.config, subdirectory_name=name),
                    ic.FileSource({}),  # each request brings its own
                    host=opts.host_from(CONF),
                    disk_ops=DiskOps(),
                )
            return self._managers[name]

    def start(self) -> None:
        """Begin anew, with managers that are not shut down."""
        with self._making:
            self._managers.clear()

    def shutdown(self) -> None:
        """Cancel what is in flight, and what is asked until the next start."""
        self.manager()  # or else the first call after this one would have one that is not shut down
        with self._making:
            for manager in self._managers.values():
                manager.shutdown()

    def request(
        self,
        context,
        trusted_certs=None,
        fallback_host: str | None = None,
        config: ic.CacheConfig | None = None,
    ) -> ic.Request:
        """Return what is particular to one call.

        :param context: the request's ``nova.context.RequestContext``: its token fetches image and
            certificates.
        :param trusted_certs: the instance's ``nova.objects.TrustedCerts``. None: it demands none.
        :param fallback_host: a compute host whose cache may have what Glance has no more.
        :param config: of the cache that is asked, which lies at the same path there; or None for Nova's.
        """
        config = config or self.config
        fallbacks = (sources.HostSource(fallback_host, config.base_path),) if fallback_host else ()
        return ic.Request(
            source=self._glance.source(context),
            trusted_certs=tuple(trusted_certs.ids) if trusted_certs else None,
            certificates=None if config.certificates_path else ic.CastellanCertificates(context),
            fallbacks=fallbacks,
        )


@contextlib.contextmanager
def translated(image_id: str) -> Iterator[None]:
    """Raise the library's errors as those of Nova's that its compute manager tells apart."""
    try:
        yield
    except NotPermitted as error:
        raise exception.ImageNotAuthorized(image_id=image_id) from error
    except ic.ImageNotFound as error:
        raise exception.ImageNotFound(image_id=image_id) from error
    except (ic.ImageRejected, CannotClone) as error:
        raise exception.ImageUnacceptable(image_id=image_id, reason=str(error)) from error
    except ic.DiskTooSmallError as error:
        raise exception.FlavorDiskSmallerThanImage(
            flavor_size=error.size or 0, image_size=error.virtual_size or 0
        ) from error
    except ic.NoSpaceError as error:
        raise exception.ComputeResourcesUnavailable(reason=str(error)) from error
    except ic.SourceError as error:
        raise exception.GlanceConnectionFailed(server="glance", reason=str(error)) from error
    except ic.ImageCacheError as error:
        raise exception.InternalError(str(error)) from error
