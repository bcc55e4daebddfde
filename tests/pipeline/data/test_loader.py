"""Files as people have them: broken lines are reported with file and line, nothing else is raised than UserError."""

import csv
import json

import pytest

from pipeline.data.catalogue import load_catalogue
from pipeline.data.loader import MAX_FIELD, load_rows
from pipeline.errors import UserError
from pipeline.fingerprint import data_hash

HEAD = "question,matching,not_matching\n"
GOOD = {"question": "Q?", "matching": "a", "not_matching": "b"}


def lines(loaded):
    """Line numbers of the items that name no persona."""
    return [int(item.source.rpartition(":")[2]) for item in loaded.items.get(None, [])]


def problem_lines(loaded, path):
    assert all(p.startswith(f"{path}:") for p in loaded.problems), loaded.problems
    return [int(p.removeprefix(f"{path}:").partition(":")[0]) for p in loaded.problems]


def test_quoted_newlines_do_not_shift_the_line_numbers(write):
    path = write("a.csv", HEAD + '"one\nof\nthree","a\n","b"\nq2,a,b\n"q3\r\nx",,b\nq4,a,b\n')
    loaded = load_rows(path)
    assert lines(loaded) == [2, 6, 9]
    assert problem_lines(loaded, path) == [7]
    assert "field 'matching' is empty" in loaded.problems[0]
    assert loaded.items[None][0].question == "one\nof\nthree"


def test_blank_lines_do_not_shift_the_line_numbers(write):
    path = write("a.csv", HEAD + "q1,a,b\n\n\nq2,,b\nq3,a,b\n")
    loaded = load_rows(path)
    assert problem_lines(loaded, path) == [5]
    assert lines(loaded) == [2, 6]


def test_a_header_over_two_lines_does_not_shift_the_line_numbers(write):
    path = write("a.csv", 'question,matching,not_matching,"my\nnote"\nq1,,b,n\nq2,a,b,n\n')
    loaded = load_rows(path)
    assert problem_lines(loaded, path) == [3]
    assert lines(loaded) == [4]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_with_byte_order_mark(write, newline):
    text = (HEAD + "q,a,b\n").replace("\n", newline)
    loaded = load_rows(write("bom.csv", b"\xef\xbb\xbf" + text.encode()))
    assert [i.question for i in loaded.items[None]] == ["q"]


def test_jsonl_with_byte_order_mark_loads_its_first_line_too(write):
    loaded = load_rows(write("bom.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n"))
    assert lines(loaded) == [1]


def test_too_few_and_too_many_fields(write):
    path = write("a.csv", HEAD + "q1,a\nq2,a,b,c,d\nq3,a,b\n")
    loaded = load_rows(path)
    assert problem_lines(loaded, path) == [2, 3]
    assert "'not_matching'" in loaded.problems[0]
    assert "2 fields too many" in loaded.problems[1]
    assert lines(loaded) == [4]


@pytest.mark.parametrize("content", [HEAD.encode() + b"caf\xe9,a,b\n", HEAD.encode("utf-16")])
def test_csv_that_is_not_utf8(write, content):
    path = write("latin.csv", content)
    with pytest.raises(UserError, match="UTF-8"):
        load_rows(path)


def test_csv_field_beyond_the_limit_and_the_limit_is_restored(write):
    before = csv.field_size_limit(4321)
    try:
        with pytest.raises(UserError, match="field larger than"):
            load_rows(write("big.csv", HEAD + "x" * (MAX_FIELD + 1) + ",a,b\n"))
        assert len(load_rows(write("ok.csv", HEAD + "x" * MAX_FIELD + ",a,b\n")).items[None][0].question) == MAX_FIELD
        assert csv.field_size_limit() == 4321
    finally:
        csv.field_size_limit(before)


def test_repeated_rows_name_the_first(write):
    path = write("a.csv", HEAD + "q,a,b\nq,a,c\nq , a,b\n")
    loaded = load_rows(path)
    assert lines(loaded) == [2, 3]
    assert loaded.problems == [f"{path}:4: the row repeats {path}:2"]


def test_the_same_answer_of_two_personas_is_no_repetition(write):
    rows = [{"persona": p, "question": "Do you sail?", "answer": "Yes"} for p in ("pirate", "captain")]
    loaded = load_rows(write("two.jsonl", rows))
    assert {p: len(items) for p, items in loaded.items.items()} == {"pirate": 1, "captain": 1}


