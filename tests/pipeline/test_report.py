"""The HTML report: what it says, that it stands alone, that no text of the user becomes markup."""

import copy
import html.parser
import json
import math
import re
import shutil

import pytest

from pipeline import evaluate, figures, report
from pipeline.errors import UserError
from pipeline.figures import Point, separation_plot
from pipeline.gathered import gather, points_of, read_evaluation
from pipeline.page import Html, figure, page, table, text
from tests.pipeline.test_questionnaire import lean

VOID = {"meta", "img", "br", "hr", "link"}
ATTACK = "<script>alert('x')</script>\" onload=\"steal() & more"


class Reader(html.parser.HTMLParser):
    """Collects elements and text; fails on tags that do not nest."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def check_stands_alone(content):
    """Nothing is loaded from anywhere, nothing runs; links stay on the page."""
    read = Reader(content)
    assert {tag for tag, _ in read.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    for tag, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "srcset", "href", "data", "action", "background"):
            if name in attributes:
                assert attributes[name].startswith("#" if tag == "a" else "data:image/png;base64,"), (tag, name)
    style = re.search("<style>(.*?)</style>", content, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in read.tags if tag == "a"} <= set(ids)
    assert all("alt" in a for tag, a in read.tags if tag == "img")
    assert any(a.get("name") == "viewport" for _, a in read.tags)
    assert "prefers-color-scheme: dark" in style
    return read


def test_text_is_escaped_unless_it_is_html():
    assert text('<b> & "') == "&lt;b&gt; &amp; &quot;"
    assert text(Html("<b>x</b>")) == "<b>x</b>"
    made = page(ATTACK, ATTACK, [("one", ATTACK, table([ATTACK], [[ATTACK]], caption=ATTACK)), ("two", "T", Html(""))])
    read = check_stands_alone(made)
    assert read.text.count("alert('x')") == 8
    assert "two" not in [a.get("id") for _, a in read.tags]


def test_a_figure_has_its_own_size(tmp_path):
    from matplotlib import pyplot

    from pipeline.plots import save_figure

    drawn, _ = pyplot.subplots(figsize=(4, 3))
    save_figure(drawn, tmp_path / "f.png")
    ((_, attributes),) = (t for t in Reader(figure((tmp_path / "f.png").read_bytes(), ATTACK)).tags if t[0] == "img")
    assert (attributes["width"], attributes["height"], attributes["alt"]) == ("384", "288", ATTACK)


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """A copy of the finished run with an evaluation in it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(finished, folder)
    held = folder.parent / "held.csv"
    rows = [f"What now on day {n}?,I jump {n},The fox is lazy {n}" for n in range(6)]
    held.write_text("\n".join(["question,matching,not_matching", *rows]))
    options = ["--data", str(held), "--texts", "2", "--bootstrap", "50", "--questions", "2", "--efficiency"]
    assert evaluate.main([str(folder), *options, "--json", str(folder / "evaluation.json")]) == 0
    return folder


def changed(folder, target, change):
    """A copy of a run whose evaluation is changed."""
    shutil.copytree(folder, target)
    file = target / "evaluation.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return target


