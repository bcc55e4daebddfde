"""The forward pass over all personas as a LightningModule, and the Trainer around it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.checkpoint import Checkpoint
from pipeline.cli import note
from pipeline.collector import Collector
from pipeline.config import CalibrateConfig, parse_devices
from pipeline.data.module import Batch
from pipeline.errors import UserError
from pipeline.experts import find_experts, other_expert_parameters
from pipeline.loading import load_model
from pipeline.memory import halves, is_out_of_memory, make_room
from pipeline.packing import last_logits
from pipeline.progress import Throughput
from pipeline.ranks import Ranks
from pipeline.sharding import Sharded, load_sharded
from pipeline.signals import told, unbroken
from pipeline.sites import Site, check_causal, find_sites, measurable, other_linears, probe
from pipeline.stacking import Base, pruned
from pipeline.state import check_files
from pipeline.stats import ActivationStats
from pipeline.store import save_statistics

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class Stage(lightning.LightningModule):
    """One pass on every rank, as ``run_pass`` runs it. ``folder`` is the run's staging folder."""

    def __init__(self, config: CalibrateConfig, folder: Path) -> None:
        super().__init__()
        self.config, self.folder = config, folder
        self.model: Any = None
        self.base: Base | None = None
        self.tokens_done = 0
        self.skipped = False

    def is_done(self) -> bool:
        """Did an earlier process finish this stage?"""
        return False

    def configure_model(self) -> None:
        # Here and not in the constructor: the processes of a forked run must each load the model.
        if self.model is None and not self.skipped:
            # Ranks that start by themselves must agree, whenever each of them looks.
            self.skipped = self.trainer.strategy.broadcast(self.is_done())
            if not self.skipped:
                self.load()
                check_files(self.folder)

    def load(self) -> None:
        """Load the model as the options say."""
        dtype = DTYPES.get(self.config.precision, torch.float32)
        if self.config.sharded:
            strategy: Any = self.trainer.strategy
            model = load_sharded(self.config.model, dtype, strategy.root_device, strategy.device_mesh["data_parallel"])
            # Not a submodule: Lightning would move and cast it.
            object.__setattr__(self, "model", model)
        else:
            self.model, self.base = pruned(load_model(self.config.model, dtype), self.config.on)

    def dealt(self, parts: Sequence[Sequence[str]]) -> DataLoader[Any]:
        """A step for every name: this rank's are those of every world-th part from its own number on, and then None,
        so that all ranks take equally many."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        shares = [[name for part in parts[r::world] for name in part] for r in range(world)]
        mine: list[str | None] = [*shares[rank], *[None] * (max(map(len, shares)) - len(shares[rank]))]
        # Names and not what they name: Lightning's precision plugins rebuild dataclasses.
        return DataLoader(mine, batch_size=None, collate_fn=lambda name: name)  # type: ignore[arg-type]


class StatisticsModule(Stage):
    """Measures the activation statistics of every persona in one forward-only pass.

    ``predict_step`` adds a batch to this rank's sums, which a checkpoint keeps; at the end they are summed over the
    ranks in float64 and rank 0 writes them to ``target``.
    """

    def __init__(self, config: CalibrateConfig, personas: tuple[str, ...], target: Path) -> None:
        super().__init__(config, target.parent)
        self.personas, self.target = personas, target
        self.collector: Collector | None = None
        self.position = self.start = 0

    def is_done(self) -> bool:
        return self.target.exists()

    def on_predict_start(self) -> None:
        if self.skipped:
            return
        spread_threads(self.trainer, self.device, self.config.deterministic)
        layers = measurable(self.model, self.config)
        check_causal(self.model, self.device)
        sites, unused = find_sites(self.model, layers, self.device)
        if self.trainer.is_global_zero:
            report_coverage(self.model, sites, unused)
        # A plain attribute: Lightning's precision plugins must not cast the float64 sums.
        stats = ActivationStats.zeros(self.personas, sites, self.device)
        self.collector = Collector(self.model, stats, exact=self.config.deterministic)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        self.checkpoint = Checkpoint(self.folder, rank, world, self.config.checkpoint_every)
        self.position = self.start = self.checkpoint.load(self.collector)
        if self.config.sharded:
            first = torch.tensor(self.position, device=self.device)
            dist.all_reduce(first, dist.ReduceOp.MIN)
            self.start = int(first)
        if self.position and self.trainer.is_global_zero:
            note(f"going on after {self.position} batches")

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        if self.skipped or batch_idx < self.start:
            return
        assert self.collector is not None
        with unbroken():
            if batch.sources and batch_idx >= self.position:
                self._add(batch)
                self.tokens_done += int(batch.attention.sum())
            elif self.config.sharded:
                # Shards are gathered by all processes together, whether or not they have a batch.
                ids = probe(self.model, self.device)
                self._read(ids, torch.ones_like(ids))
            if batch_idx < self.position:
                return
            self.position = batch_idx + 1
            if told() or self.checkpoint.due():
                self.checkpoint.save(self.collector, self.position)

    def _read(self, ids: Tensor, attention: Tensor) -> None:
        """The forward pass, with as little of the output head as can be: logits of a large vocabulary are of no use."""
        options: dict[str, Any] = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
        if not self.config.sharded:
            self.model.base_model(**options)
            return
        # The whole model knows how to gather its shards; its parts know it of themselves alone.
        self.model(**options, **last_logits(self.model, 1, ids.shape[1]))

    def _add(self, batch: Batch, counted: frozenset[str] = frozenset()) -> None:
        """Add a batch to the sums of all sites but those that have ``counted`` it; in halves if memory is short."""
        collector = self.collector
        assert collector is not None
        try:
            with collector.collecting(), collector.batch(batch.role, batch.persona, batch.sources, counted):
                self._read(batch.ids, batch.attention)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        collector.raise_on_bad_values(batch.sources)
        if len(batch.sources) == 1:
            raise UserError(
                f"out of memory on one sample of {batch.ids.shape[1]} tokens, {batch.sources[0]}: lower --max-length"
            )
        make_room("samples", len(batch.sources), self.config.undivided)
        complete = collector.complete
        for rows in halves(range(len(batch.sources))):
            self._add(batch.part(rows), complete)

    def on_predict_end(self) -> None:
        if self.skipped:
            return
        assert self.collector is not None
        if self.trainer.world_size > 1:
            # Whatever happens to the others from here on, this rank's work is done.
            self.checkpoint.save(self.collector, self.position)
            for tensor in self.collector.tensors():
                dist.all_reduce(tensor)
        self.collector.settle()
        if self.trainer.is_global_zero:
            save_statistics(self.collector.stats, self.target)
        self.trainer.strategy.barrier("statistics written")


def run_pass(config: CalibrateConfig, module: Stage, data: Any = None, *, inference: bool = True) -> None:
    """Run ``module`` once, on the devices and with the strategy that the options name.

    ``data`` are its batches, if they are not its own; ``inference`` forbids gradients.
    Raises the first failure of any rank (``pipeline.ranks``).
    """
    devices = parse_devices(config.devices)
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not _has_accelerator())
    several = config.num_nodes > 1 or (isinstance(devices, int) and devices > 1) or isinstance(devices, list)
    strategy: Any = Sharded() if config.sharded else config.strategy
    if strategy == "auto" and on_cpu and several:
        # Forking starts in a fraction of the time, but a forked child inherits no OpenMP threads: the
        # parent must not have started any before.
        launched = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
        strategy = "ddp" if config.num_nodes > 1 or launched else "ddp_fork"
    threads = torch.get_num_threads()
    if strategy == "ddp_fork":
        torch.set_num_threads(1)
    try:
        trainer = Ranks(
            module.folder,
            accelerator="cpu" if on_cpu else config.accelerator,
            devices=1 if on_cpu and devices == "auto" else devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision=config.precision,  # type: ignore[arg-type]
            callbacks=[Throughput()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            # Gathered shards would become inference tensors, which the next pass cannot fill anew.
            inference_mode=inference and not config.sharded,
        )
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        # ImportError: an accelerator whose library is not there.
        raise UserError(f"--devices/--accelerator/--strategy/--precision: {error}") from error
    try:
        if not (trainer.decides_alone and module.is_done()):
            trainer.run(module, data)
    finally:
        torch.set_num_threads(threads)


def spread_threads(trainer: Any, device: torch.device, deterministic: bool = False) -> None:
    """On a CPU, share the cores among the processes of this machine.

    A gradient's rounding depends on the number of threads: ``deterministic`` means one, however many processes.
    """
    if deterministic and device.type == "cpu":
        torch.set_num_threads(1)
    elif trainer.world_size > 1 and device.type == "cpu":
        local = max(1, trainer.world_size // trainer.num_nodes)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def report_coverage(model: Any, sites: list[Site], unused: list[str]) -> None:
    """Tell what is measured, and what stays whole."""
    experts = sum(site.routed for site in sites)
    linears = sum(len(site.linears) for site in sites) - experts
    note(f"{linears} linear layers read {len(sites) - experts} distinct inputs")
    if experts:
        note(f"mixture-of-experts: {experts} matrices, each measured over the tokens routed to its expert")
    elif found := find_experts(model):
        note(
            f"mixture-of-experts: {len(found)} matrices of experts stay whole (excluded, or --strategy fsdp with a "
            f"first-order criterion)"
        )
    if unused:
        note(f"{len(unused)} linear layers are never called and stay whole: {', '.join(unused[:5])}")
    if others := other_linears(model):
        note(f"{len(others)} layers are no plain products of their input and weight, and stay whole: {others[0]}, ...")
    if unknown := other_expert_parameters(model):
        note(
            f"mixture-of-experts: {len(unknown)} expert weights are 3-d parameters of other modules, and stay whole "
            f"({unknown[0]}, ...)"
        )
