"""Session fixtures: tiny saved models, persona files, and one finished run."""

import types

import pytest

from tests.pipeline.tiny import make_model, write_pairs, write_texts


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """Folders ``llama`` and ``gpt2``, ``pairs`` (CSV) and ``texts`` (JSON Lines)."""
    folder = tmp_path_factory.mktemp("ground")
    return types.SimpleNamespace(
        folder=folder,
        llama=make_model(folder / "llama"),
        gpt2=make_model(folder / "gpt2", "gpt2"),
        pairs=write_pairs(folder / "pairs.csv"),
        texts=write_texts(folder / "texts.jsonl"),
    )


@pytest.fixture(scope="session")
def words(ground):
    """The command line of a calibration: ``words(output, *options)``."""

    def make(output, *options, model=None, personas=None):
        personas = personas or f"up/down={ground.pairs}"
        given = ["--model", str(model or ground.llama), "--personas", personas, "--output", str(output)]
        return [*given, *map(str, options)]

    return make


@pytest.fixture(scope="session")
def finished(ground, words):
    """A run with Wanda masks at 30 % on the tiny Llama. Not to be changed."""
    from pipeline import calibrate

    folder = ground.folder / "finished"
    assert calibrate.main(words(folder, "--criterion", "wanda", "--sparsity", "0.3")) == 0
    return folder
