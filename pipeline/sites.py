"""Find the linear layers of any causal LM, and which of them read the same input.

A site is an input tensor of the forward pass together with the linears that read it (q/k/v,
gate/up); it is named after its first linear. Layers are found by what they are, not by the
model's name.
"""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional as F

from pipeline.config import FIRST_ORDER, CalibrateConfig
from pipeline.errors import UserError
from pipeline.experts import ExpertMatrix, by_module, find_experts
from pipeline.quantised import check_plain


@dataclass(frozen=True)
class Site:
    """One measured input: its ``width`` K and the names of the linears that read it.

    ``routed``: an expert's input, which has only the tokens that were routed to it, and counts of its own.
    ``calls``: how often a forward pass calls them; what they read is averaged over the calls.
    """

    name: str
    width: int
    linears: tuple[str, ...]
    routed: bool = False
    calls: int = field(default=1, compare=False)


def is_transposed(layer: Any) -> bool:
    """True where the weight is ``[K, N]``, as in GPT-2's Conv1D."""
    if isinstance(layer, ExpertMatrix):
        return layer.experts.is_transposed
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def matrix(module: Any) -> Tensor:
    """The weight as ``[N, K]`` (a view)."""
    if isinstance(module, ExpertMatrix):
        return module.matrix
    return module.weight.T if is_transposed(module) else module.weight


def find_linears(model: Any, include: str = "", exclude: str = "") -> dict[str, nn.Module]:
    """Every linear layer of the base model by name, without what shares the embedding's weight.

    ``include`` and ``exclude`` are regular expressions searched in the layer's name; empty means all
    and none. Raises UserError for quantised layers, a bad expression, or if nothing is left.
    """
    return _left(_linears(model, include, exclude), include, exclude)


def find_layers(model: Any, include: str = "", exclude: str = "") -> dict[str, Any]:
    """``find_linears``, and every expert's matrices (``pipeline.experts``), named and filtered in the same way."""
    chosen = _chooser(include, exclude)
    experts = {name: layer for name, layer in find_experts(model).items() if chosen(name)}
    return _left({**_linears(model, include, exclude), **experts}, include, exclude)


def measurable(model: Any, config: CalibrateConfig) -> dict[str, Any]:
    """The layers that are measured; the first-order criteria leave the experts of a divided model whole."""
    find = find_linears if config.sharded and config.criterion in FIRST_ORDER else find_layers
    return find(model, config.include, config.exclude)


def maskable(model: Any, config: CalibrateConfig) -> dict[str, Any]:
    """The layers that the options let be masked: of the measured ones, those beyond the first ``skipped_blocks``.

    A model without a list of decoder blocks has none to skip. Raises UserError if the user named a share then, or if
    nothing is left.
    """
    found = measurable(model, config)
    if not config.skipped_blocks:
        return found
    try:
        blocks = list(decoder_blocks(model))
    except UserError:
        if config.skip_blocks is not None:
            raise
        return found
    skipped = tuple(f"{name}." for name in blocks[: int(config.skipped_blocks * len(blocks))])
    found = {name: layer for name, layer in found.items() if not name.startswith(skipped)}
    if not found:
        raise UserError(f"no linear layer is left to mask beyond the {len(skipped)} blocks that --skip-blocks leaves")
    return found


def _linears(model: Any, include: str, exclude: str) -> dict[str, nn.Module]:
    chosen = _chooser(include, exclude)
    tied = {id(module.weight) for module in _embeddings(model)}
    head, inside = model.get_output_embeddings(), {id(module) for module in model.base_model.modules()}
    found = {}
    for name, module in model.named_modules():
        check_plain(name, module)
        if not (is_transposed(module) or (isinstance(module, nn.Linear) and is_product(module))):
            continue
        # Some heads are a linear layer more (ModernBERT's); statistics do not run them.
        if module is head or id(module) not in inside or id(module.weight) in tied or not chosen(name):
            continue
        found[name] = module
    return found


@torch.no_grad()
def is_product(module: nn.Linear) -> bool:
    """Is what ``module`` returns ``x W^T + b``? Subclasses may quantise, take their input in groups, or return a choice
    of experts; a mask's product would not be theirs. Of one without its weights, only the output's shape is looked at.
    """
    if type(module).forward is nn.Linear.forward:
        return True
    weights: dict[str, Tensor] = dict(module.named_parameters())
    known = not any(p.is_meta or isinstance(p, DTensor) for p in weights.values())
    if not known:
        weights = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in weights.items()}
    weight = weights["weight"]
    options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    x = torch.linspace(-1, 1, 2 * weight.shape[1], **options).view(1, 2, -1)
    try:
        found = functional_call(module, weights, (x,))
    except (RuntimeError, TypeError, ValueError):
        # It does not take ``[B, T, K]``.
        return False
    expected = F.linear(x, weight, weights.get("bias"))
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    scale = expected.abs().max() if known else 0.0
    return not known or torch.allclose(found, expected, rtol=0, atol=float(0.01 * scale), equal_nan=True)


