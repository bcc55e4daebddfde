"""Write a safetensors file tensor by tensor.

The library's ``save`` holds the whole file in memory beside the tensors, and writes its metadata in any order: the same
content twice is then not the same file.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def header(entries: Mapping[str, tuple[torch.dtype, Iterable[int]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file whose tensors, name -> type and shape, follow one another in the order given."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (dtype, shape) in entries.items():
        sizes = list(shape)
        stop = start + torch.Size(sizes).numel() * dtype.itemsize
        content[name] = {"dtype": CODES[dtype], "shape": sizes, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_order(entries: Mapping[str, torch.dtype]) -> list[str]:
    """Names in the order of the library: wide types first, so that every tensor is aligned; then by name."""
    return sorted(entries, key=lambda name: (-entries[name].itemsize, name))


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole file; beside the tensors one of them is copied at most. Raises OSError."""
    order = in_order({name: tensor.dtype for name, tensor in tensors.items()})
    entries = {name: (tensors[name].dtype, tensors[name].shape) for name in order}
    write_each(file, entries, ((name, tensors[name]) for name in order), metadata)


def write_each(
    file: BinaryIO,
    entries: Mapping[str, tuple[torch.dtype, Iterable[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as they come: those of ``entries`` (type and shape), in that order; one is held at a time.

    Raises OSError, and ValueError for another tensor than the next.
    """
    file.write(header(entries, metadata))
    expected = iter(entries.items())
    for name, tensor in tensors:
        wanted, (dtype, shape) = next(expected, ("nothing", (None, ())))
        if (name, tensor.dtype, list(tensor.shape)) != (wanted, dtype, list(shape)):
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype}, the header has {wanted} {list(shape)} {dtype}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            file.write(flat.view(torch.uint8).numpy().data)
    if missing := next(expected, None):
        raise ValueError(f"{missing[0]} is in the header and did not come")
