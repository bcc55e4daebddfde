"""Random calls of the native ops past their Python checks.

A call starts from arguments that fit and has up to three of them spoiled: another dtype, device, layout, stride or
size, a number out of range, values that point nowhere. It may raise; it must neither crash nor touch memory outside
its tensors. The second is for the address sanitizer to see, so every buffer has exactly the size that its tensor spans.
``python -m tests.kernels.direct_calls COUNT SEED [LIBRARY]`` prints how many calls returned and how many raised.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FOREIGN = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, *FLOATS)
NUMBERS = (-(2**63), -(2**31) - 1, -8, -1, 0, 1, 7, 63, 65536, 2**31, 2**62, 2**63 - 1)
REALS = (float("nan"), float("inf"), -1.0, 0.0, 1e300)


def draw(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(shape, generator=generator).to(dtype)


def integers(rng: random.Random, shape: tuple[int, ...], high: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randint(max(high, 1), shape, generator=generator).to(dtype)


def _sizes(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice((0, 1, 2, 5, 33, 65)), rng.choice((0, 1, 3, 9, 40)), rng.choice((0, 1, 7, 8, 17, 64, 130, 520))


def _packed(rng: random.Random, *shape: int) -> Tensor:
    *rows, columns = shape
    return integers(rng, (*rows, (columns + 7) // 8), 256, torch.uint8)


def stats(rng: random.Random) -> list[Any]:
    batch, tokens, channels = rng.choice((0, 1, 3)), rng.choice((0, 1, 5, 70)), rng.choice((0, 1, 17, 64, 130))
    spans = integers(rng, (rng.choice((0, 1, 4)) if batch else 0, 3), tokens + 1, torch.int64)
    if spans.numel():
        spans = torch.cat([spans[:, :1] % batch, spans[:, 1:].sort(1).values], 1)
    packed = rng.random() < 0.5
    return [
        draw(rng, (batch, tokens, channels), rng.choice(FLOATS)),
        integers(rng, (batch, tokens), 3, torch.uint8),
        integers(rng, (len(spans) if packed else batch,), 2, torch.int64),
        torch.zeros(2, 8, channels, dtype=torch.float64),
        spans if packed else None,
    ]


def select(rng: random.Random) -> list[Any]:
    _, rows, columns = _sizes(rng)
    values = draw(rng, (rows, columns), rng.choice(FLOATS))
    channel = draw(rng, (columns,), torch.float32).abs() if rng.random() < 0.5 else None
    tiebreak = draw(rng, (rows, columns), torch.float32) if rng.random() < 0.5 else None
    return [values, channel, tiebreak, rng.randint(0, columns), torch.empty_like(_packed(rng, rows, columns))]


def select_nm(rng: random.Random) -> list[Any]:
    rows, m = rng.choice((0, 1, 9)), rng.choice((2, 4, 8))
    columns = m * rng.choice((0, 1, 3, 20))
    weight, channel = draw(rng, (rows, columns), rng.choice(FLOATS)), draw(rng, (columns,), torch.float32).abs()
    return [weight, channel, rng.randint(0, m), m, torch.empty_like(_packed(rng, rows, columns))]


def select_threshold(rng: random.Random) -> list[Any]:
    _, rows, columns = _sizes(rng)
    scores = draw(rng, (rows, columns), rng.choice(FLOATS))
    return [scores, rng.gauss(0, 1), rng.randint(0, 50), torch.empty_like(_packed(rng, rows, columns))]


def count(rng: random.Random) -> list[Any]:
    _, rows, columns = _sizes(rng)
    counts = torch.zeros(2048, dtype=torch.int64)
    return [draw(rng, (rows, columns), torch.float32), rng.randint(0, 2), rng.getrandbits(22), counts]


def pack(rng: random.Random) -> list[Any]:
    _, rows, columns = _sizes(rng)
    return [integers(rng, (rows, columns), 2, torch.bool), torch.empty_like(_packed(rng, rows, columns))]


def unpack(rng: random.Random) -> list[Any]:
    _, rows, columns = _sizes(rng)
    return [_packed(rng, rows, columns), columns, torch.empty(rows, columns, dtype=torch.bool)]


def _product(rng: random.Random) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None, Tensor]:
    """x, weight, persona, gamma, bias and room for y."""
    rows, outputs, columns = _sizes(rng)
    dtype = rng.choice(FLOATS[:3])
    persona = integers(rng, (rng.choice((1, rows)),), 4, torch.int32) - 1
    bias = draw(rng, (outputs,), dtype) if rng.random() < 0.5 else None
    x, weight = draw(rng, (rows, columns), dtype), draw(rng, (outputs, columns), dtype)
    return x, weight, persona, rng.random(), bias, torch.empty(rows, outputs, dtype=dtype)


def masked(rng: random.Random) -> list[Any]:
    x, weight, persona, gamma, bias, y = _product(rng)
    return [x, weight, _packed(rng, 3, *weight.shape), persona, gamma, bias, y]


def gate(rng: random.Random) -> list[Any]:
    _, weight, _, gamma, _, _ = _product(rng)
    return [weight, _packed(rng, *weight.shape), gamma, torch.empty_like(weight)]


def _sparse(rng: random.Random, outputs: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Values, bits and offsets. Every third time the bits promise other numbers of values than the offsets."""
    bits = _packed(rng, outputs, columns)
    offsets = torch.zeros(outputs + 1, dtype=torch.int64)
    for row in range(outputs):
        ones = sum((int(bits[row, k // 8]) >> (k % 8)) & 1 for k in range(columns))
        offsets[row + 1] = offsets[row] + (ones if rng.random() < 0.7 else rng.randint(0, columns))
    return [draw(rng, (int(offsets[-1]) + 64,), dtype), bits, offsets]


def sparse(rng: random.Random) -> list[Any]:
    x, weight, _, _, bias, y = _product(rng)
    return [x, *_sparse(rng, *weight.shape, x.dtype), bias, y]


def expand(rng: random.Random) -> list[Any]:
    _, outputs, columns = _sizes(rng)
    dtype, first = rng.choice(FLOATS[:3]), rng.randint(0, outputs)
    room = torch.empty(rng.randint(0, outputs - first), columns, dtype=dtype)
    return [*_sparse(rng, outputs, columns, dtype), first, room]


def _removed(rng: random.Random, personas: int, outputs: int, columns: int) -> tuple[Tensor, Tensor]:
    """Lists of columns, some of which do not exist, and their offsets."""
    counts = integers(rng, (personas * (outputs + 1),), 4, torch.int64)
    counts[0] = 0
    offsets = counts.cumsum(0).to(torch.int32).view(personas, outputs + 1)
    high = columns if rng.random() < 0.7 else 65536
    return integers(rng, (int(offsets.max()),), high, torch.int64).to(torch.uint16), offsets


def correction(rng: random.Random) -> list[Any]:
    x, weight, persona, gamma, bias, y = _product(rng)
    columns, offsets = _removed(rng, 3, *weight.shape)
    return [x, weight, columns, offsets, persona, gamma, bias, y]


def subtract(rng: random.Random) -> list[Any]:
    _, weight, _, gamma, _, _ = _product(rng)
    columns, offsets = _removed(rng, 1, *weight.shape)
    y = torch.zeros(rng.randint(0, 64), weight.shape[0], dtype=weight.dtype)
    return [draw(rng, (weight.shape[1], 64), torch.float32), weight, columns, offsets[0], gamma, y]


OPS: dict[str, Callable[[random.Random], list[Any]]] = {
    "activation_stats": stats,
    "mask_select": select,
    "mask_select_nm": select_nm,
    "mask_select_threshold": select_threshold,
    "count_digits": count,
    "pack_bits": pack,
    "unpack_bits": unpack,
    "masked_linear": masked,
    "gate_rows": gate,
    "sparse_linear": sparse,
    "expand_rows": expand,
    "correction_linear": correction,
    "subtract_removed": subtract,
}


def exact(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A copy of ``tensor`` with ``stride`` in a buffer that ends with its last element."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True)) if tensor.numel() else 0
    copy = torch.zeros(span, dtype=tensor.dtype).as_strided(tensor.shape, stride)
    return copy.copy_(tensor) if 0 not in stride else copy


def respaced(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same values with gaps, in another order of dimensions, or all in one place (stride 0)."""
    order = list(range(tensor.dim()))
    rng.shuffle(order)
    stride, step = [0] * tensor.dim(), rng.choice((1, 1, 2, 3))
    for dim in order:
        stride[dim], step = step, step * max(tensor.shape[dim], 1) + rng.choice((0, 0, 1, 5))
    return exact(tensor, tuple(0 if rng.random() < 0.1 else s for s in stride))


def resized(rng: random.Random, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape)
    if not shape:
        return tensor.reshape(1)
    shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 9, 63, 200))
    return torch.ones(shape, dtype=tensor.dtype)


def spoiled(rng: random.Random, value: Any) -> Any:
    """Something else in the place of an argument."""
    if isinstance(value, bool | int) or (isinstance(value, float) and rng.random() < 0.1):
        return rng.choice(NUMBERS)
    if isinstance(value, float):
        return rng.choice(REALS)
    if value is None:
        return draw(rng, (rng.randint(0, 9),), torch.float32)
    ways: list[Callable[[], Any]] = [
        lambda: value.to(rng.choice(FOREIGN)),
        lambda: respaced(rng, value),
        lambda: respaced(rng, value),
        lambda: resized(rng, value),
        lambda: resized(rng, value),
        lambda: value.unsqueeze(0),
        lambda: value.flatten(),
        lambda: value[..., :-1] if value.dim() else value,
        lambda: value.to("meta"),
        lambda: value.to_sparse() if value.dim() == 2 and value.dtype.is_floating_point else None,
        lambda: value.new_empty(0).expand(2**6, 0),
        lambda: torch.full_like(value, rng.choice((-1, 5, 127))) if value.dtype != torch.bool else ~value,
    ]
    return rng.choice(ways)()


def storm(calls: int, seed: int) -> tuple[int, int]:
    """Make ``calls`` random calls; returns how many came back and how many raised."""
    rng = random.Random(seed)
    names, done, raised = list(OPS), 0, 0
    for number in range(calls):
        name = names[number % len(names)]
        arguments = OPS[name](rng)
        for place in rng.sample(range(len(arguments)), min(rng.choice((0, 1, 1, 1, 2, 3)), len(arguments))):
            arguments[place] = spoiled(rng, arguments[place])
        # ValueError and MemoryError: a vector for sizes that no memory has.
        try:
            getattr(torch.ops.persona_native, name)(*arguments)
            done += 1
        except (RuntimeError, ValueError, TypeError, MemoryError):
            raised += 1
    return done, raised


if __name__ == "__main__":
    if len(sys.argv) > 3:
        torch.ops.load_library(sys.argv[3])
    else:
        from kernels import native

        assert native.problem() is None
    torch.set_num_threads(2)
    print(*storm(int(sys.argv[1]), int(sys.argv[2])))
