"""A model streamed block by block: the same statistics and masks as with the whole model in memory."""

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import calibrate
from pipeline.blockwise import Blockwise
from pipeline.config import CRITERIA, FIRST_ORDER, CalibrateConfig
from pipeline.errors import UserError
from pipeline.loading import load_model
from pipeline.shards import REST, Shards
from pipeline.store import STATISTICS, load_masks, load_statistics
from tests.pipeline.test_families import FAMILIES
from tests.pipeline.tiny import make_tokenizer

CPU = torch.device("cpu")
FORWARD = [name for name in CRITERIA if name not in FIRST_ORDER]


def save_family(family, folder, **options):
    name, shape, _, _ = FAMILIES[family]
    tokenizer = make_tokenizer()
    lengths = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    options = shape | lengths | {"vocab_size": len(tokenizer)} | options
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
    for parameter in model.parameters():
        # Biases and norms that say something: as they are initialised, losing one would change nothing.
        parameter.data += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def run_both(words, tmp_path, model, *options, personas=None):
    """The same calibration in memory and streamed."""
    options = ("--batch-tokens", "200", "--samples", "4", *options)
    for output, more in (("whole", ()), ("streamed", ("--stream",))):
        given = words(tmp_path / output, *options, *more, model=model, personas=personas)
        assert calibrate.main(given) == 0
    return tmp_path / "whole", tmp_path / "streamed"


def assert_same(whole, streamed):
    ours, theirs = (load_statistics(run / STATISTICS) for run in (streamed, whole))
    assert ours.personas == theirs.personas
    assert ours.sites == theirs.sites
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-5, atol=1e-9)
        assert tensor.any() or name.startswith("counts/")
    ours, theirs = load_masks(streamed), load_masks(whole)
    assert ours.shapes == theirs.shapes
    for persona in theirs.personas:
        assert all(torch.equal(bits, ours.bits[persona][layer]) for layer, bits in theirs.bits[persona].items())
    for field, value in theirs.manifest.items():
        if field == "masks":
            for persona, entry in value.items():
                assert ours.manifest[field][persona] | {"density": 0} == entry | {"density": 0}
                assert ours.manifest[field][persona]["density"] == pytest.approx(entry["density"])
        elif field == "sparsity":
            assert ours.manifest[field]["removed"] == pytest.approx(value["removed"])
        elif field != "options":
            assert ours.manifest[field] == value, field


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_the_whole_model(family, words, tmp_path, capsys):
    model = save_family(family, tmp_path / "model")
    assert len(list(model.glob("*.safetensors"))) > 1
    whole, streamed = run_both(words, tmp_path, model, "--criterion", "contrastive-wanda", "--sparsity", "0.3")
    assert_same(whole, streamed)
    said = capsys.readouterr().err.split("measured in")
    lines = [line for line in said[0].splitlines() if "distinct inputs" in line or "mixture" in line]
    assert lines
    assert all(line in said[1] for line in lines)
    assert {path.name for path in streamed.iterdir()} == {"manifest.json", "run.json", STATISTICS, "masks"}


@pytest.mark.parametrize("criterion", [name for name in FORWARD if name != "contrastive-wanda"])
def test_every_criterion_without_gradients(criterion, words, tmp_path, ground):
    assert_same(*run_both(words, tmp_path, ground.llama, "--criterion", criterion, "--sparsity", "0.3"))


@pytest.mark.parametrize(
    "options",
    [
        ("--disjoint",),
        ("--compose", "both=0.5*up+0.5*down", "--criterion", "wanda"),
        ("--include", "mlp", "--exclude", "layers.0"),
        ("--skip-blocks", "0.5"),
        ("--tokens", "all", "--sparsity", "0.2,mlp=0.4"),
        ("--precision", "bf16-true"),
        ("--precision", "bf16-mixed"),
    ],
    ids=" ".join,
)
def test_with_other_options(options, words, tmp_path, ground):
    assert_same(*run_both(words, tmp_path, ground.llama, "--criterion", "contrastive-wanda", *options))


