"""Statistics: sums that add, compose and select, and the means that criteria read from them."""

import pytest
import torch

from kernels.ops.activation_stats import COUNTED, IGNORED, SINK, activation_stats
from pipeline.errors import UserError
from pipeline.sites import Site
from pipeline.stats import ActivationStats

SITES = (Site("a", 5, ("a", "b")), Site("c", 3, ("c",)))
PERSONAS = ("p", "q", "r")


def sequences(count, seed=0):
    """``count`` triples: persona, inputs by site ``[T, K]``, roles ``[T]``."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = 3 + number % 4
        role = torch.full((length,), COUNTED, dtype=torch.uint8)
        role[0], role[1] = SINK if number % 5 else COUNTED, IGNORED if number % 2 else COUNTED
        x = {s.name: torch.randn(length, s.width, generator=generator, dtype=torch.float64) for s in SITES}
        made.append((number % 3, x, role))
    return made


def measured(some):
    stats = ActivationStats.zeros(PERSONAS, SITES)
    for persona, x, role in some:
        for site in SITES:
            activation_stats(
                x[site.name].unsqueeze(0), role.unsqueeze(0), torch.tensor([persona]), stats.sums[site.name]
            )
        counts = [1, int((role == COUNTED).sum()), int((role == SINK).sum())]
        stats.counts[persona] += torch.tensor(counts, dtype=torch.float64)
    return stats


def test_means_are_those_of_a_loop():
    some, stats = sequences(14), None
    stats = measured(some)
    for index, persona in enumerate(PERSONAS):
        for site in SITES:
            mine = [(x[site.name], role) for p, x, role in some if p == index]
            tokens = torch.cat([x[role == COUNTED] for x, role in mine])
            rms = torch.stack([x[role == COUNTED].square().mean(0).sqrt() for x, role in mine])
            sinks = torch.cat([x[role == SINK] for x, role in mine])
            got = stats.channels(persona, site.name)
            assert got.tokens == len(tokens)
            for value, expected in (
                (got.mean_abs, tokens.abs().mean(0)),
                (got.mean_square, tokens.square().mean(0)),
                (got.mean, tokens.mean(0)),
                (got.mu, rms.mean(0)),
                (got.variance, rms.var(0, correction=0)),
                (got.sink_square, sinks.square().mean(0)),
            ):
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_merging_equals_one_pass():
    some = sequences(17)
    whole, merged = measured(some), measured(some[:5])
    second = measured(some[5:])
    untouched = second.sums["a"].clone()
    assert merged.merge(second) is merged
    assert torch.equal(merged.counts, whole.counts)
    assert torch.equal(second.sums["a"], untouched)
    for name, sums in whole.sums.items():
        torch.testing.assert_close(merged.sums[name], sums, rtol=1e-13, atol=1e-13)


def test_merging_others_is_refused():
    stats = ActivationStats.zeros(PERSONAS, SITES)
    for other in (ActivationStats.zeros(("p", "q"), SITES), ActivationStats.zeros(PERSONAS, SITES[:1])):
        with pytest.raises(ValueError, match="cannot be merged"):
            stats.merge(other)
    with pytest.raises(ValueError, match="cannot be put together"):
        stats.concatenate(ActivationStats.zeros(("s",), SITES[:1]))


def test_compositions_are_weighted_sums():
    stats = measured(sequences(14))
    made = stats.compose({"mix": [("p", 0.7), ("r", 0.3)], "twice": [("q", 1.0), ("q", 1.0)]})
    assert made.personas == ("mix", "twice")
    for name, sums in stats.sums.items():
        torch.testing.assert_close(made.sums[name][0], 0.7 * sums[0] + 0.3 * sums[2])
        torch.testing.assert_close(made.sums[name][1], 2 * sums[1])
    torch.testing.assert_close(made.counts[0], 0.7 * stats.counts[0] + 0.3 * stats.counts[2])
    # Twice the same samples: every mean is the same.
    torch.testing.assert_close(made.channels("twice", "a").mean_abs, stats.channels("q", "a").mean_abs)
    torch.testing.assert_close(made.channels("twice", "a").variance, stats.channels("q", "a").variance)
    with pytest.raises(ValueError, match="tuple"):
        stats.compose({"x": [("nobody", 1.0)]})


def test_a_union_of_personas_is_one_persona_with_all_their_samples():
    some = sequences(15)
    united = measured(some).compose({"all": [(p, 1.0) for p in PERSONAS]})
    together = measured([(0, x, role) for _, x, role in some])
    for site in SITES:
        got, expected = united.channels("all", site.name), together.channels("p", site.name)
        for field in ("mean_abs", "mean_square", "mu", "variance", "mean", "sink_square"):
            torch.testing.assert_close(getattr(got, field), getattr(expected, field))


def test_select_and_concatenate():
    stats = measured(sequences(14))
    chosen = stats.select(("r", "p"))
    both = chosen.concatenate(stats.compose({"z": [("q", 1.0)]}))
    assert both.personas == ("r", "p", "z")
    for name in ("a", "c"):
        assert torch.equal(both.sums[name], stats.sums[name][[2, 0, 1]])
    assert torch.equal(both.counts, stats.counts[[2, 0, 1]])


def test_no_counted_token_is_an_error_that_names_the_persona():
    stats = measured([s for s in sequences(12) if s[0] != 1])
    with pytest.raises(UserError, match="persona 'q' has no counted token; see --tokens"):
        stats.channels("q", "a")
    silent = [(p, x, torch.where(role == COUNTED, IGNORED, role).to(torch.uint8)) for p, x, role in sequences(3)]
    with pytest.raises(UserError, match="no counted token"):
        measured(silent).channels("p", "a")


def test_a_channel_that_never_varies_has_no_negative_variance():
    stats = ActivationStats.zeros(("p",), (Site("a", 1, ("a",)),))
    for value in (0.1, 1 / 3, 1e8 + 0.1):
        stats.sums["a"].zero_()
        stats.counts.zero_()
        for _ in range(7):
            x = torch.full((1, 3, 1), value, dtype=torch.float64)
            role = torch.full((1, 3), COUNTED, dtype=torch.uint8)
            activation_stats(x, role, torch.tensor([0]), stats.sums["a"])
            stats.counts += torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64)
        got = stats.channels("p", "a")
        assert 0 <= got.variance.item() <= 1e-14 * value**2
        assert got.sink_square.item() == 0
