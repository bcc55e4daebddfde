"""Activation statistics in C++, and in CUDA for tensors there (``csrc/activation_stats``)."""

import torch
from torch import Tensor


def activation_stats_cpp(x: Tensor, role: Tensor, persona: Tensor, sums: Tensor, spans: Tensor | None = None) -> Tensor:
    """See ``kernels.ops.activation_stats``. float32 partial sums of at most 64 tokens, float64 above them."""
    borders = None if spans is None else spans.contiguous()
    return torch.ops.persona_native.activation_stats(x, role, persona.contiguous(), sums, borders)