def test_hidden_states_on_disk(words, tmp_path, ground, capsys):
    options = ("--criterion", "wanda", "--batch-tokens", "100")
    assert calibrate.main(words(tmp_path / "memory", *options, "--stream")) == 0
    assert "(0 batches on disk)" in capsys.readouterr().err
    assert calibrate.main(words(tmp_path / "disk", *options, "--stream", "--stream-buffer", "0")) == 0
    assert "(12 batches on disk)" in capsys.readouterr().err
    # 0.00001 GiB are 10737 bytes: room for some batches of about 30 tokens and 32 channels, not for all.
    assert calibrate.main(words(tmp_path / "some", *options, "--stream", "--stream-buffer", "0.00001")) == 0
    assert "(12 batches on disk)" not in (said := capsys.readouterr().err)
    assert "(0 batches on disk)" not in said
    first = load_file(tmp_path / "memory" / STATISTICS)
    for folder in ("disk", "some"):
        other = load_file(tmp_path / folder / STATISTICS)
        assert all(torch.equal(first[name], other[name]) for name in first)
        assert not list((tmp_path / folder).rglob("*.bin"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--criterion", "first-order"), "first-order needs gradients"),
        (("--criterion", "first-order-gate"), "first-order-gate needs gradients"),
        (("--criterion", "wanda", "--max-perplexity-increase", "0.1"), "cannot measure perplexity"),
        (("--criterion", "wanda", "--statistics", "x"), "--statistics"),
        (("--criterion", "wanda", "--devices", "2"), "one process"),
        (("--criterion", "wanda", "--stream-buffer", "-1"), "--stream-buffer"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_loaded(options, message, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        calibrate.main(words(tmp_path / "run", "--stream", *options, model="no-such-folder"))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    with pytest.raises(UserError):
        CalibrateConfig(model="x", stream=True, criterion="first-order")


def test_only_one_block_is_loaded(words, tmp_path, monkeypatch):
    """While a block is measured and masked, every other block is on the meta device, and so is the head."""
    seen = []
    load = Shards.load

    def counted(self, part, *arguments):
        load(self, part, *arguments)
        loaded = [b for b, block in self.blocks.items() if any(not p.is_meta for p in block.parameters())]
        embedding = self.model.get_input_embeddings().weight.is_meta
        seen.append((part, loaded, embedding, self.model.get_output_embeddings().weight.is_meta))

    monkeypatch.setattr(Shards, "load", counted)
    assert calibrate.main(words(tmp_path / "run", "--criterion", "wanda", "--stream")) == 0
    names = ["model.layers.0", "model.layers.1"]
    assert seen == [(REST, [], False, True), *((name, [name], True, True) for name in names)]


def test_a_failure_leaves_nothing(words, tmp_path, ground, monkeypatch, capsys):
    """A weight that the shards lack, a shape that differs, a disk that is full: one sentence, no folder."""
    broken = tmp_path / "broken"
    load_model(str(ground.llama)).save_pretrained(broken)
    make_tokenizer().save_pretrained(broken)
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for change, message in (
        ({name: tensors[name][:3].clone()}, rf"{name}: \[3, 32\] on disk, \[72, 32\] here"),
        ({name: None}, f"{name}: not in the files"),
    ):
        save_file({k: t for k, t in (tensors | change).items() if t is not None}, file, {"format": "pt"})
        assert calibrate.main(words(tmp_path / "run", "--criterion", "wanda", "--stream", model=broken)) == 2
        assert re.search(message, capsys.readouterr().err)
    file.write_bytes(b"nonsense")
    assert calibrate.main(words(tmp_path / "run", "--criterion", "wanda", "--stream", model=broken)) == 2
    assert "not a safetensors file" in capsys.readouterr().err
    file.unlink()
    assert calibrate.main(words(tmp_path / "run", "--criterion", "wanda", "--stream", model=broken)) == 2
    assert "no safetensors weights" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.hidden.HiddenStates.put", full)
    assert calibrate.main(words(tmp_path / "run", "--criterion", "wanda", "--stream")) == 2
    assert "No space left on device; nothing was left behind" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


class Wired(torch.nn.Module):
    """A body whose blocks return ``change(hidden)`` and whose second is given ``given(returned)``."""

    def __init__(self, change, given):
        super().__init__()
        self.base_model, self.given = self.run, given
        self.blocks = torch.nn.ModuleList([Returning(change), Returning(change)])

    def run(self, input_ids, attention_mask, use_cache):
        hidden = torch.ones(*input_ids.shape, 4)
        state = []
        first = self.blocks[0](hidden, state=state)
        hidden = first[0] if isinstance(first, tuple) else first
        return self.blocks[1](hidden, state=state, more=self.given(first))


class Returning(torch.nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, hidden, state, more=None):
        return self.change(hidden, state)


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (lambda x, _: x, lambda r: None, None),
        (lambda x, _: (x, None), lambda r: None, None),
        (lambda x, _: (x, torch.zeros(1)), lambda r: None, None),
        (lambda x, _: (x, torch.zeros(1)), lambda r: r[1], "block 0 hands on more than hidden states"),
        (lambda x, _: {"hidden_states": x}, lambda r: None, "block 0 returns a dict"),
        (lambda x, state: state.append(x) or x, lambda r: None, "block 0 leaves something behind"),
    ],
)
def test_blocks_that_depend_on_each_other_are_refused(change, given, message):
    model, ids = Wired(change, given), torch.ones(1, 3, dtype=torch.int64)
    with Blockwise(model, dict(model.blocks.named_children())).replaced() as one:
        hidden = one.run(-1, ids, ids, None)
        if message is None:
            assert torch.equal(one.run(0, ids, ids, hidden), torch.ones(1, 3, 4))
            assert one.run(1, ids, ids, hidden) is None
        else:
            with pytest.raises(UserError, match=message):
                one.run(0, ids, ids, hidden)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_shared_weights_are_refused(ground):
    shards = Shards(str(ground.llama), torch.float32, CPU)
    shards.model.model.layers[1].mlp = shards.model.model.layers[0].mlp
    with pytest.raises(UserError, match=r"model.layers.0 and model.layers.1 share weights"):
        shards._check_unshared()


def test_an_encoder_is_refused(words, tmp_path, monkeypatch, capsys):
    """A block that looks ahead is found by what it computes."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def looking_ahead(self, hidden_states, *arguments, **options):
        return forward(self, hidden_states, *arguments, **options) + hidden_states.mean(1, keepdim=True)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", looking_ahead)
    assert calibrate.main(words(tmp_path / "run", "--criterion", "wanda", "--stream")) == 2
    assert "not a causal language model" in capsys.readouterr().err
