"""What a persona costs to serve, as a mask, a prompt, examples in the context, a vector or an adapter."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from pipeline.baselines.retrieval import Examples
from pipeline.setting import UNMASKED, Ground, Setting, applied, prompt_ids

NEW_TOKENS = 32
"""Length of the answers that are timed."""


@dataclass(frozen=True)
class Efficiency:
    """Cost of a setting, one sequence at a time, greedy.

    ``prompt_tokens`` is a mean, ``first_token_seconds`` and ``tokens_per_second`` (after the first) are medians over
    questions. Bytes: ``memory_bytes`` to hold the persona ready, ``working_bytes`` more while it is on (the dense copy
    of masked weights, the cache of the words added to the prompt), ``disk_bytes`` to store it.
    """

    condition: str
    persona: str | None
    prompt_tokens: float
    first_token_seconds: float
    tokens_per_second: float
    memory_bytes: int
    working_bytes: int
    disk_bytes: int


def efficiency_of(ground: Ground, setting: Setting, questions: Sequence[str]) -> Efficiency:
    """Measure a setting on some questions; one more answer before them warms the caches."""
    prompts = [prompt_ids(ground, setting, question) for question in questions]
    plain = fmean(len(prompt_ids(ground, UNMASKED, question)) for question in questions)
    added = fmean(map(len, prompts)) - plain
    with applied(ground, setting):
        timed = [_timed(ground, prompt) for prompt in (prompts[0], *prompts)][1:]
    memory, disk = _held(ground, setting)
    return Efficiency(
        setting.condition,
        setting.persona or None,
        fmean(map(len, prompts)),
        median(first for first, _ in timed),
        median(rate for _, rate in timed),
        memory,
        _copy_bytes(ground, setting) + round(added * _cache_bytes(ground, prompts[0])),
        disk,
    )


class _Clock:
    """A streamer of ``generate`` that notes when tokens arrive; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return None


def _timed(ground: Ground, prompt: Sequence[int]) -> tuple[float, float]:
    """Seconds to the first token, tokens per second after it."""
    ids = torch.tensor([list(prompt)], device=ground.model.get_input_embeddings().weight.device)
    clock, started = _Clock(), time.perf_counter()
    with torch.inference_mode():
        ground.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=ground.model.tokenizer.pad_token_id,
            streamer=clock,
        )
    first = clock.times[1]
    # The streamer gets a token once it is on the host, so these times need no synchronisation.
    return first - started, (len(clock.times) - 2) / (clock.times[-1] - first)


def _held(ground: Ground, setting: Setting) -> tuple[int, int]:
    """Bytes in memory and on disk of what the setting needs, beside the model."""
    memory = disk = 0
    if setting.mask:
        memory += sum(bits.numel() for bits in ground.model.masks.bits[setting.mask].values())
        disk += ground.model.masks.manifest["masks"][setting.mask]["bytes"]
    if setting.system:
        memory, disk = (size + len(setting.system.encode()) for size in (memory, disk))
    if isinstance(setting.earlier, Examples):
        words = sum(len(f"{item.question}{item.matching}".encode()) for item in setting.earlier.items)
        memory, disk = memory + words + setting.earlier.index.vectors.nbytes, disk + words
    if setting.steering:
        vectors = sum(v.numel() * v.element_size() for v in setting.steering.vectors.values())
        memory, disk = memory + vectors, disk + vectors
    if setting.adapter:
        memory, disk = memory + setting.adapter.bytes, disk + setting.adapter.bytes
    return memory, disk


def _copy_bytes(ground: Ground, setting: Setting) -> int:
    """Bytes of the dense copy of the masked (or merged) weights, which all personas share."""
    if not (setting.adapter or (setting.mask and ground.model.materialize)):
        return 0
    weights = [ground.model.weight(name) for name in ground.model.masks.shapes]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _cache_bytes(ground: Ground, prompt: Sequence[int]) -> float:
    """Bytes of keys and values per token."""
    ids = torch.tensor([list(prompt)], device=ground.model.get_input_embeddings().weight.device)
    with applied(ground, UNMASKED), torch.inference_mode():
        cache = ground.model.model(input_ids=ids, use_cache=True).past_key_values
    sizes = [t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(sizes) / ids.shape[1]
