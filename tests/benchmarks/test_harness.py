"""What every benchmark relies on: columns, the refusal to time a wrong result, ratios."""

import csv

import pytest
import torch

from benchmarks import harness

COLUMNS = (
    "op, case, dtype, threads, backend, peer, median_us, q20_us, q80_us, gbytes_per_s, ratio_to_peer,"
    " ratio_to_bound, device, torch, date"
)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "read_ceiling", lambda seconds: 10.0)
    return harness.Bench(quick=True, output=tmp_path / "sub" / "rows.csv")


def compare(bench, check):
    candidates = {"fast": lambda: None, "slow": lambda: sum(range(100000))}
    return bench.compare("op", "case", torch.bfloat16, candidates, nbytes=1000, peer="slow", check=check, seconds=0.01)


def test_rows_have_the_columns_in_order(bench):
    compare(bench, lambda name: True)
    bench.close()
    with bench.output.open() as file:
        rows = list(csv.DictReader(file))
    assert ", ".join(rows[0]) == COLUMNS
    assert [row["backend"] for row in rows] == ["fast", "slow"]
    assert rows[1]["ratio_to_peer"] == "1.0"
    assert float(rows[0]["ratio_to_peer"]) > 1
    assert rows[0]["dtype"] == "bfloat16"


def test_wrong_result_is_not_timed(bench):
    with pytest.raises(harness.CheckError, match="slow gives a wrong result"):
        compare(bench, lambda name: name != "slow")
    assert bench.rows == []


def test_quantiles():
    timing = harness.Timing.of([k / 1e6 for k in range(11)])
    assert (timing.q20, timing.median, timing.q80) == pytest.approx((2, 5, 8))


def test_bound_is_bytes_over_the_read_ceiling(bench):
    timing = harness.Timing(200.0, 100.0, 300.0)
    bench.add("op", "case", torch.float32, "a", "a", timing, timing, nbytes=1_000_000)
    assert bench.rows[0].ratio_to_bound == 2.0
    assert bench.rows[0].gbytes_per_s == 5.0


def test_buffers_rotate_beyond_the_caches():
    buffers = harness.rotating(lambda: object(), nbytes=100, limit=250)
    turns = [next(buffers) for _ in range(6)]
    assert len(set(map(id, turns))) == 3
    assert turns[:3] == turns[3:]


def test_device_name_is_no_host_name():
    import socket

    assert socket.gethostname() not in harness.device_name()
