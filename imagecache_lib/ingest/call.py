# SPDX-License-Identifier: Apache-2.0
"""One request on its way through the library: what is wanted, from where, and for how long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from imagecache_lib import errors, model
from imagecache_lib.config import CacheConfig
from imagecache_lib.sources import transfer
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import layout
from imagecache_lib.system.host import System


class Call:
    """One image wanted by one caller.

    The source is asked for the image's metadata at most once, and not at all while the cache can answer.

    :ivar name: the base's name in the cache.
    :ivar stored_format: qemu's name of the format the base must have. None: any will do.
    :param size: virtual size of the disk that is wanted, in bytes. None: whatever the image has.
    :raises ImageRejected: the id cannot be an image's.
    """

    def __init__(
        self,
        image_id: str,
        request: model.Request,
        *,
        source: ImageSource,
        config: CacheConfig,
        host: System,
        stored_format: str | None = None,
        size: int | None = None,
    ) -> None:
        self.image_id = image_id
        self.name = layout.base_name(image_id)
        self.request = request
        self.stored_format = stored_format
        self._size = size
        self._source = request.source or source
        self._config = config
        self._host = host
        self._described: tuple[ImageSource, model.Image] | None = None

    @property
    def trusted_certs(self) -> tuple[str, ...] | None:
        """Certificates that the caller or the configuration demands. None: none are."""
        if self.request.trusted_certs is not None:
            return self.request.trusted_certs
        if self._config.enable_certificate_validation:
            return self._config.default_trusted_certificate_ids
        return None

    @property
    def demands_signature(self) -> bool:
        """Whether only an image whose signature was verified will do."""
        return self._config.verify_glance_signatures or self.trusted_certs is not None

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Let every error of the body say which image it is about."""
        try:
            yield
        except errors.ImageCacheError as error:
            if error.image is None:
                error.image = self.image_id
            raise

    def require_fit(self, virtual_size: int) -> None:
        """Refuse an image that is larger than the disk.

        :raises DiskTooSmallError: it is.
        """
        if self._size is not None and self._size < virtual_size:
            raise errors.DiskTooSmallError(
                f"its virtual size is {virtual_size} bytes and the disk shall have {self._size}",
                image=self.image_id,
                next_step="choose a larger disk (flavor)",
            )

    def check(self) -> None:
        """Raise if the caller no longer waits.

        :raises CancelledError: it was cancelled.
        :raises LockTimeoutError: its deadline passed.
        """
        if self.request.cancel is not None and self.request.cancel.is_set():
            raise errors.CancelledError("the request was cancelled", image=self.image_id)
        if self.request.deadline is not None and self._host.clock() >= self.request.deadline:
            raise errors.LockTimeoutError(
                "the request's deadline passed while others were at work on the image",
                image=self.image_id,
                next_step="try again later, or allow more time",
            )

    def describe(self) -> tuple[ImageSource, model.Image]:
        """Return the source that has the image, and what it says of it.

        :raises: as :func:`imagecache_lib.sources.transfer.describe`.
        """
        if self._described is None:
            self._described = transfer.describe(
                self._source,
                self.image_id,
                host=self._host,
                fallbacks=self.request.fallbacks,
                retries=self._config.num_retries,
                deadline=self.request.deadline,
                cancel=self.request.cancel,
            )
        return self._described

    def transfer(self) -> transfer.Transfer:
        """Return a transfer of the image's data.

        :raises: as :meth:`describe`.
        """
        source, image = self.describe()
        return transfer.Transfer(
            source,
            image,
            host=self._host,
            retries=self._config.num_retries,
            deadline=self.request.deadline,
            cancel=self.request.cancel,
            max_size=self._config.max_virtual_size,
            rate=self.request.rate,
        )
