"""The shipped characters: counts, topics, lengths, no name and no word that carries a voice."""

import math
import re
from collections import Counter
from itertools import product

import pytest

from pipeline.data.catalogue import DICHOTOMIES, neutral_set, shipped_set
from pipeline.data.voices import character_prompt, shipped_characters
from pipeline.embedded import cache_folder

NAMES = ("pirate", "butler", "detective", "robot")
SPLITS = {"calibration": 80, "test": 30}
FORBIDDEN = r"pira(?:te|cy)\w*|butler\w*|butling|detect(?:ive|or)\w*|robot\w*"
"""The name of any character in an answer of any: it would be read, not the voice."""
MARKER = 0.25
"""Largest share of a character's lines with one word that is its own."""
FEW, LIMIT = 3, 0.6
"""So many most one-sided words of each character may find the right one among four answers no more often than this."""
CACHED = cache_folder() / "SmolLM2-135M-Instruct"
VOICES = shipped_characters()


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


def lines(name, split=None):
    return [i.answers[name] for i in (VOICES.items if split is None else VOICES.split(split))]


def share(name, token):
    return sum(token in words(line) for line in lines(name)) / len(VOICES.items)


def test_four_characters_answer_80_and_30_questions_of_disjoint_topics():
    assert VOICES.names == NAMES
    assert VOICES.problems == ()
    assert Counter(i.split for i in VOICES.items) == SPLITS
    assert all(tuple(i.answers) == NAMES for i in VOICES.items)
    topics = {split: Counter(i.topic for i in VOICES.split(split)) for split in SPLITS}
    assert not topics["calibration"].keys() & topics["test"].keys()
    assert {len(topics["calibration"]), len(topics["test"])} == {8, 3}
    assert set(topics["calibration"].values()) | set(topics["test"].values()) == {10}


def test_every_answer_and_every_question_occurs_once_in_all_sets():
    questions = Counter(" ".join(words(i.question)) for i in VOICES.items)
    answers = Counter(" ".join(words(a)) for i in VOICES.items for a in i.answers.values())
    assert set(questions.values()) == set(answers.values()) == {1}
    assert len(answers) == 440
    for item in [i for name in DICHOTOMIES for i in shipped_set(name).items] + list(neutral_set().items):
        assert " ".join(words(item.question)) not in questions, item.source


def test_held_out_questions_are_no_near_duplicates_of_calibration_questions():
    for held, seen in product(VOICES.split("test"), VOICES.split("calibration")):
        a, b = set(words(held.question)), set(words(seen.question))
        assert len(a & b) / len(a | b) < 0.6, f"{held.question} / {seen.question}"


def test_questions_and_answers_are_clean_and_of_15_to_35_words():
    for item in VOICES.items:
        assert item.question[-1] in "?.!", item.source
        assert len(words(item.question)) <= 15, item.source
        for name, text in [("question", item.question), *item.answers.items()]:
            assert text == " ".join(text.split()), f"{item.source} {name}"
            assert text.isprintable(), f"{item.source} {name}"
        for name, answer in item.answers.items():
            assert 15 <= len(words(answer)) <= 35, f"{item.source} {name}: {answer}"
            assert answer[-1] in ".!?", f"{item.source} {name}: {answer}"


@pytest.mark.parametrize("split", SPLITS)
def test_mean_lengths_in_words_lie_within_5_percent(split):
    means = {name: sum(len(words(a)) for a in lines(name, split)) / SPLITS[split] for name in NAMES}
    assert max(means.values()) / min(means.values()) - 1 <= 0.05, means


@pytest.mark.skipif(not (CACHED / "config.json").exists(), reason="the embedded model is not converted (make model)")
@pytest.mark.parametrize("split", SPLITS)
def test_mean_lengths_in_tokens_lie_within_8_percent(split):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CACHED)
    means = {}
    for name in NAMES:
        ids = tokenizer(lines(name, split), add_special_tokens=False)["input_ids"]
        means[name] = round(sum(map(len, ids)) / len(ids), 1)
    print(split, means)
    assert max(means.values()) / min(means.values()) - 1 <= 0.08, means


def test_no_answer_names_a_character():
    for item in VOICES.items:
        for answer in item.answers.values():
            assert not re.search(rf"\b(?:{FORBIDDEN})\b", answer, re.IGNORECASE), f"{item.source}: {answer}"


@pytest.mark.parametrize("name", NAMES)
def test_no_word_of_its_own_is_in_more_than_a_quarter_of_a_characters_lines(name):
    """A word is a character's own if it is in at least three times as large a share of its lines as of any other's."""
    for token in {w for line in lines(name) for w in words(line)}:
        own, others = share(name, token), max(share(other, token) for other in NAMES if other != name)
        assert own <= MARKER or own < 3 * others, f"{token!r}: {own:.2f} against {others:.2f}"


def right_character_by_words(count):
    """Share of right choices among four held-out answers, by the ``count`` most one-sided words of each character."""
    size = len(VOICES.split("calibration"))
    own = {name: Counter(w for line in lines(name, "calibration") for w in set(words(line))) for name in NAMES}
    rest = {name: sum((own[other] for other in NAMES if other != name), Counter()) for name in NAMES}
    known = set()
    for name in NAMES:
        known |= set(sorted(own[name] | rest[name], key=lambda w: (-abs(own[name][w] - rest[name][w] / 3), w))[:count])
    points = []
    for item, name in product(VOICES.split("test"), NAMES):
        odds = {
            other: sum(
                math.log((own[name][w] + 1) / (rest[name][w] / 3 + 1)) for w in sorted(set(words(answer)) & known)
            )
            for other, answer in item.answers.items()
        }
        best = [other for other in NAMES if odds[other] > max(odds.values()) - 1e-9]
        points.append((name in best) / len(best))
    print(f"bag of words, {count} words of each of {size} lines: {sum(points) / len(points):.3f}")
    return sum(points) / len(points)


def test_three_words_of_each_do_not_tell_the_characters_apart():
    assert right_character_by_words(FEW) <= LIMIT
    assert right_character_by_words(10**6) > 0.8, "a voice is its words: all of them tell"


def test_the_exclamation_mark_is_in_most_lines_of_nobody_but_two_thirds_at_most():
    assert all(sum("!" in line for line in lines(name)) / len(VOICES.items) <= 0.65 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_openings_vary(name):
    first = Counter(words(line)[0] for line in lines(name))
    two = Counter(tuple(words(line)[:2]) for line in lines(name))
    assert first.most_common(1)[0][1] <= 0.15 * len(VOICES.items), first.most_common(3)
    assert two.most_common(1)[0][1] <= 0.05 * len(VOICES.items), two.most_common(3)


def test_every_character_has_a_prompt_of_its_own():
    assert len({character_prompt(name) for name in NAMES}) == len(NAMES)
    assert all(character_prompt(name).endswith("Answer every question as such a person would.") for name in NAMES)
