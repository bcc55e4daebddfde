"""Measure a live model: hooks on one linear per site, and nothing left behind.

The only place that touches a model during calibration.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernels.ops.activation_stats import COUNTED, SINK, activation_stats
from pipeline.errors import UserError
from pipeline.exact import ExactSums
from pipeline.stats import SAMPLES, SINKS, TOKENS, ActivationStats


class Collector:
    """Adds the activations of every forward pass inside ``collecting`` to its statistics.

    With ``exact``, sums go to ``self.exact`` by site instead, where their order makes no difference; ``settle`` moves
    them to the statistics.
    """

    def __init__(self, model: nn.Module, stats: ActivationStats, *, exact: bool = False) -> None:
        self.model, self.stats = model, stats
        self.exact = {name: ExactSums(sums) for name, sums in stats.sums.items()} if exact else {}
        self._batch: tuple[Tensor, Tensor] | None = None
        self._seen: set[str] = set()
        self._bad: dict[str, Tensor] = {}

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
    def batch(self, role: Tensor, persona: Tensor, sources: Sequence[str]) -> Iterator[None]:
        """Declare the batch of the forward pass inside: ``role`` uint8 ``[B, T]``, ``persona`` int64 ``[B]``.

        ``sources`` names each sample for the error that NaN or infinity in an activation raises.
        """
        self._batch, self._seen, self._bad = (role, persona), set(), {}
        try:
            yield
        finally:
            self._batch = None
        self._raise_on_bad_values(sources)
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
            if site in self.exact:
                present, place = persona.unique(return_inverse=True)
                part = self.stats.sums[site].new_zeros(len(present), *self.stats.sums[site].shape[1:])
                self._bad[site] = activation_stats(x, role, place, part)
                self.exact[site].add(present, part)
            else:
                self._bad[site] = activation_stats(x, role, persona, self.stats.sums[site])

        return before

    def tensors(self) -> list[Tensor]:
        """What adds up over devices: the sums of all sites and the counts."""
        sums = [e.pieces for e in self.exact.values()] if self.exact else list(self.stats.sums.values())
        return [self.stats.counts, *sums]

    def settle(self) -> None:
        """Round the exact sums into the statistics. Raises UserError where they are too large."""
        for site, sums in self.exact.items():
            try:
                self.stats.sums[site].copy_(sums.value())
            except OverflowError as error:
                raise UserError(f"layer {site}: {error}; leave out --deterministic") from error

    def _count(self, role: Tensor, persona: Tensor) -> None:
        counts = torch.zeros(len(persona), 3, dtype=torch.float64, device=role.device)
        counts[:, SAMPLES] = 1
        counts[:, TOKENS] = (role == COUNTED).sum(1)
        counts[:, SINKS] = (role == SINK).sum(1)
        # Whole numbers: their float64 sum is exact in any order.
        self.stats.counts.index_add_(0, persona, counts)

    def _raise_on_bad_values(self, sources: Sequence[str]) -> None:
        flags = torch.stack(list(self._bad.values())) if self._bad else torch.zeros(0, 0)
        if not flags.any():
            return
        layer, sample = flags.nonzero()[0].tolist()
        raise UserError(
            f"layer {list(self._bad)[layer]}: NaN, infinity or overflow in the input for sample {sources[sample]}"
            f" ({int(flags.any(0).sum())} of {len(sources)} samples of the batch); try another --precision"
        )
