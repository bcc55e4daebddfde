"""Options: exact sparsities with overrides, and every validation of the three configs."""

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import (
    ACTIVATIONS,
    CRITERIA,
    PRECISIONS,
    CalibrateConfig,
    ChatConfig,
    EvaluateConfig,
    Sparsity,
    parse_devices,
)
from pipeline.data.prompts import TOKENS
from pipeline.errors import UserError

LAYER = "model.layers.11.mlp.down_proj"


@pytest.mark.parametrize(
    ("sparsity", "columns", "kept"),
    [
        ("0.8", 640, 128),
        ("0.9", 10, 1),
        ("0.3", 10, 7),
        ("0.7", 10, 3),
        ("0.2", 576, 460),
        ("0", 5, 5),
        ("0.99", 50, 0),
    ],
)
def test_keep_is_exact_where_floats_are_not(sparsity, columns, kept):
    assert Sparsity.parse(sparsity).keep(LAYER, columns) == kept


def test_floats_would_get_it_wrong():
    """What the decimals are for: in floats (1 - 0.8) * 640 is below 128."""
    assert int((1 - 0.8) * 640) == 127


@given(digits=st.integers(0, 10**9 - 1), columns=st.integers(1, 30000))
def test_keep_is_the_floor_of_the_exact_product(digits, columns):
    text = f"0.{digits:09d}"
    exact = (1 - Fraction(text)) * columns
    assert Sparsity.parse(text).keep(LAYER, columns) == exact.numerator // exact.denominator


def test_overrides_by_part_of_the_name_the_last_wins():
    sparsity = Sparsity.parse("0.5, mlp=0.3 ,down_proj=0.2")
    assert sparsity.default == Decimal("0.5")
    assert sparsity.of("model.layers.0.self_attn.q_proj") == Decimal("0.5")
    assert sparsity.of("model.layers.0.mlp.up_proj") == Decimal("0.3")
    assert sparsity.of(LAYER) == Decimal("0.2")
    assert Sparsity.parse("0.5,down_proj=0.2,mlp=0.3").of(LAYER) == Decimal("0.3")
    assert sparsity.keep(LAYER, 100) == 80


@pytest.mark.parametrize(
    ("part", "matches"),
    [
        ("1", False),
        ("11", True),
        ("layers.11", True),
        ("layers.1", False),
        ("down", False),
        ("proj", False),
        ("model", True),
        (LAYER, True),
        ("mlp.up_proj", False),
    ],
)
def test_overrides_match_whole_parts_of_the_dotted_name(part, matches):
    assert Sparsity.parse(f"0.5,{part}=0.1").of(LAYER) == Decimal("0.1" if matches else "0.5")


def test_overrides_alone_leave_the_rest_whole():
    sparsity = Sparsity.parse("mlp=0.4")
    assert sparsity.keep("model.layers.0.self_attn.q_proj", 64) == 64
    assert sparsity.keep(LAYER, 10) == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1", r"\[0, 1\)"),
        ("-0.1", r"\[0, 1\)"),
        ("0.5,mlp=1", r"\[0, 1\)"),
        ("nan", r"\[0, 1\)"),
        ("inf", r"\[0, 1\)"),
        ("half", "'half' is not a number"),
        ("", "'' is not a number"),
        ("0.5,", "not a number"),
        ("0.5,mlp=", "not a number"),
        ("0,5", r"\[0, 1\)|more than one"),
        ("0.5,0.3", "more than one default"),
        ("=0.3", "sparsity"),
    ],
)
def test_sparsities_that_are_refused(text, words):
    with pytest.raises(UserError, match=words) as caught:
        Sparsity.parse(text)
    assert "--sparsity" in str(caught.value)
    with pytest.raises(UserError):
        CalibrateConfig(sparsity=text)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), (" 4 ", 4), ("0,2", [0, 2]), ("3,1,0", [3, 1, 0]), ("auto", "auto"), (2, 2)]
)
def test_devices(text, value):
    assert parse_devices(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "0,", ",", "", "0,x"])
