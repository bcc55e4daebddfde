"""Masks on every architecture: the model with a persona is the model with its weights multiplied by the masks."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from kernels import pack_bits
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_linears, find_sites, is_transposed, matrix
from tests.pipeline.test_families import FAMILIES, GROUPED


def make(family):
    name, options, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval().requires_grad_(False)
    for parameter in model.parameters():
        # Biases that matter.
        parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def make_masks(model):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(matrix(module).shape) for name, module in find_linears(model).items()}
    bits = {
        persona: {name: pack_bits(torch.rand(shape, generator=generator) < 0.7) for name, shape in shapes.items()}
        for persona in ("up", "down")
    }
    return PersonaMasks(shapes, bits)


def multiplied(model, masks, persona):
    changed = copy.deepcopy(model)
    modules = dict(changed.named_modules())
    for name in masks.shapes:
        mask, module = masks.mask(persona, name), modules[name]
        module.weight.data.mul_(mask.T if is_transposed(module) else mask)
    return changed


def assert_applies(model, masks):
    ids = torch.randint(3, 128, (3, 9))
    attention = torch.ones_like(ids)
    attention[1, :4] = 0

    def logits(of):
        with torch.inference_mode():
            return of(input_ids=ids, attention_mask=attention).logits

    plain, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = {persona: logits(multiplied(model, masks, persona)) for persona in masks.personas}
    personas = PersonaModel(model, masks, verify=False)
    for materialize in (True, False):
        personas.materialize = materialize
        for persona in masks.personas:
            found = logits(personas.switch(persona).model)
            torch.testing.assert_close(found, expected[persona], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-4)
        mixed = logits(personas.switch(["up", None, "down"]).model)
        for row, of in enumerate((expected["up"], plain, expected["down"])):
            torch.testing.assert_close(mixed[row], of[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(personas.switch(None).model), plain)
    with torch.no_grad():
        generated = personas.generate(
            ids,
            attention_mask=attention,
            personas=["up", None, "down"],
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
    assert generated.shape[0] == 3
    personas.detach()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_multiplied(family):
    model = make(family)
    assert_applies(model, make_masks(model))


def test_tied_weights_stay_tied_and_whole():
    model = make("llama-tied")
    masks = make_masks(model)
    assert not any("head" in name or "embed" in name for name in masks.shapes)
    personas = PersonaModel(model, masks, verify=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    personas.detach()


def test_layers_that_are_called_twice_or_never():
    """One MLP for both blocks, and a layer that nobody calls: both are masked like any other."""
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**GROUPED)).eval().requires_grad_(False)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[0].spare = nn.Linear(5, 3).requires_grad_(False)
    sites, unused = find_sites(model, find_linears(model), torch.device("cpu"))
    assert unused == ["model.layers.0.spare"]
    assert {site.name: site.calls for site in sites if ".mlp." in site.name} == {
        "model.layers.0.mlp.gate_proj": 2,
        "model.layers.0.mlp.down_proj": 2,
    }
    assert {site.calls for site in sites if ".mlp." not in site.name} == {1}
    # One module in two places: a layer replaced in it is replaced in both.
    masks = make_masks(model)
    expected = multiplied(model, masks, "up")
    ids = torch.randint(3, 128, (2, 5))
    personas = PersonaModel(model, masks, verify=False).switch("up")
    with torch.inference_mode():
        torch.testing.assert_close(personas.model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    personas.detach()
