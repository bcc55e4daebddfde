"""``python -m pipeline.inspect RUN``: where a run comes from, what is in it, and whether its files are whole."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import parse, quiet_libraries, run
from pipeline.options import InspectConfig
from pipeline.terminal import printable

DESCRIPTION = (
    "Print where a run comes from, its personas, layers and densities, and verify the checksum of every file. "
    "Exit code 1 if a file is missing or altered, 2 if there is no run."
)


def inspect(folder: Path) -> dict[str, Any]:
    """What ``--json`` prints. Raises UserError where there is no run."""
    from pipeline.provenance import RUN
    from pipeline.reading import read_json
    from pipeline.store import load_manifest

    manifest = load_manifest(folder)
    try:
        circumstances = read_json(folder / RUN)
    except (OSError, ValueError) as error:
        circumstances = {"missing": str(error)}
    return {
        "run": str(folder),
        "provenance": {
            "model": manifest["model"]["id"],
            "criterion": manifest["criterion"],
            "commit": manifest.get("commit"),
            "versions": manifest["versions"],
            "options": manifest["options"],
            "data_sha256": manifest["personas"].get("data_sha256", {}),
            "counts": manifest.get("counts", {}),
            "circumstances": circumstances,
        },
        "personas": {
            persona: {"opponent": manifest["personas"]["opponents"].get(persona), "density": entry.get("density")}
            for persona, entry in manifest["masks"].items()
        },
        "layers": {
            layer: {
                "shape": shape,
                "density": {p: _share(entry, layer, shape) for p, entry in manifest["masks"].items()},
            }
            for layer, shape in manifest["layers"].items()
        },
        "files": _files(folder, manifest),
    }


def _share(entry: dict[str, Any], layer: str, shape: Sequence[int]) -> float | None:
    kept = entry.get("kept")
    number, size = kept.get(layer) if isinstance(kept, dict) else None, shape[0] * shape[1]
    return number / size if isinstance(number, int) and 0 <= number <= size else None


def _files(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Every file that the manifest has a checksum of, and what is the matter with it; "" where nothing is."""
    from pipeline.errors import UserError
    from pipeline.store import check_file, load_masks

    found = {}
    listed = {entry["file"]: entry for entry in manifest["masks"].values()} | manifest.get("files", {})
    for name, entry in listed.items():
        try:
            check_file(folder / name, entry)
            found[name] = ""
        except UserError as error:
            found[name] = str(error)
    if not any(found.values()):
        try:
            masks = load_masks(folder)
            for persona, entry in manifest["masks"].items():
                if masks.kept(persona) != entry.get("kept"):
                    found[entry["file"]] = "keeps other numbers of weights than the manifest says"
        except UserError as error:
            found["manifest.json"] = str(error)
    return found


def show(told: dict[str, Any]) -> None:
    """The tables on stdout."""
    provenance = told["provenance"]
    lines = [f"{told['run']}: {provenance['criterion']} masks of {provenance['model']}"]
    lines.append(f"commit {provenance['commit'] or 'unknown'}; " + _listed(provenance["versions"]))
    lines.append("options: " + _listed(provenance["options"]))
    lines.append("circumstances: " + _listed(provenance["circumstances"]))
    lines.append("sha256 of data: " + _listed(provenance["data_sha256"]))
    for name, one in told["personas"].items():
        against = f", opposed to {one['opponent']}" if one["opponent"] else ""
        lines.append(f"persona {name}{against}: {_percent(one['density'])} of the weights kept")
    for name, layer in told["layers"].items():
        shares = ", ".join(f"{p} {_percent(d)}" for p, d in layer["density"].items())
        lines.append(f"layer {name} {layer['shape']}: {shares}")
    lines += [f"file {name}: {problem or 'checksum holds'}" for name, problem in told["files"].items()]
    print(printable("\n".join(lines)))


def _listed(values: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items()) if isinstance(values, dict) else str(values)


def _percent(share: Any) -> str:
    return f"{share:.2%}" if isinstance(share, float) else "?"


def main(argv: list[str] | None = None) -> int:
    config = parse(InspectConfig, DESCRIPTION, argv)
    quiet_libraries()
    told: dict[str, Any] = {}

    def look() -> None:
        told.update(inspect(config.run))
        if config.json:
            print(json.dumps(told, indent=1))
        else:
            show(told)

    return run(look) or int(any(told["files"].values()))


if __name__ == "__main__":
    sys.exit(main())
