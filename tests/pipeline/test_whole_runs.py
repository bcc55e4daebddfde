"""From persona files to masks and records, through the command lines, on a tiny model."""

import json
import subprocess
import sys

import pytest
import torch

from pipeline import calibrate, evaluate
from pipeline.config import CRITERIA, SIGNED
from pipeline.store import STATISTICS, load_masks, load_statistics
from tests.pipeline.tiny import make_model, write_pairs, write_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, pairs and texts."""
    folder = tmp_path_factory.mktemp("place")
    make_model(folder / "model")
    write_pairs(folder / "pairs.csv")
    write_texts(folder / "texts.jsonl")
    return folder


def command(place, output, *options):
    return [
        "--model",
        str(place / "model"),
        "--personas",
        f"up/down={place / 'pairs.csv'}",
        "--output",
        str(output),
        *options,
    ]


@pytest.fixture(scope="module")
def run(place):
    """One finished run with the default criterion."""
    assert calibrate.main(command(place, place / "run", "--sparsity", "0.1")) == 0
    return place / "run"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion(place, run, tmp_path, criterion):
    reuse = () if criterion == "neutral" else ("--statistics", str(run))
    options = ("--criterion", criterion, "--sparsity", "0.3,down_proj=0.6", *reuse)
    assert calibrate.main(command(place, tmp_path / "out", *options)) == 0
    masks = load_masks(tmp_path / "out")
    for layer, (rows, columns) in masks.shapes.items():
        keep = (
            columns
            - columns * (6 if "down_proj" in layer else 3) // 10
            - bool(columns * (6 if "down_proj" in layer else 3) % 10)
        )
        for persona in ("up", "down"):
            kept = masks.mask(persona, layer).sum(1)
            if criterion in SIGNED:
                assert (kept >= keep).all()
                assert (kept < columns).any()
            else:
                assert kept.tolist() == [keep] * rows
    same = all(torch.equal(masks.bits["up"][layer], masks.bits["down"][layer]) for layer in masks.shapes)
    assert same == (criterion in ("magnitude", "neutral"))
    assert not list((tmp_path / "out").glob("gradient-*"))


def test_signed_masks_move_the_margin(place, run):
    """On the items it was made from, each pole's mask moves the margin towards the pole: the sign is right."""
    from pipeline.data.catalogue import load_catalogue
    from pipeline.data.prompts import Prompter
    from pipeline.model import PersonaModel
    from pipeline.protocol import FREE, Limits, margins

    model = PersonaModel.from_pretrained(run)
    items = load_catalogue(f"up/down={place / 'pairs.csv'}").sets[0].items
    mean = {}
    for persona in (None, "up", "down"):
        model.switch(persona)
        measured = margins(model.model, Prompter(model.tokenizer), items, FREE, system=None, limits=Limits(256, 512, 0))
        mean[persona] = sum(measured.normalised) / len(items)
    assert mean["down"] < mean[None] < mean["up"]


SMALL = ("--accelerator", "cpu", "--batch-tokens", "200", "--sparsity", "0.1")


@pytest.fixture(scope="module")
def alone(place):
    """One process, the same batches: a first-order criterion goes by the spread between batches."""
    assert calibrate.main(command(place, place / "alone", *SMALL)) == 0
    return place / "alone"


