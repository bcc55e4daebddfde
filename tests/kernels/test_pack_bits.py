"""Bit packing against numpy, and the algebra of masks on packed bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import packed, strided, unpacked
from torch.library import opcheck

from kernels import pack_bits, unpack_bits

SHAPES = [(1,), (8,), (129,), (3, 37), (5, 129), (7, 32), (0, 9), (4, 0), (2, 3, 33), (2, 0, 5)]
MASK_ROWS = st.lists(st.booleans(), max_size=70)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_is_little_bit_order(shape):
    mask = torch.rand(shape) > 0.5
    assert torch.equal(pack_bits(mask), packed(mask))


def test_one_byte_by_hand():
    mask = torch.tensor([True, False, False, True, False, False, False, False, True])
    assert pack_bits(mask).tolist() == [0b00001001, 0b00000001]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_inverts(shape):
    mask = torch.rand(shape) > 0.5
    assert torch.equal(unpack_bits(packed(mask), shape[-1]), mask)


def test_every_byte_value():
    bits = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    for columns in range(1, 9):
        assert torch.equal(unpack_bits(bits, columns), unpacked(bits, columns))


@pytest.mark.parametrize("kept", [False, True])
def test_unused_bits_are_zero(kept):
    for columns in range(1, 18):
        assert torch.equal(pack_bits(torch.full((2, columns), kept)), packed(torch.full((2, columns), kept)))


VIEWS = {
    "strided": strided,
    "transposed": torch.t,
    "slices": lambda t: t[1:, ::3],
    "expanded": lambda t: t[:1].expand(4, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_non_contiguous(view):
    mask, bits = view(torch.rand(16, 37) > 0.5), view(torch.randint(256, (6, 9), dtype=torch.uint8))
    assert torch.equal(pack_bits(mask), packed(mask))
    columns = 8 * bits.shape[1] - 3
    assert torch.equal(unpack_bits(bits, columns), unpacked(bits, columns))


@settings(deadline=None, derandomize=True)
@given(MASK_ROWS)
def test_round_trip(row):
    mask = torch.tensor(row, dtype=torch.bool)
    assert torch.equal(unpack_bits(pack_bits(mask), len(row)), mask)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=70))
def test_algebra_of_masks_holds_on_bytes(rows):
    a, b = torch.tensor(rows).unbind(1)
    assert torch.equal(pack_bits(a) & pack_bits(b), pack_bits(a & b))
    assert torch.equal(pack_bits(a) | pack_bits(b), pack_bits(a | b))
    assert torch.equal(pack_bits(a) ^ pack_bits(b), pack_bits(a ^ b))
    assert torch.equal(unpack_bits(~pack_bits(a), len(rows)), ~a)


def test_input_is_checked():
    with pytest.raises(TypeError, match=r"pack_bits: mask must be one of bool, got \[3\] uint8"):
        pack_bits(torch.ones(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least one dimension"):
        pack_bits(torch.tensor(True))
    with pytest.raises(TypeError, match=r"unpack_bits: bits must be one of uint8, got \[3\] int32"):
        unpack_bits(torch.ones(3, dtype=torch.int32), 20)
    with pytest.raises(ValueError, match=r"K = 25 needs 4 bytes a row, got \[2, 3\]"):
        unpack_bits(torch.ones(2, 3, dtype=torch.uint8), 25)


@pytest.mark.parametrize("shape", [(5, 129), (16, 8), (0, 9), (2, 3, 33)], ids=str)
@pytest.mark.parametrize("view", [torch.clone, strided])
def test_opcheck(shape, view):
    mask = torch.rand(shape) > 0.5
    opcheck(torch.ops.persona.pack_bits, (view(mask),))
    opcheck(torch.ops.persona.unpack_bits, (view(packed(mask)), shape[-1]))


def test_compile(compiled):
    mask = torch.rand(5, 129) > 0.5
    assert torch.equal(compiled(lambda m: pack_bits(~m))(mask), packed(~mask))
    assert torch.equal(compiled(lambda b: ~unpack_bits(b, 129))(packed(mask)), ~mask)