def test_devices_that_are_refused(text):
    with pytest.raises(UserError, match="--devices"):
        parse_devices(text)
    with pytest.raises(UserError, match="--devices"):
        CalibrateConfig(devices=text)


BAD = {
    CalibrateConfig: [
        ("criterion", "wandah"),
        ("activation", "gelu"),
        ("tokens", "question"),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("samples", -1),
        ("max_length", 1),
        ("batch_tokens", 0),
        ("num_nodes", 0),
        ("seed", -1),
    ],
    EvaluateConfig: [
        ("precision", "int8"),
        ("gamma", 1.0),
        ("gamma", -0.1),
        ("gamma", float("nan")),
        ("conditions", "mask,guess"),
        ("conditions", ""),
        ("samples", -1),
        ("questions", -1),
        ("texts", -1),
        ("seed", -1),
        ("batch_tokens", 0),
        ("bootstrap", 0),
        ("max_length", 1),
    ],
    ChatConfig: [
        ("precision", "float64"),
        ("gamma", 1.0),
        ("gamma", -0.1),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("max_new_tokens", 0),
    ],
}


def test_what_a_criterion_does_not_read_is_known():
    assert CalibrateConfig(criterion="wanda", loops=0.1, pool=0.3, evidence=2.0).unread == ["evidence", "loops"]
    assert CalibrateConfig(criterion="first-order-gate", pool=0.5).unread == ["pool"]
    assert CalibrateConfig(criterion="contrastive-wanda", activation="relu", temperature=1.0).unread == []
    assert CalibrateConfig(loops=0.0, pool=0.5, evidence=0.0).unread == []


@pytest.mark.parametrize(("config", "name", "value"), [(c, n, v) for c, cases in BAD.items() for n, v in cases])
def test_values_out_of_range_name_the_option(config, name, value):
    required = {} if config is CalibrateConfig else {"run": "folder"}
    with pytest.raises(UserError, match=rf"--{name.replace('_', '[-_]')}\b"):
        config(**required, **{name: value})


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (CalibrateConfig, {"samples": 0, "max_length": 2, "batch_tokens": 1, "seed": 0, "temperature": 1e-6}),
        (EvaluateConfig, {"run": "r", "gamma": 0.0, "samples": 0, "questions": 0, "texts": 0, "bootstrap": 1}),
        (ChatConfig, {"run": "r", "gamma": 0.999, "temperature": 0.0, "max_new_tokens": 1}),
    ],
)
def test_values_at_the_edge_are_taken(config, values):
    made = config(**values)
    assert all(getattr(made, name) == (Path(v) if name == "run" else v) for name, v in values.items())


@pytest.mark.parametrize(("name", "values"), [("criterion", CRITERIA), ("activation", ACTIVATIONS), ("tokens", TOKENS)])
def test_every_known_choice_is_taken_and_listed_in_the_error(name, values):
    for value in values:
        assert getattr(CalibrateConfig(**{name: value}), name) == value
    with pytest.raises(UserError) as caught:
        CalibrateConfig(**{name: "?"})
    assert all(value in str(caught.value) for value in values)
    assert "'?'" in str(caught.value)


def test_precisions_of_evaluation_and_chat():
    for precision in PRECISIONS:
        assert EvaluateConfig("r", precision=precision).precision == ChatConfig("r", precision=precision).precision


@pytest.mark.parametrize("criterion", ["random", "magnitude", "neutral"])
def test_disjoint_needs_personas(criterion):
    with pytest.raises(UserError, match=f"--disjoint.*{criterion}"):
        CalibrateConfig(criterion=criterion, disjoint=True)
    assert CalibrateConfig(criterion="wanda", disjoint=True).disjoint


def test_paths():
    assert CalibrateConfig(output="a/b").output == Path("a/b")
    config = EvaluateConfig("runs/x")
    assert (config.run, config.json, config.plot) == (Path("runs/x"), None, Path("runs/x/evaluation.png"))
    config = EvaluateConfig("runs/x", json="o.json", plot="p.png")
    assert (config.json, config.plot) == (Path("o.json"), Path("p.png"))
