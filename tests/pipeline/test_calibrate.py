"""Calibration end to end in one process: what a run holds, reused statistics, precisions, bad input."""

import csv
import hashlib
import json
import platform
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeline import calibrate
from pipeline.config import CRITERIA
from pipeline.loading import load_model, load_tokenizer
from pipeline.provenance import RUN
from pipeline.store import STATISTICS, load_masks, load_statistics
from tests.pipeline.tiny import TEMPLATE, make_model


def read(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def questions(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_holds_these_files_and_no_others(finished):
    files = sorted(str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file())
    assert files == ["manifest.json", "masks/down.safetensors", "masks/up.safetensors", RUN, STATISTICS]


def test_manifest_against_files_and_data(finished, ground):
    manifest, rows = read(finished), questions(ground.pairs)
    for persona, entry in manifest["masks"].items():
        content = (finished / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        for name, packed in load_file(finished / entry["file"]).items():
            kept, columns = sum(bin(byte).count("1") for byte in packed.flatten().tolist()), manifest["layers"][name][1]
            assert entry["kept"][name] == kept
            assert kept == packed.shape[0] * int(columns * 7 / 10)
        assert manifest["sparsity"]["removed"][persona] == pytest.approx(1 - entry["density"])
    assert manifest["sparsity"]["option"] == "0.3"
    assert manifest["personas"]["pairs"] == [["up", "down"]]
    assert manifest["personas"]["opponents"] == {"up": "down", "down": "up"}
    hashes = [hashlib.sha256(" ".join(r["question"].casefold().split()).encode()).hexdigest()[:16] for r in rows]
    assert manifest["personas"]["questions"] == {"up": sorted(hashes)}
    versions = (platform.python_version(), torch.__version__, transformers.__version__)
    assert tuple(manifest["versions"][k] for k in ("python", "torch", "transformers")) == versions
    assert manifest["options"]["criterion"] == manifest["criterion"] == "wanda"
    assert manifest["options"]["model"] == manifest["model"]["id"] == str(ground.llama)
    assert (manifest["model"]["type"], manifest["uncovered"]) == ("llama", [])


def test_counts_are_samples_answer_tokens_and_sinks(finished, ground):
    """By default a counted token predicts an answer token: there are as many of both."""
    tokenizer, rows = load_tokenizer(str(ground.llama)), questions(ground.pairs)
    manifest = read(finished)
    for persona, column in (("up", "matching"), ("down", "not_matching")):
        tokens = sum(len(tokenizer(row[column])["input_ids"]) for row in rows)
        assert manifest["counts"]["personas"][persona] == [len(rows), tokens, len(rows)]


def test_statistics_are_those_of_plain_forward_passes(finished, ground):
    """Independent of collector, batches and roles: one unpadded pass per text, hooks and loops of this test."""
    tokenizer, model = load_tokenizer(str(ground.llama)), load_model(str(ground.llama))
    stats = load_statistics(finished / STATISTICS)
    seen = {}
    modules = dict(model.named_modules())
    for site in stats.sites:
        modules[site.name].register_forward_pre_hook(lambda _, x, n=site.name: seen.__setitem__(n, x[0][0].double()))
    for persona, column in (("up", "matching"), ("down", "not_matching")):
        total, square, rms, squared_rms = ({s.name: 0 for s in stats.sites} for _ in range(4))
        tokens = 0
        for row in questions(ground.pairs):
            prompt = tokenizer.encode(f"<|user|>{row['question']}<eos><|assistant|>")
            answer = tokenizer.encode(row[column])
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt + answer]))
            tokens += len(answer)
            for name, x in seen.items():
                x = x[len(prompt) - 1 : -1]
                assert len(x) == len(answer)
                total[name] += x.abs().sum(0)
                square[name] += x.square().sum(0)
                rms[name] += x.square().mean(0).sqrt()
                squared_rms[name] += x.square().mean(0)
        count = len(questions(ground.pairs))
        for site in stats.sites:
            got, mu = stats.channels(persona, site.name), rms[site.name] / count
            for value, expected in (
                (got.mean_abs, total[site.name] / tokens),
                (got.mean_square, square[site.name] / tokens),
                (got.mu, mu),
            ):
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)
            # A difference of two close numbers: the rounding of the larger ones stays.
            torch.testing.assert_close(
                got.variance, squared_rms[site.name] / count - mu**2, rtol=1e-3, atol=1e-5 * float(mu.square().max())
            )


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "neutral"])
def test_reused_statistics_give_the_same_bits(finished, words, tmp_path, criterion):
    options = ("--criterion", criterion, "--sparsity", "0.2")
    assert calibrate.main(words(tmp_path / "new", *options)) == 0
    assert calibrate.main(words(tmp_path / "reused", *options, "--statistics", finished)) == 0
    for persona in ("up", "down"):
        new, reused = (load_file(tmp_path / f / "masks" / f"{persona}.safetensors") for f in ("new", "reused"))
        assert all(torch.equal(new[name], reused[name]) for name in new)


