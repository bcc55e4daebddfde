"""The forward pass over all personas as a LightningModule, and the Trainer around it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.multiprocessing
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import TQDMProgressBar

from pipeline.cli import note
from pipeline.collector import Collector
from pipeline.config import CalibrateConfig, parse_devices
from pipeline.data.module import Batch
from pipeline.errors import UserError
from pipeline.experts import find_experts, other_expert_parameters
from pipeline.loading import load_model
from pipeline.sites import Site, check_causal, find_sites, maskable
from pipeline.stats import ActivationStats
from pipeline.store import save_statistics

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


FAILURE = "failure.txt"
"""What went wrong in a pass, for the process that started it."""


class StatisticsModule(lightning.LightningModule):
    """Measures the activation statistics of every persona in one forward-only pass.

    ``predict_step`` adds a batch to this rank's sums; at the end they are summed over the ranks in
    float64 and rank 0 writes them to ``target``.

    What the user can mend (a UserError) does not leave a process of several as an exception: the others would be
    killed in the middle of theirs, with tracebacks before the message. The rank notes it, measures no further, and
    all ranks leave together; ``raise_failure`` is for the caller. The file ``FAILURE`` beside ``target`` carries it out
    of forked processes, which take their attributes with them.
    """

    def __init__(self, config: CalibrateConfig, personas: tuple[str, ...], target: Path) -> None:
        super().__init__()
        self.config, self.personas, self.target = config, personas, target
        self.model: Any = None
        self.collector: Collector | None = None
        self.tokens_done = 0
        self.failure: str | None = None

    def configure_model(self) -> None:
        # Here and not in the constructor: the processes of a forked run must each load the model.
        if self.model is None:
            dtype = DTYPES.get(self.config.precision, torch.float32)
            self.model = load_model(self.config.model, dtype)

    def on_predict_start(self) -> None:
        spread_threads(self.trainer, self.device, self.config.deterministic)
        with self._noting():
            layers = maskable(self.model, self.config)
            check_causal(self.model, self.device)
            sites, unused = find_sites(self.model, layers, self.device)
            if self.trainer.is_global_zero:
                report_coverage(self.model, sites, unused)
            # A plain attribute: Lightning's precision plugins must not cast the float64 sums.
            stats = ActivationStats.zeros(self.personas, sites, self.device)
            self.collector = Collector(self.model, stats, exact=self.config.deterministic)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        if not batch.sources or self.failure is not None:
            return
        assert self.collector is not None
        with (
            self._noting(),
            self.collector.collecting(),
            self.collector.batch(batch.role, batch.persona, batch.sources),
        ):
            # The body without the output head: logits of a large vocabulary are of no use here.
            self.model.base_model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
        self.tokens_done += int(batch.attention.sum())

    def on_predict_end(self) -> None:
        several = dist.is_available() and dist.is_initialized() and self.trainer.world_size > 1
        if several:
            told: list[str | None] = [None] * self.trainer.world_size
            dist.all_gather_object(told, self.failure)
            self.failure = next((text for text in told if text is not None), None)
        if self.failure is not None:
            if self.trainer.is_global_zero:
                (self.target.parent / FAILURE).write_text(self.failure, encoding="utf-8")
            return
        assert self.collector is not None
        if several:
            for tensor in self.collector.tensors():
                dist.all_reduce(tensor)
        self.collector.settle()
        if self.trainer.is_global_zero:
            save_statistics(self.collector.stats, self.target)
        self.trainer.strategy.barrier("statistics written")

    def raise_failure(self) -> None:
        """After the pass, in the process that started it: raise the UserError that a rank noted."""
        told = self.target.parent / FAILURE
        if failure := self.failure or (told.exists() and told.read_text(encoding="utf-8")):
            raise UserError(failure)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.failure = str(error)


class Throughput(TQDMProgressBar):
    """The progress bar with tokens per second over all devices."""

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_predict_start(trainer, pl_module)
        self._started = time.monotonic()

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any, **options: Any) -> None:
        super().on_predict_batch_end(trainer, pl_module, *arguments, **options)
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = pl_module.tokens_done * trainer.world_size / seconds
        self.predict_progress_bar.set_postfix_str(f"about {rate:,.0f} tokens/s")

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {}


def run_pass(config: CalibrateConfig, module: Any, data: Any, *, gradients: bool = False) -> None:
    """Run ``module`` over ``data`` once, on the devices and with the strategy that the options name."""
    devices = parse_devices(config.devices)
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not _has_accelerator())
    several = config.num_nodes > 1 or (isinstance(devices, int) and devices > 1) or isinstance(devices, list)
    strategy = config.strategy
    if strategy == "auto" and on_cpu and several:
        # Forking starts in a fraction of the time, but a forked child inherits no OpenMP threads: the
        # parent must not have started any before.
        strategy = "ddp" if config.num_nodes > 1 else "ddp_fork"
    threads = torch.get_num_threads()
    if strategy == "ddp_fork":
        torch.set_num_threads(1)
    try:
        trainer = lightning.Trainer(
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
            inference_mode=not gradients,
        )
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        # ImportError: an accelerator whose library is not there.
        raise UserError(f"--devices/--accelerator/--strategy/--precision: {error}") from error
    try:
        trainer.predict(module, datamodule=data, return_predictions=False)
    except torch.multiprocessing.ProcessRaisedException as error:
        # A forked process hands over its traceback as text; what the user can mend is its last line.
        _, found, message = str(error).rpartition("pipeline.errors.UserError: ")
        if not found:
            raise
        raise UserError(message.strip()) from error
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
            f"mixture-of-experts: {len(found)} matrices of experts stay whole (excluded, or the criterion's gradients)"
        )
    if unused:
        note(f"{len(unused)} linear layers are never called and stay whole: {', '.join(unused[:5])}")
    if unknown := other_expert_parameters(model):
        note(
            f"mixture-of-experts: {len(unknown)} expert weights are 3-d parameters of other modules, and stay whole "
            f"({unknown[0]}, ...)"
        )
