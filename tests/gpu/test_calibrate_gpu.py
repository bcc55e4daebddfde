"""A whole calibration on a GPU, beside the same on the CPU."""

from pipeline import calibrate
from pipeline.masks import PersonaMasks
from pipeline.store import load_masks
from tests.pipeline.tiny import make_model, write_pairs


def test_a_calibration_with_drafts_and_a_budget_agrees_with_the_cpu(tmp_path):
    model, pairs = make_model(tmp_path / "llama"), write_pairs(tmp_path / "pairs.csv")
    runs = {}
    for accelerator in ("cpu", "gpu"):
        output = tmp_path / accelerator
        options = ["--criterion", "first-order", "--accelerator", accelerator, "--precision", "32-true"]
        common = ["--model", str(model), "--personas", f"up/down={pairs}", "--output", str(output), "--devices", "1"]
        assert calibrate.main([*common, *options]) == 0
        runs[accelerator] = load_masks(output)
    here, there = runs["cpu"], runs["gpu"]
    assert here.personas == there.personas
    assert here.shapes == there.shapes
    for persona in here.personas:
        # The device's products have other last bits, so the search may end a step further.
        assert abs(here.density(persona) - there.density(persona)) < 0.01
        both = PersonaMasks(here.shapes, {name: of.bits[persona] for name, of in runs.items()})
        assert both.jaccard("cpu", "gpu") > 0.95
