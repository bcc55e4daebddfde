"""Generated text: repetition by hand, batches against single answers, the judged margin, and the JSON."""

import json

import pytest
import torch

from pipeline import evaluate
from pipeline.config import EvaluateConfig
from pipeline.data.catalogue import PersonaSet
from pipeline.data.forms import Item
from pipeline.data.prompts import Prompter
from pipeline.generation import _until_the_end, answer, continuations
from pipeline.likelihood import answer_scores
from pipeline.model import PersonaModel
from pipeline.protocol import Limits
from pipeline.setting import UNMASKED, Ground, Setting
from pipeline.textual import chosen_items, judged, repetition, texts_of
from tests.pipeline.tiny import write_pairs

ITEMS = [Item(q, "I jump over it.", "The fox is lazy", "pair") for q in ("What do you do?", "Dog?", "Do you like it?")]


@pytest.fixture
def ground_of(finished):
    model = PersonaModel.from_pretrained(finished)
    return Ground(model, Prompter(model.tokenizer), Limits(512, 2048, 0), EvaluateConfig(finished))


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4, 5]) == 0
    # 123 231 312 123 231: two of five came before.
    assert repetition([1, 2, 3, 1, 2, 3, 1]) == pytest.approx(2 / 5)
    assert repetition([7] * 12) == pytest.approx(9 / 10)
    assert repetition([1, 2]) == repetition([]) == 0


def test_a_question_is_asked_once():
    items = [Item("a", "1", "2", "pair"), Item("b", "3", "4", "pair"), Item("a", "5", "6", "pair")]
    assert chosen_items(PersonaSet("up", "down", tuple(items), "x"), 5) == items[:2]
    assert chosen_items(PersonaSet("up", "down", tuple(items), "x"), 0) == []


@pytest.mark.parametrize("mask", [None, "up"])
def test_batches_padded_on_the_left_answer_as_single_prompts_do(ground_of, mask):
    ground, prompter = ground_of, ground_of.prompter
    prompts = [prompter.ids(prompter.prompt(item.question)) for item in ITEMS]
    assert len({len(prompt) for prompt in prompts}) == 3
    with ground.model.using(mask):
        alone = [answer(ground.model, prompter, item.question, max_new_tokens=12) for item in ITEMS]
        for budget in (10, 4096):
            got = continuations(ground.model, prompter.tokenizer, prompts, 12, batch_tokens=budget)
            decoded = [prompter.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in got]
            assert decoded == alone
    texts = texts_of(ground, Setting("own mask", "up", mask=mask), ITEMS)
    assert all(text.answer.startswith(short) for text, short in zip(texts, alone, strict=True))
    assert ground.model.active is None


def test_sampled_answers_depend_on_seed_and_temperature_alone(ground_of):
    ground, prompter = ground_of, ground_of.prompter
    prompts = [prompter.ids(prompter.prompt(item.question)) for item in ITEMS]

    def drawn(temperature, seed):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        sizes = {"batch_tokens": 4096, "temperature": temperature, "seed": seed}
        found = continuations(ground.model, prompter.tokenizer, prompts, 12, **sizes)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    greedy, warm = drawn(0.0, 0), drawn(1.0, 0)
    assert drawn(0.0, 1) == greedy
    assert drawn(1.0, 0) == warm != greedy
    assert drawn(1.0, 1) != warm
    assert drawn(1e-4, 0) == greedy


def test_an_answer_ends_with_the_end_token(ground_of):
    model = ground_of.model
    end = model.generation_config.eos_token_id
    assert _until_the_end([5, 6, end, 0, 0], model) == [5, 6]
    assert _until_the_end([5, 6], model) == [5, 6]


