"""The Triton kernels in Triton's interpreter, on the CPU: the contract's own tests, and those of ``interpreter/``.

The interpreter must be on before the first kernel is defined, so each run is a process of its own. bfloat16
products are left out of it: ``tl.dot`` is silently wrong there (``tests/gpu`` has them).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
OPS = ",".join(
    f"{op}=triton"
    for op in (
        "activation_stats",
        "mask_select",
        "mask_select_scores",
        "mask_select_nm",
        "mask_select_threshold",
        "mask_select_global",
        "pack_bits",
        "unpack_bits",
        "masked_linear",
        "sparse_linear",
        "correction_linear",
    )
)

QUICK = {
    "activation_stats": "test_sums and 37 or bad_value and 3e or non_contiguous and 16",
    "activation_spans": "test_sums and 16 and chosen or own and 16 and chosen or no_spans and chosen",
    "mask_select": "keeps_the_largest and 37 or none- or zero_weights or low_precision or named and nan",
    "mask_select_nm": "triton and (every_group and float32 and 4 or zeros or named) or opcheck and 5",
    "mask_select_global": "triton and (all_matrices and 5 or test_threshold and 50 or named)",
    "pack_bits": "little_bit_order or unpack_inverts or non_contiguous or opcheck and strided and 129",
    "masked_linear": "not bfloat16 and (forward and 33 and 0.3-mixed or non_contiguous and 16 or unused or past)",
    "sparse_linear": "not bfloat16 and portable and (as_accurate and True and 577 or values_of)",
    "correction_linear": "not bfloat16 and reference and 577",
}
# Not what the C++ op promises beyond the contract: bits that do not depend on the batch, errors of its own.
OWN = "not threads and not input_is_checked"
ALL = {
    "activation_stats": "",
    "activation_spans": "",
    "mask_select": "",
    "mask_select_nm": "",
    "mask_select_global": "",
    "pack_bits": "",
    "masked_linear": "not bfloat16",
    "sparse_linear": f"not bfloat16 and not densities and {OWN}",
    "correction_linear": f"not bfloat16 and {OWN}",
}


def run(op, expression, marks):
    own = HERE / f"interpreter/test_{op}_triton.py"
    files = [HERE / f"test_{op}.py", *([own] if own.exists() else [])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-m", marks, "-k", expression]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PERSONA_BACKEND": OPS}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("op", QUICK)
def test_interpreted(op):
    run(op, f"{QUICK[op]} or _triton.py", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("op", ALL)
def test_interpreted_with_every_test(op):
    run(op, ALL[op], "slow or not slow")
