"""Answers in text."""

from typing import Any

import torch


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
