"""Argument checks shared by the ops: every message names the op, the argument, its shape and dtype."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int | None, ...], dims: str) -> None:
    """``expected`` holds a size or None (any) per dimension; ``dims`` names them, e.g. "[N, K]"."""
    if not _fits(tensor.shape, expected):
        wanted = [
            dim if size is None else size for dim, size in zip(dims.strip("[]").split(", "), expected, strict=True)
        ]
        raise ValueError(f"{op}: {name} {dims} must be {wanted}, got {describe(tensor)}")


def _fits(sizes: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    if len(sizes) != len(expected):
        return False
    # Not all(...) of a generator, which takes several times as long: every call of every op comes here.
    for size, wanted in zip(sizes, expected, strict=True):  # noqa: SIM110
        if wanted is not None and size != wanted:
            return False
    return True


def dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be one of {names}, got {describe(tensor)}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: tensors are on different devices: {devices}")


def in_range(op: str, name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must lie in {low}..{high}, got {value}")
