"""The grammar of --personas: shipped sets, types, own sources, names and their clashes."""

import pytest

from pipeline.data.catalogue import DICHOTOMIES, POLE_OF_LETTER, TYPES, load_catalogue, opposite_type, shipped_set
from pipeline.errors import UserError

POLES = [pole for name in DICHOTOMIES for pole in name.split("-")]
PAIR = [{"question": f"Q{i}?", "matching": f"a{i}", "not_matching": f"b{i}"} for i in range(3)]
PLAIN = [{"question": f"Q{i}?", "answer": f"a{i}"} for i in range(3)]


@pytest.fixture
def pair(write):
    return write("cats.jsonl", PAIR)


@pytest.fixture
def plain(write):
    return write("dogs.jsonl", PLAIN)


def parts(catalogue, name):
    return dict(next(c.parts for c in catalogue.compositions if c.name == name))


def test_dichotomies_are_the_four_shipped_sets():
    catalogue = load_catalogue("dichotomies")
    assert catalogue.measured == catalogue.personas == POLES
    assert catalogue.opponents["feeling"] == "thinking"
    assert catalogue.opponents["thinking"] == "feeling"
    assert len(catalogue.opponents) == 8
    assert catalogue.compositions == []
    assert catalogue.problems == []


def test_types_are_sixteen_each_from_its_own_four_letters():
    catalogue = load_catalogue("types")
    assert sorted(catalogue.personas) == sorted(TYPES)
    assert len(set(TYPES)) == 16
    assert catalogue.measured == POLES
    assert parts(catalogue, "ENFP") == {"extravert": 1.0, "intuitive": 1.0, "feeling": 1.0, "perceiving": 1.0}
    for name in TYPES:
        other = catalogue.opponents[name]
        assert catalogue.opponents[other] == name
        assert not set(parts(catalogue, name)) & set(parts(catalogue, other))


@pytest.mark.parametrize("text", ["INTJ", "intj", " INTJ ,", "INTJ,ESFP", "INTJ,INTJ"])
def test_a_type_brings_its_opposite(text):
    catalogue = load_catalogue(text)
    assert catalogue.personas == ["INTJ", "ESFP"]
    assert catalogue.opponents["INTJ"] == "ESFP"
    assert parts(catalogue, "ESFP") == {"extravert": 1.0, "sensing": 1.0, "feeling": 1.0, "perceiving": 1.0}


def test_opposites_differ_in_every_letter():
    assert opposite_type("INTJ") == "ESFP"
    for name in TYPES:
        assert opposite_type(opposite_type(name)) == name
        assert all(a != b for a, b in zip(name, opposite_type(name), strict=True))
    assert POLE_OF_LETTER["N"] == "intuitive"
    assert POLE_OF_LETTER["I"] == "introvert"


def test_one_shipped_set_by_name():
    catalogue = load_catalogue("judging-perceiving")
    assert catalogue.measured == ["judging", "perceiving"]
    assert len(catalogue.sets[0].split("calibration")) == 120
    assert len(catalogue.sets[0].split("test")) == 40
    assert not {i.question for i in catalogue.sets[0].split("test")} & {
        i.question for i in catalogue.sets[0].split("calibration")
    }


@pytest.mark.parametrize("text", ["dichotomies,INTJ", "INTJ,dichotomies", "INTJ,feeling-thinking"])
def test_sets_and_types_together_in_any_order(text):
    catalogue = load_catalogue(text)
    assert sorted(catalogue.measured) == sorted(POLES)
    assert "INTJ" in catalogue.personas


def test_own_pair_named_on_the_command_line(pair):
    catalogue = load_catalogue(f"kind/cruel={pair}")
    assert catalogue.measured == ["kind", "cruel"]
    assert catalogue.opponents == {"kind": "cruel", "cruel": "kind"}
    assert [i.matching for i in catalogue.sets[0].items] == ["a0", "a1", "a2"]
    assert catalogue.sets[0].source == pair


def test_the_opposite_is_named_after_the_first_when_left_out(pair):
    assert load_catalogue(f"kind={pair}").measured == ["kind", "not-kind"]


@pytest.mark.parametrize(
    ("name", "persona"),
    [
        ("wealth/train.csv", "wealth"),
        ("wealth/Test.csv", "wealth"),
        ("wealth/data.csv", "wealth"),
        ("wealth/greed.csv", "greed"),
        ("wealth/my greed (new).csv", "my-greed-new"),
        ("wealth/v1.2.csv", "v1.2"),
    ],
)
def test_default_name_from_file_or_folder(write, name, persona):
    path = write(name, "question,matching,not_matching\nq,a,b\n")
    assert load_catalogue(path).measured == [persona, f"not-{persona}"]