def test_judged_margin_is_the_unmasked_models_after_the_text(ground_of):
    ground, prompter = ground_of, ground_of.prompter
    texts = ["I jump", "", "The fox"]
    got = judged(ground, ITEMS, texts)
    with ground.model.using("down"):
        assert judged(ground, ITEMS, texts) == got
        assert ground.model.active == "down"
    for item, text, value in zip(ITEMS, texts, got, strict=True):
        means = []
        for reference in (item.matching, item.other):
            chat = f"<|user|>{item.question}<eos><|assistant|>{text}<eos><|user|>{item.question}<eos><|assistant|>"
            encoded = prompter.encode(item.question, reference, None, [(item.question, text)])
            assert prompter.tokenizer.decode(encoded.ids, skip_special_tokens=False) == chat + reference
            with torch.inference_mode():
                table = torch.log_softmax(ground.model.model(input_ids=torch.tensor([encoded.ids])).logits[0], -1)
            targets = torch.tensor(encoded.ids[encoded.answer :])
            means.append(float(table[encoded.answer - 1 : -1].gather(1, targets.unsqueeze(1)).mean()))
        assert value == pytest.approx(means[0] - means[1], abs=1e-4)
    without = [prompter.encode(item.question, item.matching) for item in ITEMS]
    assert answer_scores(ground.model.model, without, batch_tokens=999, pad=0)[0].mean != pytest.approx(got[0])
    assert [text.judged for text in texts_of(ground, UNMASKED, ITEMS)] != got


@pytest.mark.parametrize(("generate", "counts"), [(0, 1), (3, 3)])
def test_generation_through_the_program(finished, tmp_path, capsys, generate, counts):
    held = write_pairs(tmp_path / "held.csv", 14)
    options = ["--data", str(held), "--texts", "1", "--bootstrap", "20", "--conditions", "prompt,random"]
    options += ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "e.json"), "--generate", str(generate)]
    assert evaluate.main([str(finished), *options]) == 0
    report, shown = json.loads((tmp_path / "e.json").read_text()), capsys.readouterr().out
    states = [(e["condition"], e["persona"]) for e in report["generation"]]
    assert states == [
        ("unmasked", None),
        ("prompt", "up"),
        ("prompt", "down"),
        ("own mask", "up"),
        ("own mask", "down"),
    ]
    for entry in report["generation"]:
        assert (entry["pair"], entry["n"], len(entry["answers"])) == ("up/down", counts, counts)
        for name in ("tokens", "repetition", "judged"):
            assert entry[name] == pytest.approx(sum(a[name] for a in entry["answers"]) / counts)
        assert all(0 < a["tokens"] <= 48 and 0 <= a["repetition"] <= 1 for a in entry["answers"])
        before = report["generation"][0]["answers"]
        more = [a["repetition"] - b["repetition"] for a, b in zip(entry["answers"], before, strict=True)]
        assert entry["repeated_more"] == pytest.approx(sum(more) / counts)
        assert min(more) <= entry["repeated_more_low"] <= entry["repeated_more"] <= entry["repeated_more_high"]
    plain = [e["answers"][0] for e in report["generation"] if e["condition"] != "prompt"]
    assert [a["answer"] for a in report["answers"]] == [a["answer"] for a in plain]
    assert shown.count("Q: ") == 1
    assert "up (prompt): " in shown
    assert ("mean of 3 answers, unmasked" in shown) == (generate == 3)
    assert shown.count("points") == (4 if generate == 3 else 0)


def test_sampled_answers_stand_beside_the_greedy_ones(finished, tmp_path, capsys):
    held = write_pairs(tmp_path / "held.csv", 14)
    options = ["--data", str(held), "--texts", "1", "--bootstrap", "20", "--conditions", "mask", "--generate", "2"]
    options += ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "e.json")]
    assert evaluate.main([str(finished), *options]) == 0
    greedy = json.loads((tmp_path / "e.json").read_text())
    assert evaluate.main([str(finished), *options, "--temperature", "0.7"]) == 0
    both, shown = json.loads((tmp_path / "e.json").read_text()), capsys.readouterr().out
    assert both["generation"][:3] == greedy["generation"]
    assert [e["temperature"] for e in both["generation"]] == [0, 0, 0, 0.7, 0.7, 0.7]
    assert [e["answers"] for e in both["generation"][3:]] != [e["answers"] for e in greedy["generation"]]
    assert both["answers"] == greedy["answers"]
    assert "down, temperature 0.7: " in shown
