"""A model whose weights are divided over two processes (FSDP2): the statistics and masks are those of one process."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import calibrate
from pipeline.collector import Collector
from pipeline.config import CalibrateConfig
from pipeline.data.prompts import Encoded
from pipeline.errors import UserError
from pipeline.gradients import ObjectiveData
from pipeline.objectives import margin_units
from pipeline.shards import REST, Shards
from pipeline.sites import find_linears, find_sites, measurable
from pipeline.stats import ActivationStats
from pipeline.store import STATISTICS, load_masks, load_statistics
from tests.pipeline.kills import contents

SMALL = ("--accelerator", "cpu", "--batch-tokens", "200", "--sparsity", "0.1", "--max-perplexity-increase", "0")
CPU = torch.device("cpu")


def sharded(options, timeout=400):
    words = [sys.executable, "-m", "pipeline.calibrate", *options, "--devices", "2", "--strategy", "fsdp"]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout)


def test_the_default_criterion_on_two_processes(words, tmp_path):
    """Statistics, weighed answers, gradients and their errors: everything but the order of sums is the same."""
    # Nothing is written with a model that is divided.
    assert calibrate.main(words(tmp_path / "one", *SMALL, "--loops", "0")) == 0
    done = sharded(words(tmp_path / "two", *SMALL))
    assert done.returncode == 0, done.stderr
    one, two = load_statistics(tmp_path / "one" / STATISTICS), load_statistics(tmp_path / "two" / STATISTICS)
    assert torch.equal(one.counts, two.counts)
    assert one.sites == two.sites
    for site, sums in one.sums.items():
        torch.testing.assert_close(two.sums[site], sums, rtol=1e-12, atol=0)
    a, b = load_masks(tmp_path / "one"), load_masks(tmp_path / "two")
    assert a.manifest["model"] == b.manifest["model"]
    different = sum((a.mask(p, x) != b.mask(p, x)).sum().item() for p in a.personas for x in a.shapes)
    assert different <= 1e-3 * sum(rows * columns for rows, columns in a.shapes.values())


@pytest.mark.slow
@pytest.mark.parametrize("personas", ["pairs", "texts"])
def test_deterministic_statistics_are_the_same_bits(words, ground, tmp_path, personas):
    """With an odd number of batches one process has none at the end."""
    given = f"up/down={ground.pairs}" if personas == "pairs" else str(ground.texts)
    options = ("--criterion", "wanda", "--sparsity", "0.3", "--accelerator", "cpu", "--deterministic")
    options += ("--batch-tokens", "300")
    assert calibrate.main(words(tmp_path / "one", *options, personas=given)) == 0
    done = sharded(words(tmp_path / "two", *options, personas=given))
    assert done.returncode == 0, done.stderr
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    same = [name for name in one if "manifest" not in str(name)]
    assert len(same) == 3
    assert all(one[name] == two[name] for name in same)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_ends_all_processes(words, tmp_path):
    """One process must not take other steps than the rest, so that nothing is halved."""
    program = """
        import sys, torch
        from pipeline import calibrate
        from pipeline.calibration import StatisticsModule
        read = StatisticsModule._read
        def short(self, ids, attention):
            if self.trainer.global_rank == 1 and ids.shape[1] > 8:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            read(self, ids, attention)
        StatisticsModule._read = short
        sys.exit(calibrate.main(sys.argv[1:]))
    """
    script = tmp_path / "short.py"
    script.write_text(re.sub(r"^ {8}", "", program, flags=re.MULTILINE))
    options = words(tmp_path / "out", *SMALL, "--devices", "2", "--strategy", "fsdp")
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "which --strategy fsdp does not split: lower --batch-tokens" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_was_ahead_waits_for_the_other(words, tmp_path):
    """One is killed in its third batch; after --resume both gather together again, and nothing is counted twice."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pipeline import calibrate\n"
        "from pipeline.calibration import StatisticsModule\n"
        "add = StatisticsModule._add\n"
        "def killed(self, batch, *rest):\n"
        "    if self.trainer.global_rank == 1 and self.position == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(self, batch, *rest)\n"
        "StatisticsModule._add = killed\n"
        "sys.exit(calibrate.main(sys.argv[1:]))\n"
    )
    options = ("--criterion", "wanda", "--sparsity", "0.3", "--accelerator", "cpu", "--batch-tokens", "200")
    assert sharded(words(tmp_path / "whole", *options)).returncode == 0
    given = words(tmp_path / "out", *options, "--checkpoint-every", "0", "--devices", "2", "--strategy", "fsdp")
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "out").exists()
    words_again = [sys.executable, "-m", "pipeline.calibrate", "--resume", str(tmp_path / "out")]
    done = subprocess.run(words_again, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fsdp"}, "--max-perplexity-increase 0"),
        ({"strategy": "fsdp", "max_perplexity_increase": 0, "deterministic": True}, "leave --deterministic"),
        ({"strategy": "fsdp", "criterion": "wanda", "stream": True}, "--stream runs in one process"),
        ({"strategy": "deepspeed_stage_3"}, "take --strategy fsdp"),
        ({"strategy": "fsdp_cpu_offload"}, "take --strategy fsdp"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CalibrateConfig(**options)
    assert CalibrateConfig(strategy="fsdp", criterion="wanda", deterministic=True).undivided == "--deterministic"
    assert CalibrateConfig(strategy="fsdp", criterion="wanda").undivided == "--strategy fsdp"
    assert CalibrateConfig(strategy="ddp").undivided == ""


def test_batches_are_shared_out_whole():
    """Every process has a part of each batch of one process; together they have each answer once."""
    answers = [Encoded(tuple(range(4 + i % 5)), 2, range(2)) for i in range(29)]
    objectives = {"up": margin_units(answers, answers[::-1])}
    whole = ObjectiveData(objectives, 60).steps(0, 1)
    for world in (2, 3, 8):
        shares = [ObjectiveData(objectives, 60, shared=True).steps(rank, world) for rank in range(world)]
        assert {len(steps) for steps in shares} == {len(whole)}
        for number, step in enumerate(whole):
            parts = [steps[number] for steps in shares]
            assert {part.share for part in parts} == {step.share}
            assert {part.last for part in parts} == {step.last}
            assert sorted(map(id, (t for part in parts for t in part.terms))) == sorted(map(id, step.terms))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_block_by_block_with_the_head(ground, family):
    """Loaded part by part, tied or not, the model is the one that transformers loads."""
    folder = getattr(ground, family)
    shards = Shards(str(folder), torch.float32, CPU, head=True)
    for part in (REST, *shards.blocks):
        shards.load(part, torch.float32, CPU)
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        ours = shards.model(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    assert not any(parameter.requires_grad for parameter in shards.model.parameters())


def test_the_collector_needs_no_weights(ground, tmp_path):
    """transformers' device_map with a block on disk: its weights are on the meta device outside its pass."""
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    ids = torch.arange(5, 29).reshape(2, 12)
    role = torch.ones_like(ids, dtype=torch.uint8)
    found = []
    for options in ({}, {"device_map": places, "offload_folder": str(tmp_path)}):
        model = AutoModelForCausalLM.from_pretrained(ground.llama, dtype=torch.float32, **options).eval()
        assert find_linears(model)["model.layers.0.mlp.up_proj"].weight.is_meta == bool(options)
        sites, _ = find_sites(model, measurable(model, CalibrateConfig(criterion="wanda")), CPU)
        stats = ActivationStats.zeros(("one",), sites)
        collector = Collector(model, stats)
        persona = torch.zeros(2, dtype=torch.int64)
        with torch.no_grad(), collector.collecting(), collector.batch(role, persona, ["a", "b"]):
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        found.append(stats)
    whole, offloaded = found
    assert all(torch.equal(sums, offloaded.sums[site]) for site, sums in whole.sums.items())
