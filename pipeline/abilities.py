"""What a model can still do under a mask: tasks of lm-eval (EleutherAI), or a small one of our own."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

from pipeline.errors import UserError
from pipeline.setting import UNMASKED, Ground, Setting, applied

OURS = "general"
"""100 questions of general knowledge with four answers each, in ``pipeline/data/sets``."""


def wanted_tasks(text: str) -> list[str]:
    """The names in ``--tasks``. Raises UserError if lm-eval is missing or does not know one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        return []
    others = [name for name in names if name != OURS]
    manager = _manager(bool(others))
    if unknown := [name for name in others if not manager.match_tasks([name])]:
        raise UserError(f"--tasks: lm-eval knows no task {', '.join(map(repr, unknown))}; ours is {OURS!r}")
    return names


def measured_settings(settings: Sequence[Setting]) -> list[Setting]:
    """Those that change the model itself: what only stands before a question is not before a task's."""
    return [UNMASKED, *(s for s in settings if (s.mask or s.steering or s.adapter) and not s.system)]


def abilities_of(ground: Ground, setting: Setting, names: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for every metric of every task: ``task``, ``metric``, ``value``, ``stderr`` (None without), ``n``.

    Raises UserError where a task's data cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    device = ground.model.get_input_embeddings().weight.device
    with applied(ground, setting):
        model = HFLM(
            pretrained=ground.model.model,
            tokenizer=ground.model.tokenizer,
            device=str(device),
            batch_size=max(ground.limits.batch_tokens // 128, 1),
            max_length=ground.limits.max_length,
        )
        try:
            found = lm_eval.simple_evaluate(
                model,
                tasks=[_ours() if name == OURS else name for name in names],
                task_manager=_manager(any(name != OURS for name in names)),
                limit=ground.config.task_items or None,
                log_samples=False,
                bootstrap_iters=ground.config.bootstrap,
                random_seed=ground.config.seed,
                numpy_random_seed=ground.config.seed,
                torch_random_seed=ground.config.seed,
                fewshot_random_seed=ground.config.seed,
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"--tasks {','.join(names)}: lm-eval could not run them ({type(error).__name__}: {error}); its tasks "
                f"need a network or a filled cache of data sets, {OURS!r} needs neither"
            ) from error
    return [entry for task, metrics in found["results"].items() for entry in _entries(task, metrics)]


def _entries(task: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """``metrics`` has ``metric,filter`` beside ``metric_stderr,filter``."""
    entries = []
    for key, value in metrics.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{metric}_stderr,{chosen}")
        entries.append(
            {
                "task": task,
                "metric": metric if chosen == "none" else f"{metric},{chosen}",
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                "n": metrics.get("sample_len"),
            }
        )
    return entries


def _ours() -> dict[str, Any]:
    """The task as lm-eval's YAML would have it."""
    return {
        "task": OURS,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(resources.files("pipeline.data") / "sets" / f"{OURS}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1},
    }


@lru_cache(maxsize=2)
def _manager(with_theirs: bool) -> Any:
    """lm-eval's index of tasks; theirs takes a minute to read."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("--tasks needs lm-eval: pip install 'persona-subnetworks[lm-eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=with_theirs)
