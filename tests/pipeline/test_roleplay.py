"""Role play as multiple choice: hand-made scores, the program on the tiny model, RoleAgentBench's layout."""

import json

import pytest
import torch

from pipeline import roleplay
from pipeline.choosing import Answered, answered, chance, credit, role_record, together
from pipeline.data.catalogue import load_catalogue
from pipeline.data.choices import Choice, load_reactions, reaction_sets
from pipeline.data.prompts import Prompter
from pipeline.errors import UserError
from pipeline.model import PersonaModel
from pipeline.options import RoleplayConfig

NAMES = ("fox", "dog", "cat")


def choices(count, names=NAMES):
    right = {name: place for place, name in enumerate(names)}
    return [Choice(f"Q{i}", tuple(f"{n} {i}" for n in names), right, names) for i in range(count)]


def test_ties_share_the_choice():
    assert credit([-1.0, -2.0, -3.0]) == [1.0, 0.0, 0.0]
    assert credit([-2.0, -1.0, -1.0]) == [0.0, 0.5, 0.5]
    assert sum(credit([0.0] * 3)) == pytest.approx(1)


def test_the_unmasked_mean_is_chance_whatever_the_model_likes():
    """One line of n is the likeliest, so the characters' unmasked accuracies add up to one."""
    asked = choices(3)
    scores = [[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0], [-1.0, -1.0, -2.0]]
    parts = [answered(asked, scores, scores, name) for name in NAMES]
    assert [part.right for part in parts] == [[1, 0, 0.5], [0, 1, 0.5], [0, 0, 0]]
    assert [part.raised for part in parts] == [pytest.approx([1 / 3] * 3)] * 3
    assert parts[1].own == [-2.0, -1.0, -1.0]
    assert parts[0].chosen[2] == {"fox": 0.5, "dog": 0.5, "cat": 0.0}
    assert together(parts).right == pytest.approx([1 / 3] * 3)
    assert chance(asked, "dog") == pytest.approx(1 / 3)


def test_the_line_that_gained_most_need_not_be_the_likeliest():
    base, now = [[-1.0, -5.0, -9.0], [-1.0, -5.0, -9.0]], [[-1.5, -3.0, -8.0], [-1.0, -5.0, -8.5]]
    fox, dog, cat = (answered(choices(2), now, base, name) for name in NAMES)
    assert (fox.right, dog.right) == ([1, 1], [0, 0])
    assert (fox.raised, dog.raised, cat.raised) == ([0, 0], [1, 0], [0, 1])


def test_a_record_against_the_unmasked_model():
    base = Answered([0.0, 1.0, 0.0, 0.0], [0.5] * 4, [-4.0] * 4, [{"fox": 0.0, "dog": 1.0}] * 4)
    now = Answered(
        [1.0, 1.0, 0.0, 1.0],
        [1.0, 1.0, 1.0, 0.0],
        [-3.0] * 4,
        [{"fox": 1.0, "dog": 0.0}] * 3 + [{"fox": 0.0, "dog": 1.0}],
    )
    words = {"guess": 0.25, "removed": 0.02, "perplexity": 30.0, "resamples": 200, "seed": 1}
    record = role_record("own mask", "fox", now, base, **words)
    assert (record.n, record.accuracy, record.gain, record.own_line_change) == (4, 0.75, 0.5, 1.0)
    assert 0 <= record.low <= 0.75 <= record.high <= 1
    assert -1 <= record.gain_low <= 0.5 <= record.gain_high <= 1
    assert (record.raised, record.raised_low <= 0.75 <= record.raised_high) == (0.75, True)
    assert record.chosen == {"fox": 0.75, "dog": 0.25}


