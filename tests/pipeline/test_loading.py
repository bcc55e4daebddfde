"""How a model is loaded."""

import torch

from pipeline.loading import load_model


def test_the_head_reads_the_last_positions_in_one_piece(ground):
    """A view of the batch would be multiplied row by row."""
    model = load_model(str(ground.llama))
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.arange(24).reshape(3, 8)
    logits = model(input_ids=ids, logits_to_keep=2, use_cache=False).logits
    (hidden,) = seen
    assert hidden.shape[:2] == (3, 2)
    assert hidden.is_contiguous()
    assert torch.allclose(logits, model(input_ids=ids, use_cache=False).logits[:, -2:], atol=1e-6)
