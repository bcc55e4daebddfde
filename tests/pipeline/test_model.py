"""PersonaModel where it is easily wrong: batches of unequal prompts, beams, compiled graphs, casts, restored state."""

import copy

import pytest
import torch

from kernels import pack_bits
from kernels.layers import MaskedLinear
from pipeline.errors import UserError
from pipeline.fingerprint import model_fingerprints
from pipeline.loading import load_model
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_linears, matrix

IDS = torch.tensor([[5, 9, 11, 40, 7], [8, 3, 99, 2, 14], [70, 71, 72, 73, 74]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, ground):
    """The untouched model; not to be changed."""
    return load_model(str(getattr(ground, request.param)))


@pytest.fixture(scope="module")
def masks(base):
    linears = find_linears(base)
    shapes = {name: tuple(matrix(m).shape) for name, m in linears.items()}
    torch.manual_seed(3)
    bits = {p: {n: pack_bits(torch.rand(s) > 0.3) for n, s in shapes.items()} for p in ("a", "b")}
    return PersonaMasks(shapes, bits, {"model": {"id": "tiny", "fingerprint": model_fingerprints(linears)}})


@pytest.fixture
def personas(base, masks):
    return PersonaModel(copy.deepcopy(base), masks)


@pytest.fixture(scope="module")
def plain(base, masks):
    """``plain(persona)``: a model without this project's layers, its weights multiplied by the mask."""
    made = {None: base}

    def of(persona):
        if persona not in made:
            made[persona] = copy.deepcopy(base)
            for name, module in find_linears(made[persona]).items():
                matrix(module).data.mul_(masks.mask(persona, name))
        return made[persona]

    return of


def logits(model, ids=IDS, **options):
    with torch.inference_mode():
        return model(input_ids=ids, **options).logits


def test_masks_matter(plain):
    """The oracle itself: the masked models differ from the base and from each other."""
    one, two, three = (logits(plain(p)) for p in (None, "a", "b"))
    assert min((one - two).abs().max(), (two - three).abs().max(), (one - three).abs().max()) > 1e-2


def test_rows_equal_one_persona_each(personas, plain):
    choice = ["b", None, "a"]
    got = logits(personas.switch(choice))
    for row, persona in enumerate(choice):
        torch.testing.assert_close(got[row], logits(plain(persona), IDS[row : row + 1])[0])
    assert personas.active == choice


def test_rows_of_another_number_are_refused(personas):
    personas.switch(["a", "b"])
    with pytest.raises(ValueError, match="2 personas were chosen"):
        logits(personas)


@pytest.mark.parametrize("materialize", [True, False])
def test_generation_on_a_left_padded_batch(personas, plain, materialize):
    personas.materialize = materialize
    prompts, choice = [[5, 9, 11, 40, 7], [99, 2], [70, 71, 72]], ["a", None, "b"]
    ids, attention = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 5 - len(prompt) :], attention[row, 5 - len(prompt) :] = torch.tensor(prompt), 1
    together = personas.generate(ids, attention_mask=attention, personas=choice, **GREEDY)
    texts = []
    for row, persona in enumerate(choice):
        one = torch.tensor([prompts[row]])
        expected = plain(persona).generate(one, attention_mask=torch.ones_like(one), **GREEDY)[0, one.shape[1] :]
        assert together[row, 5 : 5 + len(expected)].tolist() == expected.tolist()
        texts.append(tuple(expected.tolist()))
    assert len(set(texts)) > 1


@pytest.mark.parametrize("several", [1, 2])
def test_beams_are_those_of_each_sequence_alone(personas, plain, several):
    options = {"num_beams": 3, "num_return_sequences": several, **GREEDY}
    choice = ["a", None, "b"]
    together = personas.generate(IDS, attention_mask=torch.ones_like(IDS), personas=choice, **options)
    for row, persona in enumerate(choice):
        one = IDS[row : row + 1]
        expected = plain(persona).generate(one, attention_mask=torch.ones_like(one), **options)
        got = together[row * several : (row + 1) * several, : expected.shape[1]]
        assert got.tolist() == expected.tolist()


def test_generation_restores_the_choice_after_an_error(personas):
    personas.switch("b", 0.5)
    with pytest.raises(ValueError, match="max_new_tokens"):
        personas.generate(IDS, personas=["a", "a", None], max_new_tokens=-3)
    assert (personas.active, personas.selector.gamma) == ("b", 0.5)


def test_generation_keeps_the_present_persona_without_personas(personas, plain):
    personas.switch("a")
    options = {"attention_mask": torch.ones_like(IDS), **GREEDY}
    assert torch.equal(personas.generate(IDS, **options), plain("a").generate(IDS, **options))


def test_a_full_cache_serves_the_next_persona(personas, plain):
    """Keys and values of one persona stay; what is computed later is the next one's."""
    with torch.inference_mode():
        cache = personas.switch("a")(input_ids=IDS[:, :3], use_cache=True).past_key_values
        expected = plain("a")(input_ids=IDS[:, :3], use_cache=True).past_key_values
        got = personas.switch("b")(input_ids=IDS[:, 3:], past_key_values=cache).logits
        torch.testing.assert_close(got, plain("b")(input_ids=IDS[:, 3:], past_key_values=expected).logits)


