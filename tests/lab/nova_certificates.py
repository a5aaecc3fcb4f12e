# SPDX-License-Identifier: Apache-2.0
"""Runs in Nova's own environment: instances with trusted certificates, through the adapter's driver."""

from __future__ import annotations

import base64

from castellan.common.objects import x_509
from castellan.tests.unit.key_manager.mock_key_manager import MockKeyManager
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from nova import exception, objects

from tests.lab.nova_files import ROOT, FilesCase, image_info, raw_disk
from tests.support.certificates import certificate

_KEPT = {}


class Keys(MockKeyManager):
    """Castellan's own stand-in for a key manager, whose objects outlive the call that asks it."""

    def __init__(self, configuration=None):
        super().__init__(configuration)
        self.keys = _KEPT


class Certificates(FilesCase):
    def setUp(self):
        super().setUp()
        self.key = rsa.generate_private_key(65537, 2048)
        self.pems = self.directory / "certificates"
        self.pems.mkdir()
        (self.pems / "root.pem").write_bytes(certificate("root", self.key, "root", self.key, signs=True))
        leaf = rsa.generate_private_key(65537, 2048)
        (self.pems / "leaf.pem").write_bytes(certificate("leaf", leaf, "root", self.key))
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
        signature = leaf.sign(raw_disk(), pss, hashes.SHA256())
        self.signed = {
            "img_signature": base64.b64encode(signature).decode(),
            "img_signature_hash_method": "SHA-256",
            "img_signature_key_type": "RSA-PSS",
            "img_signature_certificate_uuid": "leaf",
        }
        self.flags(certificates_path=str(self.pems), group="image_cache")

    def trusting(self, *ids, **more):
        instance = self.instance(**more)
        instance.trusted_certs = objects.TrustedCerts(ids=list(ids))
        return instance

    def test_an_image_signed_by_a_trusted_one_is_used(self):
        self.glance.add(ROOT, raw_disk(), **self.signed)
        made = self.create(self.trusting("root"))
        self.assertEqual(str(self.base()), image_info(made / "disk")["full-backing-filename"])

    def test_an_image_that_is_not_is_refused(self):
        self.glance.add(ROOT, raw_disk(), **self.signed)
        self.assertRaises(exception.ImageUnacceptable, self.create, self.trusting("other"))
        self.glance.add(ROOT, raw_disk(2), **self.signed)
        self.assertRaises(exception.ImageUnacceptable, self.create, self.trusting("root"))
        self.glance.add(ROOT, raw_disk())
        self.assertRaises(exception.ImageUnacceptable, self.create, self.trusting("root"))
        self.assertFalse(self.base().exists())

    def test_a_base_that_was_cached_unverified_is_proven(self):
        self.glance.add(ROOT, raw_disk(), **self.signed)
        self.create(self.instance())
        for number in range(2):
            made = self.create(self.trusting("root", uuid=f"6d1a3a0e-1111-4000-8000-00000000000{number}"))
            self.assertEqual(str(self.base()), image_info(made / "disk")["full-backing-filename"])
        self.assertEqual(2, self.downloads())

    def test_certificates_come_from_the_key_manager_with_the_requests_context(self):
        self.flags(certificates_path=None, group="image_cache")
        self.flags(backend=f"{__name__}.Keys", group="key_manager")
        ids = {}
        for name in ("root", "leaf"):
            found = x509.load_pem_x509_certificate((self.pems / f"{name}.pem").read_bytes())
            ids[name] = Keys().store(self.context, x_509.X509(found.public_bytes(Encoding.DER)))
        self.glance.add(ROOT, raw_disk(), **self.signed | {"img_signature_certificate_uuid": ids["leaf"]})
        made = self.create(self.trusting(ids["root"]))
        self.assertEqual(str(self.base()), image_info(made / "disk")["full-backing-filename"])
        unknown = self.trusting("no-such-certificate", uuid="6d1a3a0e-1111-4000-8000-000000000001")
        self.assertRaises(exception.ImageUnacceptable, self.create, unknown)
