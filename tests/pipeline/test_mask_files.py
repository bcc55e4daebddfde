"""The algebra of masks, and mask files from strangers."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import pack_bits
from pipeline.errors import UserError
from pipeline.masks import PersonaMasks
from pipeline.staging import staged_folder
from pipeline.store import load_masks, save_masks

SHAPES = {"a": (3, 19), "b": (5, 8)}
MANIFEST = {
    "model": {"id": "toy", "fingerprint": dict.fromkeys(SHAPES, "0")},
    "criterion": "",
    "sparsity": {"option": "0"},
    "personas": {"opponents": {}, "questions": {}},
    "options": {},
    "versions": {},
}


def masks_of(**personas):
    return PersonaMasks(SHAPES, {p: {n: pack_bits(m[n]) for n in SHAPES} for p, m in personas.items()})


def draw_masks(data):
    density = data.draw(st.floats(0, 1))
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    return {name: torch.rand(shape) < density for name, shape in SHAPES.items()}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_algebra(data):
    x, y = draw_masks(data), draw_masks(data)
    masks = masks_of(x=x, y=y)
    share = data.draw(st.floats(0, 1))
    union, both = masks.union("u", ("x", "y")), masks.intersection("i", ("x", "y"))
    mixed, random = masks.mix("m", "x", "y", share), masks.random_like("x", 7, "r", rows=True)
    for name in SHAPES:
        assert torch.equal(union.mask("u", name), x[name] | y[name])
        assert torch.equal(both.mask("i", name), x[name] & y[name])
        assert torch.equal(masks.difference("d", "x", "y").mask("d", name), x[name] & ~y[name])
        assert torch.equal(random.mask("r", name).sum(1), x[name].sum(1))
        got = mixed.mask("m", name)
        assert (got >= (x[name] & y[name])).all()
        assert (got <= (x[name] | y[name])).all()
        only = (x[name] & ~y[name]).sum(1)
        assert torch.equal((got & x[name] & ~y[name]).sum(1), (share * only + 0.5).floor().long())
    total = sum(m.numel() for m in x.values())
    kept = sum(int(m.sum()) for m in x.values())
    overlap = sum(int((x[n] & y[n]).sum()) for n in SHAPES)
    either = sum(int((x[n] | y[n]).sum()) for n in SHAPES)
    assert masks.density("x") == pytest.approx(kept / total)
    assert masks.jaccard("x", "y") == pytest.approx(overlap / either if either else 1)
    assert masks.difference_share("x", "y") == pytest.approx((either - overlap) / total)


def test_chance_is_what_random_masks_have():
    shapes = {"a": (400, 500)}
    torch.manual_seed(0)
    bits = {p: {"a": pack_bits(torch.rand(400, 500) < d)} for p, d in (("x", 0.7), ("y", 0.4))}
    masks = PersonaMasks(shapes, bits)
    assert masks.jaccard("x", "y") == pytest.approx(masks.chance_jaccard("x", "y"), rel=0.01)


@pytest.fixture
def run(tmp_path):
    masks = masks_of(fox=draw(0.5), dog=draw(0.2))
    save_masks(masks, tmp_path, MANIFEST)
    return tmp_path, masks


def draw(density):
    return {name: torch.rand(shape) < density for name, shape in SHAPES.items()}


def test_round_trip(run):
    folder, masks = run
    loaded = load_masks(folder)
    assert loaded.shapes == masks.shapes
    for persona in masks.personas:
        assert all(torch.equal(loaded.bits[persona][n], masks.bits[persona][n]) for n in SHAPES)


def edit(change):
    def apply(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


def truncate(folder):
    path = folder / "masks" / "fox.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def flip(folder):
    path = folder / "masks" / "fox.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))


def resign(folder, entry):
    """Make size and checksum of fox's entry fit the file again."""
    import hashlib

    content = (folder / "masks" / "fox.safetensors").read_bytes()
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def foreign_file(folder):
    (folder / "masks" / "fox.safetensors").write_bytes(b"\xff" * 400)
    edit(lambda m: resign(folder, m["masks"]["fox"]))(folder)


TAMPERED = {
    "truncated": (truncate, "truncated or altered"),
    "bit flipped": (flip, "checksum differs"),
    "no safetensors": (foreign_file, "fox.safetensors"),
    "missing file": (lambda f: (f / "masks" / "dog.safetensors").unlink(), "dog.safetensors"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "manifest is no JSON": (lambda f: (f / "manifest.json").write_text("{"), "not a manifest"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest"),
    "nested manifest": (lambda f: (f / "manifest.json").write_text("[" * 99999), "not a manifest"),
    "foreign format": (edit(lambda m: m.update(format="x")), "format 'x'"),
    "later version": (edit(lambda m: m.update(version=3)), "version 3; this program reads versions 1 and 2"),
    "version as a fraction": (edit(lambda m: m.update(version=2.0)), "reads versions 1 and 2"),
    "other shape": (edit(lambda m: m["layers"].update(a=[4, 19])), "fox.safetensors"),
    "large shape": (edit(lambda m: m["layers"].update(a=[2**31 - 1, 2**31 - 1])), "this machine has"),
    "rows that no list can have": (edit(lambda m: m["layers"].update(a=[10**6, 19])), "cannot hold 2000005 bytes"),
    "columns that no list can have": (edit(lambda m: m["layers"].update(a=[3, 1 << 16])), "cannot hold 24581 bytes"),
    "huge shape": (edit(lambda m: m["layers"].update(a=[10**12, 10**12])), "layer shape"),
    "shape beyond numbers": (edit(lambda m: m["layers"].update(a=[10**4000, 1])), "an integer of 4001 digits"),
    "missing layer": (edit(lambda m: (m["layers"].pop("a"), m["model"]["fingerprint"].pop("a"))), "layers differ"),
    "path traversal": (edit(lambda m: m["masks"]["fox"].update(file="../fox.safetensors")), "file name"),
    "persona traversal": (edit(lambda m: m["masks"].update({"../x": m["masks"]["fox"]})), "persona name"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_altered_files_are_refused(run, case):
    tamper, message = TAMPERED[case]
    tamper(run[0])
    with pytest.raises(UserError, match=message):
        load_masks(run[0])


def test_an_interrupted_run_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", False) as staging:
        (staging / "half").write_text("written")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_earlier_run(tmp_path):
    with staged_folder(tmp_path / "out", False) as staging:
        save_masks(masks_of(fox=draw(0.5)), staging, MANIFEST)
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", True):
        raise RuntimeError
    assert load_masks(tmp_path / "out").personas == ("fox",)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
