"""Where a run comes from: versions and commit, which identical runs share, and time and place, which they do not."""

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RUN = "run.json"
"""Everything that differs between identical runs; all other files of a run are then bit-identical."""
PLACE = ("output", "overwrite", "resume", "checkpoint_every")
"""Options that say where to write and when, not what: no result depends on them."""
PACKAGES = ("torch", "transformers", "lightning", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def commit() -> str | None:
    """The git commit of this program's source, with "-dirty" where tracked files differ; None outside a checkout.

    A package that is installed inside somebody else's checkout has no commit of its own.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    revision, changed = _git(here.parent, "rev-parse", "HEAD"), _git(here.parent, "status", "--porcelain", "-uno")
    return revision and revision + ("-dirty" if changed else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def circumstances(started: datetime.datetime, seconds: dict[str, float], options: dict[str, Any]) -> dict[str, Any]:
    """The content of ``RUN``: command line, time, machine, seconds of every stage and the options of ``PLACE``."""
    return {
        "command": sys.argv,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "options": {name: str(options[name]) for name in PLACE},
    }
