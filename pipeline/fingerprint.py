"""What identifies a model and a data set, so that a mask is never put on other weights unnoticed."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.data.forms import Item
from pipeline.sites import matrix

SAMPLED = 65536
"""At least so many of a layer's weights, evenly spread, and less than twice as many, make its fingerprint: reading a
whole 70B model would take minutes."""


def layer_fingerprint(weight: Tensor) -> str:
    """Hash of the shape and of the signs of evenly spread weights ``[N, K]``.

    Signs survive every change of precision, so that a model loaded in float32, bfloat16 or float16 has the
    same fingerprint; other training flips some of the small ones.
    """
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLED)
    signs = torch.signbit(flat[::step]).to(torch.uint8).cpu()
    return hashlib.sha256(f"{list(weight.shape)}".encode() + signs.numpy().tobytes()).hexdigest()[:16]


def model_fingerprints(layers: dict[str, Any]) -> dict[str, str]:
    """The fingerprint of every layer, by name."""
    return {name: layer_fingerprint(matrix(module)) for name, module in layers.items()}


def question_hash(item: Item) -> str:
    """Identifies a question (or a plain text), so that an evaluation can leave out what was calibrated on."""
    text = item.question or item.matching
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()[:16]


def data_hash(items: Iterable[Item]) -> str:
    """Hash over questions and answers in order."""
    digest = hashlib.sha256()
    for item in items:
        for text in (item.question, item.matching, item.other or ""):
            digest.update(text.encode() + b"\x00")
    return digest.hexdigest()
