"""Load a model and its tokenizer from the embedded package, a local folder or the hub, with clear failures."""

import os
from pathlib import Path
from typing import Any

import torch

from pipeline.embedded import ALIAS, embedded_model
from pipeline.errors import UserError
from pipeline.quantised import check_unquantised


def resolve(model: str) -> str:
    """The path or hub id behind ``--model``."""
    return str(embedded_model()) if model == ALIAS else model


def load_tokenizer(model: str) -> Any:
    """The tokenizer; padding falls back to the end token, or to id 0."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(model: str, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu") -> Any:
    """The causal language model in eval mode, its parameters frozen."""
    import transformers
    from transformers import AutoModelForCausalLM

    check_supported(model, load_config(model))
    previous = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded = _load(AutoModelForCausalLM, model, dtype=dtype)
    finally:
        if previous:
            transformers.utils.logging.enable_progress_bar()
    return loaded.to(device).eval().requires_grad_(False)


def load_config(model: str) -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    return _load(AutoConfig, model)


def check_supported(model: str, config: Any) -> None:
    """Raise UserError for a model that is no causal language model, or is quantised."""
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{model}: a {config.model_type!r} model is not a causal language model")
    check_unquantised(model, config)


def position_limit(model: str) -> int | None:
    """How many positions the model was built for, or None if its configuration does not say."""
    return getattr(load_config(model), "max_position_embeddings", None)


def pick_device(device: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return chosen


def _load(kind: Any, model: str, **options: Any) -> Any:
    source = resolve(model)
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().exists():
        raise UserError(f"--model {model}: no such folder")
    try:
        return kind.from_pretrained(
            str(Path(source).expanduser()) if Path(source).expanduser().exists() else source, **options
        )
    except (OSError, ValueError, KeyError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        hint = (
            "HF_HUB_OFFLINE is set and it is not in the local hub cache"
            if offline
            else "without a network set HF_HUB_OFFLINE=1 and use a local folder, a cached id or the embedded 'smollm2'"
        )
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--model {model}: {kind.__name__} could not load it ({first}); {hint}") from error
