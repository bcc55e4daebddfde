"""The collector's lifecycle and its error messages; its numbers per architecture are in test_families."""

import pytest
import torch
from torch import nn

from kernels.ops.activation_stats import COUNTED, FIELDS, IGNORED, SINK
from pipeline.collector import Collector
from pipeline.errors import UserError
from pipeline.loading import load_model
from pipeline.sites import Site, find_linears, find_sites
from pipeline.stats import ActivationStats

SOURCES = ["pairs.csv:2 (up)", "pairs.csv:3 (up)", "pairs.csv:4 (down)"]
BAD = "model.layers.1.self_attn.o_proj"


@pytest.fixture
def model(ground):
    return load_model(str(ground.llama))


@pytest.fixture
def collector(model):
    sites, _ = find_sites(model, find_linears(model), torch.device("cpu"))
    return Collector(model, ActivationStats.zeros(("up", "down"), sites))


@pytest.fixture
def batch():
    """Ids, attention, roles and personas of three right-padded sequences of 8, 5 and 3 tokens."""
    ids, attention = torch.randint(2, 200, (3, 8)), torch.ones(3, 8, dtype=torch.int64)
    role = torch.full((3, 8), COUNTED, dtype=torch.uint8)
    for row, length in enumerate((8, 5, 3)):
        ids[row, length:], attention[row, length:], role[row, length:] = 0, 0, IGNORED
    role[:, 0], role[0, 1:4] = SINK, IGNORED
    return ids, attention, role, torch.tensor([0, 0, 1])


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def forward(model, batch, rows=slice(None)):
    with torch.inference_mode():
        model.base_model(input_ids=batch[0][rows], attention_mask=batch[1][rows], use_cache=False)


def collect(collector, batch, rows=slice(None), sources=SOURCES):
    with collector.collecting(), collector.batch(batch[2][rows], batch[3][rows], sources[rows]):
        forward(collector.model, batch, rows)


