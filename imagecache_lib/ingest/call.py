# SPDX-License-Identifier: Apache-2.0
"""One request on its way through the library: what is wanted, from where, and for how long."""

from __future__ import annotations

import dataclasses
import hashlib
import logging

from imagecache_lib import errors, model
from imagecache_lib.config import CacheConfig
from imagecache_lib.ingest import authorize
from imagecache_lib.ingest.fit import require_fit
from imagecache_lib.ingest.producer import NotPrepared
from imagecache_lib.sources import answers, checked, transfer
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.sources.locations import Locations
from imagecache_lib.store import evidence, layout
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)


def origin_of(source: ImageSource, image_id: str) -> str:
    """Return a digest of where a source reads an image's data.

    A source that does not tell is taken for one that reads where others of its class do.
    """
    told = checked.origin(source, image_id)
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    # Not the text itself, which is written down: a third party's may hold a secret.
    return hashlib.sha256(f"{image_id}\0{told or kind}".encode("utf-8", "replace")).hexdigest()


class Call:
    """One image wanted by one caller.

    Each source is asked for the image's metadata at most once, and not at all while the cache can answer.
    Only :meth:`ask` and :meth:`authorize` ask: they may wait for an answer, so that no lock is held then.

    :ivar name: the base's name in the cache.
    :ivar stored_format: qemu's name of the format that the base must have, or None if any format will do.
    :ivar size: virtual size in bytes of the disk that is wanted, or None for the image's own size.
    :ivar imposes_digest: whether the digest of the image's description is what is demanded, and nothing that
        the source says.
    :ivar waiter: the caller, which may cancel the call or have a deadline.
    :param size: virtual size of the disk that is wanted, in bytes, or None for the image's own size.
    :param made: whether a disk was made from the image before. That disk needs the base that it was made on,
        whichever digest the source states today.
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
        made: bool = False,
    ) -> None:
        self.image_id = image_id
        self.name = layout.base_name(image_id)
        self.request = request
        self.stored_format = stored_format
        self.waiter = Waiter(host, image_id, request.deadline, request.cancel)
        self.size = size
        self._made = made
        self._source = request.source or source
        self._config = config
        self._host = host
        self._locations: Locations | None = None
        self._answer: tuple[ImageSource, model.Image] | errors.ImageCacheError | None = None
        self._has_answer = False
        self.imposes_digest = False

    @property
    def trusted_certs(self) -> tuple[str, ...] | None:
        """Ids of the certificates that the caller or the configuration demands, or None if neither does."""
        if self.request.trusted_certs is not None:
            return self.request.trusted_certs
        if self._config.enable_certificate_validation:
            return self._config.default_trusted_certificate_ids
        return None

    @property
    def known_digest(self) -> model.Digest | None:
        """The digest that the image's data must have, if its source knows it without asking a server."""
        return None if self._made else checked.known_digest(self._source, self.image_id)

    @property
    def demands_signature(self) -> bool:
        """Whether only an image whose signature was verified will do."""
        return self._config.verify_glance_signatures or self.trusted_certs is not None

    def requirements(self, use: evidence.Use) -> evidence.Requirements:
        """Return what a base image must prove to serve this call."""
        return evidence.Requirements(
            use,
            stored_format=self.stored_format,
            signed=self.demands_signature,
            trusted_certs=self.trusted_certs,
            inspected=not self._config.disable_deep_image_inspection,
            digest=self.known_digest,
        )

    def require_fit(self, virtual_size: int) -> None:
        """Refuse an image that is larger than the disk.

        :raises DiskTooSmallError: the image is larger.
        """
        require_fit(self.image_id, virtual_size, self.size)

    def check(self) -> None:
        """Raise if the caller no longer waits, as :meth:`Waiter.check`."""
        self.waiter.check()

    def describe(self) -> tuple[ImageSource, model.Image]:
        """Return what :meth:`ask` returned or raise what it raised, and ask nothing.

        :raises NotPrepared: it was not called yet, or not since :meth:`pass_over`.
        :raises: as :meth:`ask`.
        """
        if self._answer is None:
            raise NotPrepared
        if isinstance(self._answer, errors.ImageCacheError):
            raise self._answer
        return self._answer

    def ask(self) -> tuple[ImageSource, model.Image]:
        """Return the source that has the image, and what it says of it. One that failed is asked again.

        A digest that is demanded takes the place of one that is not, or of none: a fallback may not know it.

        :raises: as :meth:`imagecache_lib.sources.locations.Locations.describe`.
        """
        try:
            self._answer = self._ask()
        except errors.ImageCacheError as error:
            self._answer = error
            raise
        return self._answer

    def _ask(self) -> tuple[ImageSource, model.Image]:
        if self._locations is None:
            self._locations = Locations(
                (self._source, *self.request.fallbacks),
                self.image_id,
                host=self._host,
                demanded=self.known_digest,
                retries=self._config.num_retries,
                deadline=self.request.deadline,
                cancel=self.request.cancel,
            )
        source, image = self._locations.describe()
        self._has_answer = True
        self.imposes_digest = self._locations.imposes_digest
        most = self._config.max_virtual_size
        if image.size is not None and image.size > most and answers.hinted_size(image) is not None:
            image = dataclasses.replace(image, size=None)  # the answer with the data decides
        return source, image

    @property
    def has_asked(self) -> bool:
        """Whether a source was asked what it says of the image, and answered or failed."""
        return self._answer is not None

    def pass_over(self, error: errors.ImageCacheError) -> None:
        """Turn to the next source, which is to be asked, since the one that was does not give the data.

        :param error: why it does not.
        :raises ImageCacheError: no other source may be asked.
        """
        assert self._locations is not None
        self._answer = None
        self._locations.pass_over(error)

    def authorize(self) -> None:
        """Ask the caller's source about an image that need not be fetched, if that is configured.

        A source that refused is asked again: another caller may have had the image fetched meanwhile. A disk
        that was made before keeps its base, whatever the source says today. The question takes
        ``authorize_timeout`` seconds at most, however long its source takes to answer.

        :raises ImageNotFound: the source does not have it for this caller.
        :raises SourceError: the source does not answer, and ``authorize_hits`` says ``closed``.
        """
        if self._config.authorize_hits == "no" or self._made or self._has_answer:
            return
        answer = authorize.Question(self._source, self.image_id, self._host)
        try:
            answer.wait(self._config.authorize_timeout, self.waiter)
        except errors.SourceError as error:
            if self._config.authorize_hits == "closed":
                raise
            LOG.warning("Image %s is served from the cache without leave: %s", self.image_id, error)

    def origins(self) -> tuple[str, ...]:
        """Return digests of where the data may come from, one for each of the caller's sources."""
        sources = (self._source, *self.request.fallbacks)
        return tuple(origin_of(source, self.image_id) for source in sources)

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
            min_rate=self._config.min_transfer_rate,
        )
