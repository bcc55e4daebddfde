"""The name ``kernels`` is shared with a Hugging Face package that transformers probes for: what that forbids."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kernels").rglob("*.py"))
ALLOWED = {"kernels", "torch", "triton"} | set(sys.stdlib_module_names)

TINY_LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
assert not is_kernels_available(), "transformers takes this package for that of Hugging Face"
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()
prompt = torch.tensor([[1, 2, 3]])
tokens = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
import kernels
print(kernels.__file__, tokens.shape[1])
"""


def imported(source):
    """The top-level packages that a source imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def start(arguments, cwd):
    """A fresh interpreter, without what pytest added to the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=environment, **pipes)


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.split()


def test_reader_of_imports_sees_every_form():
    source = "import lightning.pytorch\ndef f():\n    from transformers.utils import x\n    from . import pipeline\n"
    assert imported(source) == {"lightning", "transformers"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_torch_triton_and_the_standard_library(path):
    assert imported(path.read_text()) <= ALLOWED


def test_sources_are_found():
    assert ROOT / "kernels/layers.py" in SOURCES
    assert ROOT / "kernels/ops/masked_linear/reference.py" in SOURCES


def test_import_is_cheap_and_takes_no_submodules():
    code = "import sys, kernels; print(*sys.modules)"
    modules = finish(start(["-c", code], ROOT))
    assert "kernels" in modules
    assert not {"torch", "numpy", "triton", "transformers"} & set(modules)
    assert not [name for name in modules if name.startswith("kernels.")]


def test_ops_do_not_load_the_product():
    code = "import sys; from kernels import *; MaskedLinear, masked_linear; print(*sys.modules)"
    modules = finish(start(["-c", code], ROOT))
    assert "torch" in modules
    assert not {"pipeline", "transformers", "lightning"} & set(modules)


def test_no_version():
    # transformers reads it: one between 0.18.2 and 0.19 makes transformers take this package for the other.
    assert not hasattr(kernels, "__version__")


def test_public_names():
    assert sorted(kernels.__all__) == dir(kernels)
    for name in kernels.__all__:
        assert callable(getattr(kernels, name))
    with pytest.raises(AttributeError, match="module 'kernels' has no attribute 'get_kernel'; it has activation_stats"):
        _ = kernels.get_kernel


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The tiny model in three interpreters at once: importing transformers takes long."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    script = elsewhere / "generate.py"
    script.write_text(TINY_LLAMA)
    return {
        "repository root": start(["-c", TINY_LLAMA], ROOT),
        "another directory": start(["-c", TINY_LLAMA], elsewhere),
        "script": start([str(script)], ROOT),
    }


@pytest.mark.parametrize("place", ["repository root", "another directory", "script"])
def test_transformers_generates_beside_this_package(running, place):
    file, length = finish(running[place])
    assert Path(file) == ROOT / "kernels/__init__.py"
    assert length == "6"
