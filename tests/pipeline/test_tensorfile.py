"""The writer of safetensors files: what the library reads is what was written, byte for byte the same each time."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from pipeline import tensorfile


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(list(tensorfile.CODES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(
        st.text(max_size=4).filter(str.isprintable), st.text(max_size=4).filter(str.isprintable), max_size=3
    ),
)
def test_the_library_reads_it(entries, metadata):
    tensors = {n: torch.randint(0, 2, shape).to(dtype) for n, (dtype, shape) in entries.items()}
    first, second = io.BytesIO(), io.BytesIO()
    tensorfile.write(first, tensors, metadata)
    tensorfile.write(second, dict(reversed(tensors.items())), metadata)
    assert first.getvalue() == second.getvalue()
    read = load(first.getvalue())
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_views_and_metadata(tmp_path):
    from safetensors import safe_open

    square = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    with open(tmp_path / "file", "wb") as file:
        tensorfile.write(file, {"view": square.T, "bits": torch.tensor([1], dtype=torch.uint8)}, {"a": "ü"})
    with safe_open(tmp_path / "file", "pt") as read:
        assert read.metadata() == {"a": "ü"}
        assert torch.equal(read.get_tensor("view"), square.T)


def test_a_type_that_has_no_code():
    with pytest.raises(KeyError):
        tensorfile.write(io.BytesIO(), {"x": torch.zeros(1, dtype=torch.complex64)}, {})
