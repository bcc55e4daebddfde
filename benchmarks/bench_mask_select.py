"""Mask selection at 50 %: every linear of SmolLM2, one block of Llama-3-8B, against what one would write in PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Bench, here, implementations, run
from benchmarks.shapes import LLAMA3_8B, SMOLLM2, Shapes
from kernels import backends, mask_select, mask_select_global, mask_select_nm
from kernels.ops.mask_select.reference import mask_select_reference
from kernels.ops.mask_select_global.reference import mask_select_global_reference
from kernels.ops.mask_select_nm.reference import mask_select_nm_reference
from kernels.ops.pack_bits.reference import pack_bits_reference

Layer = tuple[Tensor, Tensor]
"""Weight [N, K] and channel score [K]."""


def topk_packed(weight: Tensor, channel: Tensor, keep: int) -> Tensor:
    scores = weight.float().abs() * channel
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(keep, dim=1).indices, True)
    return pack_bits_reference(mask)


def topk_loop(weight: Tensor, channel: Tensor, keep: int) -> Tensor:
    """Row by row, as the released code does; a boolean mask."""
    scores = weight.float().abs() * channel
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(len(scores)):
        mask[row, scores[row].topk(keep).indices] = True
    return mask


def sort(weight: Tensor, channel: Tensor, keep: int) -> Tensor:
    """As Wanda's code does; a boolean mask."""
    scores = weight.float().abs() * channel
    order = torch.sort(scores, dim=1, stable=True, descending=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :keep], True)


PEERS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "topk + packing": topk_packed,
    "Python loop of topk": topk_loop,
    "sort": sort,
}


def layers_of(shapes: Shapes, blocks: int, dtype: torch.dtype) -> list[Layer]:
    return [
        ((torch.randn(rows, columns) / columns**0.5).to(dtype), torch.rand(columns) + 0.05)
        for _ in range(blocks)
        for _, rows, columns in shapes.linears
    ]


def over(layers: list[Layer], select: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[], None]:
    def all_layers() -> None:
        for weight, channel in layers:
            select(weight, channel, weight.shape[1] // 2)

    return all_layers


def by_row(bench: Bench, case: str, dtype: torch.dtype, layers: list[Layer]) -> None:
    weights = sum(weight.numel() for weight, _ in layers)
    ours = implementations("mask_select", over(layers, mask_select))
    weight, channel = layers[-1]

    def check(name: str) -> bool:
        # Ties at random weights are as good as none; peers that return booleans are compared unpacked.
        expected = mask_select_reference(weight, channel, weight.shape[1] // 2)
        if name in ours:
            one = implementations("mask_select", lambda: mask_select(weight, channel, weight.shape[1] // 2))
            return torch.equal(one[name](), expected)
        mask = PEERS[name](weight, channel, weight.shape[1] // 2)
        wrong = (mask if mask.dtype == torch.uint8 else pack_bits_reference(mask)) ^ expected
        return int((wrong != 0).sum()) <= wrong.shape[0] // 100

    candidates = ours | {name: over(layers, peer) for name, peer in PEERS.items()}
    nbytes = weights * dtype.itemsize + weights // 8
    bench.compare(
        "mask_select", case, dtype, candidates, nbytes=nbytes, peer="topk + packing", check=check, graph=False
    )


def other_forms(bench: Bench, case: str, dtype: torch.dtype, layers: list[Layer]) -> None:
    """2:4 and one budget for all layers, against their plain PyTorch."""
    weights = sum(weight.numel() for weight, _ in layers)
    scores = [weight.float().abs() * channel for weight, channel in layers]

    forms = {
        "mask_select_nm": (
            lambda: [mask_select_nm(w, a, 2, 4) for w, a in layers],
            lambda: [mask_select_nm_reference(w, a, 2, 4) for w, a in layers],
            weights * dtype.itemsize,
        ),
        # Three passes of counting and one of writing.
        "mask_select_global": (
            lambda: mask_select_global(scores, weights // 2),
            lambda: mask_select_global_reference(scores, weights // 2),
            4 * weights * 4,
        ),
    }
    for op, (ours, plain, nbytes) in forms.items():
        same = all(torch.equal(a, b) for a, b in zip(ours(), plain(), strict=True))
        bench.compare(
            op,
            case,
            dtype,
            {backends.choose(op, here()): ours, "plain": plain},
            nbytes=nbytes + weights // 8,
            peer="plain",
            check={backends.choose(op, here()): same, "plain": True}.__getitem__,
            graph=False,
        )


def main(bench: Bench) -> None:
    blocks = 2 if bench.quick else SMOLLM2.blocks
    small = layers_of(SMOLLM2, blocks, torch.float32)
    by_row(bench, f"SmolLM2, {blocks} blocks", torch.float32, small)
    other_forms(bench, f"SmolLM2, {min(blocks, 4)} blocks", torch.float32, small[: 7 * 4])
    del small
    large = layers_of(LLAMA3_8B, 1, torch.bfloat16)
    if bench.quick:
        by_row(bench, "Llama-3-8B, k and v", torch.bfloat16, large[1:3])
    else:
        by_row(bench, "Llama-3-8B, one block", torch.bfloat16, large)


if __name__ == "__main__":
    run(main, __doc__, gpu=True)
