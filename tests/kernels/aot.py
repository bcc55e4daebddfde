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
        bits = [re.search(r"\.(64|128)", load) for load in re.findall(r"(?:LDG|LDGSTS)(\.[A-Z0-9.]+)", self.sass)]
        return max((int(b.group(1)) // 8 if b else 4 for b in bits), default=0)


def compile_kernel(kernel: Any, arguments: dict[str, Any], capability: int, num_warps: int = 4) -> Usage:
    """Compile ``kernel`` for ``sm_<capability>``.

    ``arguments`` maps every parameter to a type ("*bf16", "i32", "fp32") or, for a compile-time constant, to its
    value. As for most calls, pointers and integers are divisible by 16; a type that ends in "?" is not.
    """
    assert set(arguments) == set(kernel.arg_names), set(arguments) ^ set(kernel.arg_names)
    # The order of the parameters counts below, and they are given by name.
    ordered = [arguments[name] for name in kernel.arg_names]
    types = [a if isinstance(a, str) else "constexpr" for a in ordered]
    signature = dict(zip(kernel.arg_names, (t.rstrip("?") for t in types), strict=True))
    constants = {(i,): a for i, a in enumerate(ordered) if types[i] == "constexpr"}
    aligned = [i for i, t in enumerate(types) if t != "constexpr" and not t.startswith("fp") and not t.endswith("?")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    return _read(compiled.asm["cubin"], compiled.asm["ptx"])


def _read(cubin: bytes, ptx: str) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"], ptx, sass)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
