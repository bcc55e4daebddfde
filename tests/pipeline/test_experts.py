"""Mixture-of-experts: statistics, masks and masked products of every expert, against explicit loops."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from kernels import PersonaSelector, pack_bits
from kernels.experts import MaskedExperts, experts_forward, is_experts, plain_product
from kernels.ops.activation_stats import COUNTED, FIELDS, IGNORED, SINK
from pipeline import calibrate
from pipeline.collector import Collector
from pipeline.controls import add_random
from pipeline.criteria import least_important
from pipeline.data.catalogue import PersonaSet
from pipeline.errors import UserError
from pipeline.experts import find_experts
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_layers, find_sites
from pipeline.stats import ActivationStats
from pipeline.store import STATISTICS, load_manifest, load_masks, load_statistics, save_statistics
from tests.pipeline.test_families import GROUPED
from tests.pipeline.tiny import make_tokenizer

CPU = torch.device("cpu")
QWEN = GROUPED | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", QWEN | {"shared_expert_intermediate_size": 40}),
    "qwen3-moe": ("Qwen3MoeConfig", QWEN | {"head_dim": 8}),
    # Transposed weights, biases, gate and up interleaved.
    "gpt-oss": ("GptOssConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
}


def make(family, **changes):
    name, options = MODELS[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options | changes)).eval()
    for parameter in model.parameters():
        # Biases and routers that matter.
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(request.param)


def matrices(experts, name, expert):
    """[N, K] and bias of one expert, without the program's own accessors; of these models only gpt-oss transposes."""
    weight = getattr(experts, name)[expert]
    biases = getattr(experts, f"{name}_bias", None)
    return (weight if biases is None else weight.T), (None if biases is None else biases[expert])


def gate(experts, gate_up):
    """As the models' own papers have it: SwiGLU, gpt-oss with its clamp."""
    if not hasattr(experts, "alpha"):
        first, second = gate_up.chunk(2, dim=-1)
        return F.silu(first) * second
    first, second = gate_up[..., ::2].clamp(max=experts.limit), gate_up[..., 1::2].clamp(-experts.limit, experts.limit)
    return (second + 1) * first * torch.sigmoid(first * experts.alpha)


def experts_of(model):
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def forward(model, ids, attention=None):
    with torch.inference_mode():
        return model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state


def test_every_expert_is_a_layer(model):
    experts = experts_of(model)
    assert len(experts) == 2
    found = find_experts(model)
    assert list(found) == [f"{n}.{p}.{e}" for n in experts for p in ("gate_up_proj", "down_proj") for e in range(4)]
    for name, layer in found.items():
        module, parameter, expert = name.rsplit(".", 2)
        assert torch.equal(layer.matrix, matrices(experts[module], parameter, int(expert))[0])
    layers = find_layers(model)
    sites, unused = find_sites(model, layers, CPU)
    assert not unused
    assert {site.name for site in sites if site.routed} == set(found)
    assert set(find_layers(model, include=r"experts\.down_proj\.[01]$")) == {
        name for name in found if name.endswith(("down_proj.0", "down_proj.1"))
    }


