"""b-bit codes: the layout, exactly."""

from __future__ import annotations

import numpy as np
import pytest

from rbe_gpu.codecs import packing


@pytest.mark.parametrize("bits", range(1, packing.MAX_BITS + 1))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 384])
def test_round_trip(bits, count):
    codes = (np.arange(3 * count).reshape(3, count) * 2654435761 >> 7) % (1 << bits)
    packed = packing.pack(codes, bits)
    assert packed.shape == (3, packing.packed_bytes(count, bits)) == (3, -(-count // 32) * 4 * bits)
    np.testing.assert_array_equal(packing.unpack(packed, bits, count), codes)


def test_layout_of_4_bits():
    """Byte k of a run holds code k in its low half and code k + 16 in its high half."""
    packed = packing.pack(np.arange(32) % 16, 4)
    assert packed.tolist() == [k | (k << 4) for k in range(16)]


def test_layout_of_3_bits():
    """The 2 high bits of the codes come first (8 bytes), the low bits after them (4 bytes)."""
    codes = np.zeros(32, np.int64)
    codes[9] = 0b101
    packed = packing.pack(codes, 3)
    expected = np.zeros(12, np.uint8)
    expected[9 % 8] = 0b10 << (2 * (9 // 8))
    expected[8 + 9 % 4] = 1 << (9 // 4)
    np.testing.assert_array_equal(packed, expected)
