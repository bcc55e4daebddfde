"""When an op need not go through torch's wrapper of custom ops.

The wrapper serves tracing, tensor subclasses and autograd, and takes longer than the checks and the kernel of a small
layer together (576 x 576, one row, bfloat16: 37 of 65 us).
"""

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def plain(*tensors: Tensor | None) -> bool:
    """Whether these arguments of an op are ordinary tensors that no gradient is wanted of, outside of a compilation."""
    if torch.compiler.is_compiling():
        return False
    learns = torch.is_grad_enabled()
    return all(t is None or (type(t) in PLAIN and not (learns and t.requires_grad)) for t in tensors)
