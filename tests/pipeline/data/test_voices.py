"""The voices form: JSON Lines and CSV, and what is wrong with a row, by file and line."""

import json

import pytest

from pipeline.data.catalogue import CHARACTER_NAMES, load_catalogue, persona_prompt
from pipeline.data.voices import VoiceItem, against_the_others, character_prompt, load_voices, shipped_characters
from pipeline.errors import UserError


def row(number, **answers):
    return {"question": f"Q{number}?", "answers": answers or {"cat": f"miaow {number}", "dog": f"woof {number}"}}


def problems(voices, path):
    """Line number -> message."""
    assert all(p.startswith(f"{path}:") for p in voices.problems), voices.problems
    told = [p.removeprefix(f"{path}:").partition(": ") for p in voices.problems]
    return {int(line): what for line, _, what in told}


def test_json_lines(write):
    path = write("v.jsonl", [row(1) | {"topic": "food", "split": "calibration"}, row(2) | {"split": "test"}, row(3)])
    voices = load_voices(path, strict=True)
    assert voices.names == ("cat", "dog")
    assert voices.items[0] == VoiceItem("Q1?", {"cat": "miaow 1", "dog": "woof 1"}, "food", "calibration", f"{path}:1")
    assert [i.question for i in voices.split("calibration")] == ["Q1?", "Q3?"]
    assert [i.question for i in voices.split("test")] == ["Q2?", "Q3?"]
    assert voices.problems == ()


@pytest.mark.parametrize("split", ["", "calibration", "test"])
def test_csv_with_one_column_per_persona(write, split):
    path = write("v.csv", f'question,cat,topic,split,dog\n"Q,\n1?", miaow ,food,{split},woof\nQ2?,a,,,b\n')
    voices = load_voices(path, strict=True)
    assert voices.names == ("cat", "dog")
    assert voices.items[0] == VoiceItem("Q,\n1?", {"cat": "miaow", "dog": "woof"}, "food", split, f"{path}:2")
    assert voices.items[1].source == f"{path}:4"


def test_both_kinds_hold_the_same(write):
    rows = [row(n) for n in range(3)]
    text = "question,cat,dog\n" + "".join(
        f"{r['question']},{r['answers']['cat']},{r['answers']['dog']}\n" for r in rows
    )
    kinds = [load_voices(path) for path in (write("v.jsonl", rows), write("v.csv", text))]
    assert [[(i.question, i.answers) for i in kind.items] for kind in kinds] == [
        [(r["question"], r["answers"]) for r in rows]
    ] * 2