def test_items_of_other_characters_do_not_count():
    asked = [Choice("Q", ("a", "b"), {"fox": 0}), Choice("Q", ("a", "b", "c", "d"), {"dog": 3})]
    scores = [[0.0, -1.0], [-1.0, -2.0, -3.0, 0.0]]
    got = answered(asked, scores, scores, "dog")
    assert (got.right, got.raised, got.own, got.chosen) == ([1.0], [0.25], [0.0], [{}])
    assert (chance(asked, "fox"), chance(asked, "dog")) == (0.5, 0.25)


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    path = tmp_path_factory.mktemp("voices") / "voices.jsonl"
    rows = []
    for number in range(12):
        answers = {name: f"the {name} likes dog {number}" + " and jumps" * place for place, name in enumerate(NAMES)}
        rows.append({"question": f"What now, {number}?", "split": "test" if number > 7 else "", "answers": answers})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def cast(voices, words):
    from pipeline import calibrate

    folder = voices.parent / "run"
    options = ("--criterion", "wanda", "--sparsity", "0.4", "--samples", "4")
    assert calibrate.main(words(folder, *options, personas=f"voices:{voices}")) == 0
    return folder


def mean_by_hand(model, prompter, question, line):
    """Mean log-probability per token of a line, from the model's logits, one sequence at a time."""
    encoded = prompter.encode(question, line)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded.ids])).logits[0].double().log_softmax(-1)
    places = range(encoded.answer, len(encoded))
    return sum(logits[t - 1, encoded.ids[t]].item() for t in places) / len(places)


