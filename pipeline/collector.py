"""Measure a live model: hooks on one layer per site, and nothing left behind.

The only place that touches a model during calibration.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernels.experts import experts_forward, plain_product
from kernels.ops.activation_stats import COUNTED, SINK, activation_stats
from pipeline.errors import SpoiledError, UserError
from pipeline.exact import ExactSums
from pipeline.experts import by_module, find_experts
from pipeline.stats import SAMPLES, SINKS, TOKENS, ActivationStats


class Collector:
    """Adds the activations of every forward pass inside ``collecting`` to its statistics.

    A layer that is called c times in a pass contributes the mean over its calls. An expert contributes the tokens
    that were routed to it; while collecting, experts are computed one after another, whatever their own forward does.

    With ``exact``, sums go to ``self.exact`` by site instead, where their order makes no difference; ``settle`` moves
    them to the statistics.
    """

    def __init__(self, model: nn.Module, stats: ActivationStats, *, exact: bool = False) -> None:
        self.model, self.stats = model, stats
        self._several = {site.name for site in stats.sites if site.calls > 1}
        self.exact = {name: ExactSums(sums) for name, sums in stats.sums.items()} if exact else {}
        self._batch: tuple[Tensor, Tensor] | None = None
        self._calls: dict[str, int] = {}
        self._repeated: dict[str, Tensor] = {}
        self._bad: dict[str, Tensor] = {}
        self._whole: set[str] = set()
        self._counted: frozenset[str] = frozenset()

    @property
    def complete(self) -> frozenset[str]:
        """Sites whose sums hold the whole last batch; a pass that was cut short leaves some out."""
        return self._counted | self._whole

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Install the hooks; they are removed on leaving, whatever happens."""
        modules = dict(self.model.named_modules())
        plain = [site.name for site in self.stats.sites if not site.routed]
        handles = [modules[name].register_forward_pre_hook(self._hook(name)) for name in plain]
        routed = {site.name for site in self.stats.sites if site.routed}
        experts = by_module(
            {n: layer for n, layer in find_experts(self.model).items() if n in routed} if routed else {}
        )
        changed = []
        try:
            for module, layers in experts:
                places = {(layer.parameter, layer.expert): name for name, layer in layers.items()}
                module.forward = self._observed(module, places)  # type: ignore[method-assign]
                changed.append(module)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in changed:
                del module.forward

    @contextmanager
    def batch(
        self, role: Tensor, persona: Tensor, sources: Sequence[str], counted: frozenset[str] = frozenset()
    ) -> Iterator[None]:
        """Declare the batch of the forward pass inside: ``role`` uint8 ``[B, T]``, ``persona`` int64 ``[B]``.

        ``sources`` names each sample for the error that NaN or infinity in an activation raises. The sites in
        ``counted`` have the samples in their sums already, from a pass that was cut short.
        """
        self._batch, self._calls, self._repeated, self._bad = (role, persona), {}, {}, {}
        self._whole, self._counted = set(), counted
        try:
            yield
        finally:
            self._batch = None
        self.raise_on_bad_values(sources)
        missing = [s.name for s in self.stats.sites if s.name not in self._calls]
        if missing:
            raise UserError(
                f"layers {', '.join(missing[:3])} ... were not called for a batch; exclude them (--exclude)"
            )
        for site, sums in self._repeated.items():
            mean = sums / self._calls[site]
            if site in self.exact:
                self.exact[site].add(torch.arange(len(mean), device=mean.device), mean)
            else:
                self.stats.sums[site] += mean
            self._whole.add(site)
        self._count(
            self.stats.counts, persona, (role == COUNTED).sum(1), (role == SINK).sum(1), torch.ones_like(persona)
        )

    def _hook(self, site: str):
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._batch is None:
                return
            role, persona = self._batch
            read = _by_token(site, inputs[0], role)
            if len(read) > 1:
                self._several.add(site)
            for x in read:
                calls = self._calls[site] = self._calls.get(site, 0) + 1
                if site not in self._counted:
                    self._add(site, self._sum(site, x, role, persona, calls))

        return before

    def _sum(
        self, site: str, x: Tensor, role: Tensor, persona: Tensor, calls: int, spans: Tensor | None = None
    ) -> Tensor:
        """Add a call's sums: those of a layer that is called several times are averaged when the batch ends."""
        sums = self.stats.sums[site]
        if site in self._several:
            return activation_stats(x, role, persona, self._repeated.setdefault(site, torch.zeros_like(sums)), spans)
        if calls > 1:
            raise UserError(f"layer {site} was called twice in a pass, but once before; exclude it (--exclude)")
        if site not in self.exact:
            bad = activation_stats(x, role, persona, sums, spans)
            self._whole.add(site)
            return bad
        present, place = persona.unique(return_inverse=True)
        part = sums.new_zeros(len(present), *sums.shape[1:])
        bad = activation_stats(x, role, place, part, spans)
        self.exact[site].add(present, part)
        self._whole.add(site)
        return bad

    def _observed(self, experts: Any, places: dict[tuple[str, int], str]):
        """The forward of an experts module that measures what each matrix reads."""

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            plain = plain_product(experts)

            def product(parameter: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
                if self._batch is not None and (site := places.get((parameter, expert))) is not None:
                    self._route(site, x, tokens)
                return plain(parameter, expert, x, tokens)

            for site in places.values():
                if self._batch is not None:
                    self._calls[site] = self._calls.get(site, 0) + 1
            return experts_forward(experts, hidden_states, top_k_index, top_k_weights, product)

        return forward

    def _route(self, site: str, x: Tensor, tokens: Tensor) -> None:
        """Add one expert's rows ``x [M, K]``, those of the batch's ``tokens`` int64 ``[M]`` in ascending order."""
        assert self._batch is not None
        role, persona = self._batch
        if self._calls[site] > 1:
            raise UserError(f"the experts of {site} were called twice in one forward pass; exclude them (--exclude)")
        if site in self._counted:
            return
        sequence = tokens // role.shape[1]
        each = torch.bincount(sequence, minlength=len(role))
        last = each.cumsum(0)
        # The rows of a sequence lie together: x is one row of the op, and holds a span of every sequence.
        spans = torch.stack([torch.zeros_like(last), last - each, last], 1).cpu()
        roles = role.flatten()[tokens]
        self._add(site, self._sum(site, x.unsqueeze(0), roles.unsqueeze(0), persona, 1, spans))
        counted, sinks = (torch.bincount(sequence[roles == kind], minlength=len(role)) for kind in (COUNTED, SINK))
        # A sequence none of whose counted tokens came here is no sample of this expert.
        self._count(self.stats.routed[site], persona, counted, sinks, counted > 0)

    def tensors(self) -> list[Tensor]:
        """What adds up over devices: the sums of all sites and the counts."""
        if not self.exact:
            return list(self.stats.tensors.values())
        return [self.stats.counts, *self.stats.routed.values(), *(one.pieces for one in self.exact.values())]

    def settle(self) -> None:
        """Round the exact sums into the statistics. Raises SpoiledError where they are too large."""
        for site, sums in self.exact.items():
            try:
                self.stats.sums[site].copy_(sums.value())
            except OverflowError as error:
                raise SpoiledError(f"layer {site}: {error}; leave out --deterministic") from error

    def _add(self, site: str, bad: Tensor) -> None:
        self._bad[site] = self._bad[site] | bad if site in self._bad else bad

    def _count(self, counts: Tensor, persona: Tensor, counted: Tensor, sinks: Tensor, samples: Tensor) -> None:
        new = torch.zeros(len(persona), 3, dtype=torch.float64, device=persona.device)
        new[:, TOKENS], new[:, SINKS], new[:, SAMPLES] = counted, sinks, samples
        # Whole numbers: their float64 sum is exact in any order.
        counts.index_add_(0, persona, new)

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


def _by_token(site: str, x: Tensor, role: Tensor) -> Sequence[Tensor]:
    """What a layer reads of the tokens of ``role`` ``[B, T]``, ``[B, T, K]``, as often as it reads them.

    Raises UserError if the shape of ``x`` does not say what is whose.
    """
    if x.shape[:-1].numel() == role.numel():
        # Some models (OPT) flatten batch and time in front of their linears.
        return [x if x.dim() == 3 else x.reshape(*role.shape, x.shape[-1])]
    if x.dim() > 3 and x.shape[:2] == role.shape:
        # Several vectors a token, such as one a head: as if the layer were called with each.
        return x.flatten(2, -2).unbind(2)
    raise UserError(f"layer {site} reads {list(x.shape)} of {list(role.shape)} tokens; exclude it (--exclude)")
