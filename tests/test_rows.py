"""Claims about rows: the lines that runs have left are read and written byte for byte, and newer ones are read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dtrain.run.rows import EvalRow, EventRow, TrainRow, as_line, from_json, parsed

# As dtrain 0.1.0 wrote them before rows had types.
OLD = {
    "train": (
        '{"kind":"train","step":5,"epoch":0.22727272727272727,"samples":320,"loss":2.292152610421181,'
        '"top1_fraction":0.209375,"lr":0.045454545454545456,"images_in_interval":320,"skipped_steps":0,'
        '"checksum":695544441558,"clock":{"images_per_second":121.77029020786762,'
        '"data_wait_fraction":0.00011639108767493975,"train_seconds":2.627898804000097,"cpu_seconds":11.198220607,'
        '"left_seconds":7.88369641200029,"time":1795660349.715883}}'
    ),
    "eval": (
        '{"kind":"eval","step":10,"epoch":0.45454545454545453,"samples":640,"split":"test","weights":"ema",'
        '"hits":36,"hits5":201,"images":360,"loss":2.909418585565355,"nonfinite_losses":0,'
        '"clock":{"eval_seconds":1.7048836740000297,"time":1795660353.9963245}}'
    ),
    "start": ('{"kind":"event","event":"start","step":0,"processes":2,"clock":{"time":1795660345.3840625}}'),
    "save": ('{"kind":"event","event":"save","step":0,"clock":{"time":1795660347.0867205}}'),
    "stop": ('{"kind":"event","event":"stop","step":9,"reason":"SIGTERM","clock":{"time":1795660347.5}}'),
    "diverged": (
        '{"kind":"train","step":5,"epoch":0.22727272727272727,"samples":320,"loss":null,"top1_fraction":0.209375,'
        '"lr":0.045454545454545456,"images_in_interval":320,"skipped_steps":0,"checksum":695544441558,'
        '"clock":{"images_per_second":121.77029020786762,"data_wait_fraction":0.00011639108767493975,'
        '"train_seconds":2.627898804000097,"cpu_seconds":11.198220607,"left_seconds":7.88369641200029,'
        '"time":1795660349.715883}}'
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_a_line_as_it_was_written_before_comes_back_byte_for_byte(name: str) -> None:
    row = parsed(OLD[name].encode())
    assert row is not None
    assert as_line(row) == OLD[name].encode() + b"\n"


def test_the_figures_of_a_line_have_their_types() -> None:
    train, evaluation, start = (parsed(OLD[name].encode()) for name in ("train", "eval", "start"))
    assert isinstance(train, TrainRow)
    assert (train.step, train.loss, train.clock.cpu_seconds) == (5, 2.292152610421181, 11.198220607)
    assert isinstance(evaluation, EvalRow)
    assert (evaluation.hits, evaluation.images, evaluation.weights) == (36, 360, "ema")
    assert isinstance(start, EventRow)
    assert (start.event, start.processes, start.reason) == ("start", 2, None)


def test_a_loss_that_is_null_is_nan() -> None:
    row = parsed(OLD["diverged"].encode())
    assert isinstance(row, TrainRow)
    assert math.isnan(row.loss)


def test_keys_of_a_newer_version_are_ignored_and_its_kinds_passed_by() -> None:
    known = json.loads(OLD["train"])
    newer = {**known, "mood": "good", "clock": {**known["clock"], "zone": "UTC"}}
    assert from_json(newer) == from_json(known)
    assert from_json({"kind": "gradient", "step": 3}) is None


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"kind": "train", "step": 1},
        {"kind": "event", "event": "save", "step": 1},
        {"kind": "event", "event": "save", "step": "1", "clock": {"time": 1.0}},
        {"kind": "event", "event": "save", "step": 1, "clock": 1.0},
        {"kind": ["event"], "step": 1},
    ],
)
def test_what_lacks_something_is_no_row(value: Any) -> None:
    with pytest.raises(ValueError, match="not a row"):
        from_json(value)


@pytest.mark.parametrize("line", [b"", b"{", b"\0\0", b"[" * 100_000])
def test_what_is_not_json_is_no_row(line: bytes) -> None:
    with pytest.raises(ValueError):
        parsed(line)