def test_the_program_against_a_loop(cast, voices, tmp_path, capsys):
    file = tmp_path / "new" / "r.json"
    options = ["--texts", "1", "--bootstrap", "50", "--json", str(file), "--conditions", "prompt,mask,random,rag"]
    assert roleplay.main([str(cast), *options]) == 0
    report = json.loads(file.read_text())
    assert (report["schema"], report["version"], report["characters"]) == ("persona-subnetworks/roleplay", 1, [*NAMES])
    by = {(r["condition"], r["persona"]): r for r in report["records"]}
    assert {c for c, _ in by} == {"unmasked", "prompt", "own mask", "random mask", "in context"}
    assert all((c, p) in by for c in ("unmasked", "own mask") for p in (*NAMES, None))
    assert by["unmasked", None]["accuracy"] == pytest.approx(1 / 3)
    assert by["unmasked", "fox"]["gain"] == by["unmasked", "fox"]["own_line_change"] == 0
    assert by["unmasked", "fox"]["raised"] == pytest.approx(1 / 3)
    assert sum(by["own mask", name]["raised"] for name in NAMES) == pytest.approx(3 * by["own mask", None]["raised"])
    # Which questions were held out: the last four, and of the others those that were not drawn.
    used = set(json.loads((cast / "manifest.json").read_text())["personas"]["questions"]["fox"])
    assert (len(used), by["own mask", "dog"]["n"]) == (4, 8)
    model = PersonaModel.from_pretrained(cast)
    prompter = Prompter(model.tokenizer)
    config = RoleplayConfig(cast)
    asked = roleplay.held_out_choices(model.masks.manifest, config)
    for name in NAMES:
        for condition, mask in (("unmasked", None), ("own mask", name)):
            right = 0
            with model.using(mask):
                for choice in asked:
                    scores = [mean_by_hand(model, prompter, choice.question, line) for line in choice.lines]
                    right += max(scores) == scores[NAMES.index(name)]
            assert by[condition, name]["accuracy"] == pytest.approx(right / 8)
            assert by[condition, name]["removed"] == pytest.approx(0.4 if mask else 0, abs=0.03)
    assert sum(by["own mask", "cat"]["chosen"].values()) == pytest.approx(1)
    out = capsys.readouterr().out
    assert "chance 33%" in out
    assert "mean of all characters" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "introvert-extravert"], "characters, voices:FILE or roleagentbench:FOLDER"),
        (["--data", "characters"], "no mask of a character that is asked (butler, detective, pirate, robot)"),
        (["--data", "voices:nowhere.jsonl"], "no such file"),
        (["--data", "roleagentbench:nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_asked(cast, capsys, options, message):
    assert roleplay.main([str(cast), *options]) == 2
    assert message in capsys.readouterr().err


def test_one_character_is_asked_against_the_lines_of_all():
    manifest = {"options": {"personas": "pirate"}, "masks": {"pirate": {}}, "personas": {"questions": {}}}
    asked = roleplay.held_out_choices(manifest, RoleplayConfig("run", samples=5))
    assert len(asked) == 5
    assert all(set(choice.right) == {"pirate", "butler", "detective", "robot"} for choice in asked)


def test_a_run_without_voices(finished, capsys):
    assert roleplay.main([str(finished)]) == 2
    assert "the run's personas are no voices" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        roleplay.main([str(finished), "--conditions", "steering"])
    assert "--conditions: unknown 'steering'" in capsys.readouterr().err


def reaction(role, number, answer="B", **changes):
    row = {"source_role": "Ann", "target_role": role, "question": f"Well, {number}?", "gt_answer": answer}
    return row | {"multi_choices": [f"A. no {number}", f"B. yes {number}", f"C: maybe {number}"]} | changes


@pytest.fixture
def bench(tmp_path):
    rows = [reaction("Old Bob", n) for n in range(6)] + [reaction("Eve", n, "C") for n in range(3)]
    rows += [reaction("小明", 1), reaction("Eve", 9, "Z"), reaction("Eve", 10, multi_choices="A. x"), 7]
    (tmp_path / "A Script").mkdir()
    (tmp_path / "A Script" / "reaction.json").write_text(json.dumps(rows))
    return tmp_path


def test_reactions_of_roleagentbench(bench):
    found, problems = load_reactions(str(bench))
    assert [c.right for c in found] == [{"Old-Bob": 1}] * 6 + [{"Eve": 2}] * 3
    assert (found[0].question, found[0].lines) == ("Ann: Well, 0?", ("no 0", "yes 0", "maybe 0"))
    assert [c.split for c in found[:6]] == ["calibration", "calibration", "test"] * 2
    assert len(problems) == 4
    for part in ("target_role", "'gt_answer' must be one of A, B, C, got 'Z'", "list of two or more", "found a int"):
        assert any(part in problem for problem in problems), part
    bob, eve = reaction_sets(found, "x")
    assert (bob.poles, eve.poles) == (("Old-Bob", "not-Old-Bob"), ("Eve", "not-Eve"))
    assert [(i.matching, i.other) for i in bob.items[:3]] == [
        ("yes 0", "no 0"),
        ("yes 1", "maybe 1"),
        ("yes 2", "no 2"),
    ]
    assert load_reactions(str(bench / "A Script"))[0] == found
    assert load_catalogue(f"roleagentbench:{bench}").personas == ["Old-Bob", "not-Old-Bob", "Eve", "not-Eve"]
    with pytest.raises(UserError, match="target_role"):
        load_catalogue(f"roleagentbench:{bench}", strict=True)


def test_reactions_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no reaction.json there"):
        load_reactions(str(tmp_path))
    (tmp_path / "reaction.json").write_text("{}")
    with pytest.raises(UserError, match="expected a list of reactions, found a dict"):
        load_reactions(str(tmp_path))
    (tmp_path / "reaction.json").write_text("[")
    with pytest.raises(UserError, match="not JSON"):
        load_reactions(str(tmp_path))
    (tmp_path / "reaction.json").write_text("[]")
    with pytest.raises(UserError, match="no usable reactions"):
        load_reactions(str(tmp_path))


def test_a_hub_id_is_downloaded(monkeypatch, bench):
    import huggingface_hub

    asked = []

    def download(source, **options):
        asked.append((source, options["repo_type"], options["allow_patterns"]))
        return str(bench)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(load_reactions("RoleAgent/RoleAgentBench")[0]) == 9
    assert asked == [("RoleAgent/RoleAgentBench", "dataset", "*/reaction.json")]

    def refuse(source, **options):
        raise OSError("offline\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"neither a folder nor a data set that can be downloaded \(offline\)"):
        load_reactions("RoleAgent/RoleAgentBench")


def test_roles_from_reactions_to_records(bench, words, tmp_path):
    from pipeline import calibrate

    run = tmp_path / "run"
    options = words(run, "--criterion", "wanda", "--sparsity", "0.3", personas=f"roleagentbench:{bench}")
    assert calibrate.main(options) == 0
    assert roleplay.main([str(run), "--texts", "1", "--conditions", "mask", "--bootstrap", "20"]) == 0
    records = json.loads((run / "roleplay.json").read_text())["records"]
    assert {(r["persona"], r["n"], r["chance"]) for r in records} == {("Old-Bob", 2, 1 / 3), ("Eve", 1, 1 / 3)}
    assert all(r["chosen"] == {} for r in records)
