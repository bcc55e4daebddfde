"""Find the linear layers of any causal LM, and which of them read the same input.

A site is an input tensor of the forward pass together with the linears that read it (q/k/v,
gate/up); it is named after its first linear. Layers are found by what they are, not by the
model's name.
"""

import re
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError


@dataclass(frozen=True)
class Site:
    """One measured input: its ``width`` K and the names of the linears that read it."""

    name: str
    width: int
    linears: tuple[str, ...]


def is_transposed(module: nn.Module) -> bool:
    """True for GPT-2's Conv1D, whose weight is ``[K, N]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def matrix(module: Any) -> Tensor:
    """The weight as ``[N, K]`` (a view)."""
    return module.weight.T if is_transposed(module) else module.weight


def find_linears(model: Any, include: str = "", exclude: str = "") -> dict[str, nn.Module]:
    """Every linear layer by name, without the output head (and whatever shares the embedding's weight).

    ``include`` and ``exclude`` are regular expressions searched in the layer's name; empty means all
    and none. Raises UserError for quantised layers, a bad expression, or if nothing is left.
    """
    patterns = [_compile(option, text) for option, text in (("include", include), ("exclude", exclude))]
    tied = {id(module.weight) for module in _embeddings(model)}
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, nn.Linear) and kind is not nn.Linear and _is_quantised(module):
            raise UserError(f"layer {name}: {kind.__module__}.{kind.__name__} is quantised; load the model unquantised")
        if not (isinstance(module, nn.Linear) or is_transposed(module)):
            continue
        if module is head or id(module.weight) in tied:
            continue
        if (include and not patterns[0].search(name)) or (exclude and patterns[1].search(name)):
            continue
        found[name] = module
    if not found:
        raise UserError(f"no linear layer is left to mask (include={include!r}, exclude={exclude!r})")
    return found


def expert_parameters(model: nn.Module) -> list[str]:
    """Mixture-of-experts weights kept as 3-d parameters: not covered, and to be reported as such."""
    return [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name.lower()]


def find_sites(model: Any, linears: dict[str, nn.Module], device: torch.device) -> tuple[list[Site], list[str]]:
    """Run one tiny forward pass and group the linears by the tensor they read.

    Returns the sites in order of execution, and the names of linears that the pass did not call.
    """
    readers: dict[str, list[str]] = {}
    width: dict[str, int] = {}
    alive: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def hook(name: str):
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if any(name in names for names in readers.values()):
                return
            ref, version, site = alive.get(id(x), (None, -1, ""))
            if ref is not None and ref() is x and version == x._version:
                readers[site].append(name)
                return
            readers[name], width[name] = [name], x.shape[-1]
            alive[id(x)] = (weakref.ref(x), x._version, name)

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=device) % vocabulary).unsqueeze(0)
    training = model.training
    try:
        model.eval()
        # no_grad, not inference_mode: inference tensors have no version counter.
        with torch.inference_mode(False), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    called = {name for names in readers.values() for name in names}
    sites = [Site(name, width[name], tuple(names)) for name, names in readers.items()]
    return sites, [name for name in linears if name not in called]


@torch.inference_mode()
def check_causal(model: Any, device: torch.device) -> None:
    """Raise UserError if a token changes what the model computes before it (an encoder such as BERT)."""
    last = min(7, model.get_input_embeddings().weight.shape[0] - 1)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, last]], device=device).clamp(max=last)
    first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :3].float()
    # Both rows are computed alike, so that rounding hardly differs; NaN is for the collector to name.
    difference, scale = (first - second).abs().max(), first.std()
    if difference > 1e-3 * scale:
        raise UserError(f"{type(model).__name__} is not a causal language model: later tokens change earlier outputs")


def _embeddings(model: Any) -> list[nn.Module]:
    return [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]


def _is_quantised(module: nn.Linear) -> bool:
    return (
        not module.weight.dtype.is_floating_point or module.weight.numel() != module.in_features * module.out_features
    )


def _compile(option: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"--{option} {pattern!r} is not a regular expression: {error}") from error
