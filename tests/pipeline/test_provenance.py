"""Where a run comes from, what identical runs share, and ``pipeline.inspect``."""

import hashlib
import json
import shutil
import subprocess

import pytest

from pipeline import calibrate, inspect, provenance
from pipeline.provenance import PLACE, RUN
from pipeline.store import load_masks


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_identical_runs_differ_in_one_file(words, finished, tmp_path):
    assert calibrate.main(words(tmp_path / "again", "--criterion", "wanda", "--sparsity", "0.3", "--overwrite")) == 0
    first, second = contents(finished), contents(tmp_path / "again")
    assert {RUN, "manifest.json", "statistics.safetensors", "masks/up.safetensors"} <= set(first)
    assert {name for name in first | second if first.get(name) != second.get(name)} == {RUN}


def test_what_a_run_says_of_itself(finished):
    told = inspect.inspect(finished)
    where = told["provenance"]
    assert {"python", "torch", "transformers", "lightning", "safetensors"} <= set(where["versions"])
    assert where["options"]["criterion"] == "wanda"
    assert not set(PLACE) & set(where["options"])
    circumstances = where["circumstances"]
    assert circumstances["options"].keys() == set(PLACE)
    assert circumstances["options"]["output"] == str(finished)
    assert circumstances["command"]
    assert circumstances["started"] <= circumstances["finished"]
    assert set(circumstances["seconds"]) == {"measuring", "masks"}
    assert len(where["data_sha256"]["up"]) == 64
    assert told["personas"]["up"]["opponent"] == "down"
    layer = told["layers"]["model.layers.0.mlp.up_proj"]
    assert layer["shape"] == [72, 32]
    assert layer["density"]["up"] == pytest.approx(22 / 32)
    names = {"masks/up.safetensors", "masks/down.safetensors", "statistics.safetensors"}
    assert told["files"] == dict.fromkeys(names, "")


def test_inspect_prints_text_or_json(finished, capsys):
    assert inspect.main([str(finished)]) == 0
    text = capsys.readouterr().out
    density = load_masks(finished).density("up")
    assert f"persona up, opposed to down: {density:.2%} of the weights kept" in text
    assert "file statistics.safetensors: checksum holds" in text
    assert inspect.main([str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect.inspect(finished)


@pytest.mark.parametrize("name", ["masks/up.safetensors", "statistics.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_wrong_checksum_is_code_1(copy, capsys, name, damage):
    path = copy / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if damage != "remove":
        path.write_bytes(content if damage == "flip" else content[:-1])
    assert inspect.main([str(copy), "--json"]) == 1
    files = json.loads(capsys.readouterr().out)["files"]
    assert [file for file, problem in files.items() if problem] == [name]


def test_counts_that_are_not_those_of_the_masks(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["masks"]["up"]["kept"]["model.layers.0.mlp.up_proj"] -= 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert inspect.main([str(copy)]) == 1
    assert "keeps other numbers of weights than the manifest says" in capsys.readouterr().out


def test_no_run_is_code_2(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == 2
    assert "not a finished run" in capsys.readouterr().err


def test_altered_statistics_are_not_used_again(copy, words, tmp_path, capsys):
    path = copy / "statistics.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    options = ("--criterion", "wanda", "--sparsity", "0.3", "--statistics", copy)
    assert calibrate.main(words(tmp_path / "out", *options)) == 2
    assert "statistics.safetensors: the checksum differs" in capsys.readouterr().err


def test_commit_of_a_checkout_and_of_a_package_inside_another(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "here.py"))
    (tmp_path / "here.py").write_text("1")
    assert provenance.commit() is None
    git("init")
    (tmp_path / "other").write_text("1")
    git("add", "other")
    git("commit", "-m", "one")
    assert provenance.commit() is None
    git("add", "here.py")
    git("commit", "-m", "two")
    clean = provenance.commit()
    assert len(clean) == 40
    (tmp_path / "here.py").write_text("2")
    assert provenance.commit() == clean + "-dirty"