def test_statistics_of_another_model_are_refused(words, finished, ground, tmp_path, capsys):
    """GPT-2's layers have other names; a model of the same shape differs in its weights alone."""
    code = calibrate.main(words(tmp_path / "out", "--criterion", "wanda", "--statistics", finished, model=ground.gpt2))
    assert code == 2
    assert "statistics" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_the_same_shape_but_other_weights_are_refused(words, finished, ground, tmp_path, capsys):
    model = load_model(str(ground.llama))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.neg_()
    model.save_pretrained(tmp_path / "other")
    for file in [*ground.llama.glob("tokenizer*"), *ground.llama.glob("*.jinja")]:
        shutil.copy(file, tmp_path / "other")
    options = ("--criterion", "wanda", "--statistics", finished)
    assert calibrate.main(words(tmp_path / "out", *options, model=tmp_path / "other")) == 2
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("option", [("--samples", "3"), ("--tokens", "all"), ("--max-length", "200")])
def test_statistics_of_other_items_or_options_are_refused(words, finished, tmp_path, capsys, option):
    options = ("--criterion", "wanda", "--statistics", finished, *option)
    assert calibrate.main(words(tmp_path / "out", *options)) == 2
    assert "measured on something else" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_statistics_without_the_persona_are_refused(words, finished, ground, tmp_path, capsys):
    options = ("--criterion", "wanda", "--statistics", finished)
    assert calibrate.main(words(tmp_path / "out", *options, personas=f"left/right={ground.pairs}")) == 2
    assert "no statistics of left, right" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_float64_sums_survive_bfloat16(words, finished, tmp_path):
    options = ("--criterion", "wanda", "--precision", "bf16-true", "--sparsity", "0.3")
    assert calibrate.main(words(tmp_path / "out", *options)) == 0
    exact, rough = load_statistics(finished / STATISTICS), load_statistics(tmp_path / "out" / STATISTICS)
    assert torch.equal(exact.counts, rough.counts)
    for name, sums in rough.sums.items():
        assert sums.dtype == torch.float64
        assert not torch.equal(sums, exact.sums[name])
        assert ((sums - exact.sums[name]).abs() <= 0.03 * exact.sums[name].abs().amax(2, keepdim=True)).all()


def test_an_option_without_effect_is_told(words, tmp_path, capsys):
    assert calibrate.main(words(tmp_path / "run", "--criterion", "wanda", "--samples", "4", "--shift", "2")) == 0
    err = capsys.readouterr().err
    assert "--shift has no effect: wanda does not read it (target-shift would)" in err
    assert err.count("no effect") == 1


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
def test_the_default_criterion_in_other_precisions(words, tmp_path, precision):
    """Rounding moves a few weights across the threshold; most of the mask stays.

    Of the whole mask nine tenths and more, of every layer that loses enough weights to speak of a share (one of these
    loses six).
    """
    for name in ("32-true", precision):
        assert calibrate.main(words(tmp_path / name, "--precision", name, "--sparsity", "0.1")) == 0
    exact, rough = load_masks(tmp_path / "32-true"), load_masks(tmp_path / precision)
    shares = []
    for layer in exact.shapes:
        removed, again = ~exact.mask("up", layer), ~rough.mask("up", layer)
        shares.append((int((removed & again).sum()), int(removed.sum())))
    assert all(same > 0.8 * count for same, count in shares if count >= 20)
    assert sum(same for same, _ in shares) > 0.9 * sum(count for _, count in shares)


@pytest.mark.parametrize("budget", ["1", "100000"])
def test_batches_do_not_matter(words, finished, tmp_path, budget):
    assert calibrate.main(words(tmp_path / "out", "--criterion", "wanda", "--batch-tokens", budget)) == 0
    one, other = load_statistics(finished / STATISTICS), load_statistics(tmp_path / "out" / STATISTICS)
    assert torch.equal(one.counts, other.counts)
    for name, sums in one.sums.items():
        torch.testing.assert_close(sums, other.sums[name], rtol=1e-4, atol=1e-5)


