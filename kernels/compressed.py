"""A drop-in layer that holds the kept weights of one mask and nothing else: a persona shipped alone."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.ops.pack_bits import unpack_bits
from kernels.ops.sparse_linear import PADDING, SparseWeight, sparse_linear


class SparseLinear(nn.Module):
    """``nn.Linear`` without its removed weights (``SparseWeight``); for inference.

    A weight ``[N, K]`` with the share d kept takes d times the bytes of the dense one, and a bit per weight: less than
    dense in float32 from 3.1 % removed on, in half precision from 6.3 %. The product is not differentiable.

    Args:
        weight: the kept weights; its parts become the buffers ``values``, ``bits`` and ``offsets``.
        bias: ``[N]`` or None.
    """

    values: Tensor
    bits: Tensor
    offsets: Tensor
    bias: Tensor | None

    def __init__(self, weight: SparseWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.bits.shape[0], weight.columns
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"SparseLinear: bias [N] must be [{self.out_features}], got {list(bias.shape)}")
        for name in ("values", "bits", "offsets"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, linear: Any, mask: Tensor | None = None) -> "SparseLinear":
        """The kept weights of an ``nn.Linear`` (or GPT-2's Conv1D), copied; its bias, shared.

        ``mask`` is bool ``[N, K]`` (True = kept); None keeps all.
        """
        weight = linear.weight.detach()
        weight = weight if isinstance(linear, nn.Linear) else weight.T
        if mask is None:
            mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        return cls(SparseWeight.from_dense(weight, mask.to(weight.device)), linear.bias)

    def to_linear(self) -> nn.Linear:
        """The dense layer: 0 for every removed weight, every kept weight as it was, bit for bit."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear.train(self.training)

    @property
    def weight(self) -> SparseWeight:
        """The kept weights (the buffers, not a copy)."""
        return SparseWeight(self.values, self.bits, self.offsets, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` -> ``[..., N]``."""
        rows, weight, bias = x.reshape(-1, self.in_features), self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            weight = SparseWeight(self.values.to(kind), self.bits, self.offsets, self.in_features)
            rows, bias = rows.to(kind), None if bias is None else bias.to(kind)
        return sparse_linear(rows, weight, bias).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        kept = self.values.numel() - PADDING
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"density={kept / max(self.in_features * self.out_features, 1):.3g}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take values of another number than the layer's own: another mask keeps another number."""
        errors: list[str] = rest[-1]
        values, bits, offsets = (state_dict.get(prefix + name) for name in ("values", "bits", "offsets"))
        if isinstance(values, Tensor) and isinstance(bits, Tensor) and isinstance(offsets, Tensor):
            problem = _inconsistency(values, bits, offsets, self)
            if problem:
                errors.append(f"{prefix.rstrip('.') or 'SparseLinear'}: {problem}")
                return
            self.values = self.values.new_empty(values.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _inconsistency(values: Tensor, bits: Tensor, offsets: Tensor, layer: SparseLinear) -> str:
    """What is wrong with the parts of a weight for ``layer``, or nothing."""
    shapes = {"bits": (bits, layer.bits), "offsets": (offsets, layer.offsets)}
    for name, (found, own) in shapes.items():
        if found.shape != own.shape or found.dtype != own.dtype:
            return f"{name} must be {list(own.shape)} {own.dtype}, got {list(found.shape)} {found.dtype}"
    kept = unpack_bits(bits, layer.in_features).sum(1)
    if int(offsets[0]) or not torch.equal(offsets.diff(), kept):
        return "the offsets are not those of the bits"
    if values.dim() != 1 or values.numel() != int(offsets[-1]) + PADDING:
        return f"values must be [{int(offsets[-1]) + PADDING}], got {list(values.shape)}"
    return ""