def test_sums_are_those_of_unpadded_passes(collector, batch):
    """Each sequence alone, without padding, its tokens picked by index: neither masks nor roles are involved."""
    collect(collector, batch)
    model, seen = collector.model, {}
    modules = dict(model.named_modules())
    for site in collector.stats.sites:
        modules[site.name].register_forward_pre_hook(lambda _, x, n=site.name: seen.__setitem__(n, x[0][0].double()))
    expected = {s.name: torch.zeros(2, len(FIELDS), s.width, dtype=torch.float64) for s in collector.stats.sites}
    for row, (length, counted) in enumerate(((8, [4, 5, 6, 7]), (5, [1, 2, 3, 4]), (3, [1, 2]))):
        with torch.no_grad():
            model.base_model(input_ids=batch[0][row : row + 1, :length])
        for name, x in seen.items():
            sums = expected[name][batch[3][row]]
            mean_square = torch.stack([x[t] ** 2 for t in counted]).mean(0)
            sums[0] += mean_square.sqrt()
            sums[1] += mean_square
            for t in counted:
                sums[2:5] += torch.stack([x[t] ** 2, x[t].abs(), x[t]])
            sums[5:] += torch.stack([x[0] ** 2, x[0].abs(), x[0]])
    for name, sums in expected.items():
        torch.testing.assert_close(collector.stats.sums[name], sums, rtol=1e-4, atol=1e-6)
    assert collector.stats.counts.tolist() == [[2, 8, 2], [1, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_statistics_are_exact_to_two_millionths(model, dtype):
    """Against float64 sums of the very activations that the hooks saw."""
    model.to(dtype)
    sites, _ = find_sites(model, find_linears(model), torch.device("cpu"))
    collector = Collector(model, ActivationStats.zeros(("up", "down"), sites))
    ids, role, persona = torch.randint(2, 200, (6, 250)), torch.ones(6, 250, dtype=torch.uint8), torch.arange(6) % 2
    role[:, 0], role[torch.rand(6, 250) < 0.2] = SINK, IGNORED
    seen = {}
    for site in sites:
        layer = model.get_submodule(site.name)
        layer.register_forward_pre_hook(lambda _, x, n=site.name: seen.__setitem__(n, x[0].clone()))
    collect(collector, (ids, torch.ones_like(ids), role, persona), slice(0, 6), [str(b) for b in range(6)])
    for site in sites:
        assert seen[site.name].dtype == dtype
        for index, name in enumerate(("up", "down")):
            exact = seen[site.name].double()[(role == COUNTED) & (persona == index)[:, None]]
            measured = collector.stats.channels(name, site.name)
            torch.testing.assert_close(measured.mean_abs, exact.abs().mean(0), rtol=2e-6, atol=0)
            torch.testing.assert_close(measured.mean_square, exact.square().mean(0), rtol=2e-6, atol=0)


def test_batches_add_up(collector, batch):
    collect(collector, batch)
    whole = ActivationStats(
        collector.stats.personas,
        collector.stats.sites,
        {n: s.clone() for n, s in collector.stats.sums.items()},
        collector.stats.counts.clone(),
    )
    for tensor in (*collector.stats.sums.values(), collector.stats.counts):
        tensor.zero_()
    with collector.collecting():
        for row in (2, 0, 1):
            rows = slice(row, row + 1)
            with collector.batch(batch[2][rows], batch[3][rows], SOURCES[rows]):
                forward(collector.model, batch, rows)
    assert torch.equal(collector.stats.counts, whole.counts)
    for name, sums in whole.sums.items():
        torch.testing.assert_close(collector.stats.sums[name], sums, rtol=1e-4, atol=1e-6)


def test_passes_outside_a_batch_are_not_measured(collector, batch):
    with collector.collecting():
        forward(collector.model, batch)
    collect_nothing = (*collector.stats.sums.values(), collector.stats.counts)
    assert all(not tensor.any() for tensor in collect_nothing)
    forward(collector.model, batch)
    assert all(not tensor.any() for tensor in collect_nothing)


def test_hooks_go_even_after_an_exception(collector, batch):
    assert hooks(collector.model) == 0
    with pytest.raises(RuntimeError, match="stopped"), collector.collecting():
        assert hooks(collector.model) == len(collector.stats.sites)
        with collector.batch(batch[2], batch[3], SOURCES):
            forward(collector.model, batch)
            raise RuntimeError("stopped")
    assert hooks(collector.model) == 0
    counts = collector.stats.counts.clone()
    forward(collector.model, batch)
    assert torch.equal(collector.stats.counts, counts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_bad_activation_names_layer_and_sample(collector, batch, value, row):
    """The bad value enters one layer's input at one token of one sequence."""
    layer = collector.model.get_submodule(BAD)

    def spoil(module, inputs):
        x = inputs[0].clone()
        x[row, 4 if row == 0 else 2, 5] = value
        return (x,)

    handle = layer.register_forward_pre_hook(spoil)
    with pytest.raises(UserError) as caught:
        collect(collector, batch)
    handle.remove()
    assert f"layer {BAD}:" in str(caught.value)
    assert SOURCES[row] in str(caught.value)
    assert not any(source in str(caught.value) for source in SOURCES if source != SOURCES[row])
    assert hooks(collector.model) == 0


def test_bad_values_in_padding_do_not_count(collector, batch):
    def spoil(module, inputs):
        x = inputs[0].clone()
        x[2, 3:] = float("nan")
        return (x,)

    collect(collector, batch)
    before = {n: s.clone() for n, s in collector.stats.sums.items()}
    handle = collector.model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(spoil)
    collect(collector, batch)
    handle.remove()
    for name, sums in collector.stats.sums.items():
        torch.testing.assert_close(sums, 2 * before[name])


def test_a_bad_weight_names_the_first_layer_that_reads_its_output(collector, batch):
    with torch.no_grad():
        collector.model.get_submodule("model.layers.0.mlp.gate_proj").weight[7, 3] = float("nan")
    with pytest.raises(UserError, match=r"layer model\.layers\.0\.mlp\.down_proj: NaN.*\(3 of 3 samples"):
        collect(collector, batch)


class Odd(nn.Module):
    """Calls its first layer ``times`` times and its second one not at all."""

    def __init__(self, times):
        super().__init__()
        self.first, self.second, self.times = nn.Linear(4, 4), nn.Linear(4, 4), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.first(x)
        return x


@pytest.mark.parametrize(
    ("times", "message"), [(2, "layer first was called twice.*--exclude"), (1, "layers second .*not called.*--exclude")]
)
def test_layers_called_twice_or_never(times, message):
    model = Odd(times)
    sites = (Site("first", 4, ("first",)), Site("second", 4, ("second",)))
    collector = Collector(model, ActivationStats.zeros(("p",), sites))
    role, persona = torch.full((1, 3), COUNTED, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match=message), collector.collecting(), collector.batch(role, persona, ["s"]):
        model(torch.randn(1, 3, 4))
    assert hooks(model) == 0
