"""Answers in text."""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.data.prompts import batches_by_tokens
from pipeline.terminal import printable

WRITTEN = 4
"""So many times more tokens a batch has where text is written: of each, memory holds the keys and values, and no
logits, which take several times as much where a likelihood is measured."""


def answer(
    model: Any,
    prompter: Any,
    question: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    system: str | None = None,
    streamer: Any = None,
) -> str:
    """The model's answer to one question under its present persona; greedy at temperature 0."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([prompter.ids(prompter.prompt(question, system))], device=device)
    return continue_from(model, prompter.tokenizer, ids, max_new_tokens, temperature, streamer)


def printing_streamer(tokenizer: Any) -> Any:
    """Prints an answer as it grows, without what a terminal would obey."""
    from transformers import TextStreamer

    class Printable(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    return Printable(tokenizer, skip_prompt=True, skip_special_tokens=True)


@torch.inference_mode()
def continue_from(
    model: Any, tokenizer: Any, ids: torch.Tensor, max_new_tokens: int, temperature: float, streamer: Any = None
) -> str:
    """Generate after ``ids`` ``[1, T]`` and return the new text."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **sampling,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


@torch.inference_mode()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continuations of many prompts (token ids), in batches padded on the left; without the end token.

    A batch has ``WRITTEN`` times ``batch_tokens`` at most, with what is written. Greedy at temperature 0, else drawn
    from the whole vocabulary: the same for the same prompts, seed and sizes of batches. The generators of the process
    are left as they were.
    """
    device, pad = model.get_input_embeddings().weight.device, tokenizer.pad_token_id
    results: list[list[int]] = [[] for _ in prompts]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    for chosen in batches_by_tokens([len(p) + max_new_tokens for p in prompts], WRITTEN * batch_tokens):
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), pad, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            attention[row, width - len(prompts[index]) :] = 1
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.generate(
                ids.to(device),
                attention_mask=attention.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **sampling,
            )
        for row, index in enumerate(chosen):
            results[index] = _until_the_end(output[row, width:].tolist(), model)
    return results


def _until_the_end(tokens: list[int], model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
