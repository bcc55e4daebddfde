"""Which layers are found, whatever the wiring: tied heads, changed inputs, odd modules, names and patterns."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.config import CalibrateConfig
from pipeline.errors import UserError
from pipeline.loading import load_model
from pipeline.sites import check_causal, find_linears, find_sites, maskable, matrix, measurable
from tests.pipeline.test_families import FAMILIES, GROUPED

CPU = torch.device("cpu")


@pytest.fixture
def llama(ground):
    return load_model(str(ground.llama))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama-tied"])
def test_the_head_is_never_found(family, tied):
    name, options, _, _ = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options | {"tie_word_embeddings": tied}))
    found = find_linears(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert tied == (head.weight is embedding.weight)
    assert all(m is not head and m.weight is not embedding.weight for m in found.values())
    # All else that is a matrix of the blocks is found: count them by a rule of this test.
    everything = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D", "FalconLinear")]
    assert len(everything) == len(found) + sum(m is head for m in everything)


def test_grouping_by_identity_and_not_by_value():
    """Two layers that read equal but different tensors are two inputs; one tensor changed in between is two."""

    class Block(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.a, self.b, self.change = nn.Linear(4, 4), nn.Linear(4, 4), change

        def forward(self, x):
            y = self.a(x)
            x = x.clone() if self.change == "clone" else x.add_(1) if self.change == "add" else x
            return y + self.b(x)

    class Model(nn.Module):
        base_model = property(lambda self: self)

        def __init__(self, change):
            super().__init__()
            self.embed, self.block = nn.Embedding(9, 4), Block(change)

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return None

        def forward(self, input_ids, **_):
            return self.block(self.embed(input_ids))

    for change, expected in (("none", 1), ("clone", 2), ("add", 2)):
        model = Model(change)
        sites, unused = find_sites(model, find_linears(model), CPU)
        assert (len(sites), unused) == (expected, [])


def test_sites_come_in_the_order_of_execution(llama):
    sites, _ = find_sites(llama, find_linears(llama), CPU)
    parts = [(".".join(s.name.split(".")[1:3]), [n.rsplit(".", 1)[1] for n in s.linears]) for s in sites]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert parts == [(f"layers.{i}", names) for i in (0, 1) for names in block]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(llama, training):
    llama.train(training)
    state = {n: t.clone() for n, t in llama.state_dict().items()}
    find_sites(llama, find_linears(llama), CPU)
    assert llama.training == training
    assert all(torch.equal(t, state[n]) for n, t in llama.state_dict().items())
    llama.model.layers[1].forward = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        find_sites(llama, find_linears(llama), CPU)
    assert llama.training == training
    assert not any(m._forward_pre_hooks for m in llama.modules())


@pytest.mark.parametrize(
    ("include", "exclude", "rule"),
    [
        ("", "", lambda n: True),
        (r"layers\.0\.", "", lambda n: ".0." in n),
        ("", "self_attn", lambda n: "mlp" in n),
        ("mlp", r"down|layers\.1", lambda n: "mlp" in n and "down" not in n and ".0." in n),
        (r"^model\.layers\.1.*q_proj$", "", lambda n: n == "model.layers.1.self_attn.q_proj"),
        ("q_proj|lm_head", "", lambda n: n.endswith("q_proj")),
    ],
)
def test_patterns(llama, include, exclude, rule):
    everything = [n for n, m in llama.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert list(find_linears(llama, include, exclude)) == [n for n in everything if rule(n)]


@pytest.mark.parametrize(("option", "pattern"), [("include", "("), ("exclude", "[z-a]"), ("include", "*")])
def test_bad_patterns(llama, option, pattern):
    with pytest.raises(UserError, match=f"--{option} '{re.escape(pattern)}' is not a regular expression"):
        find_linears(llama, **{option: pattern})


def test_quantised_like_layers_are_named(llama):
    class Linear4bit(nn.Linear):
        pass

    for weight in (torch.zeros(576, 1, dtype=torch.uint8), torch.zeros(32, 16), torch.zeros(32, 32, dtype=torch.int8)):
        model = copy.deepcopy(llama)
        odd = Linear4bit(32, 32, bias=False)
        odd.weight = nn.Parameter(weight, requires_grad=False)
        model.model.layers[1].self_attn.q_proj = odd
        with pytest.raises(UserError, match=r"layer model\.layers\.1\.self_attn\.q_proj: .*Linear4bit is quantised"):
            find_linears(model)
    plain = copy.deepcopy(llama)
    subclass = Linear4bit(32, 32, bias=False)
    plain.model.layers[1].self_attn.q_proj = subclass
    assert subclass in find_linears(plain).values()


def test_matrix_is_a_view_with_outputs_first(ground):
    model = load_model(str(ground.gpt2))
    module = model.transformer.h[0].mlp.c_fc
    view = matrix(module)
    assert tuple(view.shape) == (128, 32)
    assert view.data_ptr() == module.weight.data_ptr()
    x = torch.randn(3, 32)
    torch.testing.assert_close(module(x), x @ view.T + module.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_architectures_pass_as_causal(family):
    name, options, _, _ = FAMILIES[family]
    check_causal(AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval(), CPU)


def test_a_decoder_that_looks_ahead_is_refused():
    bert = transformers.BertLMHeadModel(
        transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    with pytest.raises(UserError, match="BertLMHeadModel is not a causal language model"):
        check_causal(bert, CPU)
    bert.config.is_decoder = True
    decoder = transformers.BertLMHeadModel(bert.config).eval()
    check_causal(decoder, CPU)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, 3),
        ({"skip_blocks": 0.0}, 5),
        ({"skip_blocks": 0.59}, 3),
        ({"skip_blocks": 0.6}, 2),
        ({"criterion": "wanda"}, 5),
        ({"criterion": "wanda", "skip_blocks": 0.999}, 1),
    ],
)
def test_skipped_blocks_are_measured_but_not_masked(options, blocks):
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": 5}))
    config = CalibrateConfig(**options)
    assert {name.split(".")[2] for name in maskable(model, config)} == {str(n) for n in range(5 - blocks, 5)}
    assert set(measurable(model, config)) == set(find_linears(model))


def test_nothing_left_beyond_the_skipped_blocks(llama):
    with pytest.raises(UserError, match="no linear layer is left to mask beyond the 1 blocks"):
        maskable(llama, CalibrateConfig(skip_blocks=0.5, include=r"layers\.0"))


def test_a_model_without_a_list_of_blocks_skips_none_unless_told_to():
    class Odd(nn.Module):
        config = transformers.LlamaConfig(**GROUPED)
        base_model = property(lambda self: self)

        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)

        def get_input_embeddings(self):
            return self.embedding

        def get_output_embeddings(self):
            return None

    assert list(maskable(Odd(), CalibrateConfig())) == ["linear"]
    with pytest.raises(UserError, match="no list of 2 decoder blocks"):
        maskable(Odd(), CalibrateConfig(skip_blocks=0.4))


def test_a_layer_under_two_names_is_one_layer(llama):
    shared = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**GROUPED))
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    assert len(find_linears(shared)) == 14 - 3


def test_whatever_shares_the_embedding_stays_whole(llama):
    spare = nn.Linear(32, llama.config.vocab_size, bias=False)
    spare.weight = llama.get_input_embeddings().weight
    llama.model.layers[0].spare = spare
    assert not any("spare" in name for name in find_linears(llama))
