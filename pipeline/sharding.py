"""Models larger than one device: every process holds a shard of each weight (FSDP2), by Lightning's strategy for it.

A block's weights are gathered for the moment of its pass, so that layers see whole inputs and weights, and every
process has batches of its own. Gathering is collective: all processes take the same steps at the same time.
"""

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pipeline.shards import REST, Shards


class Sharded(ModelParallelStrategy):
    """Lightning's strategy with all processes data parallel; by default those of a machine would be tensor parallel."""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_processes * self.num_nodes, 1
        super().setup_environment()


def load_sharded(model: str, dtype: torch.dtype, device: torch.device, mesh: Any) -> Any:
    """The causal language model, its weights divided over the processes of ``mesh``; in eval mode, frozen.

    Read block by block, so that a process holds its share and one block. Raises UserError as ``Shards`` does.
    """
    shards = Shards(model, dtype, device, head=True, option="--strategy fsdp")
    shards.load(REST, dtype, device)
    for name, block in shards.blocks.items():
        shards.load(name, dtype, device)
        fully_shard(block, mesh=mesh)
    fully_shard(shards.model, mesh=mesh)
    return shards.model


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every process has a part, divided as ``like`` is. Collective."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