BROKEN = {
    "missing answer": (row(9, cat="x", cow="y"), "no answer of 'dog'"),
    "foreign answer": (row(9, cat="x", dog="y", cow="z"), "an answer of 'cow', whom most rows do not name"),
    "empty answer": (row(9, cat="x", dog=" "), "field 'dog' is empty"),
    "no text": (row(9, cat="x", dog=3), "field 'dog' must be text, it is a int"),
    "null": (row(9, cat="x", dog=None), "field 'dog' must be text, it is empty"),
    "one persona": (row(9, cat="x"), "1 personas answer"),
    "same answers": (row(9, cat="x", dog="x "), "the answers of 'cat' and 'dog' are the same"),
    "no question": ({"answers": {"cat": "x", "dog": "y"}}, "field 'question' must be text, it is empty"),
    "blank question": (row(9) | {"question": "\n"}, "field 'question' is empty"),
    "bad split": (row(9) | {"split": "train"}, "field 'split' must be calibration or test"),
    "answers of no object": (row(9) | {"answers": ["x", "y"]}, "field 'answers' must be an object"),
    "bad name": (row(9, **{"cat": "x", "../dog": "y"}), "persona name '../dog'"),
    "reserved name": (row(9, neutral="x", dog="y"), "persona name 'neutral' is reserved"),
    "repeated": (row(1), "the row repeats"),
    "answer twice": (
        '{"question": "Q9?", "answers": {"cat": "x", "dog": "y", "cat": "z"}}',
        "field 'cat' is given twice",
    ),
    "not JSON": ("{", "not a line of JSON"),
    "empty line": (" ", "the line is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_left_out_and_reported_with_its_line(write, name):
    broken, message = BROKEN[name]
    rows = [row(1), row(2), broken, row(4)]
    path = write("v.jsonl", "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    voices = load_voices(path)
    assert [i.question for i in voices.items] == ["Q1?", "Q2?", "Q4?"]
    assert voices.names == ("cat", "dog")
    told = problems(voices, path)
    assert list(told) == [3]
    assert message in told[3]
    with pytest.raises(UserError, match=":3: "):
        load_voices(path, strict=True)


def test_a_broken_first_row_does_not_name_the_personas(write):
    voices = load_voices(write("v.jsonl", [row(1, cow="x", dog="y"), row(2), row(3)]))
    assert voices.names == ("cat", "dog")
    assert len(voices.items) == 2


def test_problems_come_in_the_order_of_the_lines(write):
    path = write("v.jsonl", [row(1), row(2, cat="x", cow="y"), row(3, cat="x"), row(1), row(5, dog="", cat="")])
    assert list(problems(load_voices(path), path)) == [2, 3, 4, 5]


def test_csv_problems_name_the_line(write):
    path = write("v.csv", "question,cat,dog\nQ1?,a,b\n\nQ2?,a\nQ3?,a,a\nQ4?,a,b,c\nQ5?,c,d\n")
    voices = load_voices(path)
    assert [i.question for i in voices.items] == ["Q1?", "Q5?"]
    told = problems(voices, path)
    assert list(told) == [4, 5, 6]
    assert "'dog' must be text, it is empty" in told[4]
    assert "are the same" in told[5]
    assert "too many" in told[6]


def test_two_columns_of_one_name(write):
    path = write("v.csv", "question,cat,dog,,,cat\nQ1?,a,b,,,c\n")
    with pytest.raises(UserError, match=":1: two columns are called 'cat'"):
        load_voices(path)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_test_question_that_is_a_calibration_question_is_left_out(write, order):
    rows = [row(1) | {"split": "calibration"}, row(1, cat="other", dog="words") | {"question": "q1?", "split": "test"}]
    path = write("v.jsonl", [rows[i] for i in order])
    voices = load_voices(path)
    assert [i.split for i in voices.items] == ["calibration"]
    assert problems(voices, path) == {order.index(1) + 1: f"repeats the question of {path}:{order.index(0) + 1}"}


@pytest.mark.parametrize("content", ["", "\n", '{"question": "Q?"}\n', '{"question": "Q?", "matching": "a"}\n'])
def test_no_usable_row(write, content):
    with pytest.raises(UserError, match="no usable rows"):
        load_voices(write("v.jsonl", content))


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_voices(str(tmp_path / "v.jsonl"))


def test_every_persona_against_the_others_in_turn():
    voices = shipped_characters()
    for name, personas in zip(voices.names, against_the_others(voices), strict=True):
        assert personas.poles == (name, f"not-{name}")
        opponents = []
        for told, item in zip(voices.items, personas.items, strict=True):
            speaker = {answer: who for who, answer in told.answers.items()}
            assert (item.question, item.split, speaker[item.matching]) == (told.question, told.split, name)
            opponents.append(speaker[item.other])
        counts = [opponents.count(other) for other in voices.names if other != name]
        assert sum(counts) == len(voices.items)
        assert max(counts) - min(counts) <= 1


def test_voices_on_the_command_line(write):
    shipped = load_catalogue("characters")
    assert [s.plus for s in shipped.sets] == list(shipped_characters().names)
    assert [len(s.split("calibration")) for s in shipped.sets] == [80] * 4
    assert tuple(s.plus for s in shipped.sets) == CHARACTER_NAMES
    assert load_catalogue("robot,pirate").sets == [s for n in ("robot", "pirate") for s in shipped.sets if s.plus == n]
    path = write("voices.jsonl", [row(n) for n in range(4)])
    own = load_catalogue(f"voices:{path}")
    assert own.opponents == {n: f"not-{n}" for n in row(0)["answers"]} | {f"not-{n}": n for n in row(0)["answers"]}
    assert persona_prompt("pirate", "characters") == character_prompt("pirate") != persona_prompt("pirate")