def other_linears(model: Any) -> list[str]:
    """Linear layers by their class that do not compute a product of their own input, each with its class's name."""
    linears = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [f"{name} ({type(module).__name__})" for name, module in linears if not is_product(module)]


def _left(found: dict[str, Any], include: str, exclude: str) -> dict[str, Any]:
    if not found:
        raise UserError(f"no linear layer is left to mask (include={include!r}, exclude={exclude!r})")
    return found


def _chooser(include: str, exclude: str) -> Callable[[str], bool]:
    wanted, unwanted = (_compile(option, text) for option, text in (("include", include), ("exclude", exclude)))
    return lambda name: bool((not include or wanted.search(name)) and not (exclude and unwanted.search(name)))


class Readers:
    """Which of the layers read which tensor, in the order of the calls of one forward pass."""

    def __init__(self) -> None:
        self._calls: dict[str, list[int]] = {}
        self._width: dict[str, int] = {}
        self._alive: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._routed: set[str] = set()
        self._tensors = 0

    def note(self, name: str, x: Tensor) -> None:
        """Layer ``name`` is called with ``x``."""
        ref, version, number = self._alive.get(id(x), (None, -1, -1))
        if ref is None or ref() is not x or version != x._version:
            number, self._tensors = self._tensors, self._tensors + 1
            self._alive[id(x)] = (weakref.ref(x), x._version, number)
        self._calls.setdefault(name, []).append(number)
        self._width[name] = x.shape[-1]

    def note_experts(self, layers: dict[str, Any]) -> None:
        """The module of these experts' matrices is called: each reads the tokens routed to it, a site of its own."""
        for name, layer in layers.items():
            self._routed.add(name)
            self._calls.setdefault(name, []).append(self._tensors)
            self._width[name] = layer.matrix.shape[1]
            self._tensors += 1

    @property
    def called(self) -> set[str]:
        return set(self._calls)

    def sites(self) -> list[Site]:
        """In order of the first call. Layers share a site if they read the same tensors in all their calls."""
        readers: dict[tuple[int, ...], list[str]] = {}
        for name, tensors in self._calls.items():
            readers.setdefault(tuple(tensors), []).append(name)
        return [
            Site(names[0], self._width[names[0]], tuple(names), names[0] in self._routed, len(calls))
            for calls, names in readers.items()
        ]


@contextmanager
def watching(layers: dict[str, Any]) -> Iterator[Readers]:
    """Note the calls of ``layers`` during the forward pass inside; the hooks are removed on leaving."""
    readers = Readers()
    handles = []
    for name, module in layers.items():
        if isinstance(module, nn.Module):
            handles.append(module.register_forward_pre_hook(lambda _, x, name=name: readers.note(name, x[0])))
    for module, of in by_module(layers):
        handles.append(module.register_forward_pre_hook(lambda _, x, of=of: readers.note_experts(of)))
    try:
        yield readers
    finally:
        for handle in handles:
            handle.remove()


def probe(model: Any, device: torch.device) -> Tensor:
    """Ids int64 ``[1, 8]`` for a pass that only looks at how a model is wired."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(8, device=device) % vocabulary).unsqueeze(0)


def find_sites(model: Any, layers: dict[str, Any], device: torch.device) -> tuple[list[Site], list[str]]:
    """Run one tiny forward pass and group the layers by the tensor they read.

    Returns the sites in order of execution, and the names of layers that the pass did not call.
    """
    ids = probe(model, device)
    training = model.training
    try:
        model.eval()
        # no_grad, not inference_mode: inference tensors have no version counter.
        with watching(layers) as readers, torch.inference_mode(False), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        model.train(training)
    return readers.sites(), [name for name in layers if name not in readers.called]


def decoder_blocks(model: Any) -> dict[str, nn.Module]:
    """The decoder blocks of a Hugging Face model by name, in order. Raises UserError if it has no list of them."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{number}": block for number, block in enumerate(module)}
    raise UserError(f"{type(model).__name__} has no list of {count} decoder blocks")


@torch.no_grad()
def check_causal(model: Any, device: torch.device) -> None:
    """Raise UserError if a token changes what the model computes before it (an encoder such as BERT)."""
    ids = causal_probe(model, device)
    compare_causal(model, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


def causal_probe(model: Any, device: torch.device) -> Tensor:
    """Ids int64 ``[2, 4]`` of two sequences that differ in the last token only."""
    last = min(7, model.get_input_embeddings().weight.shape[0] - 1)
    return torch.tensor([[1, 2, 3, 4], [1, 2, 3, last]], device=device).clamp(max=last)


def compare_causal(model: Any, computed: Tensor) -> None:
    """Raise UserError if what was computed from ``causal_probe`` ``[2, 4, D]`` differs before the last token."""
    first, second = computed[:, :3].float()
    # Both rows are computed alike, so that rounding hardly differs; NaN is for the collector to name.
    difference, scale = (first - second).abs().max(), first.std()
    if difference > 1e-3 * scale:
        raise UserError(f"{type(model).__name__} is not a causal language model: later tokens change earlier outputs")


def _embeddings(model: Any) -> list[nn.Module]:
    return [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]


def _compile(option: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"--{option} {pattern!r} is not a regular expression: {error}") from error
