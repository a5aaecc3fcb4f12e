# SPDX-License-Identifier: Apache-2.0
"""The endpoints of one service: which of them sent other data than an image's, and the data from one of them.

One server of several may have a damaged copy in a store or cache of its own. Only once each of them has sent
other data is it the image that is wrong.
"""

from __future__ import annotations

from collections.abc import Collection

from imagecache_lib import errors, model
from imagecache_lib.sources import exchange
from imagecache_lib.sources.body import Body
from imagecache_lib.system import threads

#: As many images are remembered that an endpoint sent other data for. The oldest is forgotten first.
_MOST_IMAGES = 64

_Key = tuple[str, model.Digest | None]


class Suspects:
    """Which endpoints sent other data than an image's. Thread-safe.

    :param roots: URLs of all endpoints.
    """

    def __init__(self, roots: Collection[str]) -> None:
        self._roots = frozenset(roots)
        self._lock = threads.lock()
        self._wrong: dict[_Key, frozenset[str]] = {}

    def of(self, image: model.Image) -> frozenset[str]:
        """Return the URLs of the endpoints that sent other data than this image's."""
        return self._wrong.get((image.id, image.digest), frozenset())

    def blame(self, image: model.Image, root: str) -> bool:
        """Note that an endpoint sent other data. Returns whether another one may yet send the image's.

        If none may, all of that is forgotten: whoever asks for the image later asks them anew.
        """
        key = (image.id, image.digest)
        with self._lock:
            wrong = self._wrong.pop(key, frozenset()) | {root}
            if wrong >= self._roots:
                return False
            self._wrong[key] = wrong
            if len(self._wrong) > _MOST_IMAGES:
                del self._wrong[next(iter(self._wrong))]
            return True


class FromOneOfSeveral:
    """The data from one endpoint, as :meth:`ImageSource.open` promises its iterator.

    :param root: URL of the endpoint.
    """

    def __init__(self, stream: Body, root: str, suspects: Suspects) -> None:
        self.image = stream.image
        self.hinted = stream.hinted
        self._stream = stream
        self._root = root
        self._suspects = suspects

    def __iter__(self) -> FromOneOfSeveral:
        return self

    def __next__(self) -> bytes:
        return next(self._stream)

    @property
    def doubt(self) -> errors.SourceError | None:
        """The error to raise as long as another endpoint may have the image's data, or None.

        It is asked for when the data turned out not to be the image's: this endpoint is the last one that is
        asked for them from now on.
        """
        image = self._stream.image
        may_be_elsewhere = self._suspects.blame(image, self._root)
        if self._stream.doubt is not None or not may_be_elsewhere:
            return self._stream.doubt
        return errors.SourceError(
            f"{exchange.shown(self._root)} sends data that is not the image's",
            image=image.id,
            next_step="find out what is wrong with that endpoint; another one is asked first from now on",
        )
