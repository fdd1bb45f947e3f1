"""The benchmarks compare turn and turn about, and run as told. No figure is judged here: these machines are shared."""

from __future__ import annotations

import json

import pytest
from dtrain_bench.ratios import ratios
from warm import Warm


def test_ratios_are_of_pairs_and_the_order_of_a_pair_alternates() -> None:
    order: list[str] = []
    ours, theirs = iter([2.0, 9.0, 4.0, 8.0, 5.0]), iter([2.0, 3.0, 2.0, 2.0, 1.0])

    def first() -> float:
        order.append("ours")
        return next(ours)

    def second() -> float:
        order.append("theirs")
        return next(theirs)

    result = ratios(first, second, turns=5)  # pairs: 1, 3, 2, 4, 5
    assert (result["ratio_median"], result["ratio_range"], result["turns"]) == (3.0, [1.0, 5.0], 5)
    assert (result["ours"], result["theirs"]) == (5.0, 2.0)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_bench_loaders_measures_every_reader_and_names_the_machine(ranks: Warm) -> None:
    result = ranks(["bench", "loaders", "--quick", "--json"], world=1)[0]
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert {"memory"} <= set(record["results"]) <= {"memory", "ffcv"}
    assert all(one["ours"] > 0 and one["theirs"] > 0 for one in record["results"].values())
    assert {"processor", "cores", "torch", "numpy"} <= set(record["machine"])


@pytest.mark.slow
def test_bench_overhead_measures_one_process_and_two(ranks: Warm) -> None:
    result = ranks(["bench", "overhead", "--quick", "--json"], world=1, timeout=280)[0]
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert set(record["results"]) == {"one process", "two processes"}
    assert all(one["turns"] == 3 and one["ours"] > 0 for one in record["results"].values())
