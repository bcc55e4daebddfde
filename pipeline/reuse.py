"""May an earlier run's statistics stand in for a new pass?"""

from pathlib import Path

from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue
from pipeline.data.module import draw
from pipeline.errors import UserError
from pipeline.fingerprint import data_hash
from pipeline.store import STATISTICS, check_file, load_manifest
from pipeline.weights import fingerprints, weights_of

MEASURING = ("tokens", "max_length", "on")
"""Options that change what is measured on an item."""


def check_reuse(config: CalibrateConfig, catalogue: Catalogue) -> None:
    """Raise UserError unless ``config.statistics`` is a run over these weights, items and options.

    Personas that only the earlier run measured do no harm.
    """
    folder = Path(config.statistics)
    manifest = load_manifest(folder)
    if STATISTICS in manifest.get("files", {}):
        check_file(folder / STATISTICS, manifest["files"][STATISTICS])
    differing = []
    then = manifest["model"]["fingerprint"]
    now = fingerprints(weights_of(config), then)
    if changed := [name for name in then if now.get(name) != then[name]]:
        differing.append(f"the weights of {len(changed)} of {len(then)} layers ({changed[0]}, ...)")
    hashes = manifest["personas"]["data_sha256"]
    known = {persona for pair in manifest["personas"]["pairs"] for persona in pair}
    if missing := [persona for persona in catalogue.measured if persona not in known]:
        raise UserError(f"--statistics {folder}: no statistics of {', '.join(missing)}")
    for personas in catalogue.sets:
        items = draw(personas.split("calibration"), config.samples, config.seed)
        if hashes.get(personas.plus) != data_hash(items):
            differing.append(f"the items of {personas.plus} (with --samples and --seed)")
    for name in MEASURING:
        before, now = manifest["options"].get(name, ""), getattr(config, name)
        if before != now:
            differing.append(f"--{name.replace('_', '-')} ({before}, now {now})")
    if differing:
        raise UserError(f"--statistics {folder}: measured on something else: {'; '.join(differing)}")
