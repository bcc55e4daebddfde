"""The scores against float64 loops that spell out the formulas, and what criteria do with odd statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import unpack_bits
from pipeline import scoring
from pipeline.config import SIGNED, Sparsity
from pipeline.criteria import CRITERIA, Layer, Slopes
from pipeline.stats import ChannelStats

N, K = 5, 300
PAPER = [name for name in CRITERIA if name not in SIGNED]


def channels(width=K, **given):
    drawn = {name: torch.rand(width, dtype=torch.float64) + 0.05 for name in ("mean_abs", "mean_square", "mu")}
    drawn |= {name: torch.rand(width, dtype=torch.float64) for name in ("mean", "variance", "sink_square")}
    return ChannelStats(tokens=40.0, **(drawn | given))


def layer(keep=100, width=K, **options):
    weight = options.pop("weight", None)
    margin, error, neutral = torch.randn(N, width), torch.rand(N, width), torch.randn(N, width)
    slopes = Slopes(margin, error, neutral, torch.rand(N, width))
    given = {"own": channels(width), "other": channels(width), "slopes": slopes} | options
    return Layer("l", torch.randn(N, width) if weight is None else weight, "p", keep=keep, **given)


def kept(name, case):
    return unpack_bits(CRITERIA[name](case), case.weight.shape[1])


def test_sparse_score():
    square = torch.rand(7, dtype=torch.float64)
    damping = 0.01 * sum(square.tolist()) / 7
    expected = [math.sqrt(v + damping) for v in square.tolist()]
    assert scoring.sparse(square).tolist() == pytest.approx(expected, rel=1e-6)


def test_sparse_is_the_inverse_hessian_for_a_diagonal():
    """W^2 / [H^-1]_jj, spelled out with a matrix inverse, ranks as |W| times the score."""
    square, weight = torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    hessian = torch.diag(square + 0.01 * square.mean())
    expected = weight.square() / torch.linalg.inv(hessian).diagonal()
    got = (weight.abs() * scoring.sparse(square).double()).square()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_contrast_and_its_activations():
    a, b = channels(), channels()
    z = scoring.contrast(a.mu, b.mu, a.variance, b.variance)
    expected = [
        (m - n) / math.sqrt(v + w)
        for m, n, v, w in zip(a.mu.tolist(), b.mu.tolist(), a.variance.tolist(), b.variance.tolist(), strict=True)
    ]
    assert z.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(scoring.contrast(b.mu, a.mu, b.variance, a.variance), -z)
    softplus = [math.log1p(math.exp(v / 0.7)) for v in expected]
    assert scoring.contrastive_wanda(z, "softplus", 0.7).tolist() == pytest.approx(softplus, rel=1e-5)
    relu = [max(v, 0.0) for v in expected]
    assert scoring.contrastive_wanda(z, "relu", 0.7).tolist() == pytest.approx(relu, rel=1e-5)


def test_contrast_of_channels_that_never_vary():
    zero = torch.zeros(3, dtype=torch.float64)
    own, other = torch.tensor([0.0, 2.0, 1.0]).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    z = scoring.contrast(own, other, zero, zero)
    assert torch.isfinite(z).all()
    assert z[0] == 0
    assert z[1] > 1e6
    assert z[2] == -z[1]
    for activation in ("softplus", "relu"):
        assert torch.isfinite(scoring.contrastive_wanda(z, activation, 1e-6)).all()


def test_first_order_scores():
    w, g, rms = torch.randn(3, 4), torch.randn(3, 4), torch.rand(4) + 0.1
    w[1, 2] = 0
    gain = scoring.first_order_gain(w, g)
    ratio = scoring.gain_per_damage(gain, scoring.disturbance(w, rms))
    assert ratio[1, 2] == 0
    for i in range(3):
        for j in range(4):
            assert gain[i, j].item() == pytest.approx(-w[i, j].item() * g[i, j].item())
            damage = (w[i, j].item() * rms[j].item()) ** 2
            assert ratio[i, j].item() == pytest.approx(gain[i, j].item() / damage if damage else 0)


def test_likelihood_damage():
    w, variance = torch.randn(3, 4), torch.rand(3, 4)
    floor = sum(map(sum, variance.tolist())) / 12 / 10
    expected = [w[i, j].item() ** 2 * (variance[i, j].item() + floor) for i in range(3) for j in range(4)]
    got = scoring.likelihood_damage(w, variance).tolist()
    assert [v for row in got for v in row] == pytest.approx(expected)
    assert (scoring.likelihood_damage(w, torch.zeros(3, 4)) == 0).all()


def test_contrastive_sparse_keeps_its_own_first():
    """A slow oracle: shares of the row, the own sorted by C, then the rest by share."""
    for keep in (20, 150, 290):
        case = layer(keep=keep)
        got = kept("contrastive-sparse", case)
        for i in range(N):
            share = []
            for square in (case.own.mean_square, case.other.mean_square):
                damping = 0.01 * float(square.mean())
                row = [w * w * (s + damping) for w, s in zip(case.weight[i].tolist(), square.tolist(), strict=True)]
                share.append([v / sum(row) for v in row])
            own = [j for j in range(K) if share[0][j] >= share[1][j]]
            rest = [j for j in range(K) if share[0][j] < share[1][j]]
            own.sort(key=lambda j: -abs(share[0][j] - share[1][j]))
            rest.sort(key=lambda j: -share[0][j])
            wrong = set((own + rest)[:keep]) ^ set(got[i].nonzero().flatten().tolist())
            # Scores are float32 there: the two at the border may be swapped.
            assert len(wrong) <= 2
            assert keep >= len(own) or set(rest).isdisjoint(got[i].nonzero().flatten().tolist())


def test_poles_own_every_weight_once_or_equally():
    case = layer()
    own, other = scoring.sparse(case.own.mean_square), scoring.sparse(case.other.mean_square)
    first, _ = scoring.contrastive_sparse(case.weight, own, other)
    second, _ = scoring.contrastive_sparse(case.weight, other, own)
    assert torch.equal(first + second, torch.ones(N, K))
    both, _ = scoring.contrastive_sparse(case.weight, own, own)
    assert both.bool().all()


@pytest.mark.parametrize("width", [100, 128, 129, 300, 576])
@pytest.mark.parametrize("sparsity", ["0", "0.02", "0.37", "0.5", "0.99"])
def test_sparse_apportions_the_row_over_its_blocks(width, sparsity):
    keep = Sparsity.parse(sparsity).keep("l", width)
    got = kept("sparse", layer(keep=keep, width=width))
    assert got.sum(1).tolist() == [keep] * N
    for start in range(0, width, 128):
        block = got[:, start : start + 128]
        share = keep * block.shape[1] / width
        assert ((block.sum(1) - share).abs() < 1).all()


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("sparsity", ["0", "0.015", "0.8", "0.99"])
def test_rows_keep_the_exact_number(name, sparsity):
    for width in (8, 77, 256):
        keep = Sparsity.parse(sparsity).keep("l", width)
        assert kept(name, layer(keep=keep, width=width)).sum(1).tolist() == [keep] * N


@settings(deadline=None, max_examples=25)
@given(st.integers(0, K), st.integers(0, 10**6))
def test_wanda_keeps_the_best(keep, seed):
    torch.manual_seed(seed)
    case = layer(keep=keep)
    mask, score = kept("wanda", case), case.weight.abs().double() * case.own.mean_abs
    for row, chosen in zip(score, mask, strict=True):
        if 0 < keep < K:
            assert row[chosen].min() >= row[~chosen].max() * (1 - 1e-6)


def rank_correlation(mask, score):
    """1 if the mask keeps the best of ``score``, about 0 if it has nothing to do with it."""
    best = torch.zeros_like(mask).scatter_(1, score.topk(int(mask[0].sum()), dim=1).indices, True)
    density = mask.double().mean()
    return float(((mask & best).double().mean() / density - density) / (1 - density))


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_channels_without_contrast_are_ranked_by_wanda(activation):
    """Where phi is the same everywhere it says nothing; the released code then keeps the first columns."""
    own = channels(mu=torch.zeros(K).double())
    case = layer(own=own, other=channels(mu=torch.ones(K).double(), variance=own.variance), activation=activation)
    same = layer(weight=case.weight, own=own, other=own, activation=activation)
    for one in (case, same) if activation == "relu" else (same,):
        score = one.weight.abs().double() * (own.mean_abs if activation == "relu" else 1)
        assert rank_correlation(kept("contrastive-wanda", one), score) > 0.99


@pytest.mark.parametrize("how", ["low temperature", "one sample"])
def test_softplus_that_underflows_leaves_no_ties_to_the_column_order(how):
    """softplus(z / tau) is 0 in float32 below -104: with a small tau or without variance for half the channels."""
    options = {"temperature": 0.001} if how == "low temperature" else {}
    none = {"variance": torch.zeros(K, dtype=torch.float64)} if how == "one sample" else {}
    case = layer(keep=250, own=channels(**none), other=channels(**none), **options)
    mask = kept("contrastive-wanda", case)
    lost = case.own.mu < case.other.mu
    # Of the channels that lose the contrast some are kept, as keep is large: any but "the first ones".
    columns = lost.nonzero().flatten()
    left, right = columns[: len(columns) // 2], columns[len(columns) // 2 :]
    assert mask[:, left].double().mean() < mask[:, right].double().mean() + 0.25


@pytest.mark.parametrize("name", [*PAPER, *SIGNED])
@pytest.mark.parametrize("odd", ["zeros", "constant", "huge", "tiny"])
def test_odd_statistics_raise_nothing(name, odd):
    value = {"zeros": 0.0, "constant": 1.0, "huge": 1e30, "tiny": 1e-40}[odd]
    fields = ("mean_abs", "mean_square", "mean", "mu", "variance", "sink_square")
    flat = channels(**{field: torch.full((K,), value, dtype=torch.float64) for field in fields})
    for own, other in ((flat, channels()), (channels(), flat), (flat, flat)):
        for activation in ("softplus", "relu"):
            got = kept(name, layer(own=own, other=other, activation=activation))
            assert (got.sum(1) >= 100).all()
            assert name in SIGNED or got.sum(1).tolist() == [100] * N


@pytest.mark.parametrize("name", [n for n in PAPER if n not in ("random", "magnitude")])
def test_the_measurement_decides(name):
    """The same weights under other statistics give another mask; the same statistics the same."""
    weight, own, other = torch.randn(N, K), channels(), channels()
    one = kept(name, layer(weight=weight, own=own, other=other))
    assert torch.equal(one, kept(name, layer(weight=weight, own=own, other=other)))
    assert not torch.equal(one, kept(name, layer(weight=weight, own=channels(), other=other)))
    assert torch.equal(one, kept(name, layer(weight=-weight, own=own, other=other)))


@pytest.mark.parametrize("name", CRITERIA)
def test_low_precision_weights_are_ranked_like_their_float32_copies(name):
    case = layer(weight=torch.randn(N, K).bfloat16())
    copy = layer(weight=case.weight.float(), own=case.own, other=case.other, slopes=case.slopes)
    assert torch.equal(kept(name, case), kept(name, copy))


def test_random_masks_have_the_chance_overlap():
    def one(persona):
        return unpack_bits(CRITERIA["random"](Layer("l", torch.zeros(50, K), persona, channels(), None, 150)), K)

    overlap = (one("p") & one("q")).double().mean()
    assert overlap == pytest.approx(0.25, abs=0.02)
