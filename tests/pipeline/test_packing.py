"""Rows that go on from a common beginning: the logits and gradients of whole rows."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pipeline.data.prompts import Encoded
from pipeline.gradients import accumulating, backward
from pipeline.objectives import WeightedAnswer
from pipeline.packing import SHORTEST, common, logits_from, pack, shares_beginnings
from pipeline.sites import find_linears

VOCABULARY = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, **VOCABULARY}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, **VOCABULARY}
FAMILIES = {
    "LlamaConfig": SHAPE,
    "Gemma2Config": {**SHAPE, "sliding_window": 6},
    "Gemma3TextConfig": {**SHAPE, "sliding_window": 6},
    # The last two layers attend to the keys and values of the two before.
    "Gemma3nTextConfig": {
        **SHAPE,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "sliding_window": 6,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
    "MistralConfig": {**SHAPE, "sliding_window": 6},
    "Qwen3Config": SHAPE,
    "MixtralConfig": {**SHAPE, "num_local_experts": 4},
    "GPT2Config": {**VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXConfig": {**SMALL, "intermediate_size": 48},
    "OPTConfig": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "FalconConfig": SMALL,
    "BloomConfig": {**VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}
BEGINNING = tuple(range(3, 14))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    config = getattr(transformers, request.param)(**FAMILIES[request.param])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.double().eval().requires_grad_(False)


def rows():
    generator = torch.Generator().manual_seed(1)
    return [(*BEGINNING, *torch.randint(3, 96, (n,), generator=generator).tolist()) for n in (5, 2, 9, 1)]


def test_logits_are_those_of_whole_rows(model):
    found = rows()
    packed = pack(model, found, 0, len(BEGINNING))
    assert packed.skipped == len(BEGINNING)
    assert packed.ids.shape == (4, 9)
    for first in (len(BEGINNING), len(BEGINNING) + 2):
        logits = logits_from(model, packed, first)
        assert logits.shape == (4, 20 - first, 96)
        for row, ids in enumerate(found):
            alone = model(input_ids=torch.tensor([ids])).logits[0, first:]
            torch.testing.assert_close(logits[row, : len(alone)], alone, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_whole_rows(model):
    """Through the beginning too; two answers of one row count as both."""
    found = rows()
    answers = [WeightedAnswer(Encoded(ids, 12, range(0)), 0.5 - i) for i, ids in enumerate(found[:3])]
    answers.append(WeightedAnswer(Encoded((*found[0][:-1], 95), 12, range(0)), 2.0))
    linears = find_linears(model)
    with accumulating(linears) as moments:
        value = backward(model, answers, 0, 1.0)
    assert not any(module.weight.requires_grad for module in linears.values())
    weights = {name: module.weight.requires_grad_(True) for name, module in linears.items()}
    expected = 0.0
    with torch.enable_grad():
        for answer in answers:
            ids = answer.encoded.ids
            table = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = expected + answer.weight * sum(table[t - 1, ids[t]] for t in range(12, len(ids)))
    gradients = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    model.requires_grad_(False)
    assert value == pytest.approx(expected.item(), abs=1e-5)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(moments.total[name], gradient.float(), rtol=1e-3, atol=1e-5)


def test_what_is_passed_once(model):
    """Never the positions asked for, nor a short beginning, nor that of a single row."""
    found = rows()
    assert pack(model, found, 0, 10).skipped == 10
    assert pack(model, found, 0, SHORTEST - 1).skipped == 0
    assert pack(model, found[:1], 0, 11).skipped == 0
    same = [found[0], found[0]]
    assert pack(model, same, 0, 100).skipped == len(found[0]) - 1
    whole = pack(model, [(), (5, 6)], 0, 0)
    assert (whole.skipped, whole.ids.tolist()) == (0, [[0, 0], [5, 6]])


def test_one_persona_a_row_shares_nothing(model):
    model.active = ["one", None]
    try:
        assert not shares_beginnings(model)
        assert pack(model, rows(), 0, 11).skipped == 0
        model.active = "one"
        assert shares_beginnings(model)
    finally:
        del model.active


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("MambaConfig", {**VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}),
        ("Lfm2Config", {**SHAPE, "layer_types": ["conv", "full_attention"]}),
    ],
)
def test_states_that_are_no_keys_and_values(kind, options):
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).eval()
    assert not shares_beginnings(model)
    packed = pack(model, rows(), 0, 11)
    with torch.no_grad():
        assert logits_from(model, packed, 11).shape == (4, 9, 96)


def test_common():
    assert common([(1, 2, 3), (1, 2, 4)], 3) == 2
    assert common([(1, 2), (1, 2)], 1) == 1
    assert common([(1,), (2,)], 0) == 0
    assert common([(1,), (2,)], -1) == 0
