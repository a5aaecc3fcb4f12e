# SPDX-License-Identifier: Apache-2.0
"""Signed images: real keys, real certificates, real signatures."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, padding, rsa

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.sources.interface import SourceRefused
from imagecache_lib.store import evidence
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.testing.sources import FakeSource
from tests.support import certificates, files, leftovers
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, Points, Stop, disk_image, raw_image

DATA = raw_image(1)
NOW = dt.datetime.now(dt.UTC)

# Made once: keys take long.
ROOT_KEY = rsa.generate_private_key(65537, 2048)
MIDDLE_KEY = ec.generate_private_key(ec.SECP384R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
DSA_KEY = dsa.generate_private_key(2048)


def certificate(
    name: str, key: Any, issuer: str = "root", issuer_key: Any = ROOT_KEY, **options: Any
) -> bytes:
    return certificates.certificate(name, key, issuer, issuer_key, **options)


def signed_with(key: Any, data: bytes) -> bytes:
    if isinstance(key, rsa.RSAPrivateKey):
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
        return key.sign(data, pss, hashes.SHA256())
    if isinstance(key, dsa.DSAPrivateKey):
        return key.sign(data, hashes.SHA256())
    found: bytes = key.sign(data, ec.ECDSA(hashes.SHA256()))
    return found


def properties(
    data: bytes = DATA, key: Any = RSA_KEY, key_type: str = "RSA-PSS", by: str = "leaf"
) -> dict[str, str]:
    return {
        "img_signature": base64.b64encode(signed_with(key, data)).decode(),
        "img_signature_hash_method": "SHA-256",
        "img_signature_key_type": key_type,
        "img_signature_certificate_uuid": by,
    }


class SignedSource(FakeSource):
    def __init__(self, told: Mapping[str, str], images: Mapping[str, bytes] | None = None) -> None:
        super().__init__(images or {ID: DATA})
        self.told = told

    def describe(self, image_id: str) -> ic.Image:
        return dataclasses.replace(super().describe(image_id), properties=self.told)


class InterruptedAtBypass(list[events.Event]):
    """Events, of which one is told to an observer that is interrupted."""

    def append(self, event: events.Event) -> None:
        if isinstance(event, events.Bypassed):
            raise KeyboardInterrupt
        super().append(event)


class SignatureCase(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.certificates = self.directory / "certificates"
        self.certificates.mkdir()
        self.put("root", certificate("root", ROOT_KEY, signs=True))
        self.put("middle", certificate("middle", MIDDLE_KEY, signs=True))
        self.put("leaf", certificate("leaf", RSA_KEY, "middle", MIDDLE_KEY))
        self.signed = SignedSource(properties())

    def put(self, name: str, pem: bytes) -> None:
        (self.certificates / f"{name}.pem").write_bytes(pem)

    def manager(self, source: Any = None, **options: Any) -> ic.ImageCacheManager:
        return super().manager(
            source or self.signed, **{"certificates_path": str(self.certificates), **options}
        )

    def record_of(self, path: pathlib.Path | None = None) -> evidence.Record:
        record = evidence.parse((path or self.record()).read_bytes())
        assert record is not None
        return record

    def cache(self, source: Any = None, *, trusted: tuple[str, ...] | None = None, **options: Any) -> None:
        request = ic.Request(trusted_certs=trusted)
        self.manager(source, **options).cache_image(ID, request=request)


class TestSignatures(SignatureCase):
    def test_a_good_one_of_every_kind_is_accepted(self) -> None:
        self.put("dsa", certificate("dsa", DSA_KEY))
        self.put("ecc", certificate("ecc", MIDDLE_KEY))
        for key, kind, by in (
            (RSA_KEY, "RSA-PSS", "leaf"),
            (DSA_KEY, "DSA", "dsa"),
            (MIDDLE_KEY, "ECC_SECP384R1", "ecc"),
        ):
            with self.subTest(kind):
                source = SignedSource(properties(DATA, key, kind, by))
                manager = self.manager(source, verify_glance_signatures=True)
                manager.cache_image(ID)
                self.assertEqual((by, ()), (self.record_of().signed_by, self.record_of().certificates))
                manager.evict_image(ID)

    def test_a_bad_one_is_refused_and_nothing_is_left(self) -> None:
        good = properties()
        for what, told in (
            ("does not verify", properties(DATA + b"x")),
            ("does not verify", properties(key=rsa.generate_private_key(65537, 2048))),
            ("no img_signature", {}),
            ("no img_signature_key_type", {k: v for k, v in good.items() if "key_type" not in k}),
            ("key type", good | {"img_signature_key_type": "RSA-MAGIC"}),
            ("no key of type", good | {"img_signature_key_type": "DSA"}),
            ("hash method", good | {"img_signature_hash_method": "MD5"}),
            ("base64", good | {"img_signature": "A"}),
            ("cannot be read", good | {"img_signature": "\u00e9"}),
            ("no word", good | {"img_signature_key_type": "RSA-PSS\nall is well"}),
            ("no word", good | {"img_signature_hash_method": "SHA-256" * 1000}),
            ("no certificate", good | {"img_signature_certificate_uuid": "nobody's"}),
            ("no certificate", good | {"img_signature_certificate_uuid": "../certificates/leaf"}),
        ):
            with self.subTest(what), self.assertRaises(ic.ImageRejected) as caught:
                self.cache(SignedSource(told), verify_glance_signatures=True)
            self.assertIn(what, str(caught.exception))
            self.assertIn(ID, str(caught.exception))
            self.assertTrue(str(caught.exception).isprintable())
            self.assertLess(len(str(caught.exception)), 500)
            self.assertFalse(self.base().exists())
            self.assertEqual([], self.in_flight())

    def test_without_the_demand_nobody_looks(self) -> None:
        self.cache(SignedSource({}))
        self.assertIsNone(self.record_of().signed_by)

    def test_it_is_of_the_bytes_as_they_came_however_they_are_stored(self) -> None:
        image = disk_image(self.directory, "qcow2")
        source = SignedSource(properties(image), {ID: image})
        source._described[ID] = dataclasses.replace(source._described[ID], disk_format="qcow2")
        self.cache(source, verify_glance_signatures=True)
        self.assertEqual("leaf", self.record_of().signed_by)

    def test_where_there_are_no_certificates_the_demand_is_an_error_of_the_set_up(self) -> None:
        with self.leaves_nothing_new(), self.assertRaises(ic.ConfigError) as caught:
            self.cache(verify_glance_signatures=True, certificates_path=None)
        self.assertIn("certificates_path", str(caught.exception))
        self.assertEqual(0, self.signed.opens)

    def leaves_nothing_new(self) -> Any:
        self.manager().get_disk_usage()
        self.manager().unpin(ID, owner="x")
        return self.leaves_nothing()

    def test_certificates_may_come_from_anywhere(self) -> None:
        class Store:
            def get(self, certificate_id: str) -> bytes:
                return {"leaf": certificate("leaf", RSA_KEY)}[certificate_id]

        config = ic.CacheConfig(instances_path=str(self.instances), verify_glance_signatures=True)
        ic.ImageCacheManager(config, self.signed, certificate_store=Store()).cache_image(ID)
        self.assertEqual("leaf", self.record_of().signed_by)

    def test_certificates_may_come_with_the_request(self) -> None:
        class Store:
            def get(self, certificate_id: str) -> bytes:
                return {"leaf": certificate("leaf", RSA_KEY)}[certificate_id]

        manager = self.manager(verify_glance_signatures=True, certificates_path=None)
        manager.cache_image(ID, request=ic.Request(source=self.signed, certificates=Store()))
        self.assertEqual("leaf", self.record_of().signed_by)

    def test_nobody_is_queued_behind_a_store_that_does_not_answer(self) -> None:
        stop, points = Stop(), Points()

        class Store:
            def get(self, certificate_id: str) -> bytes:
                stop()
                return {"leaf": certificate("leaf", RSA_KEY)}[certificate_id]

        manager = self.manager(verify_glance_signatures=True)
        request = ic.Request(certificates=Store())
        hanging = self.running(lambda: manager.cache_image(ID, request=request))
        stop.wait()
        self.cache(verify_glance_signatures=True, host=self.host(trace=points))
        self.assertNotIn(TracePoint.LOCK_WAITING, points.seen)
        stop.go_on()
        self.assertIs(ic.CacheResult.EXISTING, hanging.result())

    def test_a_certificate_that_is_none_is_refused(self) -> None:
        self.put("leaf", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        with self.assertRaisesRegex(ic.ImageRejected, "leaf cannot be read"):
            self.cache(verify_glance_signatures=True)

    def test_a_certificate_whose_key_is_of_no_known_kind_is_refused(self) -> None:
        pem = certificate("leaf", MIDDLE_KEY)
        der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
        curve = bytes.fromhex("06052b81040022")  # the object identifier of secp384r1
        self.assertIn(curve, der)
        unknown = base64.encodebytes(der.replace(curve, curve[:-1] + b"\x7f"))
        self.put("leaf", b"-----BEGIN CERTIFICATE-----\n" + unknown + b"-----END CERTIFICATE-----\n")
        with self.assertRaisesRegex(ic.ImageRejected, "cannot be read"):
            self.cache(verify_glance_signatures=True)

    def test_a_store_that_breaks_its_contract_is_at_fault_and_not_the_image(self) -> None:
        found = certificate("leaf", RSA_KEY)

        class Store:
            def __init__(self, certificates: Mapping[str, Any]) -> None:
                self.get = certificates.__getitem__

        manager = self.manager(verify_glance_signatures=True)
        for stored, words in (
            ({}, "certificates failed with KeyError"),
            ({"leaf": found.decode()}, "a str and not bytes"),
            ({"leaf": None}, "a NoneType and not bytes"),
        ):
            request = ic.Request(certificates=Store(stored))
            with self.subTest(words), self.assertRaisesRegex(SourceRefused, words):
                manager.cache_image(ID, request=request)
        manager.cache_image(ID, request=ic.Request(certificates=Store({"leaf": bytearray(found)})))
        self.assertEqual("leaf", self.record_of().signed_by)


class TestTrust(SignatureCase):
    def test_a_chain_of_trusted_ones_up_to_a_root_is_accepted_and_written_down(self) -> None:
        self.put("other", certificate("other", DSA_KEY, "other", DSA_KEY, signs=True))
        self.cache(trusted=("other", "root", "middle", "missing"))
        self.assertEqual(("middle", "root"), self.record_of().certificates)
        self.assertEqual("leaf", self.record_of().signed_by)

    def test_without_one_it_is_refused(self) -> None:
        self.put("other", certificate("other", DSA_KEY, "other", DSA_KEY, signs=True))
        for trusted in ((), ("root",), ("middle",), ("other",), ("missing",)):
            with self.subTest(trusted=trusted), self.assertRaises(ic.ImageRejected):
                self.cache(trusted=trusted)
            self.assertFalse(self.base().exists())

    def test_one_that_is_over_or_must_not_sign_is_no_link(self) -> None:
        for middle in (
            certificate("middle", MIDDLE_KEY, signs=False),
            certificate("middle", MIDDLE_KEY, signs=True, days=-1),
        ):
            self.put("middle", middle)
            with self.assertRaises(ic.ImageRejected):
                self.cache(trusted=("root", "middle"))

    def test_the_configuration_trusts_where_the_request_does_not_say(self) -> None:
        trusted = ("root", "middle")
        options = {"enable_certificate_validation": True, "default_trusted_certificate_ids": trusted}
        self.manager(**options).cache_image(ID)
        self.assertEqual(("middle", "root"), self.record_of().certificates)
        with self.assertRaises(ic.BackendError):
            # Young: it is not evicted for a request that trusts others, and cannot be bypassed here.
            self.cache(trusted=("root",), **options)


class TestLaterRequests(SignatureCase):
    def test_what_was_verified_serves_all_who_trust_the_whole_chain(self) -> None:
        self.cache(trusted=("root", "middle"))
        for trusted in (("middle", "root"), ("x", "middle", "root"), None):
            self.cache(trusted=trusted, verify_glance_signatures=True)
        self.assertEqual(1, self.signed.opens)
        for alone in ("root", "middle", "x"):
            with self.subTest(trusted=alone), self.assertRaises(ic.BackendError):
                self.cache(trusted=(alone,))

    def test_an_unverified_base_that_nothing_uses_is_fetched_again(self) -> None:
        self.cache()
        self.grow_old()
        self.cache(trusted=("root", "middle"))
        self.assertEqual(2, self.signed.opens)
        self.assertEqual(("middle", "root"), self.record_of().certificates)

    def test_an_unverified_base_in_use_is_proven_by_one_reading_of_its_image(self) -> None:
        manager = self.manager()
        manager.create_disk(ID, self.target())
        self.grow_old()
        self.assert_one_reading_proves_it(manager, opens=2)

    def test_a_base_in_use_that_another_program_made_is_proven_too(self) -> None:
        self.nova_made()
        self.assert_one_reading_proves_it(self.manager(), opens=1)

    def test_a_converted_base_in_use_is_proven_too(self) -> None:
        image = disk_image(self.directory, "qcow2", options="compat=1.1", data=DATA)
        self.signed = SignedSource(properties(image), {ID: image})
        self.signed._described[ID] = dataclasses.replace(self.signed._described[ID], disk_format="qcow2")
        self.nova_made()
        self.assert_one_reading_proves_it(self.manager(), opens=1)
        self.assertEqual(("qcow2", "raw"), (self.record_of().source_format, self.record_of().stored_format))

    def nova_made(self) -> None:
        self.base().parent.mkdir()
        self.base().write_bytes(DATA)
        files.overlay(pathlib.Path(self.target(instance="nova")), self.base())
        files.age(self.base(), seconds=2 * 86400)

    def assert_one_reading_proves_it(self, manager: ic.ImageCacheManager, *, opens: int) -> None:
        """``opens``: of the source in all."""
        manager.create_disk(ID, self.target(instance="unsigned"))
        inode = self.base().stat().st_ino
        request = ic.Request(trusted_certs=("root", "middle"))
        for number in range(3):
            disk = manager.create_disk(ID, self.target(instance=f"signed-{number}"), request=request)
            self.assertEqual(self.base().name, disk.base)
        self.assertEqual(opens, self.signed.opens)
        self.assertEqual(inode, self.base().stat().st_ino)
        self.assertEqual(
            (("middle", "root"), "leaf"), (self.record_of().certificates, self.record_of().signed_by)
        )
        self.assertEqual([], list((self.instances / "_base/.imagecache/stage").iterdir()))
        (found,) = manager.scrub().bases
        self.assertIn("sums", found.detail)

    def test_cached_ahead_of_time_it_is_proven_too(self) -> None:
        self.manager().create_disk(ID, self.target())
        request = ic.Request(trusted_certs=("root", "middle"))
        self.manager().cache_image(ID, request=request)
        self.assertEqual(("middle", "root"), self.record_of().certificates)

    def test_an_unverified_base_in_use_with_other_bytes_is_bypassed(self) -> None:
        manager = self.manager()
        self.nova_made()
        with open(self.base(), "r+b") as file:
            file.seek(2 * MIB)  # a hole of the image
            file.write(b"other")
        self.signed._described[ID] = dataclasses.replace(self.signed._described[ID], digest=None)
        manager.create_disk(ID, self.target(instance="unsigned"))
        request = ic.Request(trusted_certs=("root", "middle"))
        disk = manager.create_disk(ID, self.target(instance="signed"), request=request)
        self.assertIsNone(disk.base)
        self.assertEqual(((), None), (self.record_of().certificates, self.record_of().signed_by))
        with self.assertRaisesRegex(ic.BackendError, "cannot be replaced while it is in use"):
            manager.cache_image(ID, request=request)
        self.assertEqual([], list((self.instances / "_base/.imagecache/stage").iterdir()))

    def test_a_copy_that_proves_nothing_goes_though_an_observer_is_interrupted(self) -> None:
        self.nova_made()
        with open(self.base(), "r+b") as file:
            file.seek(2 * MIB)  # a hole of the image
            file.write(b"other")
        self.signed._described[ID] = dataclasses.replace(self.signed._described[ID], digest=None)
        self.manager().create_disk(ID, self.target(instance="unsigned"))
        self.events = InterruptedAtBypass()
        request = ic.Request(trusted_certs=("root", "middle"))
        with self.assertRaises(KeyboardInterrupt):
            self.manager().create_disk(ID, self.target(instance="signed"), request=request)
        self.assertEqual([], self.in_flight())

    def test_a_bad_signature_proves_nothing_and_leaves_the_base(self) -> None:
        manager = self.manager()
        manager.create_disk(ID, self.target())
        self.signed.told = properties(DATA + b"x")
        request = ic.Request(trusted_certs=("root", "middle"))
        with self.assertRaises(ic.ImageRejected):
            manager.create_disk(ID, self.target(instance="signed"), request=request)
        self.assertEqual(((), None), (self.record_of().certificates, self.record_of().signed_by))
        self.assertEqual([], list((self.instances / "_base/.imagecache/stage").iterdir()))

    def test_a_base_that_can_carry_no_id_is_bypassed(self) -> None:
        manager = self.manager()
        manager.create_disk(ID, self.target())
        os.removexattr(self.base(), "user.imagecache.id")
        fields = json.loads(self.record().read_bytes()) | {"base_id": "", "origin": "adopted"}
        self.record().write_text(json.dumps(fields))
        request = ic.Request(trusted_certs=("root", "middle"))
        disk = manager.create_disk(ID, self.target(instance="signed"), request=request)
        self.assertIsNone(disk.base)
        self.assertEqual(2, self.signed.opens)

    def test_a_signature_alone_is_no_trust(self) -> None:
        self.cache(verify_glance_signatures=True)
        self.grow_old()
        with self.assertRaises(ic.ImageRejected):
            self.cache(trusted=("leaf",))

    def test_another_image_with_the_same_content_is_not_vouched_for(self) -> None:
        source = SignedSource(properties(), {ID: DATA, OTHER_ID: DATA})
        manager = self.manager(source)
        manager.cache_image(ID, request=ic.Request(trusted_certs=("root", "middle")))
        source.told = {}
        with self.assertRaises(ic.ImageRejected):
            manager.cache_image(OTHER_ID, request=ic.Request(trusted_certs=("root", "middle")))
        manager.cache_image(OTHER_ID)
        record = self.record_of(self.record(OTHER_ID))
        self.assertEqual(((), None), (record.certificates, record.signed_by))

    def grow_old(self) -> None:
        files.age(self.base(), self.record(), seconds=2 * 86400)


class TestCost(SignatureCase):
    def test_no_thread_is_left_whatever_happens(self) -> None:
        self.signed.break_at(MIB)
        with leftovers.no_thread_left(), self.assertRaises(ic.SourceError):
            self.cache(verify_glance_signatures=True)