def test_answers_without_opposite_make_one_persona(plain):
    catalogue = load_catalogue(plain)
    assert catalogue.measured == ["dogs"]
    assert catalogue.sets[0].minus is None
    assert catalogue.opponents == {}
    assert load_catalogue(f"hounds={plain}").measured == ["hounds"]


def test_personas_named_in_the_rows(write):
    path = write("many.jsonl", [{"persona": p, "text": f"I am {p} {i}"} for i in range(2) for p in ("cook", "sailor")])
    catalogue = load_catalogue(path)
    assert catalogue.measured == ["cook", "sailor"]
    assert [i.matching for i in catalogue.sets[1].items] == ["I am sailor 0", "I am sailor 1"]
    with pytest.raises(UserError, match="cook, sailor"):
        load_catalogue(f"me={path}")


def test_two_forms_in_one_file_are_refused(write):
    path = write("mixed.jsonl", [*PAIR, PLAIN[0]])
    with pytest.raises(UserError, match=r"mixed\.jsonl:4.*one form per file"):
        load_catalogue(path)


def test_shipped_and_own_sets_together(pair, plain):
    catalogue = load_catalogue(f"feeling-thinking, kind/cruel={pair},{plain}")
    assert catalogue.measured == ["feeling", "thinking", "kind", "cruel", "dogs"]


@pytest.mark.parametrize("text", ["", " , ,"])
def test_no_persona(text):
    with pytest.raises(UserError, match="no persona"):
        load_catalogue(text)


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../b", "..", ".hidden", "-dash", "a b", "x" * 65, "é", "a\nb", "a/b/c", "/abs", "a..b"],
)
def test_names_that_are_no_file_names(pair, name):
    with pytest.raises(UserError, match="persona name"):
        load_catalogue(f"{name}={pair}")


@pytest.mark.parametrize("name", ["../evil", "a b", "x" * 65, ".."])
def test_names_in_rows_are_checked_too(write, name):
    path = write("rows.jsonl", [{"persona": name, "text": "hello"}])
    with pytest.raises(UserError, match="persona name"):
        load_catalogue(path)


def test_long_names_fit_up_to_64(pair):
    assert load_catalogue(f"{'x' * 64}/{'y' * 64}={pair}").measured == ["x" * 64, "y" * 64]


@pytest.mark.parametrize(
    "text", ["{0},{0}", "kind/cruel={0},cruel/kind={0}", "introvert/quiet={0},introvert-extravert"]
)
def test_the_same_name_twice(pair, text):
    with pytest.raises(UserError, match="two sources"):
        load_catalogue(text.format(pair))


def test_both_poles_with_one_name(pair):
    with pytest.raises(UserError):
        load_catalogue(f"same/same={pair}")


@pytest.mark.parametrize("text", ["INTJ/x={0},types", "types,INTJ/x={0}"])
def test_own_persona_called_like_a_type(pair, text):
    with pytest.raises(UserError):
        load_catalogue(text.format(pair))


@pytest.mark.parametrize("name", ["none", "neutral"])
def test_names_with_a_meaning_of_their_own(pair, name):
    """In the chat "none" is the unmasked model; criterion neutral adds a set named "neutral"."""
    with pytest.raises(UserError):
        load_catalogue(f"{name}={pair}")


def test_own_persona_called_like_a_pole_never_leaves_a_type_half_measured(plain):
    """INTJ's opposite needs "extravert", which a set of one's own named "introvert" does not have."""
    try:
        catalogue = load_catalogue(f"introvert={plain},INTJ")
    except UserError:
        return
    assert {pole for c in catalogue.compositions for pole, _ in c.parts} <= set(catalogue.measured)


def test_hub_id_without_network_says_what_is_wrong(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"neither a local file nor a dataset.*HF_HUB_OFFLINE is set") as caught:
        load_catalogue("kind=nobody/no-such-set:test")
    assert "nobody/no-such-set" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_items_seen_from_the_opposite_pole():
    for item in shipped_set("introvert-extravert").items[:20]:
        back = item.swapped()
        assert (back.matching, back.other, back.question) == (item.other, item.matching, item.question)
        assert {item.first, back.first} == {"matching", "other"}
        assert back.swapped() == item
