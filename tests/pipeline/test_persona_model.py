"""Personas on a live model: switching, batches of personas, other models refused, every trace removable."""

import copy

import pytest
import torch

from kernels import SparseLinear, pack_bits
from pipeline.errors import UserError
from pipeline.fingerprint import model_fingerprints
from pipeline.loading import load_model, load_tokenizer
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_linears, matrix
from tests.pipeline.tiny import make_model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


def random_masks(model, personas=("fox", "dog")):
    linears = find_linears(model)
    shapes = {name: tuple(matrix(m).shape) for name, m in linears.items()}
    bits = {p: {n: pack_bits(torch.rand(s) > 0.4) for n, s in shapes.items()} for p in personas}
    return PersonaMasks(shapes, bits, {"model": {"id": "tiny", "fingerprint": model_fingerprints(linears)}})


@pytest.fixture
def personas(folder):
    """A PersonaModel, its masks, and an untouched copy of the base model."""
    base = load_model(str(folder))
    masks = random_masks(base)
    return PersonaModel(copy.deepcopy(base), masks, load_tokenizer(str(folder))), masks, base


def multiplied(base, masks, persona, gamma=0.0):
    """The base model with its weights multiplied by the gate: the plain way to apply a mask."""
    model = copy.deepcopy(base)
    for name, module in find_linears(model).items():
        gate = torch.where(masks.mask(persona, name), 1.0, gamma)
        matrix(module).data.mul_(gate)
    return model


IDS = torch.tensor([[5, 9, 11, 40, 7], [8, 3, 99, 2, 14]])


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("materialize", [True, False])
def test_every_persona_is_the_model_with_multiplied_weights(personas, materialize):
    model, masks, base = personas
    model.materialize = materialize
    for persona, gamma in (("fox", 0.0), ("dog", 0.0), ("fox", 0.5)):
        model.switch(persona, gamma)
        torch.testing.assert_close(logits(model), logits(multiplied(base, masks, persona, gamma)))


def test_none_is_the_base_model_bit_for_bit(personas):
    model, _, base = personas
    expected = logits(base)
    assert torch.equal(logits(model), expected)
    model.switch("fox")
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model.switch(None)), expected)


def test_context_manager_restores(personas):
    model, _, _ = personas
    model.switch("dog", 0.25)
    before = logits(model)
    with pytest.raises(RuntimeError, match="inside"), model.using("fox"):
        assert model.active == "fox"
        raise RuntimeError("inside")
    assert (model.active, model.selector.gamma) == ("dog", 0.25)
    assert torch.equal(logits(model), before)


def test_every_sequence_its_own_persona(personas):
    model, masks, base = personas
    choice, prompts = ["fox", None, "dog"], torch.cat([IDS, IDS[:1]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(prompts, attention_mask=torch.ones_like(prompts), personas=choice, **options)
    for row, persona in enumerate(choice):
        alone = base if persona is None else multiplied(base, masks, persona)
        one = prompts[row : row + 1]
        expected = alone.generate(one, attention_mask=torch.ones_like(one), **options)[0]
        assert torch.equal(together[row, : len(expected)], expected)
    assert model.active is None


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_several_answers(personas, options):
    model, _, _ = personas
    torch.manual_seed(1)
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), personas=["fox", "dog"], max_new_tokens=4, pad_token_id=0, **options
    )
    assert out.shape[0] == 2 * options.get("num_return_sequences", 1)


def test_wrong_choices(personas):
    model, _, _ = personas
    with pytest.raises(UserError, match=r"unknown persona 'cat'; known are fox, dog"):
        model.switch("cat")
    with pytest.raises(UserError, match="3 personas for a batch of 2"):
        model.generate(IDS, personas=["fox", "dog", None])
    with pytest.raises(ValueError, match="gamma"):
        model.switch("fox", 1.0)


def test_other_models_are_refused_with_the_layers_that_differ(folder, tmp_path):
    masks = random_masks(load_model(str(folder)))
    other = load_model(str(make_model(tmp_path / "other", "gpt2" if "gpt2" in str(folder) else "llama", seed=1)))
    with pytest.raises(UserError, match=r"made for 'tiny'; \d+ of \d+ layers differ: .*other weights"):
        PersonaModel(other, masks)
    foreign = load_model(str(make_model(tmp_path / "foreign", "llama" if "gpt2" in str(folder) else "gpt2")))
    with pytest.raises(UserError, match="not in this model"):
        PersonaModel(foreign, masks)
    same = copy.deepcopy(load_model(str(folder)))
    masks.shapes[next(iter(masks.shapes))] = (3, 5)
    with pytest.raises(UserError, match=r"masks are for \[3, 5\]"):
        PersonaModel(same, masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_weights_in_another_precision(folder, dtype):
    masks = random_masks(load_model(str(folder)))
    model = PersonaModel(load_model(str(folder), dtype), masks)
    assert logits(model.switch("fox")).dtype == dtype


def test_detach_leaves_no_trace(personas):
    model, _, base = personas
    names = {n for n, _ in base.named_modules()}
    state = set(base.state_dict())
    plain = model.switch("fox").detach()
    assert {n for n, _ in plain.named_modules()} == names
    assert set(plain.state_dict()) == state
    assert torch.equal(logits(plain), logits(base))


def test_adding_personas(personas):
    model, masks, base = personas
    model.add(masks.random_like("fox", 3, "noise"))
    assert model.personas == ("fox", "dog", "noise")
    torch.testing.assert_close(logits(model.switch("noise")), logits(multiplied(base, model.masks, "noise")))
    with pytest.raises(ValueError, match="personas in both: noise"):
        model.add(masks.random_like("fox", 3, "noise"))


@pytest.mark.parametrize("form", ["masked", "correction"])
def test_forced_form_follows_added_personas(folder, form):
    base = load_model(str(folder))
    masks = random_masks(base)
    model = PersonaModel(copy.deepcopy(base), masks, materialize=False, form=form)
    model.add(masks.random_like("fox", 3, "noise"))
    torch.testing.assert_close(logits(model.switch("noise")), logits(multiplied(base, model.masks, "noise")))


def test_compressed_model_is_the_one_with_multiplied_weights(personas):
    model, masks, base = personas
    expected = logits(multiplied(base, masks, "dog"))
    with pytest.raises(UserError, match="unknown persona 'cat'"):
        model.compress("cat")
    plain = model.switch("fox").compress("dog")
    torch.testing.assert_close(logits(plain), expected)
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, SparseLinear)}
    assert set(layers) == set(masks.shapes)
    assert all(torch.equal(layer.weight.mask(), masks.mask("dog", name)) for name, layer in layers.items())
    assert not any(name.rpartition(".")[0] in layers for name, _ in plain.named_parameters())
    again = PersonaModel(copy.deepcopy(base), masks).compress("fox")
    again.load_state_dict(plain.state_dict())
    assert torch.equal(logits(again), logits(plain))
    assert model.detach() is plain


@pytest.mark.parametrize("choice", [None, "fox", ["fox", None]], ids=["off", "one", "rows"])
def test_compiles_whole(personas, choice):
    model, _, _ = personas
    model.switch(choice)
    # All models of a class share one code object, whose graphs count against one limit.
    torch.compiler.reset()
    run = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(run(input_ids=IDS, use_cache=False).logits, logits(model))
