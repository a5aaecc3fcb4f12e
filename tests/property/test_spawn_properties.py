# SPDX-License-Identifier: Apache-2.0
"""Pure rules and parsers of the spawn flow, for any input at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import unittest

from hypothesis import given, settings
from hypothesis import strategies as st

from imagecache_lib import errors, model
from imagecache_lib.formats import inspection
from imagecache_lib.store import evidence, layout, pins, stage
from imagecache_lib.store.stage import StageInfo
from imagecache_lib.system import sparse

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=200)
NUMBER = st.integers(0, 2**63)
DIGEST = st.builds(model.Digest, st.sampled_from(["md5", "sha512"]), TEXT)
#: Ids of certificates, few, so that chains and what is trusted overlap in every way.
CHAIN = st.lists(st.sampled_from(["root", "middle", "leaf", "another"]), unique=True, max_size=3).map(tuple)
RECORD = st.builds(
    evidence.Record,
    name=TEXT,
    image_id=st.none() | TEXT,
    base_id=TEXT,
    inode=NUMBER,
    size=NUMBER,
    origin=st.sampled_from(evidence.Origin),
    source_format=st.sampled_from(["raw", "qcow2", "vmdk"]),
    stored_format=st.sampled_from(["raw", "qcow2", "vmdk"]),
    virtual_size=NUMBER,
    digest=st.none() | DIGEST,
    digest_checked=st.booleans(),
    inspected=st.none() | st.integers(0, evidence.INSPECTION_RULES + 1),
    certificates=CHAIN,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
    max_leaves=10,
)


class TestNames(unittest.TestCase):
    @given(TEXT)
    def test_a_base_has_novas_name_and_is_an_original(self, image_id: str) -> None:
        name = layout.base_name(image_id)
        self.assertEqual(hashlib.sha1(image_id.encode()).hexdigest(), name)
        self.assertIs(layout.Kind.ORIGINAL, layout.classify(name))
        self.assertEqual(f"nova-{name}", layout.lock_name(name))

    @given(TEXT, st.integers(0, 10**6))
    def test_what_is_derived_from_a_name_is_told_from_it(self, image_id: str, number: int) -> None:
        name = layout.base_name(image_id)
        self.assertIs(layout.Kind.RESIZED, layout.classify(f"{name}_{number}"))
        self.assertIs(layout.Kind.RESIZED, layout.classify(f"{name}_sm"))
        self.assertIs(layout.Kind.SWAP, layout.classify(layout.swap_name(number)))
        self.assertIs(layout.Kind.EPHEMERAL, layout.classify(layout.ephemeral_name(number, image_id)))
        for suffix in (".part", ".converted"):
            self.assertIs(layout.Kind.FOREIGN_STAGE, layout.classify(name + suffix))
            self.assertIs(layout.Kind.UNKNOWN, layout.classify(f"{name}{suffix}x"))

    @given(st.text() | st.binary().map(os.fsdecode))
    def test_any_name_is_classified(self, name: str) -> None:
        self.assertIsInstance(layout.classify(name), layout.Kind)

    @given(st.text(st.characters(categories=["Cc", "Cs"]), min_size=1) | st.just("x" * 1025) | st.just(""))
    def test_ids_that_cannot_be_are_rejected(self, image_id: str) -> None:
        self.assertRaises(errors.ImageRejected, layout.base_name, image_id)

    @given(st.binary(max_size=50), TEXT, st.sampled_from([b"", b"_10", b"_sm"]))
    def test_a_name_is_found_wherever_it_occurs(self, before: bytes, image_id: str, suffix: bytes) -> None:
        name = layout.base_name(image_id).encode() + suffix
        text = b"json:{" + re.sub(rb"[0-9a-f_]", b"", before) + b"/x/_base/" + name + b'"}'
        self.assertIn(name, [match.group() for match in layout.NAME_PATTERN.finditer(text)])


class TestEvidence(unittest.TestCase):
    @given(RECORD)
    def test_a_record_survives_being_stored(self, record: evidence.Record) -> None:
        self.assertEqual(record, evidence.parse(record.to_json()))

    @given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
    def test_anything_else_is_absent(self, data: bytes) -> None:
        self.assertIsNone(evidence.parse(data))

    @given(RECORD, st.data())
    def test_a_damaged_one_is_absent_or_well_typed(
        self, record: evidence.Record, data: st.DataObject
    ) -> None:
        fields = json.loads(record.to_json())
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)
        found = evidence.parse(json.dumps(fields).encode())
        if found is not None:
            self.assertEqual(found, evidence.parse(found.to_json()))

    @given(RECORD, st.data())
    def test_a_torn_one_is_absent(self, record: evidence.Record, data: st.DataObject) -> None:
        whole = record.to_json().rstrip()
        self.assertIsNone(evidence.parse(whole[: data.draw(st.integers(0, len(whole) - 1))]))

    @given(RECORD, st.sampled_from(evidence.Use), st.none() | CHAIN)
    def test_no_base_serves_without_the_evidence_that_its_use_demands(
        self, record: evidence.Record, use: evidence.Use, certificates: tuple[str, ...] | None
    ) -> None:
        requirements = evidence.Requirements(use, trusted_certs=certificates)
        if evidence.unmet(record, requirements) is not None:
            return
        if use is evidence.Use.DISK:
            self.assertEqual(evidence.INSPECTION_RULES, record.inspected)
        else:
            self.assertEqual(record.source_format, record.stored_format)
        if certificates is not None:
            # The whole chain: who trusts a root and not the signer did not ask for the signer's images.
            self.assertTrue(record.certificates)
            self.assertLessEqual(set(record.certificates), set(certificates))

    @given(RECORD, st.sampled_from(evidence.Use))
    def test_full_evidence_serves(self, record: evidence.Record, use: evidence.Use) -> None:
        full = dataclasses.replace(
            record,
            source_format=record.stored_format,
            inspected=evidence.INSPECTION_RULES,
            certificates=("middle", "root"),
        )
        requirements = evidence.Requirements(
            use, stored_format=full.stored_format, signed=True, trusted_certs=("root", "another", "middle")
        )
        self.assertIsNone(evidence.unmet(full, requirements))
        other_format = evidence.Requirements(use, stored_format="another")
        self.assertIsNotNone(evidence.unmet(full, other_format))
        signed = evidence.Requirements(use, signed=True)
        self.assertIsNotNone(evidence.unmet(dataclasses.replace(full, certificates=()), signed))

    @given(RECORD, st.sampled_from(evidence.Use))
    def test_what_an_inspection_would_make_up_for_serves_after_it(
        self, record: evidence.Record, use: evidence.Use
    ) -> None:
        requirements = evidence.Requirements(use)
        unmet = evidence.unmet(record, requirements)
        inspected = dataclasses.replace(record, inspected=evidence.INSPECTION_RULES)
        if unmet is not None and unmet.can_recheck:
            self.assertIsNone(evidence.unmet(inspected, requirements))


class TestSmallFiles(unittest.TestCase):
    @given(TEXT, NUMBER, st.none() | RECORD)
    def test_a_stages_note_survives_being_stored(
        self, name: str, reserved: int, record: evidence.Record | None
    ) -> None:
        note = StageInfo(name, reserved, record)
        self.assertEqual(note, stage.parse_info(note.to_json()))

    @given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
    def test_anything_else_is_no_note(self, data: bytes) -> None:
        self.assertIsNone(stage.parse_info(data))

    @given(st.dictionaries(st.sampled_from(["name", "reserved", "record"]), JSON, min_size=3))
    def test_a_note_of_the_wrong_types_is_no_note(self, fields: dict[str, object]) -> None:
        note = stage.parse_info(json.dumps(fields).encode())
        if note is not None:
            self.assertIsInstance(note.name, str)
            self.assertGreaterEqual(note.reserved, 0)

    @given(TEXT, st.lists(st.builds(pins.Pin, TEXT, st.none() | st.floats(0, 2**40)), max_size=3))
    def test_pins_survive_being_stored(self, image_id: str, held: list[pins.Pin]) -> None:
        found = pins.PinFile(image_id, tuple(held))
        self.assertEqual(found, pins.parse(found.to_json()))

    @given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
    def test_anything_else_is_no_pin(self, data: bytes) -> None:
        self.assertIsNone(pins.parse(data))

    @given(st.fixed_dictionaries({"image_id": JSON, "pins": JSON | st.just([{"owner": "o"}])}))
    def test_pins_of_the_wrong_types_are_no_pins(self, fields: dict[str, object]) -> None:
        found = pins.parse(json.dumps(fields).encode())
        if found is not None:
            self.assertIsInstance(found.image_id, str)
            self.assertTrue(all(isinstance(pin.owner, str) for pin in found.pins))


#: Runs of zeros and of data around the sizes that matter.
_RUN = st.builds(
    lambda length, fill: bytes([fill]) * length,
    st.sampled_from([1, 511, 4095, 4096, 4097, 65535, 65536, 65537, 131072]),
    st.sampled_from([0, 0, 1]),
)


class TestSparseWriting(unittest.TestCase):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(_RUN, min_size=1, max_size=8), st.lists(st.integers(1, 200_000), max_size=5))
    def test_the_file_equals_the_data_and_has_holes_for_zeros(
        self, runs: list[bytes], cuts: list[int]
    ) -> None:
        data = b"".join(runs)
        with tempfile.TemporaryFile() as file:
            written, offset = sparse.SparseFile(file.fileno()), 0
            for cut in [*cuts, len(data)]:
                chunk = data[offset : offset + cut]
                written.write(chunk, offset)
                offset += len(chunk)
            os.ftruncate(file.fileno(), len(data))
            self.assertEqual(data, os.pread(file.fileno(), len(data) + 1, 0))
            blocks = [data[at : at + 4096] for at in range(0, len(data), 4096)]
            filled = sum(any(block) for block in blocks)
            self.assertLessEqual(os.fstat(file.fileno()).st_blocks * 512, filled * 4096)

    @given(st.lists(_RUN, max_size=5), st.integers(0, 10_000))
    def test_runs_are_the_data_and_nothing_else(self, runs: list[bytes], offset: int) -> None:
        data = b"".join(runs)
        found = list(sparse.data_runs(data, offset))
        rebuilt = bytearray(len(data))
        for start, end in found:
            self.assertLess(start, end)
            rebuilt[start:end] = data[start:end]
        self.assertEqual(data, bytes(rebuilt))
        self.assertEqual(sorted(found), found)


#: Beginnings that send an inspector on its way.
_MAGIC = st.sampled_from(
    [
        b"",
        b"QFI\xfb\0\0\0\2",
        b"QFI\xfb\0\0\0\3",
        b"KDMV\1\0\0\0\3\0\0\0",
        b"# Disk DescriptorFile\nversion=1\n",
        b"conectix",
        b"vhdxfile",
        b"QED\0",
        b"LUKS\xba\xbe\0\1",
        b"<<< Oracle VM VirtualBox Disk Image >>>\n" + bytes(24) + b"\x7f\x10\xda\xbe\1\0\1\0",
        bytes(510) + b"\x55\xaa" + b"EFI PART",
        bytes(0x8001) + b"CD001\1",
    ]
)


class TestInspection(unittest.TestCase):
    @settings(max_examples=150, deadline=None)
    @given(_MAGIC, st.binary(max_size=2000), st.integers(0, 70_000), st.integers(1, 100_000), st.data())
    def test_any_content_is_accepted_or_rejected(
        self, magic: bytes, rest: bytes, zeros: int, cut: int, data: st.DataObject
    ) -> None:
        content = magic + rest + bytes(zeros)
        claimed = data.draw(st.sampled_from([None, "raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso"]))
        strict = data.draw(st.booleans())
        try:
            rules = inspection.Rules(frozenset(("monolithicsparse",)), 2**44, strict)
            looking = inspection.Inspection(claimed, rules)
            for at in range(0, len(content), cut):
                looking.feed(content[at : at + cut])
            finding = looking.finish()
        except errors.ImageRejected as error:
            self.assertTrue(error.cause)
            return
        self.assertIn(finding.format, set(inspection.QEMU_FORMATS.values()))
        if claimed is not None and strict:
            self.assertEqual(inspection.QEMU_FORMATS[claimed], finding.format)
