# SPDX-License-Identifier: Apache-2.0
"""Where the certificates of signed images come from, by the id that an image or a request names."""

from __future__ import annotations

import os
import re
from typing import Any, Protocol

from imagecache_lib import errors
from imagecache_lib.system import durable

#: An id becomes a file's name, and comes from an image's owner.
_ID = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,127}")


class CertificateStore(Protocol):
    """Knows certificates by id."""

    def get(self, certificate_id: str) -> bytes:
        """Return a certificate, PEM encoded (RFC 7468).

        :raises ImageRejected: the store has no certificate with this id.
        :raises SourceError: the store cannot be read now.
        """


class DirectoryCertificates:
    """Certificates in files, ``<directory>/<id>.pem``."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def get(self, certificate_id: str) -> bytes:
        path = os.path.join(self._directory, f"{certificate_id}.pem")
        try:
            found = durable.read_file(path) if _ID.fullmatch(certificate_id) else None
        except OSError as error:
            raise errors.SourceError(
                f"the certificate cannot be read: {error.strerror}",
                path=path,
                next_step="make it readable for the service's user",
            ) from error
        if found is None:
            raise _unknown(certificate_id)
        return found


class CastellanCertificates:
    """Certificates in the key manager that castellan is configured for, such as Barbican.

    :param context: castellan's credential, or the request's context, with which the certificates are read.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    def get(self, certificate_id: str) -> bytes:
        # Imported when a certificate is wanted: castellan brings half of OpenStack.
        from castellan import key_manager
        from castellan.common import exception
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import Encoding

        try:
            found: Any = key_manager.API().get(self._context, certificate_id)
            # castellan always has them DER encoded.
            return x509.load_der_x509_certificate(found.get_encoded()).public_bytes(Encoding.PEM)
        except exception.ManagedObjectNotFoundError:
            raise _unknown(certificate_id) from None
        except Exception as error:  # castellan lets its drivers' errors through, whatever they are
            raise errors.SourceError(
                f"the key manager failed with {type(error).__name__} for certificate {certificate_id}",
                next_step="check castellan's configuration, and the key manager",
            ) from error


def _unknown(certificate_id: str) -> errors.ImageRejected:
    return errors.ImageRejected(
        f"there is no certificate {certificate_id[:128]!r}",
        next_step="put it where certificates are looked for, or have the image signed with another",
    )
