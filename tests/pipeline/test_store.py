"""Files from strangers and full disks: every damage is one sentence, and nothing half-written is left."""

import hashlib
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import pack_bits
from pipeline import calibrate, chat, evaluate
from pipeline.errors import UserError
from pipeline.masks import PersonaMasks
from pipeline.sites import Site
from pipeline.staging import staged_folder
from pipeline.stats import ActivationStats
from pipeline.store import load_manifest, load_masks, load_statistics, save_masks, save_statistics

SHAPES = {"a.b": (3, 19), "c": (5, 8), "d": (6, 300)}
MANIFEST = {
    "model": {"id": "toy", "fingerprint": dict.fromkeys(SHAPES, "0")},
    "criterion": "",
    "sparsity": {"option": "0"},
    "personas": {"opponents": {}, "questions": {}},
    "options": {},
    "versions": {},
}


def some_masks(*personas):
    """The layer "d" is stored as a list."""
    removed = {"a.b": 0.5, "c": 0.5, "d": 0.02}
    bits = {p: {n: pack_bits(torch.rand(s) > removed[n]) for n, s in SHAPES.items()} for p in personas}
    return PersonaMasks(SHAPES, bits)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    with staged_folder(folder, False) as staging:
        save_masks(some_masks("fox", "dog"), staging, MANIFEST)
    return folder


def rewrite(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_tensors(folder, change):
    """Give fox other tensors and make size and checksum fit, as a careful forger would."""
    path = folder / "masks" / "fox.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    content = path.read_bytes()
    signed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(folder, lambda m: m["masks"]["fox"].update(signed))


FORGED = {
    "other dtype": (
        lambda t: t.update({"c": t["c"].to(torch.int8)}),
        r"mask of c is \[5, 1\] I8, expected \[5, 1\] U8",
    ),
    "transposed": (lambda t: t.update({"a.b": torch.zeros(19, 1, dtype=torch.uint8)}), r"mask of a.b is \[19, 1\]"),
    "unpacked": (lambda t: t.update({"c": torch.ones(5, 8, dtype=torch.uint8)}), r"mask of c is \[5, 8\]"),
    "one layer less": (lambda t: t.pop("c") is None, "cannot hold|layers differ"),
    "one layer more": (lambda t: t.update({"e": t["c"].clone()}), "layers differ.*'e'"),
    "a list of a small layer": (lambda t: t.update({"c": torch.zeros(5, dtype=torch.uint16)}), r"c is a list \[5\]"),
    "a list that is too short": (lambda t: t.update({"d": t["d"][:5].clone()}), r"d is a list \[5\]"),
    "a column less": (lambda t: t.update({"d": t["d"][:-1].clone()}), "d lists"),
    "columns in disorder": (
        lambda t: t.update({"d": numbers([2, 0, 0, 0, 0, 0, 8, 7])}),
        "d lists columns that do not",
    ),
    "a column behind the last": (
        lambda t: t.update({"d": numbers([1, 0, 0, 0, 0, 0, 300])}),
        "lists column 300 of 300",
    ),
}


def numbers(values):
    return torch.tensor(values, dtype=torch.uint16)


@pytest.mark.parametrize("case", FORGED)
def test_forged_tensors(run, case):
    change, message = FORGED[case]
    replace_tensors(run, change)
    with pytest.raises(UserError, match=message):
        load_masks(run)


def test_version_1_is_read(run):
    """Packed bits alone, as they were written before there were lists."""
    masks = load_masks(run)
    for persona in masks.personas:
        save_file(masks.bits[persona], run / "masks" / f"{persona}.safetensors")
    files = {p: (run / "masks" / f"{p}.safetensors").read_bytes() for p in masks.personas}
    signed = {p: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for p, c in files.items()}
    rewrite(run, lambda m: [m["masks"][p].update(signed[p]) for p in files] and m.update(version=1))
    again = load_masks(run)
    assert all(torch.equal(again.bits[p][n], masks.bits[p][n]) for p in masks.personas for n in SHAPES)


def test_version_1_has_no_lists(run):
    rewrite(run, lambda m: m.update(version=1))
    with pytest.raises(UserError, match=r"cannot hold 262 bytes|mask of d is \[\d+\] U16, expected \[6, 38\] U8"):
        load_masks(run)


def test_every_flipped_bit_and_every_truncation_is_found(run):
    path = run / "masks" / "dog.safetensors"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="checksum"):
            load_masks(run)
        path.write_bytes(content[:position])
        with pytest.raises(UserError, match="truncated"):
            load_masks(run)
    path.write_bytes(content)
    load_masks(run)


