"""The data sets in pipeline/data/sets: sizes, balance, lengths, no repetition, no names of traits."""

import json
import re
from collections import Counter
from itertools import product

import pytest

from pipeline.data.catalogue import DICHOTOMIES, neutral_set, neutral_texts, persona_prompt, shipped_path, shipped_set
from pipeline.embedded import cache_folder

SPLITS = {"calibration": 120, "test": 40}
TRAITS = r"introver\w*|extrav\w*|extrov\w*|intuit\w*|sensing|sensors?|feelers?|thinkers?|judg(?:ing|ers?|emental)"
"""Refused in every set. "feel", "think" and "judge" are ordinary words; the sets that they name refuse them too."""
META = r"perceiv\w*|percepti\w*|personalit\w*|personas?|myers|briggs|mbti|as an? (?:ai|language) \w+|chatbot"
OWN = {
    "feeling-thinking": r"feel\w*|felt|think\w*",
    "judging-perceiving": r"judg\w*",
    "intuitive-sensing": r"sens(?:ed|ory|ation\w*)",
    "introvert-extravert": r"shyness|outgoing|sociable|loners?",
}
CACHED = cache_folder() / "SmolLM2-135M-Instruct"


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


@pytest.fixture(scope="module", params=list(DICHOTOMIES))
def personas(request):
    return shipped_set(request.param)


def answers(personas, split=None):
    items = personas.items if split is None else personas.split(split)
    return [i.matching for i in items], [i.other for i in items]


def test_120_and_40_items_in_the_two_way_form_from_disjoint_topics(personas):
    assert Counter(i.split for i in personas.items) == SPLITS
    assert {i.form for i in personas.items} == {"two-way"}
    topics = {split: {i.topic for i in personas.split(split)} for split in SPLITS}
    assert not topics["calibration"] & topics["test"]
    assert "" not in topics["calibration"] | topics["test"]
    assert len(topics["calibration"]) >= 8
    assert len(topics["test"]) >= 3


@pytest.mark.parametrize("split", SPLITS)
def test_letters_are_exactly_balanced(personas, split):
    half = SPLITS[split] // 2
    assert Counter(i.first for i in personas.split(split)) == {"matching": half, "other": half}


def test_nothing_is_repeated_in_or_across_sets():
    seen, repeated = {}, []
    for name in [*DICHOTOMIES, "neutral"]:
        items = neutral_set().items if name == "neutral" else shipped_set(name).items
        for item in items:
            for part, text in (("question", item.question), ("answer", item.matching), ("answer", item.other or "")):
                key = " ".join(words(text))
                if not key:
                    continue
                if key in seen:
                    repeated.append(f"{item.source}: {part} repeats {seen[key]}: {text}")
                seen[key] = item.source
    assert repeated == []


def test_test_questions_are_no_near_duplicates_of_calibration_questions(personas):
    pairs = product(personas.split("test"), personas.split("calibration"))
    for held, seen in pairs:
        a, b = set(words(held.question)), set(words(seen.question))
        overlap = len(a & b) / len(a | b)
        assert overlap < 0.7, f"{held.source} and {seen.source}: {held.question} / {seen.question}"


def test_no_trait_is_named(personas):
    name = f"{personas.plus}-{personas.minus}"
    forbidden = re.compile(rf"\b(?:{TRAITS}|{META}|{OWN[name]})\b", re.IGNORECASE)
    found = [
        f"{item.source}: {hit.group()}"
        for item in personas.items
        for text in (item.question, item.matching, item.other)
        for hit in forbidden.finditer(text)
    ]
    assert found == []


@pytest.mark.parametrize("split", SPLITS)
def test_mean_length_in_words_is_the_same_within_5_percent(personas, split):
    plus, minus = (sum(len(words(a)) for a in side) for side in answers(personas, split))
    assert abs(plus / minus - 1) <= 0.05


@pytest.mark.skipif(not (CACHED / "config.json").exists(), reason="the embedded model is not converted (make model)")
def test_mean_length_in_tokens_is_the_same_within_5_percent(personas):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CACHED)
    for split in SPLITS:
        plus, minus = (
            sum(map(len, tokenizer(side, add_special_tokens=False)["input_ids"])) / len(side)
            for side in answers(personas, split)
        )
        print(f"{personas.source} {split}: tokens {personas.plus} {plus:.2f}, {personas.minus} {minus:.2f}")
        assert abs(plus / minus - 1) <= 0.05


def test_answers_that_begin_with_yes_or_no_are_balanced(personas):
    plus, minus = (Counter(words(a)[0] for a in side) for side in answers(personas))
    for word in ("yes", "no"):
        assert abs(plus[word] - minus[word]) <= 1, (word, plus[word], minus[word])


def test_no_first_word_gives_a_pole_away(personas):
    plus, minus = (Counter(words(a)[0] for a in side) for side in answers(personas))
    for word in plus | minus:
        assert abs(plus[word] - minus[word]) <= 0.15 * len(personas.items), (word, plus[word], minus[word])


def test_texts_are_clean(personas):
    for item in personas.items:
        assert item.question[-1] in '?."”', item.source
        for text in (item.question, item.matching, item.other):
            assert text == " ".join(text.split()), item.source
            assert text.isprintable(), item.source
        for answer in (item.matching, item.other):
            assert 5 <= len(words(answer)) <= 50, f"{item.source}: {answer}"
            assert answer[-1] in ".!?\"'”", f"{item.source}: {answer}"
            assert not re.match(r"[AB][).:]", answer), item.source


def test_neutral_pairs():
    items = neutral_set().items
    assert len(items) >= 128
    assert all(i.question and i.other is None for i in items)
    assert len({" ".join(words(i.question)) for i in items}) == len(items)
    first_person = [i.source for i in items if re.search(r"\b(?:I|I'm|I'd|my)\b", i.matching)]
    assert first_person == []


def test_neutral_texts():
    texts = neutral_texts()
    assert len(texts) == len(set(texts)) == 40
    assert all(40 <= len(words(t)) <= 400 for t in texts), [len(words(t)) for t in texts]


def test_every_pole_has_a_prompt_in_words():
    prompts = json.loads(shipped_path("prompts.json").read_text(encoding="utf-8"))
    poles = [pole for name in DICHOTOMIES for pole in name.split("-")]
    assert set(poles) <= set(prompts)
    assert len({persona_prompt(pole) for pole in poles}) == len(poles)
    assert all(prompts[pole].endswith("Answer every question as such a person would.") for pole in poles)
