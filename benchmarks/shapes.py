"""Layer shapes of real models, and models of them with random weights (speed does not depend on what they are)."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shapes:
    """The linears of one decoder block as (name, N, K); ``blocks`` such blocks make the model. ``head``: width of an
    attention head."""

    name: str
    blocks: int
    linears: tuple[tuple[str, int, int], ...]
    head: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Weights in the linears of one block."""
        return sum(rows * columns for _, rows, columns in self.linears)


def _llama(name: str, blocks: int, hidden: int, kv: int, intermediate: int, head: int, vocabulary: int) -> Shapes:
    return Shapes(
        name,
        blocks,
        (
            ("q", hidden, hidden),
            ("k", kv, hidden),
            ("v", kv, hidden),
            ("o", hidden, hidden),
            ("gate", intermediate, hidden),
            ("up", intermediate, hidden),
            ("down", hidden, intermediate),
        ),
        head,
        vocabulary,
    )


SMOLLM2 = _llama("SmolLM2", 30, 576, 192, 1536, 64, 49152)
LLAMA3_8B = _llama("Llama-3-8B", 32, 4096, 1024, 14336, 128, 128256)
GPU_BLOCKS = 8
"""Of Llama-3-8B, where a GPU measures whole passes."""


def random_model(shapes: Shapes, dtype: torch.dtype, blocks: int) -> Any:
    """A causal model of ``shapes`` with ``blocks`` blocks of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = {name: rows for name, rows, _ in shapes.linears}
    config = LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=rows["q"],
        intermediate_size=rows["gate"],
        num_hidden_layers=blocks,
        num_attention_heads=rows["q"] // shapes.head,
        num_key_value_heads=rows["k"] // shapes.head,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()
