# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
import unittest

from hypothesis import given
from hypothesis import strategies as st

from imagecache_lib.formats.qcow2 import header


def valid_header(backing: bytes, cluster_bits: int, extensions: list[tuple[int, bytes]]) -> bytes:
    area = b"".join(
        struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
        for kind, data in extensions
    )
    name_at = 112 + len(area) + 8
    l1_at, refcounts_at = 4 << cluster_bits, 1 << cluster_bits
    fields = header.V2_FIELDS.pack(
        header.MAGIC,
        3,
        name_at if backing else 0,
        len(backing),
        cluster_bits,
        2**20,
        0,
        2**15,
        l1_at,
        refcounts_at,
        1,
        0,
        0,
    )
    fields += header.V3_FIELDS.pack(0, 0, 0, 4, 112)
    return (fields.ljust(112, b"\0") + area + bytes(8) + backing).ljust(1 << cluster_bits, b"\0")


HEADERS = st.builds(
    valid_header,
    st.binary(max_size=200),
    st.integers(11, 14),
    st.lists(
        st.tuples(
            st.sampled_from([header.EXTENSION_BACKING_FORMAT, 0x12345678]), st.binary(min_size=1, max_size=15)
        ),
        max_size=3,
    ),
)


class AnyBytes(unittest.TestCase):
    def check(self, data: bytes) -> None:
        """Nothing but the promised errors comes out, and a request for more is honest and bounded."""
        for read in (header.parse, header.backing_reference):
            try:
                read(data)
            except header.NotQcow2:
                self.assertFalse(data.startswith(header.MAGIC))
            except header.Truncated as error:
                self.assertGreater(error.needed, len(data))
                self.assertLessEqual(error.needed, 1 << header.MAX_CLUSTER_BITS)
            except header.HeaderError:
                pass

    @given(st.binary(max_size=300))
    def test_random_bytes(self, data: bytes) -> None:
        self.check(data)
        self.check(header.MAGIC + data)
        self.check(header.MAGIC + struct.pack(">I", 3) + data)

    @given(
        HEADERS,
        st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
        st.integers(0, 4096),
    )
    def test_changed_and_cut_headers(self, data: bytes, changes: list[tuple[int, int]], length: int) -> None:
        changed = bytearray(data)
        for position, value in changes:
            changed[position] = value
        self.check(bytes(changed))
        self.check(bytes(changed[:length]))

    @given(HEADERS)
    def test_both_readers_see_the_same_backing_file(self, data: bytes) -> None:
        self.assertEqual(header.parse(data).backing_file, header.backing_reference(data))
