"""Measure a live model: hooks on one linear per site, and nothing left behind.

The only place that touches a model during calibration.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernels.ops.activation_stats import COUNTED, SINK, activation_stats
from pipeline.errors import SpoiledError, UserError
from pipeline.stats import SAMPLES, SINKS, TOKENS, ActivationStats


class Collector:
    """Adds the activations of every forward pass inside ``collecting`` to its statistics."""

    def __init__(self, model: nn.Module, stats: ActivationStats) -> None:
        self.model, self.stats = model, stats
        self._batch: tuple[Tensor, Tensor] | None = None
        self._seen: set[str] = set()
        self._bad: dict[str, Tensor] = {}
        self._counted: frozenset[str] = frozenset()

    @property
    def complete(self) -> frozenset[str]:
        """Sites whose sums hold the whole last batch; a pass that was cut short leaves some out."""
        return self._counted | self._bad.keys()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Install the hooks; they are removed on leaving, whatever happens."""
        modules = dict(self.model.named_modules())
        handles = [modules[s.name].register_forward_pre_hook(self._hook(s.name)) for s in self.stats.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(
        self, role: Tensor, persona: Tensor, sources: Sequence[str], counted: frozenset[str] = frozenset()
    ) -> Iterator[None]:
        """Declare the batch of the forward pass inside: ``role`` uint8 ``[B, T]``, ``persona`` int64 ``[B]``.

        ``sources`` names each sample for the error that NaN or infinity in an activation raises. The sites in
        ``counted`` have the samples in their sums already, from a pass that was cut short.
        """
        self._batch, self._seen, self._bad, self._counted = (role, persona), set(), {}, counted
        try:
            yield
        finally:
            self._batch = None
        self.raise_on_bad_values(sources)
        missing = [s.name for s in self.stats.sites if s.name not in self._seen]
        if missing:
            raise UserError(
                f"layers {', '.join(missing[:3])} ... were not called for a batch; exclude them (--exclude)"
            )
        self._count(role, persona)

    def _hook(self, site: str):
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._batch is None:
                return
            role, persona = self._batch
            x = inputs[0]
            # Some models (OPT) flatten batch and time in front of their linears.
            x = x if x.dim() == 3 else x.reshape(*role.shape, x.shape[-1])
            if site in self._seen:
                raise UserError(f"layer {site} was called twice in one forward pass; exclude it (--exclude)")
            self._seen.add(site)
            if site not in self._counted:
                self._bad[site] = activation_stats(x, role, persona, self.stats.sums[site])

        return before

    def _count(self, role: Tensor, persona: Tensor) -> None:
        counts = torch.zeros(len(persona), 3, dtype=torch.float64, device=role.device)
        counts[:, SAMPLES] = 1
        counts[:, TOKENS] = (role == COUNTED).sum(1)
        counts[:, SINKS] = (role == SINK).sum(1)
        # Whole numbers: their float64 sum is exact in any order.
        self.stats.counts.index_add_(0, persona, counts)

    def raise_on_bad_values(self, sources: Sequence[str]) -> None:
        """Raise SpoiledError, with layer and sample, if the last pass met NaN or infinity."""
        flags = torch.stack(list(self._bad.values())) if self._bad else torch.zeros(0, 0)
        if not flags.any():
            return
        layer, sample = flags.nonzero()[0].tolist()
        raise SpoiledError(
            f"layer {list(self._bad)[layer]}: NaN, infinity or overflow in the input for sample {sources[sample]}"
            f" ({int(flags.any(0).sum())} of {len(sources)} samples of the batch); try another --precision"
        )