def test_nested_contexts(personas):
    with personas.using(["a", None, "b"], 0.25):
        with personas.using("a"):
            with personas.using(None):
                assert personas.active is None
            assert (personas.active, personas.selector.gamma) == ("a", 0.0)
        assert (personas.active, personas.selector.gamma) == (["a", None, "b"], 0.25)
    assert personas.active is None


def test_an_unknown_persona_in_a_context_changes_nothing(personas):
    personas.switch("a")
    before = logits(personas)
    for choice in ("z", ["a", "z", None], ""):
        with pytest.raises(UserError, match="unknown persona.*known are a, b"), personas.using(choice):
            pass
    assert personas.active == "a"
    assert torch.equal(logits(personas), before)


def test_a_refused_gamma_changes_nothing(personas):
    personas.switch("a")
    before = logits(personas)
    for gamma in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            personas.switch("b", gamma)
    assert personas.active == "a"
    assert torch.equal(logits(personas), before)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_materialized_or_not(personas, gamma):
    results = []
    for personas.materialize in (True, False, True):
        results.append(logits(personas.switch("a", gamma)))
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_cast_after_attaching(personas, plain):
    """``.to(dtype)`` of the wrapped model reaches the shared weight and the dense copy."""
    personas.switch("a").model.to(torch.bfloat16)
    expected = logits(copy.deepcopy(plain("a")).to(torch.bfloat16))
    torch.testing.assert_close(logits(personas), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(logits(personas.switch(["a"] * 3)), expected, rtol=0.02, atol=0.02)


def test_the_same_weights_loaded_in_bfloat16(base, masks, plain):
    model = PersonaModel(copy.deepcopy(base).to(torch.bfloat16), masks).switch("b")
    expected = logits(copy.deepcopy(plain("b")).to(torch.bfloat16))
    torch.testing.assert_close(logits(model), expected, rtol=0.02, atol=0.02)


def test_one_flipped_weight_names_its_layer_alone(base, masks):
    other = copy.deepcopy(base)
    name = list(masks.shapes)[3]
    matrix(dict(other.named_modules())[name]).data[1, 2] *= -1
    with pytest.raises(UserError, match="differ") as caught:
        PersonaModel(copy.deepcopy(other), masks)
    message = str(caught.value)
    assert f"1 of {len(masks.shapes)} layers differ: {name}: other weights" in message
    assert [n for n in masks.shapes if n in message.replace(name, "")] == []
    assert isinstance(PersonaModel(other, masks, verify=False), PersonaModel)


def test_a_refused_model_is_left_as_it_was(base, masks):
    other = copy.deepcopy(base)
    matrix(dict(other.named_modules())[list(masks.shapes)[-1]]).data.neg_()
    with pytest.raises(UserError):
        PersonaModel(other, masks)
    assert not any(isinstance(m, MaskedLinear) for m in other.modules())


def test_masking_twice_is_refused(personas, masks):
    with pytest.raises(UserError, match="masked already"):
        PersonaModel(personas.model, masks)


def test_detach_gives_back_the_very_modules(base, masks):
    model = copy.deepcopy(base)
    before = {name: id(module) for name, module in model.named_modules()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    wrapped = PersonaModel(model, masks).switch("a", 0.5)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
    assert wrapped.detach() is model
    assert {name: id(module) for name, module in model.named_modules()} == before
    PersonaModel(model, masks).detach()


def test_adding_while_a_persona_is_on(personas, base, masks):
    personas.switch("a")
    before = logits(personas)
    personas.add(masks.intersection("both", ("a", "b")))
    assert torch.equal(logits(personas), before)
    expected = copy.deepcopy(base)
    for name, module in find_linears(expected).items():
        matrix(module).data.mul_(masks.mask("a", name) & masks.mask("b", name))
    torch.testing.assert_close(logits(personas.switch("both")), logits(expected))
    torch.testing.assert_close(logits(personas.switch([None, "both", "a"]))[1:2], logits(expected, IDS[1:2]))


def test_a_refused_addition_changes_nothing(personas, masks):
    for wrong in (masks, PersonaMasks({"x": (1, 8)}, {"c": {"x": torch.zeros(1, 1, dtype=torch.uint8)}})):
        with pytest.raises(ValueError, match="personas in both|different layers"):
            personas.add(wrong)
    assert personas.personas == ("a", "b")
    assert {layer.bits.shape[0] for layer in personas.modules() if isinstance(layer, MaskedLinear)} == {2}


def test_one_compiled_function_follows_every_switch(personas):
    torch._dynamo.reset()
    personas.materialize = False
    torch.compiler.reset()
    run = torch.compile(personas.model, fullgraph=True, backend="aot_eager")
    for choice, gamma in (("a", 0), ("b", 0), (["a", None, "b"], 0), (["b", "b", "a"], 0), (None, 0)):
        personas.switch(choice, gamma)
        with torch.inference_mode():
            torch.testing.assert_close(run(input_ids=IDS, use_cache=False).logits, logits(personas), msg=str(choice))


def test_from_pretrained(finished, ground):
    model = PersonaModel.from_pretrained(finished)
    assert model.personas == ("up", "down")
    assert model.tokenizer.pad_token_id == 0
    assert torch.equal(logits(model), logits(load_model(str(ground.llama))))
    with pytest.raises(UserError, match="not in this model"):
        PersonaModel.from_pretrained(finished, str(ground.gpt2))
    with pytest.raises(UserError, match="no manifest"):
        PersonaModel.from_pretrained(ground.folder)
