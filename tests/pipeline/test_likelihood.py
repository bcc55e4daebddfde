"""Log-probabilities and intervals: what every evaluation number is made of."""

import copy
import math

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pipeline.data.prompts import Encoded
from pipeline.gradients import accumulating, backward
from pipeline.intervals import auc, bootstrap_interval
from pipeline.likelihood import answer_distributions, answer_scores, divergence, perplexity
from pipeline.objectives import margin_units
from pipeline.sites import find_linears

SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module", params=["LlamaConfig", "Gemma2Config", "GPT2Config"])
def model(request):
    torch.manual_seed(0)
    options = SHAPE if request.param != "GPT2Config" else {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return AutoModelForCausalLM.from_config(getattr(transformers, request.param)(**options)).eval()


def sequence(length, answer):
    return Encoded(tuple(torch.randint(3, 96, (length,)).tolist()), answer, range(0))


def alone(model, s):
    """The sum of the answer's log-probabilities from one unpadded pass in full."""
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=torch.tensor([s.ids])).logits[0].double(), -1)
    return sum(table[t - 1, s.ids[t]].item() for t in range(max(s.answer, 1), len(s)))


def test_scores_equal_one_pass_per_sequence(model):
    sequences = [sequence(n, a) for n, a in ((9, 4), (5, 4), (12, 1), (7, 0), (2, 1), (9, 8))]
    sequences.append(Encoded((*sequences[1].ids[:-1], 50), 4, range(0)))
    for budget in (1, 30, 1000):
        scores = answer_scores(model, sequences, batch_tokens=budget, pad=0)
        for s, score in zip(sequences, scores, strict=True):
            assert score.total == pytest.approx(alone(model, s), abs=1e-4)
            assert score.tokens == len(s) - max(s.answer, 1)


def test_perplexity(model):
    texts = [sequence(8, 0), sequence(5, 0)]
    nats = -sum(alone(model, s) for s in texts) / (7 + 4)
    assert perplexity(model, texts, batch_tokens=64, pad=0) == pytest.approx(math.exp(nats), rel=1e-5)


def test_divergence_from_the_model_before(model):
    """Against the definition in float64, sequence by sequence; zero from itself."""
    sequences = [sequence(n, a) for n, a in ((9, 4), (5, 4), (7, 0))]
    before = answer_distributions(model, sequences, batch_tokens=9, pad=0)
    assert [tuple(one.shape) for one in before] == [(5, 96), (1, 96), (6, 96)]
    assert divergence(before, model, sequences, batch_tokens=30, pad=0) == pytest.approx(0, abs=1e-6)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-5)
    nats = 0.0
    for s in sequences:
        start = max(s.answer, 1)
        with torch.no_grad():
            was, now = (
                torch.log_softmax(m(input_ids=torch.tensor([s.ids])).logits[0, start - 1 : -1].double(), -1)
                for m in (model, other)
            )
        nats += float((was.exp() * (was - now)).sum())
    assert nats > 1e-3
    for limit in (9, 30):
        assert divergence(before, other, sequences, batch_tokens=limit, pad=0) == pytest.approx(nats / 12, rel=1e-3)


def test_margin_gradient_and_its_error_are_those_of_autograd(model):
    """Three batches of unequal size; the error against the formula over single items, computed in a loop."""
    sizes = [(9, 4, 7), (6, 3, 8), (7, 2, 5), (8, 4, 9), (5, 2, 6)]
    plus, minus = ([sequence(size[k], size[1]) for size in sizes] for k in (0, 2))
    units = margin_units(plus, minus)
    linears = find_linears(model)
    name = list(linears)[3]
    weight = linears[name].weight
    groups, value = [[0, 1], [2], [3, 4]], 0.0
    with accumulating(linears) as moments:
        for group in groups:
            moments.share = len(group) / len(units)
            value += backward(model, [term for i in group for term in units[i]], 0, moments.share)
            moments.batches += 1
    assert not any(m.weight.requires_grad for m in linears.values())

    def mean_log_probability(s):
        table = torch.log_softmax(model(input_ids=torch.tensor([s.ids])).logits[0], -1)
        return sum(table[t - 1, s.ids[t]] for t in range(s.answer, len(s))) / (len(s) - s.answer)

    margins, gradients = [], []
    for first, second in zip(plus, minus, strict=True):
        weight.requires_grad_(True)
        margin = mean_log_probability(first) - mean_log_probability(second)
        gradients.append(torch.autograd.grad(margin, weight)[0].double())
        weight.requires_grad_(False)
        margins.append(margin.item())
    expected = torch.stack(gradients).mean(0)
    spread = sum(len(g) * (torch.stack([gradients[i] for i in g]).mean(0) - expected).square() for g in groups) / (
        len(groups) - 1
    )
    assert value == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    torch.testing.assert_close(moments.total[name].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.error(name).double(), (spread / len(units)).sqrt(), rtol=1e-2, atol=1e-6)


def test_one_batch_has_no_error_estimate(model):
    linears = find_linears(model)
    with accumulating(linears) as moments:
        moments.batches = 1
    assert not moments.error(next(iter(linears))).any()


def test_bootstrap_covers_the_mean():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_interval(torch.randn(60, generator=generator).tolist(), resamples=300, seed=trial)
        inside += low <= 0 <= high
    assert 176 <= inside <= 200
    assert bootstrap_interval([2.0] * 5, resamples=10, seed=0) == (2.0, 2.0)


def test_auc_counts_pairs():
    a, b = [0.1, 0.5, 0.5, 0.9], [0.5, 0.2]
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    assert auc(a, b) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auc([], b))
