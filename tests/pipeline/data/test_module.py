"""Samples and batches: both poles see the same items, every batch is dealt once, padding never counts."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.ops.activation_stats import COUNTED, IGNORED, SINK
from pipeline.data.catalogue import PersonaSet
from pipeline.data.forms import Item
from pipeline.data.module import CalibrationData, Sample, draw, make_samples
from pipeline.data.prompts import TOKENS, Encoded, Prompter, roles
from pipeline.errors import UserError

WORDS = ("book", "long", "evening", "alone", "friends", "noise")


def items(count, split="", start=0):
    return tuple(
        Item(f"What about {i}?", f"yes {WORDS[i % 6]} {i}", f"never {i}", "pair", split=split, source=f"f.csv:{i + 2}")
        for i in range(start, start + count)
    )


def answer(prompter, sample):
    return prompter.tokenizer.decode(list(sample.encoded.ids[sample.encoded.answer :])).strip()


def place(sample):
    return sample.source.partition(" ")[0]


@pytest.fixture
def prompter(tokenizers):
    return Prompter(tokenizers["chat"])


def make(prompter, sets, **options):
    return make_samples(sets, prompter, **({"count": 5, "max_length": 200, "seed": 0} | options))


def test_both_poles_get_the_same_items_with_their_own_answers(prompter):
    own = PersonaSet("kind", "cruel", items(20), "own")
    samples, problems = make(prompter, [own])
    assert problems == []
    plus, minus = samples[:5], samples[5:]
    assert [s.persona for s in samples] == [0] * 5 + [1] * 5
    assert list(map(place, plus)) == list(map(place, minus))
    assert len(set(map(place, plus))) == 5
    by_place = {i.source: i for i in own.items}
    assert [answer(prompter, s) for s in plus] == [by_place[place(s)].matching for s in plus]
    assert [answer(prompter, s) for s in minus] == [by_place[place(s)].other for s in minus]
    assert all(s.source.endswith("(kind)") for s in plus)
    assert all(s.source.endswith("(cruel)") for s in minus)


def test_personas_are_numbered_over_all_sets(prompter):
    plain = PersonaSet("cook", None, tuple(Item(i.question, i.matching, None, "text") for i in items(3)), "plain")
    sets = [plain, PersonaSet("kind", "cruel", items(4), "own")]
    samples, _ = make(prompter, sets, count=0)
    assert Counter(s.persona for s in samples) == {0: 3, 1: 4, 2: 4}


def test_only_calibration_items_are_measured(prompter):
    own = PersonaSet("kind", "cruel", items(4, "calibration") + items(3, "test", 10) + items(2, "", 20), "own")
    samples, _ = make(prompter, [own], count=0)
    assert {place(s) for s in samples} == {i.source for i in items(4) + items(2, "", 20)}
    assert [i.source for i in own.split("test")] == [i.source for i in items(3, "", 10) + items(2, "", 20)]


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (7, 7), (20, 20), (99, 20), (0, 20)])
def test_count(prompter, count, drawn):
    samples, _ = make(prompter, [PersonaSet("kind", "cruel", items(20), "own")], count=count)
    assert Counter(s.persona for s in samples) == {0: drawn, 1: drawn}
    assert len({place(s) for s in samples}) == drawn


def test_the_seed_decides_the_draw_and_a_larger_draw_holds_the_smaller():
    pool = items(50)
    assert draw(pool, 10, 3) == draw(pool, 10, 3)
    assert draw(pool, 10, 3) != draw(pool, 10, 4)
    assert draw(pool, 20, 3)[:10] == draw(pool, 10, 3)
    assert pool == items(50)


def test_questions_that_fill_the_length_are_left_out_and_reported(prompter):
    long = Item("What " + "do you do " * 80 + "?", "yes", "no", "pair", source="f.csv:77")
    samples, problems = make(prompter, [PersonaSet("kind", "cruel", (*items(3), long), "own")], count=0, max_length=60)
    assert len(samples) == 6
    assert "f.csv:77" not in {place(s) for s in samples}
    assert {p.partition(":")[0] + ":77" for p in problems} == {"f.csv:77"}
    tokens = prompter.encode(long.question, "yes").answer
    assert all(str(tokens) in p and "60" in p for p in problems)


def test_answers_are_cut_at_the_length_to_the_token(prompter):
    own = Item("Why?", "I read " * 60, "I sing " * 60, "pair", source="f.csv:2")
    full = prompter.encode(own.question, own.matching)
    for max_length in (full.answer + 1, full.answer + 9):
        samples, problems = make(prompter, [PersonaSet("a", "b", (own,), "own")], max_length=max_length)
        assert problems == []
        assert samples[0].encoded.ids == full.ids[:max_length]
        assert (samples[0].encoded.answer, samples[0].encoded.question) == (full.answer, full.question)
        assert roles(samples[0].encoded, "predicting").count(COUNTED) == max_length - full.answer
    with pytest.raises(UserError):
        make(prompter, [PersonaSet("a", "b", (own,), "own")], max_length=full.answer)


@pytest.mark.parametrize("pool", [(), items(3, "test")])
def test_a_persona_without_samples_is_named(prompter, pool):
    with pytest.raises(UserError, match=r"'kind' of own.*no usable calibration item"):
        make(prompter, [PersonaSet("kind", "cruel", pool, "own")])


def fake_samples(lengths):
    return [
        Sample(i % 3, Encoded(tuple(range(1, n + 1)), min(n - 1, n // 2 + 1), range(1, n // 2)), f"s{i}")
        for i, n in enumerate(lengths)
    ]


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=50)


@given(lengths=LENGTHS, budget=st.integers(1, 150), world=st.integers(1, 7))
def test_every_batch_is_dealt_once_in_equally_many_steps(lengths, budget, world):
    data = CalibrationData(fake_samples(lengths), tokens="all", batch_tokens=budget, pad=0)
    shares = [data.share(rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    dealt = sorted(tuple(batch) for share in shares for batch in share if batch)
    assert dealt == sorted(map(tuple, data.batches))
    assert sorted(i for batch in dealt for i in batch) == list(range(len(lengths)))
    assert len(shares[0]) * world - len(data.batches) < world


@pytest.mark.parametrize("tokens", TOKENS)
def test_padding_never_counts_and_rows_are_the_samples(tokens):
    samples = fake_samples([9, 4, 2, 7])
    data = CalibrationData(samples, tokens=tokens, batch_tokens=1000, pad=77)
    batch = data.collate([2, 0, 3])
    assert batch.ids.shape == batch.attention.shape == batch.role.shape == (3, 9)
    assert batch.sources == ["s2", "s0", "s3"]
    assert batch.persona.tolist() == [2, 0, 0]
    assert (batch.ids.dtype, batch.role.dtype, batch.persona.dtype) == (torch.int64, torch.uint8, torch.int64)
    for row, sample in enumerate(samples[i] for i in (2, 0, 3)):
        n = len(sample.encoded)
        assert batch.ids[row].tolist() == [*sample.encoded.ids, *[77] * (9 - n)]
        assert batch.attention[row].tolist() == [1] * n + [0] * (9 - n)
        assert batch.role[row].tolist() == [*roles(sample.encoded, tokens), *[IGNORED] * (9 - n)]
        assert batch.role[row, 0] == SINK


def test_an_empty_batch_has_no_rows_and_keeps_its_types():
    batch = CalibrationData(fake_samples([5]), tokens="all", batch_tokens=10, pad=0).collate([])
    assert batch.ids.shape == batch.attention.shape == batch.role.shape == (0, 0)
    assert batch.persona.shape == (0,)
    assert (batch.ids.dtype, batch.role.dtype, batch.persona.dtype) == (torch.int64, torch.uint8, torch.int64)
    assert batch.sources == []
    assert batch.to(torch.device("cpu")).ids.shape == (0, 0)


def test_the_loader_of_a_rank_yields_its_share():
    data = CalibrationData(fake_samples([9, 8, 7, 3, 3]), tokens="all", batch_tokens=10, pad=0)
    seen = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        batches = list(data.predict_dataloader())
        assert [b.sources for b in batches] == [[f"s{i}" for i in share] for share in data.share(rank, 2)]
        seen += [s for b in batches for s in b.sources]
    assert sorted(seen) == [f"s{i}" for i in range(5)]
