"""Ops and layers of Persona Subnetworks: activation statistics, mask selection, masked products.

A mask is True where a weight is KEPT; packed masks hold 8 weights a byte in little bit order.

This package shares its name with a package of Hugging Face that ``transformers`` probes for, so
importing it is cheap and never fails: every public name is loaded at its first use.
``python -m kernels`` reports which backends are available.
"""

import importlib
from typing import Any

_HOME = {
    "activation_stats": "kernels.ops.activation_stats",
    "mask_select": "kernels.ops.mask_select",
    "mask_select_scores": "kernels.ops.mask_select",
    "mask_select_nm": "kernels.ops.mask_select_nm",
    "mask_select_threshold": "kernels.ops.mask_select_global",
    "mask_select_global": "kernels.ops.mask_select_global",
    "pack_bits": "kernels.ops.pack_bits",
    "unpack_bits": "kernels.ops.pack_bits",
    "masked_linear": "kernels.ops.masked_linear",
    "correction_linear": "kernels.ops.correction_linear",
    "removed_lists": "kernels.ops.correction_linear",
    "sparse_linear": "kernels.ops.sparse_linear",
    "SparseWeight": "kernels.ops.sparse_linear",
    "MaskedLinear": "kernels.layers",
    "PersonaSelector": "kernels.layers",
    "SparseLinear": "kernels.compressed",
    "MaskedExperts": "kernels.experts",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
