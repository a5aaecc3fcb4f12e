# SPDX-License-Identifier: Apache-2.0
"""Images on a web server: ids are looked up in a table, and never are URLs or paths themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import requests

from imagecache_lib import errors, model
from imagecache_lib.sources import answers, body, exchange, interface, tables
from imagecache_lib.sources.body import Body
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.sources.unanswered import Silent, Unreachable
from imagecache_lib.system import arguments

LOG = logging.getLogger(__name__)

_NONE: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class HttpImage:
    """One image on a web server.

    :param url: absolute http or https URL. May hold a user and password or a signature: it is never
        shown but for host and path.
    :param disk_format: Glance's name of its format, or None to let the content decide.
    :param digest: of its content. Without one, only TLS and the server vouch for what arrives, and a
        broken transfer resumes only if the server sends strong entity tags; and what the server calls a
        document or compressed is refused.
    :param size: length of the data in bytes, or None for the length that the server states.
    :param compression: how the data is compressed: ``gzip``, ``xz``, ``zstd`` or ``bzip2``; ``disk_format``
        is that of what is in it, digest and size are of the data as the server has it. With None it is not
        compressed.
    """

    url: str = dataclasses.field(repr=False)
    disk_format: str | None = None
    digest: model.Digest | None = None
    size: int | None = None
    compression: str | None = None


class HttpSource(ImageSource):
    """Images from web servers, over HTTP/1.1 with ranges (RFC 9110).

    Redirects are followed, except from https to http. Another origin is asked without any of the
    session's headers, cookies and credentials. User and password of a URL are sent to its own origin whatever
    redirects lie between, and to no other.

    HEAD is a hint: where it is refused or fails, a GET of the first byte tells what there is, and the length
    of the answer that brings the data replaces the one that HEAD told. If that answer tells none, what
    arrives decides. Where they differ and there is no digest, a GET of the first byte has to tell the same
    length as the data has; if it tells none, the data must not be shorter than what HEAD told.

    :param images: by image id.
    :param session: a requests session that carries what the servers ask for: credentials, proxies,
        client certificates. With None the source makes one of its own.
    :param timeout: seconds for the connection, and for each read.
    :param verify: as in requests: True, or the path of a file with CA certificates. False turns
        verification off.
    :raises ConfigError: there is no such mapping, a URL is not absolute http or https, or a compression is
        unknown.
    """

    def __init__(
        self,
        images: Mapping[str, HttpImage],
        *,
        session: requests.Session | None = None,
        timeout: exchange.Timeout = (5.0, 60.0),
        verify: bool | str = True,
    ) -> None:
        arguments.require_table("images", images, HttpImage)
        for image in images.values():
            exchange.check_url(image.url)
            interface.check_compression(image.compression)
        self._images = dict(images)
        # Ids of images whose server let a HEAD time out. It is not asked so again: of a server that is
        # silent altogether, each attempt would wait twice.
        self._silent_to_head: set[str] = set()
        sender = exchange.SessionSender(session, verify=verify, timeout=timeout)
        self._web = exchange.Web(sender, sender.stranger())

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> ImageSource:
        """Make one from ``table``, the path of a table of images, and ``cafile``."""
        interface.require_options("http", options, "table", "cafile", needed="table")
        table = tables.read(options["table"], HttpImage)
        return cls(table, verify=options.get("cafile") or True)

    def __repr__(self) -> str:
        return f"HttpSource({len(self._images)} images)"

    def origin(self, image_id: str) -> str:
        entry = self._images.get(image_id)
        return "" if entry is None else exchange.origin(entry.url)

    def describe(self, image_id: str) -> model.Image:
        entry = self._entry(image_id)
        if image_id not in self._silent_to_head:
            try:
                with self._ask("HEAD", entry, image_id) as response:
                    if response.status_code == 200:
                        return _image(image_id, entry, answers.content_length(response.headers), response)
            except Unreachable:
                raise
            except errors.SourceError as error:
                if isinstance(error, Silent):
                    self._silent_to_head.add(image_id)
                LOG.debug("HEAD tells nothing of image %s: %s", image_id, error.cause)
        # Whatever becomes of HEAD, GET decides: a URL may be signed for GET only, a proxy may know no HEAD.
        return self._describe_by_get(image_id, entry)

    def _length_by_range(self, image_id: str, entry: HttpImage) -> int | None:
        """Return the length that comes with the first byte, or None if the server sends no ranges.

        Of a server without ranges another GET would only repeat what the first one told.
        """
        with self._ask("GET", entry, image_id, {"Range": "bytes=0-0"}) as response:
            return _whole_length(response, image_id) if response.status_code == 206 else None

    def _describe_by_get(self, image_id: str, entry: HttpImage) -> model.Image:
        """Return what an answer to a GET tells, of the first byte if the server sends ranges."""
        with self._ask("GET", entry, image_id, {"Range": "bytes=0-0"}) as response:
            if response.status_code == 206:
                return _image(image_id, entry, _whole_length(response, image_id), response)
            if response.status_code in answers.WHOLE:
                return _image(image_id, entry, answers.content_length(response.headers), response)
            if response.status_code not in answers.RANGE_REFUSED:
                raise answers.refusal(response, image_id)
        with self._ask("GET", entry, image_id) as response:
            if response.status_code not in answers.WHOLE:
                raise answers.refusal(response, image_id)
            return _image(image_id, entry, answers.content_length(response.headers), response)

    def _ask(
        self, method: str, entry: HttpImage, image_id: str, headers: Mapping[str, str] = _NONE
    ) -> contextlib.AbstractContextManager[requests.Response]:
        asked = {**headers, "Accept-Encoding": "identity"}
        return exchange.exchange(self._web, method, entry.url, asked, image_id=image_id)

    def known_digest(self, image_id: str) -> model.Digest | None:
        entry = self._images.get(image_id)
        return None if entry is None else entry.digest

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Body]:
        entry = self._entry(image.id)
        size_is = answers.SizeIs.HINTED if entry.size is None else answers.SizeIs.STATED
        confirmed: int | None = None
        if offset == 0 and self._length_in_doubt(image, entry):
            confirmed = self._length_by_range(image.id, entry)
            if confirmed is not None:
                properties = {**image.properties, answers.HINTED_SIZE: str(confirmed)}
                image = dataclasses.replace(image, properties=MappingProxyType(properties))
        with answers.data(
            self._web, entry.url, {}, image, offset, size_is=size_is, confirmed=confirmed is not None
        ) as stream:
            yield stream

    def _length_in_doubt(self, image: model.Image, entry: HttpImage) -> bool:
        """Return whether the data came with another length than was told before, and no digest decides."""
        decided = image.digest is not None or entry.size is not None
        return not decided and answers.hinted_size(image) not in (None, image.size)

    def can_resume(self, image: model.Image) -> bool:
        return super().can_resume(image) or image.properties.get(answers.ETAG) is not None

    def _entry(self, image_id: str) -> HttpImage:
        return interface.entry_of(self._images, image_id)


def _whole_length(response: requests.Response, image_id: str) -> int | None:
    """Return the length that an answer with the first byte tells of all of the data, or None.

    The byte is read, so that the connection is kept. Of more, no more is read.
    """
    part = answers.parse_content_range(response.headers.get("Content-Range", ""))
    with contextlib.suppress(errors.SourceError):
        next(body.read(response, image_id), None)
    return part[2] if part else None


def _image(image_id: str, entry: HttpImage, told: int | None, response: requests.Response) -> model.Image:
    tag = answers.strong_etag(response.headers)
    properties = {} if tag is None else {answers.ETAG: tag}
    if told is not None and entry.size is None:
        properties[answers.HINTED_SIZE] = str(told)
    return model.Image(
        id=image_id,
        disk_format=entry.disk_format,
        size=told if entry.size is None else entry.size,
        digest=entry.digest,
        compression=entry.compression,
        properties=MappingProxyType(properties),
    )
