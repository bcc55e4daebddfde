"""SmolLM2 speaks the same 64 tokens, whichever form its masked products take."""

import copy

import pytest
import torch

from kernels import pack_bits
from pipeline.embedded import ALIAS, cache_folder
from pipeline.loading import load_model
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_linears, matrix

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(
        not (cache_folder() / "SmolLM2-135M-Instruct" / "config.json").exists(),
        reason="the embedded model is not converted yet (make model)",
    ),
]
STEPS, FEW = 64, 12
"""Tokens of one sequence, and of a batch whose sequences have personas of their own."""
PROMPTS = torch.tensor([[504, 3575, 282, 4649, 314, 253], [28, 198, 540, 3061, 288, 1803]])
PERSONAS = ("fox", "dog")
FORMS = {
    "materialised": {"materialize": True},
    "masked": {"materialize": False, "form": "masked"},
    "correction": {"materialize": False, "form": "correction"},
    "sparse": {},
}


@pytest.fixture(scope="module")
def base():
    return load_model(ALIAS)


@pytest.fixture(scope="module")
def masks(base):
    """2 % removed at random: what the correction form is for, and text that is still text."""
    torch.manual_seed(0)
    shapes = {name: tuple(matrix(module).shape) for name, module in find_linears(base).items()}
    bits = {p: {name: pack_bits(torch.rand(shape) > 0.02) for name, shape in shapes.items()} for p in PERSONAS}
    return PersonaMasks(shapes, bits)


def greedy(model, prompts, steps, **options):
    options |= {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0, "do_sample": False}
    with torch.inference_mode():
        return model.generate(prompts, min_new_tokens=steps, max_new_tokens=steps, **options)


def twin(model):
    """Another model on the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@pytest.fixture(scope="module")
def expected(base, masks):
    """What the dense model with multiplied weights says: all of fox's tokens, few of dog's."""
    told = []
    for row, persona, steps in ((0, "fox", STEPS), (1, "dog", FEW)):
        model = twin(base)
        for name, module in find_linears(model).items():
            module.weight = torch.nn.Parameter(module.weight * masks.mask(persona, name), requires_grad=False)
        told.append(greedy(model, PROMPTS[row : row + 1], steps)[0])
    assert len(set(told[0].tolist())) > 10
    return told


@pytest.mark.parametrize("form", FORMS)
def test_the_dense_masked_model_s_tokens(base, masks, expected, form):
    personas = PersonaModel(twin(base), masks, **FORMS[form])
    model = personas.compress("fox") if form == "sparse" else personas.switch("fox")
    assert torch.equal(greedy(model, PROMPTS[:1], STEPS)[0], expected[0])
    if form in ("masked", "correction"):
        few = PROMPTS.shape[1] + FEW
        together = greedy(personas, PROMPTS, FEW, personas=list(PERSONAS))
        assert torch.equal(together, torch.stack([told[:few] for told in expected]))
