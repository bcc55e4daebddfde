"""What two masks have in common, against loops over single weights."""

import pytest
import torch

from kernels.ops.pack_bits import pack_bits
from pipeline.analysis import Overlap, depth_of, grouped, kind_of, overlaps
from pipeline.masks import PersonaMasks

SHAPES = {"model.layers.0.mlp.up": (5, 11), "model.layers.1.mlp.up": (4, 7), "model.layers.1.attn.q": (3, 9)}


def masks_of(kept):
    bits = {p: {layer: pack_bits(m) for layer, m in layers.items()} for p, layers in kept.items()}
    return PersonaMasks(SHAPES, bits)


def test_overlaps_against_counting():
    generator = torch.Generator().manual_seed(3)
    kept = {p: {n: torch.rand(s, generator=generator) > 0.4 for n, s in SHAPES.items()} for p in ("a", "b")}
    parts = overlaps(masks_of(kept), "a", "b")
    for layer, (rows, columns) in SHAPES.items():
        x = y = both = one = 0
        for row in range(rows):
            for column in range(columns):
                first, second = (not kept[p][layer][row, column] for p in ("a", "b"))
                x, y, both, one = x + first, y + second, both + (first and second), one + (first != second)
        part = parts[layer]
        assert (part.size, part.removed_a, part.removed_b, part.removed_both) == (rows * columns, x, y, both)
        assert part.difference == pytest.approx(one / part.size)
        assert part.jaccard == pytest.approx(both / (x + y - both))
        assert part.expected == pytest.approx(x * y / part.size)
    whole = grouped(parts, lambda _: "all")["all"]
    assert whole.difference == pytest.approx(masks_of(kept).difference_share("a", "b"))
    assert list(grouped(parts, kind_of)) == ["mlp.up", "attn.q"]
    assert grouped(parts, depth_of)[1].size == 4 * 7 + 3 * 9


def test_chance_and_lift():
    same, apart, nothing = Overlap(100, 10, 10, 10, 1.0), Overlap(100, 10, 10, 0, 1.0), Overlap(100, 0, 0, 0, 0.0)
    assert (same.jaccard, same.lift, same.difference) == (1.0, 10.0, 0.0)
    assert (apart.jaccard, apart.lift, apart.difference) == (0.0, 0.0, 0.2)
    assert apart.chance == pytest.approx(1 / 19)
    assert (nothing.jaccard, nothing.chance, nothing.lift) == (1.0, 1.0, None)


@pytest.mark.parametrize(
    ("layer", "depth", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", 12, "self_attn.q_proj"),
        ("transformer.h.0.mlp.c_proj", 0, "mlp.c_proj"),
        ("lm.adapter", None, "lm.adapter"),
    ],
)
def test_places_of_layers(layer, depth, kind):
    assert (depth_of(layer), kind_of(layer)) == (depth, kind)