MANIFESTS = {
    "model is a list": lambda m: m.update(model=[]),
    "model has no id": lambda m: m["model"].pop("id"),
    "fingerprints are a list": lambda m: m["model"].update(fingerprint=["x"]),
    "personas are a list": lambda m: m.update(personas=[]),
    "no opponents": lambda m: m["personas"].pop("opponents"),
    "no questions": lambda m: m["personas"].pop("questions"),
    "sparsity is text": lambda m: m.update(sparsity="0.3"),
    "masks are a list": lambda m: m.update(masks=[]),
    "an entry is text": lambda m: m["masks"].update(up="masks/up.safetensors"),
    "layers are a list": lambda m: m.update(layers=[]),
    "a shape is text": lambda m: m["layers"].update({"model.layers.0.mlp.up_proj": "72x32"}),
    "a shape has three sizes": lambda m: m["layers"].update({"model.layers.0.mlp.up_proj": [1, 72, 32]}),
    "an absolute file": lambda m: m["masks"]["up"].update(file="/etc/passwd"),
    "a file above": lambda m: m["masks"]["up"].update(file="../../masks/up.safetensors"),
    "version 0": lambda m: m.update(version=0),
    "version as text": lambda m: m.update(version="1"),
    "no format": lambda m: m.pop("format"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_from_strangers_end_in_one_sentence(finished, ground, tmp_path, capsys, case):
    """Through the program: exit code 2, not a traceback, whatever field is of another kind."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    rewrite(folder, MANIFESTS[case])
    held = tmp_path / "held.csv"
    held.write_text("question,matching,not_matching\nWhat else?,I jump,I do not\n")
    words = [str(folder), "--data", f"up/down={held}", "--texts", "1", "--bootstrap", "20", "--questions", "0"]
    assert evaluate.main([*words, "--conditions", "mask", "--plot", str(tmp_path / "p.png")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_folder_in_the_place_of_a_file(run):
    path = run / "masks" / "fox.safetensors"
    path.unlink()
    path.mkdir()
    rewrite(run, lambda m: m["masks"]["fox"].update(bytes=path.stat().st_size))
    with pytest.raises(UserError, match="fox.safetensors"):
        load_masks(run)


def test_outputs_that_are_refused_stay_as_they_are(run, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for name, overwrite, message in (
        ("file", True, "a file of that name"),
        ("full", True, "not a run of this tool"),
        ("full", False, "not a run of this tool"),
        ("run", False, "an earlier run"),
        ("file/below", True, "could not write"),
    ):
        with pytest.raises(UserError, match=message), staged_folder(tmp_path / name, overwrite) as staging:
            (staging / "new").write_text("x")
    assert (tmp_path / "file").read_text() == "text"
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    assert load_masks(run).personas == ("fox", "dog")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "run"]


def test_an_empty_folder_is_taken_and_an_old_run_replaced_whole(run, tmp_path):
    (run / "stale.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "run"):
        with staged_folder(tmp_path / name, True) as staging:
            save_masks(some_masks("cat"), staging, MANIFEST)
            assert staging.parent == tmp_path
        assert load_masks(tmp_path / name).personas == ("cat",)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["manifest.json", "masks"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, OSError], ids=lambda e: e.__name__)
def test_whatever_stops_a_run_the_earlier_one_survives(run, tmp_path, error):
    expected = UserError if error is OSError else error
    with pytest.raises(expected), staged_folder(run, True) as staging:
        save_masks(some_masks("cat"), staging, MANIFEST)
        raise error("stopped")
    assert load_masks(run).personas == ("fox", "dog")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_at_every_size(run, tmp_path):
    """A limit on file size stands in for a full disk; Python ignores SIGXFSZ and the write fails half-way."""
    program = """
        import resource, sys, torch
        from pathlib import Path
        from pipeline.cli import run
        from pipeline.staging import staged_folder
        from pipeline.store import save_masks
        from tests.pipeline.test_store import MANIFEST, some_masks

        def write(folder):
            with staged_folder(Path(folder), True) as staging:
                save_masks(some_masks("cat"), staging, MANIFEST)

        codes = []
        for limit in (0, 1, 50, 200, 400):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            codes += [run(lambda: write(sys.argv[1])), run(lambda: write(sys.argv[2]))]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.exit(0 if codes == [2] * 10 else f"exit codes {codes}")
    """
    words = [sys.executable, "-c", textwrap.dedent(program), str(run), str(tmp_path / "new")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: could not write") == 10
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert load_masks(run).personas == ("fox", "dog")


def test_persona_names_never_leave_the_folder(tmp_path):
    for name in ("../x", "a/b", "/x", "", ".", "..", "a..b", "x" * 65, "none", "a\n"):
        masks = some_masks("fox")
        masks.bits[name] = masks.bits["fox"]
        with pytest.raises(UserError, match="persona name"):
            save_masks(masks, tmp_path / "run", MANIFEST)
    assert not (tmp_path / "x.safetensors").exists()


def statistics():
    stats = ActivationStats.zeros(("p", "q"), (Site("a", 4, ("a", "b")), Site("c", 2, ("c",))))
    for sums in stats.sums.values():
        sums += torch.rand_like(sums)
    stats.counts += torch.tensor([[3.0, 17, 3], [0.25, 1 / 3, 2**53]], dtype=torch.float64)
    return stats


def test_statistics_round_trip_bit_for_bit(tmp_path):
    stats = statistics()
    save_statistics(stats, tmp_path / "s.safetensors")
    back = load_statistics(tmp_path / "s.safetensors")
    assert (back.personas, back.sites) == (stats.personas, stats.sites)
    assert torch.equal(back.counts, stats.counts)
    assert all(torch.equal(back.sums[n], stats.sums[n]) and back.sums[n].dtype == torch.float64 for n in stats.sums)


FOREIGN = {
    "counts of another shape": lambda s: setattr(s, "counts", s.counts[:1]),
    "counts with two columns": lambda s: setattr(s, "counts", s.counts[:, :2].contiguous()),
    "sums of another shape": lambda s: s.sums.update(a=s.sums["a"][:, :7].contiguous()),
    "a site less": lambda s: s.sums.pop("c"),
    "sums of whole numbers": lambda s: s.sums.update(a=s.sums["a"].long()),
    "NaN in a sum": lambda s: s.sums["a"].fill_(float("nan")),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_statistics_from_strangers(tmp_path, case):
    stats = statistics()
    FOREIGN[case](stats)
    save_statistics(stats, tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=r"s\.safetensors"):
        load_statistics(tmp_path / "s.safetensors")


def test_files_that_are_no_statistics(tmp_path, run):
    (tmp_path / "text").write_text("no tensors")
    (tmp_path / "nothing").write_bytes(b"")
    for path in (tmp_path / "text", tmp_path / "nothing", tmp_path, run / "masks" / "fox.safetensors"):
        with pytest.raises(UserError, match="not a statistics file"):
            load_statistics(path)


def test_programs_refuse_a_folder_without_a_run(tmp_path, words, capsys):
    for program in (evaluate, chat):
        assert program.main([str(tmp_path)]) == 2
    assert calibrate.main(words(tmp_path / "out", "--statistics", tmp_path)) == 2
    assert capsys.readouterr().err.count("error: ") == 3
    with pytest.raises(UserError, match="no manifest"):
        load_manifest(tmp_path / "nowhere")
