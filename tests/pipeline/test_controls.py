"""Random controls of a finished run come from the weights that its criterion chose from."""

import pytest
import torch

from pipeline import calibrate
from pipeline.controls import add_random
from pipeline.criteria import least_important
from pipeline.data.catalogue import PersonaSet
from pipeline.model import PersonaModel
from pipeline.store import STATISTICS, load_statistics

PAIR = PersonaSet("up", "down", (), "test")


def drawn(folder, draws=2):
    model = PersonaModel.from_pretrained(folder)
    return model, add_random(model, folder, PAIR, draws, seed=0)


@pytest.mark.parametrize("criterion", ["first-order", "first-order-pool", "first-order-gate", "wanda"])
def test_random_masks_of_a_run(words, tmp_path, criterion):
    run = tmp_path / "run"
    assert calibrate.main(words(run, "--criterion", criterion, "--sparsity", "0.1", "--pool", "0.4")) == 0
    model, draws = drawn(run)
    stats = load_statistics(run / STATISTICS)
    sites = {linear: site.name for site in stats.sites for linear in site.linears}
    assert [set(names) for names in draws] == [{"up", "down"}] * 2
    assert len({name for names in draws for name in names.values()}) == 4
    modules, outside = dict(model.model.named_modules()), 0
    for layer in model.masks.shapes:
        own, other = (stats.channels(p, sites[layer]) for p in ("up", "down"))
        square = (own.mean_square * own.tokens + other.mean_square * other.tokens) / (own.tokens + other.tokens)
        pool = least_important(modules[layer].matrix, square.sqrt().float(), 0.4)
        assert pool.sum(1).tolist() == [int(0.4 * pool.shape[1])] * pool.shape[0]
        masks = [model.masks.mask(names["up"], layer) for names in draws]
        for mask in masks:
            assert mask.sum() == model.masks.mask("up", layer).sum()
            assert mask.sum(1).max() - mask.sum(1).min() <= 1
            outside += int((~mask & ~pool).sum())
        assert not torch.equal(masks[0], masks[1]) or bool(masks[0].all())
    assert (outside == 0) == (criterion in ("first-order", "first-order-pool"))