def test_gpt2_and_a_part_of_the_layers(words, ground, tmp_path):
    options = ("--include", "mlp", "--exclude", r"h\.1\.", "--sparsity", "0.25", "--criterion", "contrastive-sparse")
    assert calibrate.main(words(tmp_path / "out", *options, model=ground.gpt2)) == 0
    masks = load_masks(tmp_path / "out")
    assert masks.shapes == {"transformer.h.0.mlp.c_fc": (128, 32), "transformer.h.0.mlp.c_proj": (32, 128)}
    assert masks.mask("up", "transformer.h.0.mlp.c_proj").sum(1).tolist() == [96] * 32
    assert "transformer.h.1.mlp.c_fc" in masks.manifest["uncovered"]
    assert "transformer.h.0.attn.c_attn" in masks.manifest["uncovered"]
    assert len(masks.manifest["uncovered"]) == 6


def test_a_mixture_of_one_is_the_persona(words, tmp_path):
    for criterion in ("contrastive-wanda", "first-order"):
        options = ("--criterion", criterion, "--sparsity", "0.2")
        assert calibrate.main(words(tmp_path / criterion, *options)) == 0
        mixed = tmp_path / f"{criterion}-mixed"
        assert calibrate.main(words(mixed, *options, "--compose", "same/other=2*up")) == 0
        plain, composed = load_masks(tmp_path / criterion), load_masks(mixed)
        for layer in plain.shapes:
            for a, b in (("up", "same"), ("down", "other")):
                # A factor of two is exact in sums; in means it cancels.
                assert torch.equal(plain.bits[a][layer], composed.bits[b][layer])


def test_disjoint_masks(words, finished, tmp_path):
    common = ("--criterion", "wanda", "--disjoint", "--statistics", finished)
    assert calibrate.main(words(tmp_path / "half", *common, "--sparsity", "0.5")) == 0
    half = load_masks(tmp_path / "half")
    assert half.jaccard("up", "down") == 0
    assert calibrate.main(words(tmp_path / "more", *common, "--sparsity", "0.25")) == 0
    more = load_masks(tmp_path / "more")
    # 3/4 of each row are kept twice: half a row is forced into both, two thirds of what one keeps.
    assert more.intersection("x", ("up", "down")).density("x") == pytest.approx(0.5)
    (overlap,) = more.manifest["disjoint_overlap"].values()
    assert overlap == pytest.approx(2 / 3)


def test_encoder_decoders_are_refused(words, tmp_path, capsys):
    from tests.pipeline.tiny import make_tokenizer

    t5 = transformers.T5Config(vocab_size=300, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    assert calibrate.main(words(tmp_path / "out", model=tmp_path / "t5")) == 2
    assert "'t5' model is not a causal language model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--include", "nothing-like-it"), ("--statistics", "/nowhere")], ids=str)
def test_a_failure_leaves_no_parent_folders(words, tmp_path, options):
    """What a failed run made it takes away again: "nothing was left behind"."""
    assert calibrate.main(words(tmp_path / "new" / "deep" / "out", *options)) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_odd_output_folders(words, tmp_path, monkeypatch, capsys, output):
    """``.`` has no name of its own to put a staging folder beside; it must work or be refused in one sentence."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    code = calibrate.main(words(output, "--criterion", "magnitude"))
    if output == "." and code == 0:
        assert load_masks(tmp_path / "a" / "b").personas == ("up", "down")
    else:
        assert code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_texts_longer_than_the_model_can_read(ground, words, tmp_path, capsys):
    """GPT-2 has learned positions: beyond the last one there is nothing to look up."""
    with open(tmp_path / "long.csv", "w", encoding="utf-8") as file:
        file.write(f"question,matching,not_matching\nWhat?,{'jump ' * 300},no\n")
    options = ("--criterion", "wanda", "--max-length", "400")
    code = calibrate.main(words(tmp_path / "out", *options, model=ground.gpt2, personas=str(tmp_path / "long.csv")))
    assert code == 2
    assert "max-length" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_chat_template_and_pad_token(ground, words, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(ground.llama, folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template == TEMPLATE
    tokenizer.chat_template, tokenizer.pad_token = None, None
    for file in folder.glob("*.jinja"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    assert calibrate.main(words(tmp_path / "out", "--criterion", "wanda", model=folder)) == 0
    with open(ground.pairs, newline="", encoding="utf-8") as file:
        expected = sum(len(tokenizer(" " + row["matching"])["input_ids"]) for row in csv.DictReader(file))
    assert read(tmp_path / "out")["counts"]["personas"]["up"][1] == expected


def test_models_of_one_seed_are_equal(ground, tmp_path):
    """What every comparison above rests on: the fixture's model is reproducible."""
    again = load_model(str(make_model(tmp_path / "again")))
    for a, b in zip(load_model(str(ground.llama)).parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
