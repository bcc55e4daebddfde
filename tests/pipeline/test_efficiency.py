"""What a state costs to serve: bytes counted by hand, and the JSON."""

import json

import pytest
import torch

from pipeline import evaluate
from pipeline.baselines.retrieval import Examples
from pipeline.baselines.steering import Steering, Strength
from pipeline.config import EvaluateConfig
from pipeline.data.forms import Item
from pipeline.data.prompts import Prompter
from pipeline.efficiency import NEW_TOKENS, efficiency_of
from pipeline.model import PersonaModel
from pipeline.protocol import Limits
from pipeline.setting import UNMASKED, Ground, Setting
from tests.pipeline.tiny import write_pairs

QUESTIONS = ["What do you do?", "Dog?"]
CACHE = 2 * 2 * 2 * 8 * 4
"""Keys and values, 2 layers, 2 heads of 8, float32: bytes per token of the tiny Llama."""


@pytest.fixture
def ground_of(finished):
    model = PersonaModel.from_pretrained(finished)
    return Ground(model, Prompter(model.tokenizer), Limits(512, 2048, 0), EvaluateConfig(finished))


def tokens(ground, *words, **more):
    prompter = ground.prompter
    return sum(len(prompter.ids(prompter.prompt(q, *words, **more))) for q in QUESTIONS) / len(QUESTIONS)


def test_bytes_by_hand(ground_of, finished):
    ground = ground_of
    plain = efficiency_of(ground, UNMASKED, QUESTIONS)
    assert plain.prompt_tokens == tokens(ground)
    assert (plain.memory_bytes, plain.working_bytes, plain.disk_bytes, plain.persona) == (0, 0, 0, None)
    assert plain.first_token_seconds > 0
    assert plain.tokens_per_second > 0

    prompt = efficiency_of(ground, Setting("prompt", "up", system="Sei fröhlich."), QUESTIONS)
    assert (prompt.memory_bytes, prompt.disk_bytes) == (14, 14)
    assert prompt.prompt_tokens == tokens(ground, "Sei fröhlich.")
    assert prompt.working_bytes == CACHE * (prompt.prompt_tokens - plain.prompt_tokens)

    mask = efficiency_of(ground, Setting("own mask", "up", mask="up"), QUESTIONS)
    shapes = ground.model.masks.shapes.values()
    assert mask.memory_bytes == sum(rows * -(-columns // 8) for rows, columns in shapes)
    assert mask.working_bytes == 4 * sum(rows * columns for rows, columns in shapes)
    assert mask.disk_bytes == (finished / "masks" / "up.safetensors").stat().st_size
    ground.model.materialize = False
    both = efficiency_of(ground, Setting("prompt and mask", "up", mask="up", system="Sei fröhlich."), QUESTIONS)
    assert (both.memory_bytes, both.disk_bytes) == (mask.memory_bytes + 14, mask.disk_bytes + 14)
    assert both.working_bytes == prompt.working_bytes

    examples = Examples([Item("Day 1?", "jump", "lie", "pair"), Item("Day 2?", "run", "sit", "pair")], 1)
    shots = efficiency_of(ground, Setting("in context", "up", earlier=examples), QUESTIONS)
    assert shots.disk_bytes == len("Day 1?jumpDay 2?run")
    assert shots.memory_bytes == shots.disk_bytes + 2 * 3 * 8  # two questions, three words, float64

    vectors = {0: torch.zeros(32), 1: torch.zeros(32)}
    steering = Setting("steering vector", "up", steering=Steering(vectors, Strength(1.0, 0.0, 0.0, True)))
    steered = efficiency_of(ground, steering, QUESTIONS)
    assert (steered.memory_bytes, steered.working_bytes, steered.disk_bytes) == (256, 0, 256)


def test_speed_is_that_of_the_tokens(ground_of, monkeypatch):
    """A clock that ticks once a look: the first token is the second thing put, after it every tick is a token."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("pipeline.efficiency.time.perf_counter", lambda: float(next(ticks)))
    got = efficiency_of(ground_of, UNMASKED, QUESTIONS)
    assert got.first_token_seconds == 2
    assert got.tokens_per_second == 1
    assert next(ticks) == 3 * (NEW_TOKENS + 2)


def test_efficiency_through_the_program(finished, tmp_path, capsys):
    held = write_pairs(tmp_path / "held.csv", 14)
    options = ["--data", str(held), "--texts", "1", "--bootstrap", "20", "--questions", "0"]
    options += [
        "--plot",
        str(tmp_path / "p.png"),
        "--json",
        str(tmp_path / "e.json"),
        "--conditions",
        "rag,mask,random",
    ]
    assert evaluate.main([str(finished), *options]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["efficiency"] == []
    assert evaluate.main([str(finished), *options, "--efficiency"]) == 0
    entries = json.loads((tmp_path / "e.json").read_text())["efficiency"]
    states = [(e["pair"], e["condition"], e["persona"]) for e in entries]
    speaking = [(c, p) for c in ("in context", "own mask") for p in ("up", "down")]
    assert states == [("up/down", c, p) for c, p in [("unmasked", None), *speaking]]
    assert entries[1]["prompt_tokens"] > 2 * entries[0]["prompt_tokens"]
    assert "tokens/s" in capsys.readouterr().out
