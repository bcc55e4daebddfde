"""``python tests/kernels/aot_report.py``: the table of registers and spills in docs/kernels-gpu.md."""

import test_triton_aot as cases
from aot import TARGETS, compile_kernel
from test_triton_aot import FLOATS, correction, linear, nm, packing, select, sparse, stats, threshold


def rows():
    """Name, kernel, arguments, warps."""
    for kind in ("bf16", "fp32"):
        yield f"statistics, split, {kind}", stats._split_kernel, cases.split_arguments(kind), 4
    yield "statistics, sequence", stats._combine_kernel, cases.combine_arguments("*fp32"), 4
    yield "statistics, persona", stats._persona_kernel, cases.persona_arguments("*fp32"), 4
    for kind, columns, tiebreak in (("bf16", 576, 0), ("bf16", 4096, 0), ("bf16", 14336, 0), ("fp32", 8192, 1)):
        kernel, arguments, warps = cases.select_arguments(kind, columns, bool(tiebreak))
        yield f"selection, {kind}, K = {columns}{', tiebreak' * tiebreak}", kernel, arguments, warps
    for kind, tiebreak in (("bf16", 0), ("fp32", 1)):
        kernel, arguments, warps = cases.select_arguments(kind, 65536, bool(tiebreak))
        yield f"selection, {kind}, streamed{', tiebreak' * tiebreak}", kernel, arguments, warps
    for m in (4, 8):
        yield f"selection, bf16, groups of {m}", nm._nm_kernel, cases.nm_arguments("bf16", m), 4
    for stage, what in (("digits", "digits"), ("equal", "equal scores"), ("threshold", "written")):
        kernel = getattr(threshold, f"_{stage}_kernel")
        yield f"threshold, {what}", kernel, cases.threshold_arguments(stage), 4
    for way in ("pack", "unpack"):
        yield f"{way} bits", getattr(packing, f"_{way}_kernel"), cases.packing_arguments(), 4
    for kind in ("bf16", "fp32"):
        blocks, warps = cases.with_warps(linear.ROW_BLOCK)
        yield f"product, row, {kind}", linear._row_kernel, cases.linear_arguments(kind) | blocks, warps
        for count in (16, 1024):
            tile = linear.tile_of(count, FLOATS[kind])
            blocks, warps = cases.with_warps(tile)
            name = "x".join(str(tile[f"BLOCK_{axis}"]) for axis in "MNK")
            if kind == "bf16" or count == 16:
                yield f"product, tile {name}, {kind}", linear._tile_kernel, cases.tile_arguments(kind) | blocks, warps
    yield "product, gated panel, bf16", linear._gate_kernel, cases.gate_arguments("bf16"), 4
    yield "product, sum of splits, bf16", linear._sum_kernel, cases.sum_arguments("bf16"), 4
    for kind in ("bf16", "fp32"):
        blocks, warps = cases.with_warps(sparse.ROW_BLOCK)
        yield f"sparse, row, {kind}", sparse._row_kernel, cases.sparse_arguments(kind) | blocks, warps
        for count in (16, 1024) if kind == "bf16" else (16,):
            tile = linear.tile_of(count, FLOATS[kind])
            blocks, warps = cases.with_warps(tile)
            name = "x".join(str(tile[f"BLOCK_{axis}"]) for axis in "MNK")
            yield f"sparse, tile {name}, {kind}", sparse._tile_kernel, cases.sparse_arguments(kind) | blocks, warps
        blocks, warps = cases.with_warps(correction.BLOCK)
        yield f"correction, {kind}", correction._subtract_kernel, cases.correction_arguments(kind) | blocks, warps


def main():
    assert select.LONGEST_RESIDENT < 65536
    print("| kernel | warps | " + " | ".join(f"sm_{c}" for c in TARGETS) + " | widest load |")
    print("|---|---|" + "---|" * (len(TARGETS) + 1))
    for name, kernel, arguments, warps in rows():
        usages = [compile_kernel(kernel, arguments, c, warps) for c in TARGETS]
        cells = [f"{u.registers}" + (f" (spills {u.spill})" if u.spill else "") for u in usages]
        print(f"| {name} | {warps} | " + " | ".join(cells) + f" | {min(u.widest_load() for u in usages)} bytes |")


if __name__ == "__main__":
    main()
