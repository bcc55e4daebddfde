"""Choosing personas: shared selectors, static buffers, beams, stale copies, and choices that must be refused."""

import pytest
import torch
from oracles import random_masks
from torch import nn

from kernels import MaskedLinear, PersonaSelector

CPU = torch.device("cpu")
N, K, P = 5, 9, 3


def layer_of(personas=P, **options):
    return MaskedLinear.from_linear(nn.Linear(K, N), random_masks(personas, N, K), **options)


def dense(layer, persona, x):
    """The masked product of one persona, gamma 0."""
    with torch.no_grad():
        weight = layer.weight if persona < 0 else layer.weight * layer.mask(persona)
        return nn.functional.linear(x, weight, layer.bias)


def assert_rows(layer, x, personas):
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y, torch.stack([dense(layer, p, row) for p, row in zip(personas, x, strict=True)]))


def test_modes():
    selector = PersonaSelector()
    assert selector.mode == "off"
    for choice, mode in [(0, "uniform"), (None, "off"), (2, "uniform"), (-1, "off"), ([-1], "rows"), ([0, 1], "rows")]:
        selector.select(choice)
        assert selector.mode == mode


@pytest.mark.parametrize("choices", [[0, 2, 1], [[0, 1], [2, -1], [1, 1]], [[0], [2]]], ids=str)
def test_switching_reuses_the_index_buffer(choices):
    selector = PersonaSelector()
    selector.select(choices[0])
    buffer = selector.index(CPU)
    for choice in choices[1:]:
        selector.select(choice, 0.3)
        assert selector.index(CPU) is buffer
        assert buffer.tolist() == ([choice] if isinstance(choice, int) else choice)
        assert selector.gamma == 0.3


def test_another_batch_size_gets_another_buffer():
    layer, x = layer_of(), torch.randn(4, K)
    for choice in ([0, 1], [2, 0, 1, -1], 1, [1]):
        layer.select(choice)
        sequences = [choice] if isinstance(choice, int) else choice
        assert_rows(layer, x, [p for p in sequences for _ in range(4 // len(sequences))])


def test_one_selector_serves_two_layers():
    selector = PersonaSelector()
    layers = [layer_of(selector=selector), layer_of(selector=selector)]
    x = torch.randn(2, K)
    layers[0].select([2, -1])
    for layer in layers:
        assert_rows(layer, x, [2, -1])
    assert selector.index(CPU) is layers[1].selector.index(CPU)
    own = layer_of()
    assert_rows(own, x, [-1, -1])


def test_beams_repeat_the_persona_of_their_sequence():
    layer, x = layer_of(), torch.randn(6, 4, K)
    layer.select([1, -1])
    assert_rows(layer, x, [1, 1, 1, -1, -1, -1])
    assert_rows(layer, x[:, :1], [1, 1, 1, -1, -1, -1])
    assert_rows(layer, x.flatten(0, 1), [1] * 12 + [-1] * 12)


def test_tokens_do_not_make_up_for_missing_sequences():
    # Three sequences of two tokens are six rows, divisible by two personas, but no sequence may hold both.
    layer = layer_of()
    layer.select([0, 1])
    with pytest.raises(ValueError, match="2 personas"):
        layer(torch.randn(3, 2, K))


def test_wrong_number_of_rows_is_named():
    layer = layer_of()
    layer.select([0, 1])
    with pytest.raises(ValueError, match="2 personas were chosen for a batch whose layer has 3 rows"):
        layer(torch.randn(3, K))


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        (3, IndexError, "persona 3 is not among the 3 masks"),
        (-2, IndexError, "persona -2 is not among the 3 masks"),
        ([0, 3], IndexError, "persona 3 is not among the 3 masks"),
        ([], ValueError, "the list is empty"),
    ],
    ids=str,
)
def test_bad_choice_changes_nothing(choice, error, message):
    layer, x = layer_of(), torch.randn(2, K)
    layer.select(1)
    with pytest.raises(error, match=message):
        layer.select(choice)
    assert_rows(layer, x, [1, 1])


@pytest.mark.parametrize("gamma", [1.0, -0.1, float("nan")])
def test_bad_gamma_changes_nothing(gamma):
    layer, x = layer_of(), torch.randn(2, K)
    layer.select(1)
    with pytest.raises(ValueError, match=f"0 <= gamma < 1, got {gamma}"):
        layer.select(0, gamma)
    assert_rows(layer, x, [1, 1])


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("choice", [-2, P], ids=str)
def test_bad_choice_of_the_selector_itself_is_refused(choice, materialize):
    layer = layer_of()

    def use():
        layer.selector.select(choice)
        layer.materialize(materialize)
        layer(torch.randn(2, K))

    with pytest.raises((IndexError, ValueError), match=str(choice)):
        use()


def test_materialized_copy_is_dropped_and_renewed():
    layer, x = layer_of(), torch.randn(2, K)
    for persona in (1, 2):
        layer.selector.select(persona)
        layer.materialize(True)
        assert_rows(layer, x, [persona] * 2)
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.select(2)
    assert_rows(layer, x, [2, 2])
    layer.select([0, 1])
    layer.materialize(True)
    assert_rows(layer, x, [0, 1])


@pytest.mark.parametrize("choice", [0, None, [0, 2]], ids=str)
def test_materialized_copy_never_outlives_the_choice(choice):
    # The second layer hears of the switch only through the shared selector.
    selector = PersonaSelector()
    first, second = layer_of(selector=selector), layer_of(selector=selector)
    first.select(1)
    second.materialize(True)
    first.select(choice)
    x = torch.randn(2, K)
    assert_rows(second, x, choice if isinstance(choice, list) else [-1 if choice is None else choice] * 2)


@pytest.mark.parametrize("choice", [0, [0, 2]], ids=str)
def test_switching_after_inference_mode(choice):
    layer, x = layer_of(), torch.randn(2, K)
    with torch.inference_mode():
        layer.select(choice)
        layer(x)
    layer.select(1 if isinstance(choice, int) else [1, 1])
    assert_rows(layer, x, [1, 1])


@pytest.mark.parametrize("choice", [0, [0, 0]], ids=str)
def test_gradients_after_inference_mode(choice):
    layer, x = layer_of(), torch.randn(2, K)
    with torch.inference_mode():
        layer.select(choice)
        layer(x)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, layer.mask(0) * x.sum(0))


def test_materializing_in_inference_mode():
    layer, x = layer_of(), torch.randn(2, K)
    layer.select(0)
    with torch.inference_mode():
        layer.materialize(True)
    layer.selector.select(1)
    layer.materialize(True)
    assert_rows(layer, x, [1, 1])
