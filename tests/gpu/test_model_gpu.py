"""A whole model with a persona per sequence on a GPU: its logits beside those of models whose weights are masked, and a
CUDA graph that follows every switch."""

import copy

import pytest
import torch

from kernels import pack_bits
from kernels.layers import MaskedLinear
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_linears, matrix

DEVICE = "cuda"
PERSONAS = ("a", "b", "c")
SEQUENCES = ["b", None, "a", "c", "b"]


def tiny(dtype):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=100, max_position_embeddings=128, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval().to(device=DEVICE, dtype=dtype)


def masks_of(model):
    shapes = {name: tuple(matrix(module).shape) for name, module in find_linears(model).items()}
    bits = {p: {name: pack_bits(torch.rand(shape) > 0.3) for name, shape in shapes.items()} for p in PERSONAS}
    return PersonaMasks(shapes, bits)


def masked(model, masks, persona):
    """A model without this project's layers, its weights multiplied by the mask."""
    plain = copy.deepcopy(model)
    if persona is not None:
        for name, module in find_linears(plain).items():
            matrix(module).data.mul_(masks.mask(persona, name).to(DEVICE))
    return plain


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_sequence_has_its_own_persona(dtype, length):
    model = tiny(dtype)
    masks, ids = masks_of(model), torch.randint(3, 100, (len(SEQUENCES), length), device=DEVICE)
    with torch.inference_mode():
        expected = [masked(model, masks, p)(input_ids=ids[i : i + 1]).logits for i, p in enumerate(SEQUENCES)]
        personas = PersonaModel(model, masks, materialize=False, verify=False)
        together = personas.switch(SEQUENCES).model(input_ids=ids).logits
        alone = personas.switch("b").model(input_ids=ids).logits
    wanted = torch.cat(expected).float()
    # Roundings of two blocks; in half precision a few show already.
    limit = (64 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps * wanted.abs().max()
    assert (together.float() - wanted).abs().max() <= limit
    assert (alone[0].float() - wanted[0]).abs().max() <= limit
    # The wrong persona would not pass.
    assert (alone[2].float() - wanted[2]).abs().max() > 2 * limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_follows_every_switch():
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 192).to(DEVICE, torch.bfloat16)
    layer = MaskedLinear.from_linear(linear, torch.rand(3, 192, 128) > 0.5)
    x = torch.randn(8, 128, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer.select([0, 1, 2, -1, 0, 1, 2, -1])
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for choice in ([2, 2, 2, 2, 1, 1, 0, -1], [-1] * 8, [0, 1, 2, -1, 0, 1, 2, -1]):
            layer.select(choice)
            graph.replay()
            assert torch.equal(y, layer(x))
