# SPDX-License-Identifier: Apache-2.0
"""Verifying an image's signature over its bytes in flight, with cursive, as Glance's users sign them.

The properties ``img_signature``, ``img_signature_hash_method``, ``img_signature_key_type`` and
``img_signature_certificate_uuid`` say how: Glance's user documentation, "Image Signature Verification".
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from imagecache_lib import errors, model
from imagecache_lib.ingest import certificates
from imagecache_lib.ingest.aside import Aside
from imagecache_lib.ingest.stream import VerifiedSignature
from imagecache_lib.system.waiter import Waiter

_PROPERTIES = (
    "img_signature",
    "img_signature_hash_method",
    "img_signature_key_type",
    "img_signature_certificate_uuid",
)

#: Those that are one word each, and the most characters that one may have.
_WORDS = _PROPERTIES[1:]
_LONGEST_WORD = 255

_RETRY_IS_USELESS = "have its owner sign it anew, with a trusted certificate"


def is_possible() -> bool:
    """Whether the packages that verify signatures are installed."""
    return importlib.util.find_spec("cursive") is not None


def ask_for_certificates(
    image: model.Image, store: certificates.CertificateStore, trusted: tuple[str, ...] | None
) -> None:
    """Ask a store that remembers its answers for what :class:`Verification` will need of it.

    What cannot be got is no error here: it is one where it is needed.
    """
    with contextlib.suppress(errors.ImageCacheError):
        store.get(_stated(image)[-1])
    for each in trusted or ():
        with contextlib.suppress(errors.ImageCacheError):
            store.get(each)


class Verification:
    """Verifies one image's signature while its bytes flow by, on a thread of its own.

    :param trusted: ids of the certificates of which some must lead from the image's to a root, or None if
        the image's certificate need not be trusted.
    :param waiter: the caller, which may stop waiting.
    :raises ImageRejected: the image is not signed, or not with a certificate that is known and trusted.
    :raises SourceError: a certificate cannot be got now.
    """

    def __init__(
        self,
        image: model.Image,
        store: certificates.CertificateStore,
        trusted: tuple[str, ...] | None,
        waiter: Waiter,
    ) -> None:
        signature, hash_method, key_type, certificate_id = _stated(image)
        certificate = _load(store, certificate_id)
        chain = () if trusted is None else _chain(certificate, store, trusted)
        self._signature = VerifiedSignature(certificate_id, chain)
        with _understood("its signature or its certificate"):
            self._verifier = _verifier(certificate, signature, hash_method, key_type)
        self._aside = Aside(self._verifier, "imagecache-signature", waiter)

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk, which must not change afterwards."""
        self._aside.feed(chunk)

    def close(self) -> None:
        """End the thread."""
        self._aside.close()

    def finish(self) -> VerifiedSignature:
        """Return who signed the image. Call after the last chunk.

        :raises ImageRejected: the signature is not that of these bytes.
        """
        from cryptography.exceptions import InvalidSignature

        self._aside.finish()
        with _understood("its signature"):
            try:
                self._verifier.verify()
            except InvalidSignature:
                raise errors.ImageRejected(
                    f"its signature does not verify with certificate {self._signature.signed_by}",
                    next_step=_RETRY_IS_USELESS,
                ) from None
        return self._signature


def _stated(image: model.Image) -> tuple[str, ...]:
    """Return what an image's properties say of its signature, in the order of :data:`_PROPERTIES`.

    :raises ImageRejected: it is not signed, or one of them is none.
    """
    lacking = [name for name in _PROPERTIES if not isinstance(image.properties.get(name), str)]
    if lacking:
        raise errors.ImageRejected(
            f"a verified signature is demanded, and it has no {lacking[0]}", next_step=_RETRY_IS_USELESS
        )
    for name in _WORDS:
        word = image.properties[name]
        # They are shown in messages and logs, whose lines an image's owner must not write.
        if not (word.isprintable() and len(word) <= _LONGEST_WORD):
            raise errors.ImageRejected(
                f"its {name} is no word: {errors.shown(word)}", next_step=_RETRY_IS_USELESS
            )
    return tuple(image.properties[name] for name in _PROPERTIES)


@contextlib.contextmanager
def _understood(what: str) -> Iterator[None]:
    """Refuse an image of which cursive or cryptography cannot read what its owner stated, or a certificate.

    :param what: what is looked at in the body, for the message.
    """
    from cursive import exception

    try:
        yield
    except (errors.ImageCacheError, MemoryError):
        raise
    except exception.SignatureVerificationError as error:
        raise errors.ImageRejected(
            f"its signature is refused: {str(error).rstrip('.')}", next_step=_RETRY_IS_USELESS
        ) from error
    except Exception as error:  # cryptography's errors have no base of their own, and some are Python's
        raise errors.ImageRejected(
            f"{what} cannot be read ({type(error).__name__})", next_step=_RETRY_IS_USELESS
        ) from error


def _load(store: certificates.CertificateStore, certificate_id: str) -> Any:
    from cryptography import x509

    found = store.get(certificate_id)
    try:
        return x509.load_pem_x509_certificate(found)
    except (ValueError, x509.InvalidVersion) as error:
        raise errors.ImageRejected(
            f"the certificate {certificate_id} cannot be read: {error}", next_step="replace it"
        ) from error


def _verifier(certificate: Any, signature: str, hash_method: str, key_type: str) -> Any:
    from cursive import exception, signature_utils

    kind = signature_utils.SignatureKeyType.lookup(key_type)
    key = certificate.public_key()
    if not isinstance(key, kind.public_key_type):
        raise exception.SignatureVerificationError(f"its certificate has no key of type {key_type}")
    verifier = kind.create_verifier(
        signature_utils.get_signature(signature), signature_utils.get_hash_method(hash_method), key
    )
    if verifier is None:
        raise exception.SignatureVerificationError("its signature is empty")
    return verifier


def _chain(
    certificate: Any, store: certificates.CertificateStore, trusted: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the ids of the trusted certificates that lead from an image's to a root.

    :raises ImageRejected: they do not lead to a root, or one of them is not valid now, or must not sign.
    """
    from cursive import certificate_utils

    known = []
    for each in trusted:
        try:
            known.append((each, _load(store, each)))
        except errors.ImageRejected:
            continue  # others may do; if not, that is the error
    with _understood("its certificate, or one of those that are trusted,"):
        context = certificate_utils.CertificateVerificationContext(known)
        context.update(certificate)
        context.verify()
    chain: list[str] = []
    issued = certificate
    while True:  # verify() came to its end, so this does
        issuer = next(each for each in known if certificate_utils.is_issuer(each[1], issued))
        if issuer[0] not in chain:
            chain.append(issuer[0])
        if issuer[1] == issued:
            return tuple(chain)
        issued = issuer[1]
