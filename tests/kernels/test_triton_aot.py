"""Every Triton kernel compiled ahead of time: no GPU is needed to see spills, narrow loads or another rounding."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl
from aot import TARGETS, compile_kernel

from kernels.ops.activation_stats import triton as stats
from kernels.ops.correction_linear import triton as correction
from kernels.ops.mask_select import triton as select
from kernels.ops.mask_select_global import triton as threshold
from kernels.ops.mask_select_nm import triton as nm
from kernels.ops.masked_linear import triton as linear
from kernels.ops.pack_bits import triton as packing
from kernels.ops.sparse_linear import triton as sparse

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

targets = pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=[] if c == 90 else pytest.mark.slow, id=f"sm_{c}") for c in TARGETS]
)
slow = pytest.mark.slow


def split_arguments(kind, spans=False):
    wide = kind == "fp64"
    work = "*fp64" if wide else "*fp32"
    return {
        **{"x_ptr": f"*{kind}", "role_ptr": "*u8", "persona_ptr": "*i64", "span_ptr": "*i64" if spans else None},
        **{"moment_ptr": work, "count_ptr": "*i32"},
        **{"bad_ptr": "*i1", "stride_xb": "i64", "stride_xt": "i64", "stride_xk": 1, "stride_rb": "i32?"},
        **{"stride_rt": 1, "stride_ps": 1, "T": "i32?", "K": "i32", "splits": "i32?", "personas": "i32?"},
        **{"WORK": tl.float64 if wide else tl.float32, "BLOCK_K": stats.split_block(FLOATS[kind])},
    }


def combine_arguments(work):
    return {
        **{"part_ptr": work, "part_count_ptr": "*i32", "moment_ptr": work, "count_ptr": "*i32", "bad_ptr": "*i1"},
        **{"K": "i32", "splits": "i32?", "BLOCK_K": stats.FOLD_BLOCK},
    }


def persona_arguments(work):
    return {
        **{"moment_ptr": work, "count_ptr": "*i32", "persona_ptr": "*i64", "sums_ptr": "*fp64", "stride_ps": 1},
        **{"stride_sp": "i64", "stride_sf": "i64", "stride_sk": 1, "sequences": "i32?", "K": "i32"},
        **{"BLOCK_K": stats.FOLD_BLOCK},
    }


def select_arguments(kind, columns, tiebreak):
    block, warps = select.block_of(columns, tiebreak)
    kernel = select._resident_kernel if block >= columns else select._streamed_kernel
    return (
        kernel,
        {
            **{"score_ptr": f"*{kind}", "channel_ptr": None if tiebreak else "*fp32"},
            **{"tiebreak_ptr": "*fp32" if tiebreak else None, "bits_ptr": "*u8", "bad_ptr": "*i32"},
            **{"stride_sn": "i32", "stride_sk": 1, "stride_ck": "i32" if tiebreak else 1},
            **{"stride_tn": "i32", "stride_tk": 1 if tiebreak else "i32", "K": "i32", "keep": "i32?"},
            **{"FUSED": not tiebreak, "KEY": tl.uint64 if tiebreak else tl.uint32, "BLOCK": block},
        },
        warps,
    )


def packing_arguments():
    return {"mask_ptr": "*u8", "bits_ptr": "*u8", "K": "i32", "BLOCK": packing.BLOCK}


def nm_arguments(kind, m):
    return {
        **{"score_ptr": f"*{kind}", "channel_ptr": "*fp32", "bits_ptr": "*u8", "bad_ptr": "*i32", "stride_sn": "i32"},
        **{"stride_sk": 1, "stride_ck": 1, "K": "i32", "n": "i32?", "M": m, "BLOCK": packing.BLOCK},
    }


def threshold_arguments(stage, level=0):
    shift = sum(threshold.DIGIT_BITS[level + 1 :])
    given = {"score_ptr": "*fp32", "stride_sn": "i32", "stride_sk": 1, "K": "i32", "BLOCK": packing.BLOCK}
    return (
        given
        | {
            "digits": {
                **{"count_ptr": "*i64", "bad_ptr": "*i32", "prefix": "i32?", "SHIFT": shift},
                **{"BITS": threshold.DIGIT_BITS[level], "BINS": threshold.BINS},
            },
            "equal": {"count_ptr": "*i64", "threshold": "fp32"},
            "threshold": {"room_ptr": "*i64", "bits_ptr": "*u8", "bad_ptr": "*i32", "threshold": "fp32", "TIES": True},
        }[stage]
    )


def linear_arguments(kind):
    return {
        **{"x_ptr": f"*{kind}", "weight_ptr": f"*{kind}", "bits_ptr": "*u8", "persona_ptr": "*i32"},
        **{"bias_ptr": f"*{kind}", "y_ptr": f"*{kind}", "stride_xm": "i32", "stride_xk": 1, "stride_wn": "i32"},
        **{"stride_wk": 1, "stride_bp": "i32", "stride_bn": "i32", "stride_bb": 1, "stride_pm": 1},
        **{"stride_bias": 1, "M": "i32?", "N": "i32", "K": "i32", "P": "i32?", "gamma": "fp32", "SOFT": False},
    }


def tile_arguments(kind):
    left = {name: value for name, value in linear_arguments(kind).items() if "bias" not in name and name != "y_ptr"}
    return left | {"part_ptr": "*fp32", "splits": "i32?", "span": "i32"}


def gate_arguments(kind):
    taken = linear_arguments(kind)
    used = set(linear._gate_kernel.arg_names)
    left = {name: value for name, value in taken.items() if name in used}
    return left | {"out_ptr": f"*{kind}", "BLOCK_G": linear.GATE_GROUPS}


def sum_arguments(kind):
    pointers = {"part_ptr": "*fp32", "bias_ptr": f"*{kind}", "y_ptr": f"*{kind}"}
    return pointers | {"stride_bias": 1, "MN": "i32", "N": "i32", "splits": "i32?", "BLOCK": linear.SUM_BLOCK}


def sparse_arguments(kind):
    return {
        **{"x_ptr": f"*{kind}", "values_ptr": f"*{kind}", "bits_ptr": "*u8", "offsets_ptr": "*i64"},
        **{"bias_ptr": f"*{kind}", "y_ptr": f"*{kind}", "stride_xm": "i32", "stride_xk": 1, "stride_bn": "i32"},
        **{"stride_bb": 1, "stride_on": 1, "stride_bias": 1, "M": "i32?", "N": "i32", "K": "i32"},
    }


def correction_arguments(kind):
    return {
        **{"x_ptr": f"*{kind}", "weight_ptr": f"*{kind}", "columns_ptr": "*u16", "offsets_ptr": "*i32"},
        **{"persona_ptr": "*i32", "y_ptr": f"*{kind}", "stride_xm": "i32", "stride_xk": 1, "stride_wn": "i32"},
        **{"stride_wk": 1, "stride_c": 1, "stride_op": "i32?", "stride_on": 1, "stride_pm": 1, "M": "i32?"},
        **{"N": "i32", "K": "i32", "P": "i32?", "scale": "fp32"},
    }


def with_warps(blocks):
    return {name: value for name, value in blocks.items() if name != "num_warps"}, blocks["num_warps"]


@targets
@pytest.mark.parametrize("spans", [pytest.param(False, id="rows"), pytest.param(True, id="spans")])
@pytest.mark.parametrize("kind", ["bf16", pytest.param("fp16", marks=slow), "fp32", pytest.param("fp64", marks=slow)])
def test_stats_of_a_split(kind, spans, capability):
    usage = compile_kernel(stats._split_kernel, split_arguments(kind, spans), capability)
    assert usage.spill == 0
    assert usage.widest_load() == 16
    assert not {"atom", "red"} & {line.split(".")[0].strip() for line in usage.ptx.splitlines()}


@targets
@pytest.mark.parametrize("work", ["*fp32", pytest.param("*fp64", marks=slow)])
@pytest.mark.parametrize("stage", ["combine", "persona"])
def test_stats_of_sequences_and_personas(stage, work, capability):
    kernel = getattr(stats, f"_{stage}_kernel")
    usage = compile_kernel(kernel, globals()[f"{stage}_arguments"](work), capability)
    assert usage.spill == 0
    assert usage.widest_load() == 16


@targets
@pytest.mark.parametrize(
    ("kind", "columns", "tiebreak"),
    [
        ("bf16", 4096, False),
        ("fp32", 14336, False),
        ("fp32", 4096, True),
        ("bf16", 53248, False),
        pytest.param("bf16", 576, False, marks=slow),
        pytest.param("fp16", 14336, False, marks=slow),
        pytest.param("fp64", 14336, False, marks=slow),
        pytest.param("fp32", 8192, True, marks=slow),
        pytest.param("fp32", 65536, True, marks=slow),
    ],
)
def test_select(kind, columns, tiebreak, capability):
    kernel, arguments, warps = select_arguments(kind, columns, tiebreak)
    usage = compile_kernel(kernel, arguments, capability, warps)
    assert usage.spill == 0
    assert usage.widest_load() == 16
    # The score is one rounded product, subnormal or not: nothing is fused, nothing flushed.
    assert "fma" not in usage.ptx
    assert "ftz" not in usage.ptx


@targets
@pytest.mark.parametrize("way", ["pack", "unpack"])
def test_packing(way, capability):
    assert compile_kernel(getattr(packing, f"_{way}_kernel"), packing_arguments(), capability).spill == 0


@targets
@pytest.mark.parametrize(
    ("kind", "m"), [("bf16", 4), ("fp32", 8), *[pytest.param("fp16", m, marks=slow) for m in (2, 4, 8)]]
)
def test_select_nm(kind, m, capability):
    usage = compile_kernel(nm._nm_kernel, nm_arguments(kind, m), capability)
    assert usage.spill == 0
    assert "fma" not in usage.ptx
    assert "ftz" not in usage.ptx


@targets
@pytest.mark.parametrize(("stage", "level"), [("digits", 0), ("digits", 2), ("equal", 0), ("threshold", 0)])
def test_threshold(stage, level, capability):
    kernel = getattr(threshold, f"_{stage}_kernel")
    usage = compile_kernel(kernel, threshold_arguments(stage, level), capability)
    assert usage.spill == 0
    # Subnormal scores have an order too.
    assert "ftz" not in usage.ptx


@targets
@pytest.mark.parametrize("kind", ["bf16", pytest.param("fp16", marks=slow), "fp32"])
def test_linear_row(kind, capability):
    blocks, warps = with_warps(linear.ROW_BLOCK)
    usage = compile_kernel(linear._row_kernel, linear_arguments(kind) | blocks, capability, warps)
    assert usage.spill == 0
    assert usage.widest_load() == 16


@targets
@pytest.mark.parametrize("rows", [16, 1024])
@pytest.mark.parametrize("kind", ["bf16", pytest.param("fp16", marks=slow), "fp32"])
def test_linear_tile(kind, rows, capability):
    blocks, warps = with_warps(linear.tile_of(rows, FLOATS[kind]))
    usage = compile_kernel(linear._tile_kernel, tile_arguments(kind) | blocks, capability, warps)
    assert usage.spill == 0
    assert usage.widest_load() == 16
    assert ("mma" in usage.ptx) == (kind != "fp32"), "float32 is not for tf32, half precision is for tensor cores"


@targets
@pytest.mark.parametrize("soft", [False, True])
def test_gate(soft, capability):
    usage = compile_kernel(linear._gate_kernel, gate_arguments("bf16") | {"SOFT": soft}, capability)
    assert usage.spill == 0
    assert usage.widest_load() == 16


@targets
def test_sum_of_splits(capability):
    assert compile_kernel(linear._sum_kernel, sum_arguments("bf16"), capability).spill == 0


@targets
@pytest.mark.parametrize("rows", [1, 16, 1024])
@pytest.mark.parametrize("kind", ["bf16", pytest.param("fp16", marks=slow), pytest.param("fp32", marks=slow)])
def test_sparse(kind, rows, capability):
    kernel = sparse._row_kernel if rows == 1 else sparse._tile_kernel
    blocks, warps = with_warps(sparse.ROW_BLOCK if rows == 1 else linear.tile_of(rows, FLOATS[kind]))
    usage = compile_kernel(kernel, sparse_arguments(kind) | blocks, capability, warps)
    assert usage.spill == 0
    assert ("mma" in usage.ptx) == (rows > 1 and kind != "fp32")


@targets
@pytest.mark.parametrize("kind", ["bf16", pytest.param("fp16", marks=slow), pytest.param("fp32", marks=slow)])
def test_correction(kind, capability):
    blocks, warps = with_warps(correction.BLOCK)
    usage = compile_kernel(correction._subtract_kernel, correction_arguments(kind) | blocks, capability, warps)
    assert usage.spill == 0


# Triton compiles an integer of 1 into the kernel: a loop variable that begins as one must not change its type.
ONES = {
    "split": (stats._split_kernel, split_arguments("fp32"), ("T", "K", "splits", "personas")),
    "split of spans": (stats._split_kernel, split_arguments("fp32", True), ("T", "K", "splits", "personas")),
    "combine": (stats._combine_kernel, combine_arguments("*fp32"), ("K",)),
    "persona": (stats._persona_kernel, persona_arguments("*fp32"), ("sequences", "K")),
    "select": (*select_arguments("fp32", 1, False)[:2], ("K", "keep", "stride_sn")),
    "select streamed": (*select_arguments("fp32", 65536, True)[:2], ("keep",)),
    "pack": (packing._pack_kernel, packing_arguments(), ("K",)),
    "unpack": (packing._unpack_kernel, packing_arguments(), ("K",)),
    "select of groups": (nm._nm_kernel, nm_arguments("fp32", 2), ("n", "stride_sn")),
    "digits": (threshold._digits_kernel, threshold_arguments("digits", 2), ("K", "prefix", "stride_sn")),
    "equal": (threshold._equal_kernel, threshold_arguments("equal"), ("K", "stride_sn")),
    "threshold": (threshold._threshold_kernel, threshold_arguments("threshold"), ("K", "stride_sn")),
    "row": (linear._row_kernel, linear_arguments("fp16") | with_warps(linear.ROW_BLOCK)[0], ("M", "N", "K", "P")),
    "tile": (
        linear._tile_kernel,
        tile_arguments("fp16") | with_warps(linear.tile_of(16, torch.float16))[0],
        ("N", "K", "P", "splits"),
    ),
    "gate": (linear._gate_kernel, gate_arguments("fp16"), ("N", "K", "P")),
    "sum": (linear._sum_kernel, sum_arguments("fp16"), ("MN", "N", "splits")),
    "sparse row": (sparse._row_kernel, sparse_arguments("fp16") | with_warps(sparse.ROW_BLOCK)[0], ("M", "N", "K")),
    "sparse tile": (
        sparse._tile_kernel,
        sparse_arguments("fp16") | with_warps(linear.tile_of(16, torch.float16))[0],
        ("N", "K"),
    ),
    "correction": (
        correction._subtract_kernel,
        correction_arguments("fp16") | with_warps(correction.BLOCK)[0],
        ("M", "N", "K", "P"),
    ),
}


@slow
@pytest.mark.parametrize("name", ONES)
def test_arguments_of_one_compile(name):
    kernel, arguments, ones = ONES[name]
    compile_kernel(kernel, arguments | dict.fromkeys(ones, 1), 90)


@slow
@pytest.mark.parametrize("name", ["row", "sum"])
def test_linear_without_bias_compiles(name):
    kernel, arguments, _ = ONES[name]
    assert compile_kernel(kernel, arguments | {"bias_ptr": None}, 90).spill == 0
