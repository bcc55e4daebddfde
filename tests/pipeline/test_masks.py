"""Algebra of masks against bool tensors, and what random choices must keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import pack_bits
from pipeline.masks import PersonaMasks

SHAPES = {"a": (4, 13), "b.c": (6, 32), "d": (1, 1)}


def pack(**personas):
    return PersonaMasks(SHAPES, {p: {n: pack_bits(m[n]) for n in SHAPES} for p, m in personas.items()}, {"from": 1})


@st.composite
def three(draw):
    torch.manual_seed(draw(st.integers(0, 10**6)))
    return [
        {n: torch.rand(s) < draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])) for n, s in SHAPES.items()} for _ in "xyz"
    ]


def flat(mask):
    return torch.cat([mask[name].flatten() for name in SHAPES])


@settings(deadline=None, max_examples=60)
@given(three())
def test_sets_of_weights(drawn):
    masks = pack(**dict(zip("xyz", drawn, strict=True)))
    x, y, z = map(flat, drawn)

    def of(made, name="n"):
        assert made.personas == (name,)
        assert made.manifest == {"from": 1}
        return torch.cat([made.mask(name, layer).flatten() for layer in SHAPES])

    assert torch.equal(of(masks.union("n", "xyz")), x | y | z)
    assert torch.equal(of(masks.intersection("n", iter("xyz"))), x & y & z)
    assert torch.equal(of(masks.difference("n", "x", "y")), x & ~y)
    assert torch.equal(of(masks.union("n", "x")), x)
    assert masks.density("x") == pytest.approx(x.double().mean().item())
    assert masks.kept("x") == {name: int(drawn[0][name].sum()) for name in SHAPES}
    either, both = int((x | y).sum()), int((x & y).sum())
    assert masks.jaccard("x", "y") == masks.jaccard("y", "x") == pytest.approx(both / either if either else 1)
    assert masks.difference_share("x", "y") == pytest.approx((x ^ y).double().mean().item())
    layer = drawn[0]["b.c"]
    assert masks.density("x", "b.c") == pytest.approx(layer.double().mean().item())
    assert masks.difference_share("x", "y", "b.c") == pytest.approx((layer ^ drawn[1]["b.c"]).double().mean().item())


@settings(deadline=None, max_examples=40)
@given(three(), st.integers(0, 1000), st.booleans())
def test_random_controls_keep_every_layer_or_row(drawn, seed, rows):
    masks = pack(x=drawn[0])
    one, again = (masks.random_like("x", seed, "r", rows=rows) for _ in range(2))
    for name, mask in drawn[0].items():
        counts = one.mask("r", name).sum(1).tolist()
        assert sum(counts) == int(mask.sum())
        if rows:
            assert counts == mask.sum(1).tolist()
        else:
            assert max(counts, default=0) - min(counts, default=0) <= 1
        assert torch.equal(one.bits["r"][name], again.bits["r"][name])
        # Unused high bits stay 0, so that counting bytes counts weights.
        assert torch.equal(one.bits["r"][name], pack_bits(one.mask("r", name)))


@settings(deadline=None, max_examples=40)
@given(three(), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
def test_mixtures(drawn, share):
    masks, x, y = pack(x=drawn[0], y=drawn[1]), drawn[0], drawn[1]
    mixed = masks.mix("m", "x", "y", share, seed=5)
    for name in SHAPES:
        got = mixed.mask("m", name)
        assert torch.equal(got & x[name] & y[name], x[name] & y[name])
        assert not (got & ~x[name] & ~y[name]).any()
        if share in (0.0, 1.0):
            assert torch.equal(got, x[name] if share else y[name])
    equal = pack(x=x, y={n: m.flip(1) for n, m in x.items()})
    for name, mask in equal.mix("m", "x", "y", share).bits["m"].items():
        assert torch.equal(pack_bits(equal.mix("m", "x", "y", share).mask("m", name)), mask)
        assert equal.mix("m", "x", "y", share).mask("m", name).sum(1).tolist() == x[name].sum(1).tolist()


@settings(deadline=None, max_examples=40)
@given(three(), st.integers(0, 1000))
def test_random_controls_stay_in_their_pool(drawn, seed):
    """Exactly what the persona removes may go, and nothing else: then there is no choice."""
    masks = pack(x=drawn[0])
    for rows in (False, True):
        same = masks.random_like("x", seed, "r", lambda layer: ~drawn[0][layer], rows=rows)
        wider = masks.random_like("x", seed, "r", lambda layer: ~drawn[0][layer] | drawn[1][layer], rows=rows)
        for name, mask in drawn[0].items():
            assert torch.equal(same.mask("r", name), mask)
            assert not (~wider.mask("r", name) & mask & ~drawn[1][name]).any()
            kept = wider.mask("r", name).sum(1)
            assert (kept.tolist() == mask.sum(1).tolist()) if rows else (kept.sum() == mask.sum())
    if any((~mask).any() for mask in drawn[0].values()):
        with pytest.raises(ValueError, match="pool"):
            masks.random_like("x", seed, "r", lambda layer: torch.zeros_like(drawn[0][layer]))


def test_random_controls_are_random():
    """Independent of the persona, of other seeds, and even over the columns."""
    shapes = {"a": (2000, 40)}
    mask = torch.zeros(2000, 40, dtype=torch.bool)
    mask[:, :10] = True
    for rows in (slice(0, 2000), slice(0, 1999)):
        mask[1999, 10] = rows.stop != 2000
        masks = PersonaMasks(shapes, {"x": {"a": pack_bits(mask)}})
        drawn = [masks.random_like("x", seed, "r").mask("r", "a").double() for seed in (1, 2)]
        for one in drawn:
            assert ((one.mean(0) - 0.25).abs() < 0.05).all()
            assert (one * mask).mean() == pytest.approx(0.25 * 0.25, abs=0.01)
        assert (drawn[0] * drawn[1]).mean() == pytest.approx(0.25 * 0.25, abs=0.01)


def test_a_mixture_takes_its_share_of_each():
    x, y = torch.zeros(300, 80, dtype=torch.bool), torch.zeros(300, 80, dtype=torch.bool)
    x[:, :40], y[:, 30:70] = True, True
    masks = PersonaMasks({"a": (300, 80)}, {"x": {"a": pack_bits(x)}, "y": {"a": pack_bits(y)}})
    got = masks.mix("m", "x", "y", 0.7).mask("m", "a")
    assert got[:, 30:40].all()
    assert got[:, :30].sum(1).tolist() == [21] * 300
    assert got[:, 40:70].sum(1).tolist() == [9] * 300
    assert ((got[:, :30].double().mean(0) - 0.7).abs() < 0.12).all()
    assert not torch.equal(got, masks.mix("m", "x", "y", 0.7, seed=1).mask("m", "a"))


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_chance_is_the_expected_overlap(p, q):
    torch.manual_seed(0)
    shapes = {"a": (200, 100), "b": (50, 300)}
    bits = {n: {k: pack_bits(torch.rand(s) < d) for k, s in shapes.items()} for n, d in (("x", p), ("y", q))}
    masks = PersonaMasks(shapes, bits)
    assert masks.chance_jaccard("x", "y") == pytest.approx(masks.jaccard("x", "y"), abs=0.02)
    assert masks.chance_jaccard("x", "y") == pytest.approx(p * q / (p + q - p * q), abs=0.02)


def test_errors_name_what_is_wrong():
    everything = {n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()}
    masks = pack(x=everything)
    for call in (lambda: masks.mask("z", "a"), lambda: masks.union("n", "xz"), lambda: masks.jaccard("x", "z")):
        with pytest.raises(KeyError, match="unknown persona 'z'; known are x"):
            call()
    with pytest.raises(ValueError, match="no personas"):
        masks.union("n", [])
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must lie"):
            masks.mix("n", "x", "x", share)
    with pytest.raises(ValueError, match="personas in both: x"):
        masks | masks
    with pytest.raises(ValueError, match="different layers"):
        masks | PersonaMasks({"a": (4, 13)}, {})
    assert (masks | pack(y=everything)).personas == ("x", "y")
    assert masks.personas == ("x",)