@pytest.mark.parametrize(
    "options", [("--devices", "2"), ("--devices", "3"), ("--devices", "2", "--strategy", "ddp")], ids=str
)
def test_any_number_of_processes(place, alone, tmp_path, options):
    words = [sys.executable, "-m", "pipeline.calibrate", *command(place, tmp_path / "many", *SMALL, *options)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, many = load_statistics(alone / STATISTICS), load_statistics(tmp_path / "many" / STATISTICS)
    assert torch.equal(one.counts, many.counts)
    for site, sums in one.sums.items():
        scale = sums.abs().amax(2, keepdim=True)
        assert ((sums - many.sums[site]).abs() <= 1e-5 * scale).all()
    a, b = load_masks(alone), load_masks(tmp_path / "many")
    different = sum((a.mask(p, x) != b.mask(p, x)).sum().item() for p in a.personas for x in a.shapes)
    assert different <= 1e-3 * sum(rows * columns for rows, columns in a.shapes.values())


def test_fewer_samples_than_processes(place, tmp_path):
    words = [sys.executable, "-m", "pipeline.calibrate"]
    words += command(place, tmp_path / "out", "--devices", "4", "--accelerator", "cpu", "--samples", "1")
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert load_statistics(tmp_path / "out" / STATISTICS).counts[:, 0].tolist() == [1, 1]


def test_types_and_mixtures(place, tmp_path):
    options = ("--criterion", "wanda", "--compose", "both/neither=0.7*up+0.3*up")
    assert calibrate.main(command(place, tmp_path / "out", *options)) == 0
    masks = load_masks(tmp_path / "out")
    assert masks.personas == ("both", "neither")
    assert masks.manifest["personas"]["opponents"] == {"both": "neither", "neither": "both"}


def test_plain_texts(place, tmp_path, capsys):
    texts = [
        "--model",
        str(place / "model"),
        "--personas",
        str(place / "texts.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert calibrate.main(texts) == 2
    assert "needs opposing personas" in capsys.readouterr().err
    assert calibrate.main([*texts, "--criterion", "wanda"]) == 0
    assert set(load_masks(tmp_path / "out").personas) == {"pirate", "butler"}


def test_bad_input_leaves_nothing(place, tmp_path, capsys):
    make_model(tmp_path / "bert", "bert")
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("question,matching,not_matching\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    before = sorted(p.name for p in tmp_path.iterdir())
    cases = [
        (("--personas", str(tmp_path / "missing.csv")), "no such file"),
        (("--personas", str(tmp_path / "columns.csv")), "columns.csv:2"),
        (("--personas", str(tmp_path / "empty.csv")), "no usable rows"),
        (("--model", str(tmp_path / "bert")), "not a causal language model"),
        (("--model", str(tmp_path / "nowhere")), "no such folder"),
        (("--output", str(tmp_path / "full")), "not a run of this tool"),
        (("--exclude", ".*"), "no linear layer is left"),
        (("--statistics", str(tmp_path)), "not a statistics file"),
    ]
    for options, message in cases:
        assert calibrate.main(command(place, tmp_path / "out", *options)) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1], error
    for options in (("--criterion", "magic"), ("--sparsity", "1.0"), ("--devices", "none")):
        with pytest.raises(SystemExit) as stop:
            calibrate.main(command(place, tmp_path / "out", *options))
        assert stop.value.code == 2
        assert options[0].strip("-") in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_an_earlier_run_is_replaced_only_on_demand(place, tmp_path, capsys):
    assert calibrate.main(command(place, tmp_path / "out", "--criterion", "wanda")) == 0
    assert calibrate.main(command(place, tmp_path / "out", "--criterion", "sparse")) == 2
    assert "earlier run" in capsys.readouterr().err
    assert calibrate.main(command(place, tmp_path / "out", "--criterion", "sparse", "--overwrite")) == 0
    assert load_masks(tmp_path / "out").manifest["criterion"] == "sparse"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_disk_full(place, tmp_path):
    """A limit on file size stands in for a full disk: the write fails half-way."""
    words = [sys.executable, "-m", "pipeline.calibrate", *command(place, tmp_path / "out", "--criterion", "wanda")]
    limited = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.argv = {words[1:]!r}; "
    )
    limited += f"from pipeline import calibrate; sys.exit(calibrate.main({words[3:]!r}))"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "could not write" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nan_in_an_activation_names_layer_and_sample(place, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    import shutil

    for file in (place / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "broken")
    assert calibrate.main(command(place, tmp_path / "out", "--model", str(tmp_path / "broken"))) == 2
    error = capsys.readouterr().err
    assert "layer model.layers.1.mlp.down_proj" in error
    assert "pairs.csv:" in error
    assert not (tmp_path / "out").exists()


def test_evaluation_writes_records(place, run, tmp_path, capsys):
    with open(tmp_path / "held.csv", "w") as file:
        file.write("question,A,B,matching\n")
        for i in range(6):
            file.write(f"Question number {i}?,I jump {i},The fox is lazy,{'AB'[i % 2]}\n")
        file.write("What do you do on day 3?,I jump,I do not,A\n")
    options = ["--data", str(tmp_path / "held.csv"), "--json", str(tmp_path / "e.json"), "--texts", "2"]
    options += ["--plot", str(tmp_path / "e.png"), "--bootstrap", "50"]
    assert evaluate.main([str(run), *options]) == 0
    assert "1 of 7 items left out" in capsys.readouterr().err
    report = json.loads((tmp_path / "e.json").read_text())
    assert (report["schema"], report["version"]) == ("persona-subnetworks/evaluation", 1)
    assert {r["condition"] for r in report["records"]} == {
        "unmasked",
        "prompt",
        "own mask",
        "opponent mask",
        "random mask",
        "random mask 2",
    }
    assert {r["form"] for r in report["records"]} == {"free", "options"}
    by = {(r["condition"], r["persona"], r["form"]): r for r in report["records"]}
    for record in report["records"]:
        assert record["n"] == 6
        assert 0 <= record["score_normalised"] <= 1
        assert record["ci_low"] <= record["margin_shift"] <= record["ci_high"]
        assert record["perplexity"] > 1
    # The opponent's mask is the own mask seen from the other pole.
    assert by["opponent mask", "up", "free"]["margin"] == pytest.approx(-by["own mask", "down", "free"]["margin"])
    assert by["unmasked", "up", "free"]["score_sum"] == pytest.approx(1 - by["unmasked", "down", "free"]["score_sum"])
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate.main([str(run)]) == 2
    assert "give --data" in capsys.readouterr().err


def test_voices_from_file_to_records(place, tmp_path):
    """Three voices in one file: each becomes a pair with the others, measured, masked and evaluated."""
    rows = [
        {
            "question": f"Question number {i}?",
            "split": "calibration" if i < 6 else "test",
            "answers": {"dog": f"I bark {i}", "cat": f"I sleep {i}", "bird": f"I sing {i}"},
        }
        for i in range(10)
    ]
    voices = tmp_path / "voices.jsonl"
    voices.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = command(place, tmp_path / "run", "--criterion", "wanda", "--sparsity", "0.3")
    words[words.index("--personas") + 1] = f"voices:{voices}"
    assert calibrate.main(words) == 0
    assert set(load_masks(tmp_path / "run").personas) == {
        prefix + name for name in ("dog", "cat", "bird") for prefix in ("", "not-")
    }
    options = ["--data", f"voices:{voices}", "--conditions", "mask", "--texts", "1", "--questions", "0"]
    assert evaluate.main([str(tmp_path / "run"), *options, "--json", str(tmp_path / "e.json")]) == 0
    records = json.loads((tmp_path / "e.json").read_text())["records"]
    assert {r["pair"] for r in records} == {"dog/not-dog", "cat/not-cat", "bird/not-bird"}
    assert {r["n"] for r in records} == {4}
