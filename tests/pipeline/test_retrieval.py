"""In-context examples: TF-IDF by hand, the order of turns, and where a run's calibration items come from."""

import json
import math
import shutil

import pytest

from pipeline import calibrate, evaluate
from pipeline.baselines.retrieval import Examples, Tfidf, words
from pipeline.calibrated import calibration_items
from pipeline.data.forms import Item
from pipeline.data.prompts import Prompter
from pipeline.errors import UserError
from pipeline.loading import load_tokenizer
from tests.pipeline.tiny import write_pairs


def test_tfidf_by_hand():
    """Documents "a b" and "b b c": idf(b) = log(3/3) + 1 = 1, idf(a) = idf(c) = log(3/2) + 1."""
    index, rare = Tfidf(["a b", "B, b c!"]), math.log(1.5) + 1
    lengths = math.hypot(rare, 1), math.hypot(2, rare)
    assert index.similarity("c").tolist() == pytest.approx([0, rare / lengths[1]])
    assert index.similarity("b").tolist() == pytest.approx([1 / lengths[0], 2 / lengths[1]])
    query = math.hypot(rare, 1)
    assert index.similarity("a b unknown").tolist() == pytest.approx([1, 2 / (lengths[1] * query)])
    assert index.similarity("unknown").tolist() == [0, 0]
    assert index.nearest("c", 1) == [1]
    assert index.nearest("a", 5) == [0, 1]
    assert index.nearest("unknown", 2) == [0, 1]
    assert words("Don't: 2 DOGS") == ["don", "t", "2", "dogs"]


def test_examples_stand_before_the_question_the_nearest_last(ground):
    texts = ["red dog", "blue cat", "red dog and cat"]
    items = [Item(text, f"yes {text}", f"no {text}", "pair") for text in texts]
    turns = Examples(items, 2)("a red dog")
    assert turns == [("red dog and cat", "yes red dog and cat"), ("red dog", "yes red dog")]
    prompter = Prompter(load_tokenizer(str(ground.llama)))
    prompt = prompter.prompt("a red dog", "Be kind.", turns)
    order = ["Be kind.", "red dog and cat", "yes red dog and cat", "|>red dog<", "yes red dog<", "|>a red dog<"]
    places = [prompt.index(words) for words in order]
    assert places == sorted(places)
    encoded = prompter.encode("a red dog", "indeed", None, turns)
    decode = prompter.tokenizer.decode
    assert decode(encoded.ids[encoded.question.start : encoded.question.stop]) == "a red dog"
    assert decode(encoded.ids[encoded.answer :]) == "indeed"
    prompter.chat = False
    assert prompter.prompt("q?", "S", [("a?", "b")]) == "S\nQuestion: a?\nAnswer: b\nQuestion: q?\nAnswer:"


def test_calibration_items_are_those_of_the_run(words, ground, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv")
    run = tmp_path / "run"
    options = ("--criterion", "wanda", "--samples", "6", "--seed", "3", "--compose", "mix/xim=0.5*up+0.5*left")
    other = shutil.copy(ground.pairs, tmp_path / "other.csv")
    assert calibrate.main(words(run, *options, personas=f"up/down={pairs},left/right={other}")) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    up, down, mixed = (calibration_items(manifest, persona) for persona in ("up", "down", "xim"))
    assert len(up) == 6
    assert [item.matching for item in down] == [item.other for item in up]
    assert len(mixed) == 12
    assert mixed[:6] == down
    pairs.write_text(pairs.read_text().replace("fox", "cat"))
    with pytest.raises(UserError, match=r"pairs\.csv: no longer the items that 'up' was calibrated on"):
        calibration_items(manifest, "up")
    pairs.unlink()
    with pytest.raises(UserError, match=r"calibration items .* cannot be read any more: .*pairs\.csv: no such file"):
        calibration_items(manifest, "up")


def test_conditions_of_words_through_the_program(finished, tmp_path, capsys):
    held = write_pairs(tmp_path / "held.csv", 14)
    options = ["--data", str(held), "--texts", "1", "--bootstrap", "20", "--questions", "0", "--shots", "2"]
    options += ["--conditions", "prompt+mask, rag,prompt,mask", "--gamma", "0.5"]
    files = ["--json", str(tmp_path / "e.json"), "--plot", str(tmp_path / "p.png")]
    assert evaluate.main([str(finished), *options, *files]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    by = {(r["condition"], r["persona"]): r for r in report["records"]}
    assert list(dict.fromkeys(c for c, _ in by)) == [
        "unmasked", "prompt", "in context", "own mask", "prompt and mask", "opponent mask",
    ]  # fmt: skip
    base, context, both = (by[c, "up"] for c in ("unmasked", "in context", "prompt and mask"))
    assert context["perplexity"] == base["perplexity"] != both["perplexity"] == by["own mask", "up"]["perplexity"]
    assert (context["removed"], both["removed"]) == (0, by["own mask", "up"]["removed"])
    # A pole's examples are its own: the two poles are two states, and no two conditions are the same.
    assert by["in context", "down"]["margin_shift"] != pytest.approx(-context["margin_shift"])
    shifts = [r["margin_shift"] for r in report["records"] if r["persona"] == "up"]
    assert len(set(shifts)) == len(shifts)
    assert {c["condition"] for c in report["contrasts"]} == {c for c, _ in by} - {"unmasked"}
    shown = capsys.readouterr().out
    assert "in context" in shown
    assert "prompt and mask" in shown


def test_options_are_checked(finished):
    for wrong, said in ((["--shots", "0"], "at least 1"), (["--conditions", "magic"], "prompt\\+mask")):
        with pytest.raises(SystemExit) as caught:
            evaluate.main([str(finished), *wrong])
        assert caught.value.code == 2, said
