# SPDX-License-Identifier: Apache-2.0
"""The edge between a certificate store, which a third party may have written, and the rest of the library.

It is to such a store what :mod:`imagecache_lib.sources.checked` is to a source.
"""

from __future__ import annotations

from imagecache_lib import errors
from imagecache_lib.ingest.certificates import CertificateStore
from imagecache_lib.sources import checked

_STORE = "store of certificates"


class CheckedCertificates:
    """A store of which what it returns is checked, and what it raises is translated.

    It is asked for each certificate once: a key manager may be as slow to answer as a source, and what it
    answered while no lock was held is there when the certificate is needed.
    """

    def __init__(self, store: CertificateStore) -> None:
        self._store = store
        self._answers: dict[str, bytes | errors.ImageCacheError] = {}

    def get(self, certificate_id: str) -> bytes:
        """Return a certificate, PEM encoded.

        :raises ImageCacheError: as :meth:`CertificateStore.get`.
        :raises SourceRefused: the store failed in a way of its own, or what it returned is no certificate.
        """
        if certificate_id not in self._answers:
            try:
                self._answers[certificate_id] = self._ask(certificate_id)
            except errors.ImageCacheError as error:
                self._answers[certificate_id] = error
        answer = self._answers[certificate_id]
        if isinstance(answer, errors.ImageCacheError):
            raise answer
        return answer

    def _ask(self, certificate_id: str) -> bytes:
        with checked.Guard(None, _STORE):
            found: object = self._store.get(certificate_id)
        if not isinstance(found, bytes | bytearray | memoryview):
            kind = type(found).__name__
            raise checked.broken_contract(None, f"a certificate is a {kind} and not bytes", _STORE)
        return bytes(found)
