"""Compiles Triton kernels ahead of time, without a GPU, and reads what ptxas made of them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = (80, 90, 100)
_TYPE = re.compile(r"^(\*?)([a-z]+\d+|i1)$")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes; ``spill`` is bytes of local memory a thread, ``sass`` the machine code."""

    registers: int
    spill: int
    shared: int
    ptx: str
    sass: str

    def widest_load(self) -> int:
        """Bytes that a thread's widest load from global memory fetches at once."""
        bits = [re.search(r"\.(64|128)", load) for load in re.findall(r"LDG(\.[A-Z0-9.]+)", self.sass)]
        return max((int(b.group(1)) // 8 if b else 4 for b in bits), default=0)


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], capability: int, num_warps: int = 4, **options: Any
) -> Usage:
    """Compile ``kernel`` for ``sm_<capability>``.

    ``arguments`` maps every parameter to a type ("*bf16", "i32", "fp32") or, for a compile-time constant,
    to its value. As at run time, pointers and integers count as divisible by 16 (a type with a trailing "?"
    does not).
    """
    types = {name: a for name, a in arguments.items() if isinstance(a, str)}
    signature = {name: types[name].rstrip("?") if name in types else "constexpr" for name in arguments}
    constants = {(i,): a for i, (name, a) in enumerate(arguments.items()) if name not in types}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, _) in enumerate(arguments.items())
        if name in types and not types[name].endswith("?") and not types[name].startswith("fp")
    }
    missing = set(kernel.arg_names) ^ set(arguments)
    assert not missing, f"{kernel.__name__}: arguments and parameters differ in {missing}"
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
    return _read(compiled.asm["cubin"], compiled.asm["ptx"])


def _read(cubin: bytes, ptx: str) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output(
            [TOOLS / "cuobjdump", "-res-usage", file.name], text=True, stderr=subprocess.STDOUT
        )
        sass = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"], ptx, sass)
