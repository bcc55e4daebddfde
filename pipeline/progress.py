"""The progress bar of a pass."""

import time
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar


class Throughput(TQDMProgressBar):
    """The progress bar with tokens per second over all devices."""

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_predict_start(trainer, pl_module)
        self._started = time.monotonic()

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any, **options: Any) -> None:
        super().on_predict_batch_end(trainer, pl_module, *arguments, **options)
        if not pl_module.tokens_done:
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = pl_module.tokens_done * trainer.world_size / seconds
        self.predict_progress_bar.set_postfix_str(f"about {rate:,.0f} tokens/s")

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {}
