"""Quantised models: refused with a sentence that names the layer and the class, whatever library made them."""

import json

import pytest
import torch
from torch import nn

from pipeline import calibrate
from pipeline.errors import UserError
from pipeline.loading import load_model
from pipeline.sites import find_layers, find_linears
from tests.pipeline.tiny import make_model

LAYER = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def llama(ground):
    return load_model(str(ground.llama))


def refused(model, kind):
    for find in (find_linears, find_layers):
        with pytest.raises(UserError, match=rf"layer {LAYER}: {kind} is quantised; load the model unquantised"):
            find(model)


def foreign(name, base, library):
    """A class as a library would define it, without the library."""
    return type(name, (base,), {"__module__": f"{library}.nn.modules"})


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao", "gptqmodel", "awq", "hqq"])
@pytest.mark.parametrize("base", [nn.Linear, nn.Module])
def test_a_layer_of_a_quantising_library(llama, library, base):
    """Also one that is no nn.Linear: it must not be passed over as if it were no layer at all."""
    kind = foreign("Linear4bit", base, library)
    llama.model.layers[0].self_attn.o_proj = kind(32, 32) if base is nn.Linear else kind()
    refused(llama, rf"{library}\.nn\.modules\.Linear4bit")


def test_a_weight_of_a_quantising_library(llama):
    """torchao leaves nn.Linear as it is and swaps its weight for a tensor of its own class."""
    kind = foreign("AffineQuantizedTensor", torch.Tensor, "torchao")
    weight = torch.zeros(32, 32).as_subclass(kind)
    llama.model.layers[0].self_attn.o_proj.weight = nn.Parameter(weight, requires_grad=False)
    refused(llama, r"torchao\.nn\.modules\.AffineQuantizedTensor")


def test_torchao_itself(llama):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(llama.model.layers[0].self_attn.o_proj, torchao.Int8WeightOnlyConfig())
    refused(llama, r"torchao\..*")


def test_bitsandbytes_itself(llama):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    llama.model.layers[0].self_attn.o_proj = bitsandbytes.nn.Linear8bitLt(32, 32, bias=False)
    refused(llama, r"bitsandbytes\.nn\.modules\.Linear8bitLt")


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_a_model_whose_configuration_says_so(options, method, stream, words, tmp_path, capsys):
    """Before its library is asked for: the message is the same where that is not installed."""
    model = make_model(tmp_path / "model")
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": options}))
    assert calibrate.main(words(tmp_path / "run", "--criterion", "wanda", *stream, model=model)) == 2
    said = capsys.readouterr().err
    assert f"its weights are quantised ({method}); masks need the unquantised model" in said
    assert not (tmp_path / "run").exists()
