"""The questionnaire: balance, lengths, distance from every other set, and rows that cannot be used."""

import json
import re

import pytest

from pipeline.data.catalogue import DICHOTOMIES, neutral_set, neutral_texts, shipped_set
from pipeline.data.questionnaire import load_questionnaire, questionnaire
from pipeline.data.voices import shipped_characters
from pipeline.errors import UserError

FORBIDDEN = (
    r"introver\w*|extrav\w*|extrov\w*|intuit\w*|sens(?:e|ed|es|ing|ory)|sensors?|feel\w*|felt|think\w*|judg\w*|"
    r"perceiv\w*|percepti\w*|personalit\w*|personas?|myers|briggs|mbti|shy|shyness|outgoing|sociable|loners?"
)
GRAM = 5
SETS = questionnaire()
ITEMS = [item for personas in SETS for item in personas.items]
ROW = {"dichotomy": "introvert-extravert", "question": "Q?", "options": {"introvert": "a", "extravert": "b"}}


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


def grams(text):
    tokens = words(text)
    return {" ".join(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)}


def other_texts():
    for name in [*DICHOTOMIES, "neutral"]:
        for item in (neutral_set() if name == "neutral" else shipped_set(name)).items:
            yield from (item.question, item.matching, item.other or "")
    for voice in shipped_characters().items:
        yield from (voice.question, *voice.answers.values())
    yield from neutral_texts()


def test_eight_items_per_dichotomy_in_both_orders_equally_often():
    assert ["-".join(s.poles) for s in SETS] == list(DICHOTOMIES)
    for personas in SETS:
        assert len(personas.items) == 8
        assert [i.first for i in personas.items].count("matching") == 4
        assert {i.split for i in personas.items} == {"test"}
        assert {i.form for i in personas.items} == {"two-way"}


def test_nothing_is_repeated():
    assert len({i.question for i in ITEMS}) == 32
    assert len({text for i in ITEMS for text in (i.matching, i.other)}) == 64


def test_options_are_short_of_like_length_and_in_the_first_person():
    for item in ITEMS:
        plus, minus = len(words(item.matching)), len(words(item.other))
        assert 6 <= min(plus, minus) <= max(plus, minus) <= 14, item.source
        assert abs(plus - minus) <= 2, item.source
        for option in (item.matching, item.other):
            assert re.match(r"I\b", option), item.source
            assert option[-1] == ".", item.source
        assert item.question[-1] == "?", item.source
    for personas in SETS:
        plus = sum(len(words(i.matching)) for i in personas.items)
        minus = sum(len(words(i.other)) for i in personas.items)
        assert abs(plus / minus - 1) <= 0.05


def test_no_trait_is_named():
    for item in ITEMS:
        for text in (item.question, item.matching, item.other):
            assert not re.search(rf"\b(?:{FORBIDDEN})\b", text, re.IGNORECASE), f"{item.source}: {text}"


def test_no_five_words_in_a_row_are_shared_with_another_set():
    known = {gram: text for text in other_texts() for gram in grams(text)}
    assert len(known) > 20_000
    found = [
        f"{item.source}: {gram!r} is in {known[gram]!r}"
        for item in ITEMS
        for text in (item.question, item.matching, item.other)
        for gram in sorted(grams(text) & known.keys())
    ]
    assert found == []


def test_the_option_named_first_is_listed_first(write):
    flipped = ROW | {"question": "R?", "options": {"extravert": "b", "introvert": "a"}}
    (personas,) = load_questionnaire(write("q.jsonl", [ROW, flipped]))
    assert [(i.matching, i.other, i.first) for i in personas.items] == [("a", "b", "matching"), ("a", "b", "other")]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ROW | {"dichotomy": "up-down"}, "unknown dichotomy 'up-down'"),
        (ROW | {"options": {"introvert": "a", "thinking": "b"}}, "'options' must be an object"),
        (ROW | {"options": ["a", "b"]}, "'options' must be an object"),
        (ROW | {"options": {"introvert": "a", "extravert": ""}}, "field 'extravert' is empty"),
        (ROW | {"options": {"introvert": "a", "extravert": "a"}}, "both options are the same"),
        (ROW | {"question": "Q1?"}, "repeats the question of"),
        ({"question": "Q?"}, "field 'dichotomy'"),
        ("{", "not a line of JSON"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_with_its_line(write, broken, message):
    rows = [ROW | {"question": "Q1?"}, broken]
    path = write("q.jsonl", "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    with pytest.raises(UserError, match=f"^{re.escape(path)}:2: .*{message}"):
        load_questionnaire(path)


def test_an_empty_questionnaire(write):
    with pytest.raises(UserError, match="no usable rows"):
        load_questionnaire(write("q.jsonl", ""))
