"""The published files in ../shared/data, where they are present."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.catalogue import load_catalogue
from pipeline.data.loader import load_rows
from pipeline.errors import UserError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
TRAITS = ("conscientiousness", "extraversion", "neuroticism", "risk-seeking")
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there (data for development only)")


def test_wealth_train_reports_the_empty_row_and_the_repeated_ones():
    path = SHARED / "wealth" / "train.csv"
    with open(path, encoding="utf-8", newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 623
    loaded = load_rows(str(path))
    assert f"{path}:238: field 'question' is empty" in loaded.problems
    repeats = [p for p in loaded.problems if "repeats" in p]
    assert len(loaded.problems) == len(repeats) + 1
    assert len(loaded.items[None]) + len(loaded.problems) == 623
    assert path.read_text(encoding="utf-8").splitlines()[237].startswith(",")


def test_wealth_train_in_strict_mode_stops_at_its_first_problem():
    path = SHARED / "wealth" / "train.csv"
    first = load_rows(str(path)).problems[0]
    with pytest.raises(UserError) as caught:
        load_rows(str(path), strict=True)
    assert str(caught.value) == first


def test_wealth_test_has_balanced_letters():
    loaded = load_rows(str(SHARED / "wealth" / "test.csv"), strict=True)
    items = loaded.items[None]
    assert len(items) == 200
    assert {i.form for i in items} == {"two-way"}
    assert Counter(i.first for i in items) == {"matching": 100, "other": 100}


def test_wealth_test_matching_is_the_answer_of_the_letter():
    path = SHARED / "wealth" / "test.csv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, item in zip(rows, load_rows(str(path)).items[None], strict=True):
        assert item.matching == row[row["matching"]].strip()


@pytest.mark.parametrize("trait", TRAITS)
def test_traits_are_a_thousand_statements_half_of_them_denied(trait):
    path = SHARED / "traits" / f"{trait}.jsonl"
    items = load_rows(str(path), strict=True).items[None]
    assert len(items) == 1000
    assert {i.form for i in items} == {"statement"}
    assert Counter((i.matching, i.other) for i in items) == {("Yes", "No"): 500, ("No", "Yes"): 500}
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert first["statement"] in items[0].question


def test_default_names_of_the_published_files():
    folder = SHARED / "wealth"
    assert load_catalogue(str(folder / "train.csv")).measured == ["wealth", "not-wealth"]
    assert load_catalogue(str(SHARED / "traits" / "neuroticism.jsonl")).measured == ["neuroticism", "not-neuroticism"]