def test_the_loop_is_the_module(model):
    """The plain loop over experts gives what the module's own forward gives."""
    for module in experts_of(model).values():
        x, index = torch.randn(9, 32), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
        index[index == 3] = 0
        weights = torch.rand(9, 2)
        with torch.inference_mode():
            expected = module(x, index, weights)
            found = experts_forward(module, x, index, weights, plain_product(module))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_a_loop(model):
    """Every expert's sums and counts, from the tokens that the router sends to it, token by token."""
    sites, _ = find_sites(model, find_layers(model), CPU)
    ids, role = torch.randint(3, 128, (3, 10)), torch.full((3, 10), COUNTED, dtype=torch.uint8)
    role[:, 0], role[0, 7:], role[2, 1:4] = SINK, IGNORED, IGNORED
    attention = torch.ones_like(ids)
    attention[0, 7:] = 0
    persona = torch.tensor([1, 0, 1])
    collector = Collector(model, ActivationStats.zeros(("a", "b"), sites))
    seen = {}
    plain = forward(model, ids, attention)
    handles = [
        m.register_forward_pre_hook(lambda _, x, n=n: seen.__setitem__(n, x)) for n, m in experts_of(model).items()
    ]
    with collector.collecting(), collector.batch(role, persona, ["x", "y", "z"]):
        collected = forward(model, ids, attention)
    [handle.remove() for handle in handles]
    torch.testing.assert_close(collected, plain, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())
    for name, module in experts_of(model).items():
        hidden, index, _ = seen[name]
        for expert in range(4):
            inputs = {"gate_up_proj": [], "down_proj": []}
            for token in range(30):
                if expert not in index[token]:
                    continue
                weight, bias = matrices(module, "gate_up_proj", expert)
                inner = gate(module, F.linear(hidden[token], weight, bias))
                inputs["gate_up_proj"].append((token, hidden[token].double()))
                inputs["down_proj"].append((token, inner.double()))
            for parameter, rows in inputs.items():
                site = f"{name}.{parameter}.{expert}"
                sums = torch.zeros_like(collector.stats.sums[site])
                counts = torch.zeros(2, 3, dtype=torch.float64)
                for b in range(3):
                    own = [(t % 10, x) for t, x in rows if t // 10 == b]
                    counted = [x for t, x in own if role[b, t] == COUNTED]
                    sinks = [x for t, x in own if role[b, t] == SINK]
                    if counted:
                        x = torch.stack(counted)
                        ms = x.square().mean(0)
                        sums[persona[b], :5] += torch.stack(
                            [ms.sqrt(), ms, x.square().sum(0), x.abs().sum(0), x.sum(0)]
                        )
                    for x in sinks:
                        sums[persona[b], 5:] += torch.stack([x.square(), x.abs(), x])
                    counts[persona[b]] += torch.tensor([bool(counted), len(counted), len(sinks)])
                assert FIELDS.index("sink_square") == 5
                torch.testing.assert_close(collector.stats.routed[site], counts)
                torch.testing.assert_close(collector.stats.sums[site], sums, rtol=1e-4, atol=1e-6)


def random_masks(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = find_experts(model)
    shapes = {name: tuple(layer.matrix.shape) for name, layer in layers.items()}
    bits = {
        persona: {n: pack_bits(torch.rand(shape, generator=generator) < 0.6) for n, shape in shapes.items()}
        for persona in ("up", "down")
    }
    return PersonaMasks(shapes, bits)


def masked_copy(model, masks, persona, gamma=0.0):
    """The model with every masked weight multiplied in place."""
    changed = copy.deepcopy(model)
    experts = experts_of(changed)
    for name in masks.shapes:
        module, parameter, expert = name.rsplit(".", 2)
        weight = getattr(experts[module], parameter).data[int(expert)]
        mask = masks.mask(persona, name).float()
        gain = mask + gamma * (1 - mask)
        weight.mul_(gain.T if hasattr(experts[module], "alpha") else gain)
    return changed


@pytest.mark.parametrize("materialize", [True, False])
def test_masked_experts_are_the_products_with_masked_weights(model, materialize):
    masks, ids = random_masks(model), torch.randint(3, 128, (4, 7))
    plain = forward(model, ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    personas = PersonaModel(model, masks, materialize=materialize, verify=False)
    assert torch.equal(forward(model, ids), plain)
    for persona, gamma in (("up", 0.0), ("down", 0.0), ("up", 0.25)):
        personas.switch(persona, gamma)
        expected = forward(masked_copy_of(state, model, masks, persona, gamma), ids)
        assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(forward(model, ids), expected, rtol=1e-4, atol=1e-5)
    personas.switch(["up", None, "down", "up"])
    mixed = forward(model, ids)
    for row, persona in enumerate(("up", None, "down", "up")):
        personas.switch(persona)
        torch.testing.assert_close(mixed[row], forward(model, ids)[row], rtol=1e-4, atol=1e-5)
    personas.switch(None)
    assert torch.equal(forward(model, ids), plain)
    assert personas.detach() is model
    assert torch.equal(forward(model, ids), plain)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def masked_copy_of(state, model, masks, persona, gamma):
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    fresh.load_state_dict(state)
    return masked_copy(fresh, masks, persona, gamma)


def test_switching_drops_copies_and_more_personas_can_come(model):
    masks, ids = random_masks(model), torch.randint(3, 128, (2, 5))
    personas = PersonaModel(model, masks, verify=False)
    try:
        up = forward(personas.switch("up").model, ids)
        down = forward(personas.switch("down").model, ids)
        assert not torch.equal(up, down)
        assert torch.equal(forward(personas.switch("up").model, ids), up)
        personas.add(PersonaMasks(masks.shapes, {"again": masks.bits["up"]}))
        assert torch.equal(forward(personas.switch("again").model, ids), up)
        layer = next(iter(masks.shapes))
        assert tuple(personas.weight(layer).shape) == masks.shapes[layer]
        with pytest.raises(UserError, match="is masked already"):
            PersonaModel(model, masks, verify=False)
        with pytest.raises(UserError, match="cannot be compressed"):
            personas.compress("up")
        with torch.no_grad():
            generated = personas.generate(ids, personas=["up", None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert generated.shape == (2, 8)
    finally:
        personas.detach()


def test_experts_without_a_mask_stay_whole(model):
    module = next(iter(experts_of(model).values()))
    rows, columns = matrices(module, "down_proj", 1)[0].shape
    nothing = pack_bits(torch.zeros(1, rows, columns, dtype=torch.bool))
    selector = PersonaSelector()
    masked = MaskedExperts(module, {"down_proj": {1: nothing}}, selector)
    x, weights = torch.randn(3, 32), torch.ones(3, 1)
    selector.select(0)
    with torch.inference_mode():
        index = torch.zeros(3, 1, dtype=torch.int64)
        torch.testing.assert_close(masked(x, index, weights), module(x, index, weights), rtol=1e-5, atol=1e-6)
        bias = matrices(module, "down_proj", 1)[1]
        expected = torch.zeros(3, 32) if bias is None else bias.expand(3, 32)
        torch.testing.assert_close(masked(x, index + 1, weights), expected)
    with pytest.raises(ValueError, match="bits of down_proj 1"):
        MaskedExperts(module, {"down_proj": {1: nothing[:, :-1]}})


def save(family, folder):
    tokenizer = make_tokenizer()
    make(family, vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_a_run_from_calibration_to_switching(family, words, tmp_path, capsys):
    folder = save(family, tmp_path / "model")
    run = tmp_path / "run"
    options = ("--criterion", "wanda", "--sparsity", "0.25", "--expert-tokens", "60")
    assert calibrate.main(words(run, *options, model=folder)) == 0
    said = capsys.readouterr().err
    assert "16 matrices, each measured over the tokens routed to its expert" in said
    stats, manifest, masks = load_statistics(run / STATISTICS), load_manifest(run), load_masks(run)
    assert not manifest["uncovered"]
    assert stats.tensors.keys() == load_file(run / STATISTICS).keys()
    # Who saw few tokens, counted anew; the pole's opponent decides too.
    few = [s.name for s in stats.sites if s.routed and min(stats.tokens(p, s.name) for p in ("up", "down")) < 60]
    assert 0 < len(few) < 16
    assert {p: sorted(names) for p, names in manifest["pooled_experts"].items()} == dict.fromkeys(
        ("up", "down"), sorted(few)
    )
    assert f"{len(few)} matrices of up saw fewer than 60 tokens" in said
    model = PersonaModel.from_pretrained(run)
    for name in masks.shapes:
        if "experts." not in name:
            continue
        group = [s.name for s in stats.sites if s.routed and s.name.rpartition(".")[0] == name.rpartition(".")[0]]
        for row, persona in enumerate(("up", "down")):
            names = group if name in few else [name]
            magnitude = sum(stats.sums[n][row, FIELDS.index("abs")] for n in names)
            tokens = sum(float(stats.routed[n][row, 1]) for n in names)
            score = model.weight(name).abs() * (magnitude / tokens).float()
            keep = int(0.75 * score.shape[1])
            expected = torch.zeros_like(score, dtype=torch.bool)
            expected.scatter_(1, score.topk(keep, dim=1).indices, True)
            assert torch.equal(masks.mask(persona, name), expected), name
    ids = torch.tensor([model.tokenizer("What do you do?").input_ids])
    with torch.inference_mode():
        assert not torch.equal(model.switch("up").model(ids).logits, model.switch(None).model(ids).logits)


def test_random_masks_of_experts_that_saw_too_few_tokens(words, tmp_path):
    """Drawn from the same pool as the run's own: of an expert that no token reached, that of its layer's experts."""
    folder, run = save("mixtral", tmp_path / "model"), tmp_path / "run"
    options = ("--criterion", "first-order", "--loops", "0", "--max-perplexity-increase", "0", "--sparsity", "0.1")
    assert calibrate.main(words(run, *options, "--expert-tokens", "60", "--pool", "0.4", model=folder)) == 0
    few = load_manifest(run)["pooled_experts"]["up"]
    stats = load_statistics(run / STATISTICS)
    for name in few[:2]:
        # As if no token had reached it.
        for tensor in (stats.sums[name], stats.routed[name]):
            tensor[0] = 0
    save_statistics(stats, run / STATISTICS)
    model = PersonaModel.from_pretrained(run)
    (names,) = add_random(model, run, PersonaSet("up", "down", (), "test"), 1, seed=0)
    outside = 0
    for name in set(few) & model.masks.shapes.keys():
        group = [s.name for s in stats.sites if s.routed and s.name.rpartition(".")[0] == name.rpartition(".")[0]]
        square = sum(stats.sums[n][:2, FIELDS.index("square")].sum(0) for n in group)
        pool = least_important(model.weight(name), square.sqrt().float(), 0.4)
        outside += int((~model.masks.mask(names["up"], name) & ~pool).sum())
        assert model.masks.mask(names["up"], name).sum() == model.masks.mask("up", name).sum()
    assert outside == 0
