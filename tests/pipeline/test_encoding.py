"""Masks as they are stored: lossless, the smaller of two forms, and nothing that is no mask is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import pack_bits
from pipeline import encoding
from pipeline.building import LayerMask
from pipeline.encoding import bytes_of, check_stored, decode, encode, least_bytes, stored_as, worth_listing
from pipeline.masks import PersonaMasks
from pipeline.parts import MaskParts
from pipeline.store import load_masks, save_masks
from tests.pipeline.fuzzing import LISTED, MANIFEST, SHAPES

COLUMNS = (1, 8, 9, 17, 33, 300, 1025, (1 << 16) - 1, 1 << 16, (1 << 16) + 9)
CODES = {torch.uint8: "U8", torch.uint16: "U16"}


def random_mask(rows, columns, removed):
    """Some rows whole, some gone."""
    mask = torch.rand(rows, columns) >= removed
    mask[: rows // 3] = True
    if removed > 0.5:
        mask[-1:] = False
    return mask


@settings(deadline=None, max_examples=120)
@given(
    st.integers(1, 9),
    st.sampled_from(COLUMNS),
    st.sampled_from((0.0, 0.005, 0.03, 0.06, 0.07, 0.6)),
    st.integers(0, 999),
)
def test_there_and_back_in_the_smaller_form(rows, columns, removed, seed):
    torch.manual_seed(seed)
    mask = random_mask(rows, columns, removed)
    bits, gone = pack_bits(mask), int((~mask).sum())
    stored = encode(bits, columns)
    listed = 2 * (rows + gone) < bits.nbytes and columns < 1 << 16
    assert stored.nbytes == (2 * (rows + gone) if listed else bits.nbytes)
    assert (stored.dtype, list(stored.shape)) == stored_as(rows, columns, gone)
    assert stored.nbytes >= least_bytes(rows, columns)
    check_stored("x", CODES[stored.dtype], list(stored.shape), (rows, columns), lists=True)
    assert torch.equal(decode("x", stored, (rows, columns)), bits)
    assert torch.equal(encode(bits.clone(), columns), stored)


def test_a_list_as_large_as_the_bits_is_not_taken():
    assert worth_listing(8, 160, 71)
    assert not worth_listing(8, 160, 72)
    assert not worth_listing(4, 16, 0)
    assert least_bytes(4, 16) == 8


@pytest.mark.parametrize("at_once", [1, 700, 10**6])
def test_some_rows_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(encoding, "AT_ONCE", at_once)
    mask = random_mask(11, 300, 0.03)
    stored = encode(pack_bits(mask), 300)
    assert stored.dtype == torch.uint16
    assert stored[:11].tolist() == (~mask).sum(1).tolist()
    assert stored[11:].tolist() == (~mask).nonzero()[:, 1].tolist()
    assert torch.equal(decode("x", stored, (11, 300)), pack_bits(mask))


def test_a_whole_row_of_the_widest_list():
    columns = (1 << 16) - 1
    mask = torch.ones(20, columns, dtype=torch.bool)
    mask[3] = False
    stored = encode(pack_bits(mask), columns)
    assert (stored.dtype, int(stored[3].to(torch.int32)), int(stored[-1].to(torch.int32))) == (
        torch.uint16,
        columns,
        columns - 1,
    )
    assert torch.equal(decode("x", stored, (20, columns)), pack_bits(mask))


def listed(counts, columns):
    return torch.tensor([*counts, *columns], dtype=torch.uint16)


WRONG = {
    "a column behind the last": (listed([1, 0, 0], [300]), "lists column 300 of 300"),
    "a column twice": (listed([2, 0, 0], [7, 7]), "do not rise"),
    "falling": (listed([0, 2, 0], [7, 6]), "do not rise"),
    "more than the rows have": (listed([1, 0, 0], [6, 7]), "lists 2 columns, its rows have 1"),
    "fewer than the rows have": (listed([65535, 65535, 65535], [6, 7]), "lists 2 columns, its rows have 196605"),
    "bits behind the last column": (torch.full((3, 38), 0xFF, dtype=torch.uint8), "bits behind its last column"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_contents_that_are_no_mask(monkeypatch, case, at_once):
    monkeypatch.setattr(encoding, "AT_ONCE", at_once)
    stored, message = WRONG[case]
    with pytest.raises(ValueError, match=f"mask of x .*{message}"):
        decode("x", stored, (3, 300))


HEADERS = {
    "a list in two dimensions": ("U16", [3, 1], (3, 300), True),
    "a list shorter than the rows": ("U16", [2], (3, 300), True),
    "a list longer than the bits": ("U16", [57], (3, 300), True),
    "a list of a layer too wide": ("U16", [3], (3, 1 << 16), True),
    "a list in version 1": ("U16", [3], (3, 300), False),
    "a signed list": ("I16", [3], (3, 300), True),
    "no rows": ("U8", [0, 38], (3, 300), True),
    "unpacked": ("U8", [3, 300], (3, 300), True),
    "bits as a list": ("U8", [114], (3, 300), True),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_no_mask(case):
    with pytest.raises(ValueError, match="mask of x is "):
        check_stored("x", *HEADERS[case])


def some_masks(names=SHAPES):
    removed = {name: 0.02 if name == LISTED else 0.5 for name in names}
    bits = {p: {n: pack_bits(torch.rand(SHAPES[n]) > removed[n]) for n in names} for p in ("fox", "dog")}
    return PersonaMasks({name: SHAPES[name] for name in names}, bits)


def test_layer_by_layer_gives_the_same_files(tmp_path):
    masks = some_masks()
    save_masks(masks, tmp_path / "whole", MANIFEST)
    (tmp_path / "parts").mkdir()
    parts = MaskParts(tmp_path / "parts")
    for layer in ("d", "a.b", "c"):
        for persona, of in masks.bits.items():
            parts.add(LayerMask(layer, SHAPES[layer], persona, of[layer]))
    parts.finish(MANIFEST, list(SHAPES))
    for name in ("manifest.json", "masks/fox.safetensors", "masks/dog.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    loaded = load_masks(tmp_path / "parts")
    assert all(torch.equal(loaded.bits[p][n], masks.bits[p][n]) for p in masks.personas for n in SHAPES)


def test_bytes_of_a_row():
    assert [bytes_of(columns) for columns in (1, 8, 9)] == [1, 1, 2]