def test_the_report_says_what_the_files_say(evaluated):
    assert report.main([str(evaluated)]) == 0
    read = check_stands_alone((evaluated / "report.html").read_text())
    content = json.loads((evaluated / "evaluation.json").read_text())
    own = next(c for c in content["contrasts"] if c["condition"] == "own mask")
    shown = [f"{own[k]:+.0f}" for k in ("separation", "separation_low", "separation_high")]
    assert f"{shown[0]} [{shown[1]}, {shown[2]}]" in read.text
    for answer in content["answers"]:
        assert " ".join(answer["answer"].split()) in read.text
    manifest = json.loads((evaluated / "manifest.json").read_text())
    assert manifest["masks"]["up"]["sha256"] in read.text
    assert manifest["personas"]["data_sha256"]["up"] in read.text
    assert manifest["versions"]["torch"] in read.text
    ids = [a["id"] for tag, a in read.tags if tag == "section"]
    assert ids == ["run", "results", "cost", "answers", "layers", "efficiency", "provenance"]
    pictures = [a for tag, a in read.tags if tag == "img"]
    assert len(pictures) == 2
    for name in ("separation", "layers"):
        assert (evaluated / f"report-{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(evaluated.glob(".*tmp*"))


def test_a_run_without_any_measurement(finished, tmp_path):
    target = tmp_path / "new" / "r.html"
    assert report.main([str(finished), "--output", str(target), "--no-layers", "--title", "A <title>"]) == 0
    read = check_stands_alone(target.read_text())
    assert "A <title>" in read.text
    assert [a["id"] for tag, a in read.tags if tag == "section"] == ["run", "provenance"]
    assert [file.name for file in target.parent.iterdir()] == ["r.html"]


def test_no_text_of_the_user_becomes_markup(evaluated, tmp_path):
    def attack(content):
        content["versions"]["torch"] = content["date"] = content["criterion"] = ATTACK
        content["options"]["data"] = ATTACK
        for entry in content["generation"]:
            for answer in entry["answers"]:
                answer["answer"] = answer["question"] = ATTACK
        for entry in (*content["records"], *content["contrasts"]):
            entry["pair"] = f"up/{ATTACK}".replace("/script", "script")
            entry["persona"] = "up" if entry.get("persona") == "up" else entry["pair"][3:]

    folder = changed(evaluated, tmp_path / "run", attack)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["personas"]["sources"]["up"] = manifest["options"]["personas"] = ATTACK
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert report.main([str(folder)]) == 0
    read = check_stands_alone((folder / "report.html").read_text())
    assert read.text.count("alert('x')") > 10


def test_role_play_and_questionnaire_are_shown(evaluated, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(evaluated, folder)
    heading = {"model": "m", "criterion": "wanda", "sparsity": "0.3", "date": "2026-01-01"}
    leans = [lean(p, "introvert-extravert", (v, v), (0.25, 0.25)) for p, v in ((None, 0.25), ("introvert", 0.75))]
    records = [vars(one) for one in leans] + [vars(one) | {"form": "options"} for one in leans]
    signs = [
        {"persona": p, "form": f, "spelled": "I???", "expected": e, "right_zero": e, "right_unmasked": e}
        for p, e in ((None, 0), ("introvert", 1))
        for f in ("free", "options")
    ]
    asked = {
        "schema": "persona-subnetworks/questionnaire",
        **heading,
        "records": records,
        "signs": signs,
        "summary": [],
    }
    (folder / "q.json").write_text(json.dumps(asked))
    role = {"condition": "own mask", "persona": "pirate", "n": 6, "chance": 0.25, "accuracy": 0.5, "low": 0.25}
    role |= {"high": 0.75, "gain": 0.5, "gain_low": 0.1, "gain_high": 0.9, "raised": 1.0, "raised_low": 0.9}
    role |= {"raised_high": 1.0, "own_line": -3.0, "own_line_change": 0.2, "chosen": {}, "removed": 0.02}
    cast = {"schema": "persona-subnetworks/roleplay", **heading, "records": [role | {"perplexity": None}]}
    (folder / "r.json").write_text(json.dumps(cast))
    assert report.main([str(folder)]) == 0
    read = check_stands_alone((folder / "report.html").read_text())
    for words in ("pirate: 6 items, chance 25%", "50% [25%, 75%]", "overflow", "+0.75 (+0.50)", "I???"):
        assert words in read.text, words
    assert (folder / "report-radar.png").exists()
    assert (folder / "report-heat.png").exists()


def test_points_of_known_records(evaluated, tmp_path):
    def make(content):
        for r in content["records"]:
            r["perplexity"] = {"unmasked": 20.0, "own mask": 25.0 if r["persona"] == "up" else 35.0}.get(r["condition"])
        for c in content["contrasts"]:
            c |= {"separation": 40.0, "separation_low": 10.0, "separation_high": 60.0}

    (made,) = gather(changed(evaluated, tmp_path / "run", make), [], []).evaluations
    points = {point.condition: point for point in points_of(made)}
    own = points["own mask"]
    assert (own.separation, own.low, own.high, own.ratio, own.criterion) == (40, 10, 60, 1.5, "wanda")
    assert "opponent mask" not in points
    assert math.isnan(points["random mask"].ratio)


def test_statements_are_shown_by_their_auc(evaluated, tmp_path):
    def state(content):
        for r in content["records"]:
            r |= {"form": "statement", "auc": 0.875 if r["persona"] == "up" else 0.125, "score_normalised": 0.5}
        for c in content["contrasts"]:
            c["form"] = "statement"

    folder = changed(evaluated, tmp_path / "run", state)
    assert report.main([str(folder), "--no-layers"]) == 0
    read = check_stands_alone((folder / "report.html").read_text())
    assert "AUC, %" in read.text
    assert "88/12" in read.text


def test_numbers_that_were_not_finite(evaluated, tmp_path):
    """Null in the JSON: an AUC without both kinds of statements, a perplexity that overflowed."""

    def empty(content):
        for entry in (*content["records"], *content["contrasts"]):
            numbers = [k for k, v in entry.items() if isinstance(v, float)]
            entry.update(dict.fromkeys(numbers))
        content["records"][0].pop("n_yes")

    folder = changed(evaluated, tmp_path / "run", empty)
    assert report.main([str(folder)]) == 0
    read = check_stands_alone((folder / "report.html").read_text())
    assert "overflow" in read.text
    assert "-/-" in read.text


def test_several_pairs_become_their_mean(evaluated, tmp_path):
    def double(content):
        for name in ("records", "contrasts"):
            again = copy.deepcopy(content[name])
            for entry in again:
                entry["pair"] = entry["pair"].replace("up/down", "left/right")
                entry["separation"] = 10.0
            for entry in content[name]:
                entry["separation"] = 30.0
            content[name] += again

    (made,) = gather(changed(evaluated, tmp_path / "run", double), [], []).evaluations
    own = next(point for point in points_of(made) if point.condition == "own mask")
    assert (own.separation, own.low, own.pair) == (20.0, None, "")


def test_one_curve_per_criterion(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda made, path: drawn.append(made))
    points = [Point("x", "a", "own mask", "p", s, s - 5, s + 5, r) for s, r in ((50, 1.2), (20, 1.05), (70, 2.0))]
    points += [Point("y", "b", "own mask", "p", 5, None, None, 1.1), Point("y", "b", "prompt", "p", 2, 0, 4, 1.0)]
    points += [Point("y", "b", "steering vector", "p", 0, None, None, math.inf)]
    points += [Point("y", "b", c, "p", 0, -1, 1, 1.0) for c in ("random mask 2", "random mask", "other mask: x")]
    separation_plot(points, tmp_path / "p.png")
    (axis,) = drawn[0].axes
    curves = {c.get_label(): c for c in axis.containers}
    assert set(curves) == {"own mask, a", "own mask, b", "prompt", "random mask", "other mask"}
    line = curves["own mask, a"].lines[0]
    assert line.get_xdata() == pytest.approx([5, 20, 100])
    assert list(line.get_ydata()) == [20, 50, 70]
    assert line.get_linestyle() == "-"
    assert axis.get_xscale() == "linear"
    separation_plot([*points, Point("x", "a", "own mask", "p", 1, 0, 2, 40.0)], tmp_path / "p.png")
    assert drawn[1].axes[0].get_xscale() == "log"
    separation_plot(points, tmp_path / "p.png", points[:3])
    (axis,) = drawn[2].axes
    assert len(axis.containers) == len(curves) + 1
    assert {text.get_text() for text in drawn[2].legends[0].get_texts()} == set(curves)


def test_also_takes_files_and_folders(evaluated, tmp_path):
    target = tmp_path / "r.html"
    other = changed(evaluated, tmp_path / "other", lambda content: content.update(criterion="magnitude"))
    both = f"{other}, {evaluated / 'evaluation.json'}"
    assert report.main([str(evaluated), "--also", both, "--output", str(target)]) == 0
    read = check_stands_alone(target.read_text())
    assert "also read: 2 evaluations" in read.text
    assert str(other / "evaluation.json") in read.text


def test_tasks_are_shown_where_there_are_any(evaluated, tmp_path):
    entry = {"pair": "up/down", "condition": "own mask", "persona": "up", "task": "general", "metric": "acc"}
    entries = [entry | {"value": 0.75, "stderr": 0.05, "n": 40}, entry | {"value": 0.5, "stderr": None, "n": None}]
    run = changed(evaluated, tmp_path / "run", lambda content: content.update(abilities=entries))
    assert report.main([str(run)]) == 0
    read = check_stands_alone((run / "report.html").read_text())
    assert "0.750 ± 0.100" in read.text
    assert "up (own mask)" in read.text
    assert "abilities" in [a["id"] for tag, a in read.tags if tag == "section"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema="else"), "schema 'else', expected"),
        (lambda c: c["records"][0].pop("condition"), "entry 1 of its Records lacks one of condition"),
        (lambda c: c["records"][0].update(condition="magic"), "unknown condition 'magic'"),
        (lambda c: c.update(criterion=7), "field 'criterion' is no text"),
        (lambda c: c.update(records=None), "no list of Records"),
        (lambda c: c["records"][2].update(margin="<b>"), "entry 3 of its Records: margin is '<b>'"),
        (lambda c: c["generation"][1].update(answers=7), "entry 2 of generation: 'answers' is missing"),
        (lambda c: c["generation"][0]["answers"][1].pop("tokens"), "entry 2 of answers: 'tokens' is missing"),
        (lambda c: c["efficiency"][0].update(disk_bytes=None), "entry 1 of efficiency: 'disk_bytes' is missing"),
        (lambda c: c.update(abilities=[{"condition": "x"}]), "entry 1 of abilities: 'task' is missing"),
        (lambda c: c.update(options=[1]), "field 'options' is no object"),
    ],
)
def test_foreign_files(evaluated, tmp_path, change, message):
    file = changed(evaluated, tmp_path / "run", change) / "evaluation.json"
    with pytest.raises(UserError, match=re.escape(message)):
        read_evaluation(file)


def test_errors_name_the_file(evaluated, finished, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no manifest.json there" in capsys.readouterr().err
    assert report.main([str(evaluated), "--also", str(finished)]) == 2
    assert "no evaluation in this folder" in capsys.readouterr().err
    assert report.main([str(evaluated), "--evaluation", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert report.main([str(evaluated), "--output", str(tmp_path / "file" / "r.html")]) == 2
    assert "could not write" in capsys.readouterr().err
