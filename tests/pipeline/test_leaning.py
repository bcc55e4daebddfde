"""The line between two answers: which items have one, what leans to it, and how a mask's is levelled."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from pipeline import calibrate, shares
from pipeline.budget import line_under, own_items
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import load_catalogue
from pipeline.data.prompts import Encoded, Prompter
from pipeline.gradient_files import ANSWERS, Gradients, gradient_file
from pipeline.gradients import accumulating, backward
from pipeline.leaning import FEWEST, LEVEL, TRIES, Line, answer_units, levelled, two_answers
from pipeline.loading import load_model, load_tokenizer
from pipeline.masks import PersonaMasks
from pipeline.objectives import margin_units
from pipeline.sites import find_linears
from pipeline.store import load_masks

YES, NO, MAYBE = (7,), (8,), (9,)


def pair(number, own, other):
    question = (1, 2, 10 + number)
    return tuple(Encoded(question + answer, len(question), range(1, 2)) for answer in (own, other))


def write_statements(path, count=24):
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            own, other = ("Yes", "No") if i % 2 else ("No", "Yes")
            row = {"question": f"Do you jump over {'dog' if i % 2 else 'fox'} {i}?", "statement": "I jump"}
            row |= {"answer_matching_behavior": own, "answer_not_matching_behavior": other}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ([pair(i, *((YES, NO) if i % 2 else (NO, YES))) for i in range(2 * FEWEST)], (YES, NO)),
        ([pair(i, *((YES, NO) if i % 2 else (NO, YES))) for i in range(2 * FEWEST - 1)], None),
        ([pair(i, YES, NO) for i in range(20)], None),
        ([pair(i, *((YES, NO) if i % 2 else (NO, MAYBE))) for i in range(20)], None),
        ([pair(i, (50 + i,), (90 + i,)) for i in range(20)], None),
        ([], None),
    ],
    ids=["two", "too few of one", "always the same", "three", "texts", "nothing"],
)
def test_items_with_two_answers(pairs, found):
    assert two_answers(pairs) == found


def test_either_answer_whoever_gives_it():
    pairs = [pair(i, *((YES, NO) if i % 3 else (NO, YES))) for i in range(15)]
    margin = margin_units([own for own, _ in pairs], [other for _, other in pairs])
    for units, answer in zip(answer_units(margin), (YES, NO), strict=True):
        assert [len(unit) for unit in units] == [1] * 15
        for (term,), (own, _) in zip(units, pairs, strict=True):
            assert term.encoded.ids == (*own.ids[:-1], *answer)
            assert term.weight == pytest.approx(1 / 15)
    assert answer_units([(unit[0],) for unit in margin]) is None


def test_what_it_leans_to_is_the_gradient_of_the_mean_difference(ground, tmp_path):
    """Against autograd over the whole model, item by item; and that of both answers' mean."""
    model = load_model(str(ground.llama))
    pairs = [pair(i, *((YES, NO) if i % 3 else (NO, YES))) for i in range(12)]
    linears = find_linears(model)
    name, module = next(iter(linears.items()))
    margin = margin_units([own for own, _ in pairs], [other for _, other in pairs])
    for folder, units in zip(ANSWERS, answer_units(margin), strict=True):
        with accumulating(linears) as moments:
            backward(model, [term for unit in units for term in unit], 0, 1.0)
            moments.release()
        (tmp_path / folder).mkdir()
        save_file({f"mean/{name}": moments.total[name]}, tmp_path / folder / gradient_file("up"))
    gradients = Gradients(tmp_path, load_catalogue(f"up/down={ground.pairs}"))
    module.weight.requires_grad_(True)
    ids = torch.tensor([own.ids[:-1] for own, _ in pairs])
    scores = torch.log_softmax(model(input_ids=ids).logits[:, -1], dim=-1)
    first, second = scores[:, YES[0]].mean(), scores[:, NO[0]].mean()
    (expected,) = torch.autograd.grad(first - second, module.weight, retain_graph=True)
    torch.testing.assert_close(gradients.leaning("up", name), expected, rtol=1e-4, atol=1e-7)
    (expected,) = torch.autograd.grad((first + second) / 2, module.weight)
    torch.testing.assert_close(gradients.both("down", name), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("start", [0.0, 0.3, -1.0])
@pytest.mark.parametrize(
    "off", [lambda p: 0.8 + p, lambda p: -0.4 + 0.1 * p, lambda p: math.tanh(3 * p + 4), lambda p: (p - 1) ** 3]
)
def test_the_price_that_levels_is_found(off, start):
    tried = []

    def measured(price):
        tried.append(price)
        return off(price)

    price = levelled(measured, start)
    assert abs(off(price)) <= LEVEL
    assert len(tried) == len(set(tried)) <= TRIES
    assert tried[0] == start


@pytest.mark.parametrize("seed", range(200))
def test_the_search_ends_whatever_is_measured(seed):
    generator, tried = torch.Generator().manual_seed(seed), []

    def measured(price):
        tried.append(price)
        return float(torch.randint(-2, 3, (), generator=generator)) or math.nan if seed % 2 else (-1.0) ** len(tried)

    assert levelled(measured) in tried
    assert len(tried) == len(set(tried)) <= TRIES


def test_where_nothing_levels_the_nearest_is_taken():
    assert levelled(lambda p: 0.05) == 0
    tried = []

    def stubborn(price):
        tried.append(price)
        return 2 - 0.1 * len(tried)

    assert levelled(stubborn) == tried[-1] < 0
    assert len(tried) == TRIES


def test_how_far_a_line_is_off():
    assert Line(8.5, 3.9).off == pytest.approx(6.2 / 4.6)
    assert Line(1.0, -1.0).off == 0
    assert Line(-1.0, -3.0).off == pytest.approx(-1)
    assert Line(1.0, 2.0).off == 0


def test_a_line_is_measured_as_its_definition_says(ground, tmp_path):
    data = write_statements(tmp_path / "statements.jsonl")
    config = CalibrateConfig(personas=f"up/down={data}", model=str(ground.llama), samples=16)
    catalogue, tokenizer = load_catalogue(config.personas), load_tokenizer(config.model)
    model = load_model(config.model)
    line = line_under(model, tokenizer, catalogue, config, None, "down")
    assert line is not None
    shapes = {name: tuple(module.weight.shape) for name, module in find_linears(model).items()}
    everything = {name: torch.full((n, -(-k // 8)), 255, dtype=torch.uint8) for name, (n, k) in shapes.items()}
    found = line(PersonaMasks(shapes, {"down": everything}))
    prompter, margins = Prompter(tokenizer), {"Yes": [], "No": []}
    for item in own_items("down", catalogue, config):
        scores = {}
        for answer in ("Yes", "No"):
            text = prompter.encode(item.question, answer)
            with torch.no_grad():
                logits = torch.log_softmax(model(input_ids=torch.tensor([text.ids])).logits[0].double(), -1)
            tokens = range(text.answer, len(text))
            scores[answer] = sum(float(logits[t - 1, text.ids[t]]) for t in tokens) / len(tokens)
        margins[item.matching].append(scores["Yes"] - scores["No"])
    means = {answer: sum(found) / len(found) for answer, found in margins.items()}
    # Which of the two is the first is a matter of token numbers.
    first = min(means, key=lambda answer: prompter.encode("x", answer).ids[prompter.encode("x", answer).answer :])
    sign = 1 if first == "Yes" else -1
    other = "No" if first == "Yes" else "Yes"
    assert found.first == pytest.approx(sign * means[first], abs=1e-4)
    assert found.second == pytest.approx(sign * means[other], abs=1e-4)


def test_texts_have_no_line(ground):
    config = CalibrateConfig(personas=f"up/down={ground.pairs}", model=str(ground.llama))
    catalogue = load_catalogue(config.personas)
    assert line_under(None, load_tokenizer(config.model), catalogue, config, None, "up") is None


@pytest.mark.parametrize("compose", ["", "mix/other=0.6*up+0.4*left"], ids=["poles", "mixture"])
def test_a_run_levels_its_masks(ground, words, tmp_path, monkeypatch, compose):
    """Of the same calibration with and without a price, the one with it is nearer to the middle."""
    personas = f"up/down={write_statements(tmp_path / 'up.jsonl')}"
    names = {"up", "down"}
    if compose:
        personas += f",left/right={write_statements(tmp_path / 'left.jsonl')}"
        names = {"mix", "other"}
    options = ["--sparsity", "0.2", "--pool", "1", "--evidence", "0", "--loops", "0", "--skip-blocks", "0"]
    options += ["--max-perplexity-increase", "3", *(["--compose", compose] if compose else [])]
    assert calibrate.main(words(tmp_path / "level", *options, personas=personas)) == 0
    monkeypatch.setattr(shares, "line_under", lambda *_: None)
    reuse = ("--statistics", str(tmp_path / "level"))
    assert calibrate.main(words(tmp_path / "plain", *options, *reuse, personas=personas)) == 0
    level, plain = (json.loads((tmp_path / n / "manifest.json").read_text())["sparsity"] for n in ("level", "plain"))
    assert set(level["price"]) == names
    assert not any(plain["price"].values())
    assert any(level["price"].values())
    config = CalibrateConfig(personas=personas, compose=compose, model=str(ground.llama))
    tokenizer, model = load_tokenizer(config.model), load_model(config.model)
    catalogue = load_catalogue(personas, compose=compose)
    for persona, price in level["price"].items():
        line = line_under(model, tokenizer, catalogue, config, None, persona)
        off = [
            abs(line(PersonaMasks(masks.shapes, {persona: masks.bits[persona]})).off)
            for masks in (load_masks(tmp_path / "level"), load_masks(tmp_path / "plain"))
        ]
        assert off[0] < off[1] if price or level["both_price"][persona] else off[0] == off[1]


def test_a_mixture_leans_as_its_parts_together(tmp_path):
    """And only if all of them do."""
    for name in ("up", "left", "far"):
        write_statements(tmp_path / f"{name}.jsonl")
    sets = ",".join(f"{a}/{b}={tmp_path / a}.jsonl" for a, b in (("up", "down"), ("left", "right"), ("far", "near")))
    catalogue = load_catalogue(sets, compose="mix/other=3*up+right,lost=up+far")
    written = {folder: {name: torch.randn(4, 8) for name in ("up", "left")} for folder in ANSWERS}
    for folder, of in written.items():
        (tmp_path / folder).mkdir()
        for name, value in of.items():
            save_file({"mean/layer": value}, tmp_path / folder / gradient_file(name))
    gradients = Gradients(tmp_path, catalogue)
    assert {name for name in catalogue.personas if gradients.leans(name)} == {"mix", "other"}
    # Whoever gives the answer: a pole leans as its opposite does.
    for name in ("mix", "other"):
        first, second = (0.75 * written[folder]["up"] + 0.25 * written[folder]["left"] for folder in ANSWERS)
        torch.testing.assert_close(gradients.leaning(name, "layer"), first - second)
        torch.testing.assert_close(gradients.both(name, "layer"), (first + second) / 2)
    (tmp_path / ANSWERS[1] / gradient_file("left")).unlink()
    assert not any(gradients.leans(name) for name in catalogue.personas if name != "up")


@pytest.mark.parametrize("criterion", ["wanda", "first-order-damage"])
def test_other_criteria_have_a_budget_and_no_price(words, tmp_path, criterion):
    """Nothing says what their answers lean to."""
    personas = f"up/down={write_statements(tmp_path / 'statements.jsonl')}"
    options = ("--criterion", criterion, "--sparsity", "0.2", "--pool", "1", "--max-perplexity-increase", "3")
    assert calibrate.main(words(tmp_path / "run", *options, personas=personas)) == 0
    found = json.loads((tmp_path / "run" / "manifest.json").read_text())["sparsity"]
    assert found["price"] == {"up": 0, "down": 0}
