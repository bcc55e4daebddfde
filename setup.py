"""The metadata is in pyproject.toml; this file builds the native ops into ``kernels/_native.abi3.so``.

``PERSONA_BUILD`` chooses: ``none``; ``cpu``; ``cuda`` (the CPU part too). Forced and impossible is an error.
Without it everything is built that can be, and a package without native ops works, slower: ``kernels.native``
says so once, and why.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CHOICES = ("none", "cpu", "cuda")
TORCH_TARGET = "0x020b000000000000"
"""The stable ABI of torch 2.11: the library built here serves every later torch."""
# No -ffast-math: the sums are compared bit by bit. -ffp-contract=off: a fused product only where the source says so.
# The last flag: GCC warns of its own AVX-512 header (bug 105593).
FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-maybe-uninitialized",
]
# The last flag: GCC would keep the pointers of four rows in one vector register, and the way there and back lies
# between one step of a product and the next.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-fno-tree-slp-vectorize"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vbmi2"]
INSTRUCTIONS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx_bf16": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
"""Flags of ``csrc/simd/NAME.cpp`` alone: nothing else may hold an instruction that some processor lacks."""


def choice() -> str | None:
    """What the environment forces, or None."""
    forced = os.environ.get("PERSONA_BUILD", "").strip().lower() or None
    if forced not in (None, *CHOICES):
        sys.exit(f"PERSONA_BUILD={forced}: must be one of {', '.join(CHOICES)}")
    return forced


def obstacle(part: str) -> str | None:
    """Why ``part`` ("cpu" or "cuda") cannot be built here, in one sentence, or None."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return "torch is not installed where setup.py runs: install torch 2.11 or newer and use --no-build-isolation"
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        return f"torch {torch.__version__} is too old: install torch 2.11 or newer"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}): install g++ or clang++, or set CXX"
    if part == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    if part == "cuda" and (cpp_extension.CUDA_HOME is None or not list(ROOT.glob("csrc/*/cuda.cu"))):
        return (
            "there is no CUDA toolkit (nvcc): set CUDA_HOME" if cpp_extension.CUDA_HOME is None else "no csrc/*/cuda.cu"
        )
    return None


def parts(forced: str | None) -> tuple[str, ...]:
    """The parts to build."""
    wanted = {"none": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), None: ("cpu", "cuda")}[forced]
    chosen = []
    for part in wanted:
        reason = obstacle(part)
        if reason is None:
            chosen.append(part)
        elif forced is not None:
            sys.exit(f"PERSONA_BUILD={forced} cannot be built: {reason}")
        elif part == "cpu":
            print(f"persona: the native ops are left out, the slower PyTorch ops are used: {reason}", file=sys.stderr)
            break
    return tuple(chosen)


def extension(chosen: tuple[str, ...], optional: bool):
    import torch
    from torch.utils import cpp_extension

    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp"))
    defines = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET),
        ("PERSONA_TORCH_VERSION", f'"{torch.__version__}"'),
        ("PERSONA_FLAGS", f'"{" ".join(FLAGS)}"'),
    ]
    cuda = "cuda" in chosen
    if cuda:
        sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/cuda.cu"))
        defines.append(("USE_CUDA", None))
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    built = kind(
        "kernels._native",
        sources,
        define_macros=defines,
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3"]} if cuda else FLAGS,
        depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")),
        py_limited_api=True,
        optional=optional,
    )
    built.parts = chosen
    return built


def command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Adds the flags of ``INSTRUCTIONS``, and leaves no older library behind a failure."""

        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except BaseException:
                built = Path(self.get_ext_fullpath(ext.name))
                for stale in (built, ROOT / "kernels" / built.name):
                    stale.unlink(missing_ok=True)
                raise

        def build_extensions(self) -> None:
            compile_one = self.compiler._compile

            def with_instructions(obj, src, ext, cc_args, extra_postargs, pp_opts):
                extra = INSTRUCTIONS.get(Path(src).stem, []) if platform.machine() in ("x86_64", "AMD64") else []
                return compile_one(obj, src, ext, cc_args, list(extra_postargs) + extra, pp_opts)

            self.compiler._compile = with_instructions
            (ext,) = self.extensions
            if not (ext.optional and "cuda" in ext.parts):
                return super().build_extensions()
            try:
                super().build_extensions()
                built = Path(self.get_ext_fullpath(ext.name)).exists()
            except Exception as error:  # such as nvcc of another CUDA than torch's, found before anything is compiled
                print(f"persona: {error}", file=sys.stderr)
                built = False  # An older library may be there.
            if not built:
                print("persona: the CUDA part cannot be built, see above; building without it", file=sys.stderr)
                # The same object: setuptools has added to it what a new one would lack.
                vars(ext).update(vars(extension(("cpu",), optional=True)))
                super().build_extensions()

    # torch's ninja path takes one set of flags for all files.
    return Build.with_options(use_ninja=False)


def main() -> None:
    forced = choice()
    chosen = parts(forced)
    if chosen:
        setup(ext_modules=[extension(chosen, optional=forced is None)], cmdclass={"build_ext": command()})
    else:
        setup()


if __name__ == "__main__":
    main()
