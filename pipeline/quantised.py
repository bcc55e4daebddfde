"""Quantised layers hold codes, not weights: they are refused before anything is measured."""

from typing import Any

from torch import Tensor, nn

from pipeline.errors import UserError

LIBRARIES = (
    "bitsandbytes",
    "torchao",
    "awq",
    "auto_gptq",
    "gptqmodel",
    "hqq",
    "eetq",
    "quanto",
    "aqlm",
    "compressed_tensors",
)
"""Packages whose classes are quantised weights or layers."""


def check_plain(name: str, module: Any) -> None:
    """Raise UserError if ``module`` is a quantised linear layer: a packed weight, or a class of such a library."""
    weight = getattr(module, "weight", None)
    for part in (module, weight, getattr(weight, "data", None)):
        if part is not None and _library(part) in LIBRARIES:
            _refuse(name, part)
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear and _packed(module):
        _refuse(name, module)


def check_unquantised(model: str, config: Any) -> None:
    """Raise UserError if the model's configuration says that its weights are quantised."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    options = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = getattr(options.get("quant_method"), "value", options.get("quant_method"))
    raise UserError(f"--model {model}: its weights are quantised ({method}); masks need the unquantised model")


def _library(part: Any) -> str:
    return type(part).__module__.partition(".")[0]


def _packed(module: nn.Linear) -> bool:
    weight: Tensor = module.weight
    return not weight.dtype.is_floating_point or weight.numel() != module.in_features * module.out_features


def _refuse(name: str, part: Any) -> None:
    kind = type(part)
    raise UserError(f"layer {name}: {kind.__module__}.{kind.__name__} is quantised; load the model unquantised")
