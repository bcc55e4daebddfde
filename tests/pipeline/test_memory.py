"""Batches that do not fit into memory: the statistics and gradients are those of the whole batch."""

import pytest
import torch

from pipeline import calibrate, memory
from pipeline.collector import Collector
from pipeline.errors import UserError
from pipeline.gradients import accumulating, backward
from pipeline.loading import load_model
from pipeline.sites import find_linears
from pipeline.store import STATISTICS, load_statistics
from pipeline.weights import WholeModel


@pytest.fixture(autouse=True)
def _untold(monkeypatch):
    monkeypatch.setattr(memory, "_told", set())


def short_of_memory(monkeypatch, rows, layer):
    """Batches of more than ``rows`` sequences do not get through ``layer`` of the model; its probes are short."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward
    failed = []

    def limited(self, hidden, *arguments, **options):
        if self.self_attn.layer_idx == layer and len(hidden) > rows and hidden.shape[1] > 8:
            failed.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden, *arguments, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", limited)
    return failed


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_statistics_count_every_sample_once(words, finished, tmp_path, monkeypatch, capsys, rows, layer):
    """The first layer's sums hold the batch already when the second runs out of memory."""
    failed = short_of_memory(monkeypatch, rows, layer)
    assert calibrate.main(words(tmp_path / "out", "--criterion", "wanda", "--sparsity", "0.3")) == 0
    assert len(failed) > 1
    assert capsys.readouterr().err.count("out of memory on a batch of") == 1
    whole, halved = load_statistics(finished / STATISTICS), load_statistics(tmp_path / "out" / STATISTICS)
    assert torch.equal(whole.counts, halved.counts)
    for site, sums in whole.sums.items():
        scale = sums.abs().amax(2, keepdim=True)
        assert ((sums - halved.sums[site]).abs() <= 1e-5 * scale).all()


def test_a_sample_that_does_not_fit_is_named(words, tmp_path, monkeypatch, capsys):
    short_of_memory(monkeypatch, 0, 1)
    assert calibrate.main(words(tmp_path / "out", "--criterion", "wanda")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory on one sample of" in last
    assert "pairs.csv:" in last
    assert "--max-length" in last


def test_masks_of_the_default_criterion_are_the_same(words, tmp_path, monkeypatch):
    options = ("--samples", "6", "--sparsity", "0.2", "--max-perplexity-increase", "0")
    assert calibrate.main(words(tmp_path / "whole", *options)) == 0
    short_of_memory(monkeypatch, 1, 1)
    assert calibrate.main(words(tmp_path / "halved", *options)) == 0
    from pipeline.store import load_masks

    whole, halved = load_masks(tmp_path / "whole"), load_masks(tmp_path / "halved")
    weights = sum(rows * columns for rows, columns in whole.shapes.values())
    different = sum(int((whole.mask("up", n) != halved.mask("up", n)).sum()) for n in whole.shapes)
    assert different <= 1e-3 * weights


def test_likelihoods_are_measured_in_halves(ground, monkeypatch, capsys):
    """What the budget and an evaluation are made of; the order of the answers stays."""
    from pipeline.data.prompts import Encoded
    from pipeline.likelihood import answer_distributions, answer_scores, divergence

    model = load_model(str(ground.llama))
    texts = [Encoded(tuple(range(3 + i, 13 + i + i % 3)), 4, range(0)) for i in range(7)]
    sizes = {"batch_tokens": 100, "pad": 0}
    scores, before = answer_scores(model, texts, **sizes), answer_distributions(model, texts, **sizes)
    failed = short_of_memory(monkeypatch, 2, 1)
    halved = answer_scores(model, texts, **sizes)
    assert failed == [7, 4, 3]
    assert capsys.readouterr().err.count("out of memory on a batch of 7 texts") == 1
    assert [one.tokens for one in halved] == [one.tokens for one in scores]
    assert [one.total for one in halved] == pytest.approx([one.total for one in scores], abs=1e-4)
    assert divergence(before, model, texts, **sizes) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="which --deterministic does not split: lower --batch-tokens"):
        answer_scores(model, texts, **sizes, undivided="--deterministic")
    short_of_memory(monkeypatch, 0, 0)
    with pytest.raises(UserError, match="out of memory on one text of 1[0-2] tokens .* --max-length"):
        answer_scores(model, texts, **sizes)


