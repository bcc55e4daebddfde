"""Many cells in one command: made once, gone on with, tallied, drawn."""

import dataclasses
import json
import math

import pytest

from pipeline import cells, study
from pipeline.cells import Cell, cells_of, make
from pipeline.curves import curves_plot
from pipeline.errors import UserError
from pipeline.gathered import read_evaluation
from pipeline.options import StudyConfig
from pipeline.results import finite
from pipeline.staging import STATE, staging_of
from pipeline.tally import each_of, means_of, number_of, points_of, rows_of


def held_out(path):
    rows = "".join(f"What on night {i}?,I jump {i},Lazy {i}\n" for i in range(6))
    path.write_text("question,matching,not_matching\n" + rows, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(ground, tmp_path_factory):
    """A study of two sparsities on the tiny Llama, through the command line."""
    folder = tmp_path_factory.mktemp("study") / "made"
    test = held_out(ground.folder / "held-out.csv")
    command = [
        str(folder),
        f"--sets=up/down={ground.pairs}@{test}",
        "--seeds=3",
        "--vary=sparsity=0.1|0.4",
        f"--calibrate=--model {ground.llama} --criterion first-order-pool --pool 1",
        "--evaluate",
        "--texts 2 --generate 2 --bootstrap 50 --conditions mask,random --draws 2",
    ]
    assert study.main(command) == 0
    return folder, command


def test_every_cell_once(made):
    folder, _ = made
    content = json.loads((folder / "study.json").read_text())
    assert {(r["seed"], r["label"]) for r in content["rows"]} == {(3, "sparsity=0.1"), (3, "sparsity=0.4")}
    assert {row["condition"] for row in content["rows"]} == {"own mask", "random mask", "random mask 2"}
    assert len(list((folder / "cells").iterdir())) == 2
    for share, limit in (("0.1", 0.1), ("0.4", 0.4)):
        own = [r for r in content["rows"] if r["condition"] == "own mask" and r["label"] == f"sparsity={share}"]
        assert all(0 < removed <= limit + 0.03 for row in own for removed in row["removed"])
    assert (folder / "separation.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_set_under_the_masks_of_the_others(ground, tmp_path, capsys):
    """Once, and again for what is new."""
    test, other = held_out(tmp_path / "test.csv"), tmp_path / "other.csv"
    other.write_text(ground.pairs.read_text().replace("jump", "drop").replace("fox", "hen"))
    two = f"up/down={ground.pairs}@{test},left/right={other}@{test}"
    calibrated = f"--calibrate=--model {ground.llama} --criterion first-order-pool --pool 1 --sparsity 0.3"
    measured = ["--evaluate", "--texts 2 --generate 1 --bootstrap 50 --conditions mask,random --draws 1 --no-options"]
    folder = tmp_path / "study"
    command = [str(folder), f"--sets={two}", calibrated, *measured, "--others"]
    assert study.main(command) == 0
    content = json.loads((folder / "study.json").read_text())
    rows = {(row["set"], row["condition"]): row for row in content["rows"]}
    foreign = {("up-down", "other mask: left"), ("left-right", "other mask: up")}
    assert set(rows) == foreign | {(name, c) for name in ("up-down", "left-right") for c in ("own mask", "random mask")}
    # The same items: a state is the same, whichever set it was made from; it is held against the other set's poles.
    assert rows["up-down", "other mask: left"]["shift"] == pytest.approx(rows["left-right", "own mask"]["shift"])
    (mean,) = (mean for mean in content["means"] if mean["condition"] == "other mask")
    assert mean["cells"] == 2
    assert mean["above"] + mean["below"] == sum(rows[k]["low"] > 0 or rows[k]["high"] < 0 for k in foreign)
    assert "other mask" in capsys.readouterr().out
    file = folder / "cells" / "up-down,seed=0" / "others.json"
    before = file.stat()
    assert study.main(command) == 0
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    command[1] += f",fore/back={other}@{test}"
    assert study.main(command) == 0
    content = json.loads((folder / "study.json").read_text())
    own = {row["condition"] for row in content["rows"] if row["set"] == "up-down"}
    assert own == {"own mask", "random mask", "other mask: left", "other mask: fore"}


def test_what_others_need():
    with pytest.raises(UserError, match="--others needs the masks"):
        StudyConfig("out", others=True, keep_masks=False)
    with pytest.raises(UserError, match="--others needs several --sets"):
        StudyConfig("out", others=True, sets="up/down=x.csv")


def test_rows_are_the_evaluations(made):
    folder, _ = made
    path = folder / "cells" / "up-down,seed=3,sparsity=0.4"
    evaluation = read_evaluation(path / "evaluation.json")
    cell = Cell("up-down", "", "", 3, (("sparsity", "0.4"),), path)
    (row,) = (row for row in rows_of(cell, evaluation) if row.condition == "own mask")
    records = {(r.condition, r.persona): r for r in evaluation.records if r.form == "free"}
    assert row.cost[1] == records["own mask", "down"].perplexity / records["unmasked", "down"].perplexity - 1
    assert row.own[0] == records["own mask", "up"].own_answer - records["unmasked", "up"].own_answer
    scores = records["own mask", "up"].score_normalised + records["own mask", "down"].score_normalised
    assert row.separation == pytest.approx(100 * scores - 100)
    assert row.repeats is not None
    assert row.yes == (None, None)
    assert row.mass is None


def test_goes_on_without_doing_anything_again(made, capsys):
    folder, command = made
    lost = folder / "cells" / "up-down,seed=3,sparsity=0.1"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/run/manifest.json")}
    answer = (lost / "evaluation.json").read_text()
    (lost / "evaluation.json").unlink()
    assert study.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/run/manifest.json")} == before
    again = json.loads((lost / "evaluation.json").read_text())
    assert again["records"] == json.loads(answer)["records"]
    assert "means over sets and seeds" in capsys.readouterr().out


def test_other_options_are_refused(made, capsys):
    _, command = made
    assert study.main([*command[:4], "--calibrate=--criterion wanda", *command[5:]]) == 2
    assert "take another folder" in capsys.readouterr().err


def test_another_file_under_the_same_names_is_refused(made, capsys):
    folder, command = made
    before = (folder / "study.json").read_text()
    assert study.main([command[0], "--sets=up/down=other.csv@other.csv", *command[2:]]) == 2
    assert "its cells of up-down were made from" in capsys.readouterr().err
    assert (folder / "study.json").read_text() == before


def test_a_cell_that_fails_names_itself(ground, tmp_path, capfd):
    command = [str(tmp_path / "out"), f"--sets=up/down={ground.pairs}", "--calibrate=--criterion nonsense"]
    assert study.main(command) == 2
    said = capfd.readouterr().err
    assert "unknown 'nonsense'" in said
    assert "up-down,seed=0: pipeline.calibrate ended with code 2" in said


def test_what_a_cell_goes_on_with(tmp_path, monkeypatch):
    """A process that was killed before it wrote its state cannot be resumed."""
    called = []
    monkeypatch.setattr(cells, "_call", lambda cell, command, options: called.append((command, options)))
    (cell,) = cells_of(StudyConfig(tmp_path, sets="up/down=x.csv"))
    staging = staging_of(cell.run)
    staging.mkdir(parents=True)
    make(cell, ["--samples", "3"], [], keep_masks=True)
    assert called[0][1][:2] == ["--personas", "up/down=x.csv"]
    assert called[0][1][-2:] == ["--samples", "3"]
    (staging / STATE).write_text("{}")
    make(cell, [], [], keep_masks=True)
    assert called[2] == ("calibrate", ["--resume", str(cell.run)])


def test_a_destroyed_model_can_be_written_down():
    assert finite({"cost": (math.inf, 0.5), "low": math.nan, "mass": None}) == {
        "cost": (None, 0.5),
        "low": None,
        "mass": None,
    }


def test_the_grid():
    config = StudyConfig(
        "out", sets="dichotomies,a/b=x.csv@y.csv", seeds="3,4", vary="criterion=wanda|sparse;samples=8"
    )
    all_cells = cells_of(config)
    assert len(all_cells) == 2 * 2 * 5
    assert all_cells[0].label == "criterion=wanda, samples=8"
    last = all_cells[4]
    assert (last.name, last.sources, last.held_out, last.seed) == ("a-b", "a/b=x.csv", "y.csv", 3)
    assert len({cell.folder for cell in all_cells}) == len(all_cells)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": "1,x"}, "--seeds"),
        ({"sets": " , "}, "--sets"),
        ({"vary": "sparsity"}, "--vary 'sparsity'"),
        ({"vary": "sparsity=1||2"}, "--vary"),
        ({"sets": "a/b=one.csv,a/b=two.csv"}, "a-b is named twice"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        cells_of(StudyConfig("out", **options))


def test_means_and_numbers(made):
    folder, _ = made
    two = cells_of(StudyConfig(folder, sets="up/down=x.csv", seeds="3", vary="sparsity=0.1|0.4"))
    first = [row for cell in two for row in rows_of(cell, read_evaluation(cell.evaluation))]
    rows = [*first, *(dataclasses.replace(row, seed=4, separation=row.separation + 2) for row in first)]
    means = means_of(rows)
    assert means[0].seeds == (first[0].separation, first[0].separation + 2)
    assert points_of(means)[0].high == first[0].separation + 2
    assert [(m.label, m.condition, m.cells) for m in means] == [
        (f"sparsity={share}", condition, count)
        for share in ("0.1", "0.4")
        for condition, count in (("own mask", 2), ("random mask", 4))
    ]
    assert means[0].separation == pytest.approx(sum(means[0].seeds) / 2)
    assert [p.ratio for p in points_of(means)] == [1 + m.cost for m in means]
    assert [(p.separation, p.high) for p in each_of(rows)] == [(row.separation, row.high) for row in rows]
    assert number_of("sparsity=0.4") == 0.4
    assert math.isnan(number_of("criterion=wanda"))
    assert math.isnan(number_of(""))
    same = [dataclasses.replace(row, label="") for row in rows]
    assert not curves_plot(same, folder / "none.png")
    assert not (folder / "none.png").exists()
