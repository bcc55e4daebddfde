"""Three ways of measuring the inputs of a model's linears, as hooks: ours, the plain PyTorch op, and what the
paper's released code does (a float32 copy and a norm over batch and time at every linear)."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import here
from kernels.ops.activation_stats import COUNTED, FIELDS, SINK, activation_stats
from kernels.ops.activation_stats.reference import activation_stats_reference

BATCH, PERSONAS = 8, 2


def tokens() -> int:
    """Of a sequence; a GPU needs more of them to be busy."""
    return 2048 if here() == "cuda" else 256


def roles() -> tuple[Tensor, Tensor]:
    """Every token of a batch counted but the first, a sink; two personas in turn."""
    role = torch.full((BATCH, tokens()), COUNTED, dtype=torch.uint8)
    role[:, 0] = SINK
    return role, torch.arange(BATCH) % PERSONAS


def new_sums(channels: int) -> Tensor:
    return torch.zeros(PERSONAS, len(FIELDS), channels, dtype=torch.float64)


class Hooks:
    """Hooks on ``modules`` that call ``measure(name, x)``; ``seconds`` adds up the time spent inside."""

    def __init__(self, modules: dict[str, Any], measure: Callable[[str, Tensor], Any]) -> None:
        self.modules, self.measure, self.seconds = modules, measure, 0.0

    def __enter__(self) -> "Hooks":
        self.handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self.modules.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def before(module: Any, inputs: tuple[Tensor, ...]) -> None:
            start = time.perf_counter()
            self.measure(name, inputs[0])
            self.seconds += time.perf_counter() - start

        return before


def fused(widths: dict[str, int]) -> Callable[[str, Tensor], Any]:
    """The op as the collector calls it."""
    sums, (role, persona) = {name: new_sums(width) for name, width in widths.items()}, roles()
    return lambda name, x: activation_stats(x, role, persona, sums[name])


def plain(widths: dict[str, int]) -> Callable[[str, Tensor], Any]:
    """The same statistics in plain PyTorch: the oracle of the tests."""
    sums, (role, persona) = {name: new_sums(width) for name, width in widths.items()}, roles()
    return lambda name, x: activation_stats_reference(x, role, persona, sums[name])


def reference_style(widths: dict[str, int]) -> Callable[[str, Tensor], Any]:
    """What a Wanda-style hook does: one number per channel, without mask, persona, mean, sign or variance."""
    totals = {name: torch.zeros(width) for name, width in widths.items()}

    def measure(name: str, x: Tensor) -> None:
        totals[name] += x.float().norm(p=2, dim=(0, 1)) ** 2

    return measure