def test_a_budget_is_found_in_halves(words, tmp_path, monkeypatch, capsys):
    from pipeline import budget
    from pipeline.store import load_masks

    monkeypatch.setattr(budget, "PROBE_TEXTS", 4)
    # The masks of one run, so that all that could differ is the search.
    options = ("--samples", "4", "--sparsity", "0.3", "--criterion", "wanda", "--max-perplexity-increase", "0.02")
    assert calibrate.main(words(tmp_path / "whole", *options)) == 0
    failed = short_of_memory(monkeypatch, 2, 1)
    reused = ("--statistics", tmp_path / "whole")
    assert calibrate.main(words(tmp_path / "halved", *options, *reused)) == 0
    assert failed
    assert "out of memory on a batch of" in capsys.readouterr().err
    whole, halved = (load_masks(tmp_path / name).manifest["sparsity"] for name in ("whole", "halved"))
    assert whole["factor"] == halved["factor"]
    assert halved["perplexity_increase"] == pytest.approx(whole["perplexity_increase"], abs=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("lost", [0, 5])
def test_parts_of_a_batch_count_as_one(ground, parts, lost):
    """Gradient and spread, also when a pass was cut short after the last ``lost`` layers had their gradient."""
    from pipeline.data.prompts import Encoded
    from pipeline.objectives import WeightedAnswer

    model = load_model(str(ground.llama))
    terms = [WeightedAnswer(Encoded(tuple(range(3 + i, 13 + i)), 4, range(0)), 0.25 * (-1) ** i) for i in range(4)]
    linears = find_linears(model)
    with accumulating(linears) as moments:
        backward(model, terms, 0, 1.0)
        total = {name: value.clone() for name, value in moments.total.items()}
        square = {name: value.clone() for name, value in moments.square.items()}
        counted = frozenset(list(linears)[len(linears) - lost :]) if lost else frozenset()
        for name in linears:
            if name not in counted:
                moments.total[name].zero_()
                moments.square[name].zero_()
        moments.hold()
        for part in range(parts):
            moments.begin(counted)
            backward(model, terms[part::parts], 0, 1.0)
        assert moments.complete == frozenset(linears)
        moments.release()
        for name in linears:
            torch.testing.assert_close(moments.total[name], total[name], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(moments.square[name], square[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (UserError("out of memory"), False),
    ],
    ids=str,
)
def test_what_is_about_memory(error, expected):
    assert memory.is_out_of_memory(error) is expected


def test_the_cpu_says_it_in_words_that_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


def test_nan_before_the_memory_is_full_is_not_lost(ground):
    """What the cut pass has counted is looked at before the halves begin."""
    from pipeline.sites import find_sites
    from pipeline.stats import ActivationStats

    model = load_model(str(ground.llama))
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    sites, _ = find_sites(model, find_linears(model), torch.device("cpu"))
    collector = Collector(model, ActivationStats.zeros(["up"], sites))
    role = torch.tensor([[2, 1, 1]] * 2, dtype=torch.uint8)
    ids = torch.tensor([[3, 4, 5], [3, 7, 5]])
    with (
        pytest.raises(MemoryError),
        collector.collecting(),
        collector.batch(role, torch.zeros(2, dtype=torch.int64), ["a", "b"]),
    ):
        model.base_model(input_ids=ids)
        raise MemoryError
    with pytest.raises(UserError, match="sample b"):
        collector.raise_on_bad_values(["a", "b"])


def test_a_model_goes_to_a_device_that_holds_it(ground, monkeypatch, capsys):
    weights = WholeModel(str(ground.llama), "")
    assert weights.move(torch.device("meta")) == weights.model.device == torch.device("meta")
    weights = WholeModel(str(ground.llama), "")
    move = weights.model.to

    def short(device):
        if str(device) != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return move(device)

    monkeypatch.setattr(weights.model, "to", short)
    assert weights.move(torch.device("meta")) == weights.model.device == torch.device("cpu")
    assert "does not fit on meta" in capsys.readouterr().err