def test_bad_lines_of_jsonl_are_reported_each(write):
    good = json.dumps(GOOD).encode()
    deep = b"[" * 100_000 + b"]" * 100_000
    huge = b'{"question": "' + b"x" * (4 * MAX_FIELD) + b'"}'
    bad = [
        b"{oops",
        b"[1, 2]",
        b'"text"',
        b"null",
        b"",
        b"  \t",
        b"\xff\xfe",
        deep,
        huge,
        b'{"a": ' + b"9" * 9999 + b"}",
    ]
    path = write("bad.jsonl", b"\n".join([*bad, good]))
    loaded = load_rows(path)
    assert problem_lines(loaded, path) == list(range(1, len(bad) + 1))
    for words, problem in zip(
        ("JSON", "a list", "a str", "NoneType", "empty", "empty", "UTF-8", "nested", "bytes", "JSON"),
        loaded.problems,
        strict=True,
    ):
        assert words in problem
        assert len(problem) < 500
    assert lines(loaded) == [len(bad) + 1]


def test_text_that_no_encoder_takes_is_refused(write):
    """A lone surrogate escapes from JSON; hashing and tokenizing it would crash much later."""
    path = write(
        "s.jsonl", b'{"question": "\\ud800", "matching": "a", "not_matching": "b"}\n' + json.dumps(GOOD).encode()
    )
    loaded = load_rows(path)
    data_hash(loaded.items[None])
    assert problem_lines(loaded, path) == [1]


@pytest.mark.parametrize("name", ["nothing.csv", "nothing.jsonl", "folder.csv/x.jsonl"])
def test_missing_file(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    "source",
    ["x" * 5000 + ".csv", "/tmp/" + "x" * 300 + ".csv", "~no-such-user/a.csv", "/a\0b.csv"],
    ids=["long", "long name", "user", "nul"],
)
def test_path_that_the_system_refuses(source):
    with pytest.raises(UserError):
        load_rows(source)


def test_folder(tmp_path):
    with pytest.raises(UserError, match="folder"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a", "a.csv.gz"])
def test_suffix_of_no_known_format(write, name):
    with pytest.raises(UserError, match=r"expected a \.csv or \.jsonl"):
        load_rows(write(name, HEAD))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize("content", ["", "\n\n", HEAD])
def test_nothing_usable(write, name, content):
    with pytest.raises(UserError, match=r"a\.(csv|jsonl).*no usable rows"):
        load_rows(write(name, content))


def test_nothing_usable_states_the_first_problem(write):
    path = write("a.csv", HEAD + "q,,b\nq,a,\n")
    with pytest.raises(UserError, match=r"a\.csv:2: field 'matching' is empty"):
        load_rows(path)


@pytest.mark.parametrize(
    ("bad", "words"), [("{oops", "JSON"), ("", "empty"), (json.dumps(GOOD), "repeats"), ("{}", "none")]
)
def test_strict_raises_with_file_and_line(write, bad, words):
    path = write("a.jsonl", json.dumps(GOOD) + "\n" + bad + "\n" + json.dumps(GOOD | {"question": "R?"}))
    assert len(load_rows(path).problems) == 1
    with pytest.raises(UserError, match=words) as caught:
        load_rows(path, strict=True)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_strict_reaches_the_loader_through_the_catalogue(write):
    path = write("a.csv", HEAD + "q,,b\nq,a,b\n")
    assert len(load_catalogue(f"me={path}").problems) == 1
    with pytest.raises(UserError, match=r"a\.csv:2"):
        load_catalogue(f"me={path}", strict=True)


def test_test_questions_that_are_calibration_questions_are_left_out(write):
    rows = [
        GOOD | {"split": "calibration"},
        GOOD | {"split": "test", "question": "q?", "matching": "c"},
        GOOD | {"split": "test", "question": "other"},
    ]
    path = write("split.jsonl", rows)
    loaded = load_rows(path)
    assert lines(loaded) == [1, 3]
    assert problem_lines(loaded, path) == [2]
    assert f"{path}:1" in loaded.problems[0]
    with pytest.raises(UserError, match=r"split\.jsonl:2"):
        load_rows(path, strict=True)


def test_texts_without_question_do_not_cross_the_split(write):
    rows = [{"persona": "p", "text": f"text {i}", "split": s} for i, s in enumerate(("calibration", "test", "test"))]
    loaded = load_rows(write("texts.jsonl", rows))
    assert loaded.problems == []
    assert [i.split for i in loaded.items["p"]] == ["calibration", "test", "test"]


def test_personas_named_by_rows_are_kept_apart(write):
    rows = [{"persona": p, "text": f"{p} {i}"} for i in range(2) for p in ("cook", "sailor")]
    loaded = load_rows(write("p.json", rows))
    assert {p: [i.matching for i in v] for p, v in loaded.items.items()} == {
        "cook": ["cook 0", "cook 1"],
        "sailor": ["sailor 0", "sailor 1"],
    }
