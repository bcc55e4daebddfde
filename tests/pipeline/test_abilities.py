"""General ability: our small task's data, and lm-eval's tasks under the masks of a run."""

import json
import math
import sys
from importlib import resources

import pytest

from pipeline import evaluate
from pipeline.abilities import OURS, _entries, _manager, measured_settings, wanted_tasks
from pipeline.baselines.steering import Steering, Strength
from pipeline.errors import UserError
from pipeline.setting import UNMASKED, Setting
from tests.pipeline.tiny import write_pairs


def test_our_questions():
    """A hundred, all different, four different answers each, the right one as often in every place."""
    text = (resources.files("pipeline.data") / "sets" / f"{OURS}.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["question"] for row in rows}) == 100
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [sum(row["label"] == place for row in rows) for place in range(4)] == [25] * 4


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    _manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert wanted_tasks(" , ") == []
    with pytest.raises(UserError, match="persona-subnetworks.lm-eval"):
        wanted_tasks(OURS)


def test_words_before_a_question_are_not_before_a_task():
    vector = Steering({}, Strength(1.0, 0.0, 0.0, True))
    changing = [Setting("own mask", "a", mask="a"), Setting("steering vector", "a", steering=vector)]
    speaking = [Setting("prompt", "a", system="You are a."), Setting("prompt and mask", "a", mask="a", system="You.")]
    assert measured_settings([*speaking, *changing]) == [UNMASKED, *changing]


def test_entries_are_metrics_with_their_errors():
    found = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.2, "f1_stderr,strict": "N/A"}
    assert _entries("x", found | {"sample_len": 4}) == [
        {"task": "x", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4},
        {"task": "x", "metric": "f1,strict", "value": 0.2, "stderr": None, "n": 4},
    ]


def test_our_task_under_the_masks_of_a_run(finished, tmp_path, capsys):
    """The tiny model guesses; the unmasked one is measured once, and each mask on its own."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    _manager.cache_clear()
    written, data = tmp_path / "out.json", tmp_path / "held.csv"
    write_pairs(data, 16)
    options = ("--conditions", "prompt,mask", "--data", f"up/down={data}", "--no-options", "--tasks", OURS)
    common = ("--json", written, "--plot", tmp_path / "plot.png", "--bootstrap", "20", "--texts", "2")
    assert evaluate.main([str(finished), *map(str, (*options, *common, "--task-items", 40))]) == 0
    entries = json.loads(written.read_text())["abilities"]
    shown = [(e["condition"], e["persona"]) for e in entries if e["metric"] == "acc"]
    assert shown == [("unmasked", ""), ("own mask", "up"), ("own mask", "down")]
    for e in entries:
        assert e["n"] == 40
        assert (e["value"] * 40) % 1 == pytest.approx(0, abs=1e-9) or (e["value"] * 40) % 1 == pytest.approx(1)
        assert e["stderr"] == pytest.approx(math.sqrt(e["value"] * (1 - e["value"]) / 39))
    assert "general" in capsys.readouterr().out
    with pytest.raises(UserError, match="'no-such-task'"):
        wanted_tasks(f"{OURS},no-such-task")
