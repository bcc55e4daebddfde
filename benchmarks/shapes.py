"""Layer shapes of real models, and SmolLM2 with random weights (speed does not depend on what they are)."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shapes:
    """The linears of one decoder block as (name, N, K); ``blocks`` such blocks make the model."""

    name: str
    blocks: int
    linears: tuple[tuple[str, int, int], ...]

    @property
    def weights(self) -> int:
        """Weights in the linears of one block."""
        return sum(rows * columns for _, rows, columns in self.linears)


def _llama(name: str, blocks: int, hidden: int, kv: int, intermediate: int) -> Shapes:
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
    )


SMOLLM2 = _llama("SmolLM2-135M", 30, 576, 192, 1536)
LLAMA3_8B = _llama("Llama-3-8B", 32, 4096, 1024, 14336)


def smollm2(dtype: torch.dtype, blocks: int = SMOLLM2.blocks) -> Any:
    """SmolLM2-135M with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()
