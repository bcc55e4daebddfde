"""Any architecture: layers found by what they are, inputs measured once, statistics as a plain loop has them."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from kernels.ops.activation_stats import COUNTED, FIELDS, IGNORED, SINK
from pipeline.collector import Collector
from pipeline.errors import UserError
from pipeline.experts import other_expert_parameters
from pipeline.sites import Site, find_linears, find_sites, other_linears
from pipeline.stats import ActivationStats

GROUPED = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"vocab_size": 128, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    # family: (config, its options, linears, distinct inputs)
    "llama": ("LlamaConfig", GROUPED, 14, 8),
    "llama-tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}, 14, 8),
    "qwen2": ("Qwen2Config", GROUPED, 14, 8),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}, 14, 8),
    "mistral": ("MistralConfig", GROUPED, 14, 8),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}, 14, 8),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8}, 14, 8),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8}, 14, 8),
    "phi": ("PhiConfig", GROUPED, 12, 6),
    "phi3": ("Phi3Config", GROUPED, 8, 8),
    "gpt2": ("GPT2Config", GPT2, 8, 8),
    "gpt-neox": (
        "GPTNeoXConfig",
        SMALL | {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        8,
        8,
    ),
    "opt": (
        "OPTConfig",
        SMALL
        | {
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
        14,
        10,
    ),
    "falcon": ("FalconConfig", SMALL | {"num_hidden_layers": 2, "num_attention_heads": 4}, 8, 6),
    "bloom": ("BloomConfig", SMALL | {"n_layer": 2, "n_head": 4}, 8, 8),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}, 8, 4),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    name, options, linears, inputs = FAMILIES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval()
    return model, linears, inputs


def test_layers_and_shared_inputs(family):
    model, linears, inputs = family
    found = find_linears(model)
    sites, unused = find_sites(model, found, torch.device("cpu"))
    assert (len(found), len(sites), unused) == (linears, inputs, [])
    assert model.get_output_embeddings() not in found.values()
    assert sorted(n for s in sites for n in s.linears) == sorted(found)
    # Independently: the linears of a site read equal inputs.
    seen = {}
    handles = [m.register_forward_pre_hook(lambda _, x, n=n: seen.__setitem__(n, x[0])) for n, m in found.items()]
    model(input_ids=torch.randint(3, 128, (2, 9)))
    [handle.remove() for handle in handles]
    for site in sites:
        assert all(torch.equal(seen[name], seen[site.name]) for name in site.linears)
        assert seen[site.name].shape[-1] == site.width


def test_statistics_are_those_of_a_loop(family):
    model, _, _ = family
    linears = find_linears(model)
    sites, _ = find_sites(model, linears, torch.device("cpu"))
    ids, role = torch.randint(3, 128, (3, 10)), torch.full((3, 10), COUNTED, dtype=torch.uint8)
    role[:, 0], role[0, 7:], role[2, 1:4] = SINK, IGNORED, IGNORED
    attention = torch.ones_like(ids)
    attention[0, 7:] = 0
    persona = torch.tensor([1, 0, 1])
    collector = Collector(model, ActivationStats.zeros(("a", "b"), sites))
    seen = {}
    modules = dict(model.named_modules())
    handles = [
        modules[s.name].register_forward_pre_hook(lambda _, x, n=s.name: seen.__setitem__(n, x[0])) for s in sites
    ]
    with torch.inference_mode(), collector.collecting(), collector.batch(role, persona, ["x", "y", "z"]):
        model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
    [handle.remove() for handle in handles]
    assert collector.stats.counts.tolist() == [[1, 9, 1], [2, 6 + 6, 2]]
    for site in sites:
        x = seen[site.name].reshape(3, 10, -1).double()
        expected = torch.zeros(2, len(FIELDS), site.width, dtype=torch.float64)
        for b in range(3):
            counted, sink = x[b][role[b] == COUNTED], x[b][role[b] == SINK]
            ms = counted.square().mean(0)
            rows = [ms.sqrt(), ms, counted.square().sum(0), counted.abs().sum(0), counted.sum(0)]
            expected[persona[b]] += torch.stack([*rows, sink.square().sum(0), sink.abs().sum(0), sink.sum(0)])
        torch.testing.assert_close(collector.stats.sums[site.name], expected, rtol=1e-5, atol=1e-6)
    assert not any(m._forward_pre_hooks for m in modules.values())


def test_expert_weights_of_other_modules_are_reported():
    """Llama 4 keeps its experts in 3-d parameters too, but its module reads what is sorted by expert already."""
    model = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**GROUPED, num_local_experts=4))
    assert not other_expert_parameters(model)
    model.model.layers[0].mlp.foreign_experts = torch.nn.ParameterList([torch.zeros(4, 8, 8)])
    assert other_expert_parameters(model) == ["model.layers.0.mlp.foreign_experts.0"]


@pytest.fixture
def llama():
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**GROUPED)).eval()


def test_include_and_exclude(llama):
    assert {n.rsplit(".")[-1] for n in find_linears(llama, "mlp", "down")} == {"gate_proj", "up_proj"}
    with pytest.raises(UserError, match="not a regular expression"):
        find_linears(llama, "(")
    with pytest.raises(UserError, match="no linear layer"):
        find_linears(llama, "nothing")


def test_quantised_layers_are_refused(llama):
    class Packed(torch.nn.Linear):
        pass

    packed = Packed(32, 32)
    packed.weight = torch.nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
    llama.model.layers[0].self_attn.o_proj = packed
    with pytest.raises(UserError, match=r"o_proj: .*Packed is quantised"):
        find_linears(llama)


def test_unused_and_repeated_layers(llama):
    llama.model.layers[0].spare = torch.nn.Linear(3, 3)
    sites, unused = find_sites(llama, find_linears(llama), torch.device("cpu"))
    assert unused == ["model.layers.0.spare"]
    llama.model.layers[1].mlp = llama.model.layers[0].mlp
    sites, _ = find_sites(llama, find_linears(llama), torch.device("cpu"))
    collector = Collector(llama, ActivationStats.zeros(("a",), sites))
    role, persona = torch.full((1, 4), COUNTED, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    seen = []
    layer = llama.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0][0].double()))
    with torch.no_grad(), collector.collecting(), collector.batch(role, persona, ["s"]):
        llama(input_ids=torch.ones(1, 4, dtype=torch.int64))
    assert len(seen) == 2
    # A layer that is called twice has the mean over its calls: as if each were a pass of its own, at half the weight.
    square = torch.stack([x.square().sum(0) for x in seen]).mean(0)
    rms = torch.stack([x.square().mean(0).sqrt() for x in seen]).mean(0)
    sums = collector.stats.sums["model.layers.0.mlp.down_proj"][0]
    torch.testing.assert_close(sums[FIELDS.index("square")], square, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[FIELDS.index("rms")], rms, rtol=1e-5, atol=0)
    assert collector.stats.counts.tolist() == [[1, 4, 0]]


def test_a_layer_that_is_called_more_often_than_it_was_is_an_error(llama):
    sites, _ = find_sites(llama, find_linears(llama), torch.device("cpu"))
    llama.model.layers[1].mlp = llama.model.layers[0].mlp
    sites = [site for site in sites if not site.name.startswith("model.layers.1.mlp")]
    collector = Collector(llama, ActivationStats.zeros(("a",), sites))
    role, persona = torch.full((1, 4), COUNTED, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match="called twice"), collector.collecting(), collector.batch(role, persona, ["s"]):
        llama(input_ids=torch.ones(1, 4, dtype=torch.int64))
    assert not any(m._forward_pre_hooks for m in llama.modules())


def test_linear_layers_that_compute_something_else_stay_whole(llama):
    """Routers that return a choice, layers that quantise or group; but not one that writes the product its own way."""

    class Router(torch.nn.Linear):
        def forward(self, x):
            return torch.topk(super().forward(x), 2)

    class Grouped(torch.nn.Linear):
        def forward(self, x):
            return torch.einsum("btgk,gnk->btgn", x, self.weight.view(4, 8, 32))

    class Quantising(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.sign(), self.bias)

    class Written(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    plain, block = find_linears(llama), llama.model.layers[0]
    for device in ("cpu", "meta"):
        layers = {kind.__name__: kind(32, 32, device=device) for kind in (Router, Grouped, Quantising, Written)}
        block.others = torch.nn.ModuleDict(layers)
        # Without weights, only the shape of what comes out tells.
        kept = {"Written"} | ({"Quantising"} if device == "meta" else set())
        assert find_linears(llama).keys() - plain.keys() == {f"model.layers.0.others.{name}" for name in kept}
        assert set(other_linears(llama)) == {f"model.layers.0.others.{name} ({name})" for name in layers.keys() - kept}


def test_a_layer_that_reads_several_vectors_a_token():
    """The mean over them; a shape that does not say what is whose is an error with the layer's name."""
    layer = torch.nn.Linear(8, 4)
    site = Site("layer", 8, ("layer",))
    role, persona = torch.full((2, 5), COUNTED, dtype=torch.uint8), torch.tensor([0, 0])
    role[:, 0], role[1, 3:] = SINK, IGNORED
    x = torch.randn(2, 5, 3, 8)
    model = torch.nn.ModuleDict({"layer": layer})
    collector = Collector(model, ActivationStats.zeros(("a",), [site]))
    with torch.no_grad(), collector.collecting(), collector.batch(role, persona, ["x", "y"]):
        layer(x)
    sums = collector.stats.sums["layer"][0]
    counted = [[x[b, :, h][role[b] == COUNTED].double() for h in range(3)] for b in range(2)]
    for field, of in (("rms", lambda c: c.square().mean(0).sqrt()), ("abs", lambda c: c.abs().sum(0))):
        expected = sum(torch.stack([of(c) for c in every]).mean(0) for every in counted)
        torch.testing.assert_close(sums[FIELDS.index(field)], expected)
    assert collector.stats.counts.tolist() == [[2, 6, 2]]
    with (
        pytest.raises(UserError, match=r"layer layer reads \[7, 8\] of \[2, 5\] tokens"),
        torch.no_grad(),
        collector.collecting(),
        collector.batch(role, persona, ["x", "y"]),
    ):
        layer(torch.randn(7, 8))


def test_a_linear_layer_of_the_head_stays_whole():
    """ModernBERT's head has one more, which a pass of the base model for statistics does not run."""
    options = SMALL | {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(transformers.ModernBertDecoderConfig(**options))
    assert isinstance(model.lm_head.dense, torch.nn.Linear)
    found = find_linears(model)
    assert found
    assert all(name.startswith("model.") for name in found)
