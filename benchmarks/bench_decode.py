"""SmolLM2's greedy decode end to end: dense, masked, compressed at 50 %, and sixteen personas in one batch.

A row's time is that of one token. Its case names the bytes that parameters and masks hold in memory. Every weight that
is used is read once a step, which is what the bound is made of.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Bench, CheckError, Timing, alternate, run
from kernels import backends, pack_bits
from pipeline.embedded import ALIAS
from pipeline.loading import load_model
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_linears, matrix

PERSONAS = tuple(f"p{index}" for index in range(16))
DENSITY = 0.5
PROMPT = 8
"""Tokens of a prompt, read in one step."""
MASKED = f"masked ({backends.choose('masked_linear', 'cpu')})"
SPARSE = f"compressed ({backends.choose('sparse_linear', 'cpu')})"


@dataclass(frozen=True)
class Candidate:
    """One way to write the next tokens of ``sequences`` sequences. Bytes: ``memory`` of parameters and masks, ``read``
    for a token of each."""

    backend: str
    case: str
    write: Callable[[], Any]
    sequences: int
    memory: int
    read: int


def twin(model: Any) -> Any:
    """Another model on the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def random_masks(model: Any) -> PersonaMasks:
    sizes = {name: matrix(module).shape for name, module in find_linears(model).items()}
    shapes = {name: (size[0], size[1]) for name, size in sizes.items()}
    bits = {p: {name: pack_bits(torch.rand(s) < DENSITY) for name, s in shapes.items()} for p in PERSONAS}
    return PersonaMasks(shapes, bits)


def held(model: Any) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def greedy(model: Any, prompts: Tensor, steps: int, **options: Any) -> Tensor:
    options |= {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0, "do_sample": False}
    return model.generate(prompts, min_new_tokens=steps, max_new_tokens=steps, **options)


def check(models: dict[str, Any], expected: Any, prompt: Tensor) -> None:
    """Raise CheckError unless every model's logits are those of the dense masked one, to a few roundings a layer."""
    wanted = expected(input_ids=prompt).logits.float()
    for name, model in models.items():
        error = (model(input_ids=prompt).logits.float() - wanted).abs().max() / wanted.abs().max()
        if not error <= 32 * torch.finfo(expected.dtype).eps:
            raise CheckError(f"decode {expected.dtype}: {name} is {error:.2g} from the dense masked model")


def measure(bench: Bench, dtype: torch.dtype, steps: int, candidates: list[Candidate]) -> None:
    """Time the candidates in turn, ``steps`` tokens of each sequence; the first is the peer."""
    timings = alternate({c.backend: c.write for c in candidates}, 1.0 if bench.quick else 5.0)
    tokens = {c.backend: _divided(timings[c.backend], steps * c.sequences) for c in candidates}
    peer = candidates[0].backend
    for c in candidates:
        case, timing = f"{c.case}, {c.memory / 1e6:.0f} MB", tokens[c.backend]
        bench.add("decode", case, dtype, c.backend, peer, timing, tokens[peer], c.read // c.sequences)
        print(f"{'':18} {1e6 / timing.median:.1f} tokens per second")


def _divided(timing: Timing, by: int) -> Timing:
    return Timing(timing.median / by, timing.q20 / by, timing.q80 / by)


def one_persona(bench: Bench, dense: Any, masks: PersonaMasks, prompts: Tensor, steps: int) -> None:
    """A sequence under one persona: masked at every product, with a masked copy of the weights, compressed."""
    name, first, size = PERSONAS[0], prompts[:1], held(dense)
    one = PersonaMasks(masks.shapes, {name: masks.bits[name]})
    masked = PersonaModel(twin(dense), one, materialize=False).switch(name)
    copied = PersonaModel(twin(dense), one).switch(name)
    sparse = PersonaModel(twin(dense), one).compress(name)
    check({MASKED: masked.model, SPARSE: sparse}, copied.model, prompts)
    case = "1 sequence, 1 persona"
    measure(
        bench,
        dense.dtype,
        steps,
        [
            Candidate("dense", "1 sequence", lambda: greedy(dense, first, steps), 1, size, size),
            Candidate(MASKED, case, lambda: greedy(masked, first, steps), 1, held(masked.model), held(masked.model)),
            Candidate("masked copy", case, lambda: greedy(copied, first, steps), 1, held(copied.model), size),
            Candidate(SPARSE, f"{case}, 50 %", lambda: greedy(sparse, first, steps), 1, held(sparse), held(sparse)),
        ],
    )


def many_personas(bench: Bench, dense: Any, masks: PersonaMasks, prompts: Tensor, steps: int) -> None:
    """A sequence for each persona, in one batch or by a model of its own."""
    count, size = len(PERSONAS), held(dense)
    model = PersonaModel(twin(dense), masks, materialize=False)
    measure(
        bench,
        dense.dtype,
        steps,
        [
            # Sixteen copies need not fit into memory: one that no cache holds takes as long sixteen times.
            Candidate(
                "dense, one 16 times",
                "16 models, a sequence each",
                lambda: [greedy(dense, row[None], steps) for row in prompts],
                count,
                count * size,
                count * size,
            ),
            Candidate(
                MASKED,
                "16 personas, a batch of 16",
                lambda: greedy(model, prompts, steps, personas=PERSONAS),
                count,
                held(model.model),
                held(model.model),
            ),
            Candidate("dense", "a batch of 16", lambda: greedy(dense, prompts, steps), count, size, size),
        ],
    )


def main(bench: Bench) -> None:
    steps = 4 if bench.quick else 32
    for dtype in (torch.float32,) if bench.quick else (torch.float32, torch.bfloat16):
        dense = load_model(ALIAS, dtype)
        masks, prompts = random_masks(dense), torch.randint(49152, (len(PERSONAS), PROMPT))
        one_persona(bench, dense, masks, prompts, steps)
        many_personas(bench, dense, masks, prompts, steps)


if __name__ == "__main__":
    run(main, __doc__)
