"""A loss or a gradient that is not finite: named with step and samples, or left out on every process, to the bit."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_network import small
from test_resume import Runs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from warm import Warm

from dtrain import plugins
from dtrain.assembly import plan_of
from dtrain.data.batch import Batch
from dtrain.errors import UsageError
from dtrain.model.learner import Learner
from dtrain.model.metrics import Outcome, Sums, Tally
from dtrain.model.network import Average, Network
from dtrain.model.nonfinite import GIVE_UP_STEPS, Before, gradients_not_finite, poisoned, told
from dtrain.model.step import StepOptions, apply_unless, backward, train_step
from dtrain.plan import Share
from dtrain.run.checkpoint import digest
from dtrain.settings.config import SETTINGS, TrainConfig
from dtrain.world import Place, World

BRIGHT = f"{Path(__file__).with_name('faulty_networks.py')}:bright"
CPU = torch.device("cpu")
SKIP = StepOptions(0.1, 1.0, skip_nonfinite=True)
HALVES = Share(0, (4, 4), 8)
OPTIMIZERS = ["sgd", "adam", "adamw", "muon"]


def learner(optimizer: str, dtype: torch.dtype = torch.float32) -> Learner:
    torch.manual_seed(0)
    module = small(5)
    groups = [{"params": [p for p in module.parameters() if (p.ndim >= 2) == many]} for many in (True, False)]
    made = plugins.load(plugins.find("optimizer", optimizer))(groups, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    return Learner(Network(module, module, dtype, CPU), made, scaler, Average(module, 0.9))


def batch(seed: int, *, poison: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    if poison:
        images[5] = math.inf
    return Batch(images, torch.randint(5, (8,), generator=generator), torch.arange(8), torch.tensor(7))


def by_reading(one: Learner, of: Batch) -> bool:
    torch.manual_seed(3)
    return bool(train_step(one, of, SKIP, HALVES).skipped)


def by_selection(one: Learner, of: Batch) -> bool:
    """The same, as on a GPU."""
    torch.manual_seed(3)
    one.optimizer.zero_grad(set_to_none=True)
    buffers = Before(one.network.module.buffers())
    backward(one.network, one.scaler, of, SKIP, HALVES)
    skipped = gradients_not_finite(one.network.module)
    apply_unless(skipped, one, SKIP.clip_grad)
    buffers.put_back(skipped)
    return bool(skipped)


def bits(one: Learner) -> dict[str, str]:
    parts = {name: digest(tensors) for name, tensors in one.parts().items()}
    counts = one.counts()
    return {**parts, "optimizer's": json.dumps(counts["optimizer"]), "averages": str(counts["ema_updates"] > 0)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [by_reading, by_selection])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_that_is_skipped_leaves_every_bit_also_when_it_is_the_first(
    optimizer: str, step: Callable[[Learner, Batch], bool], dtype: torch.dtype
) -> None:
    one, other = learner(optimizer, dtype), learner(optimizer, dtype)
    for number in range(3):
        before = bits(one)
        assert step(one, batch(number, poison=True))
        assert bits(one) == before
        assert not step(one, batch(number))
        assert bits(one) != before
        if dtype is torch.float32:  # a scaler that has backed off rounds otherwise
            assert not by_reading(other, batch(number))
            assert bits(one) == bits(other)


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: a tensor's value asked for by the host."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_a_step_by_selection_reads_nothing_but_for_a_runs_first(optimizer: str) -> None:
    one, skipped = learner(optimizer), torch.tensor(False)
    backward(one.network, one.scaler, batch(0), SKIP, HALVES)
    one = replace(one, ema=None)
    with Reads() as first:
        apply_unless(skipped, one, 1.0)
    with Reads() as second:
        apply_unless(skipped, one, 1.0)
    tally = Tally(CPU, 8)
    with Reads() as tallied:
        tally += train_step(one, batch(1), StepOptions(0.1, 1.0), HALVES)
    assert (first.count, second.count, tallied.count) == (1, 0, 0)


def test_what_an_optimizer_keeps_on_the_host_is_refused_where_it_cannot_be_put_back() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            self.state[self.param_groups[0]["params"][0]]["steps"] = 1

    one = learner("sgd")
    other = replace(one, optimizer=Counting(one.network.module.parameters()), ema=None)
    backward(one.network, one.scaler, batch(0), SKIP, HALVES)
    with pytest.raises(UsageError, match="Counting keeps 'steps' on the host.*; give --opt-opt fused=true"):
        apply_unless(torch.tensor(False), other, None)


def test_an_infinite_loss_with_a_finite_gradient_makes_the_gradient_not_finite_too() -> None:
    def gradient_of(guard: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        logits = torch.tensor([[3e38, -3e38], [0.0, 0.0]], requires_grad=True)
        losses = nn.functional.cross_entropy(logits, torch.tensor([1, 0]), reduction="none")
        assert losses.isfinite().tolist() == [False, True]
        guard(losses.mean(), losses).backward()
        assert logits.grad is not None
        return logits.grad

    assert gradient_of(lambda loss, _: loss).isfinite().all()
    assert not gradient_of(poisoned).isfinite().any()
    assert poisoned(torch.tensor(1.0), torch.tensor([1.0, 1e7])).isnan()  # too large to be counted
    fine = torch.tensor([1.0, 2.0])
    assert poisoned(fine.mean(), fine) == 1.5


def test_a_large_gradient_is_finite_though_its_square_is_not() -> None:
    module = nn.Linear(2, 1)
    for value, bad in ((3e38, False), (math.inf, True), (-math.inf, True), (math.nan, True)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 3e38)
        module.weight.grad[0, 1] = value
        assert bool(gradients_not_finite(module)) == bad


def test_the_first_fault_is_kept_and_the_streak_outlives_a_read() -> None:
    one = learner("sgd")
    world, tally = World(Place(), 1.0), Tally(CPU, 8, streak=3)
    plain = StepOptions(0.1, None)
    for number, poison in enumerate([False, True, False, True, True]):
        options = SKIP if poison else plain
        tally += train_step(one, batch(number, poison=poison), options, HALVES)
    config = TrainConfig.of(recipe="none", arch="x", batch_size=8, steps=20)
    plan = plan_of(config, train_size=80, image_size=32, world_size=1)
    fault = tally.first_fault(world, plan, 15)
    assert (fault.step, fault.positions) == (12, [4, 5, 6, 7])  # batch norm: the whole micro-batch
    assert (int(tally.streak), int(tally.longest)) == (2, 3)
    sums = Sums.of(tally.sums.tolist())
    assert (sums.images, sums.nonfinite, sums.skipped_steps, sums.checksum) == (40, 12, 3, 35)
    tally.begin_anew()
    assert (int(tally.sums.sum()), int(tally.streak), int(tally.longest)) == (0, 2, 2)


@pytest.mark.dist
def test_a_fault_is_found_at_its_place_in_a_batch_of_uneven_shares_and_in_a_smaller_one_after_it(ranks: Warm) -> None:
    found = ranks.call("test_nonfinite:faults", 3)
    # shares of 7 over 3 processes begin at 0, 2 and 4, those of 5 at 0, 1 and 3
    assert found == [[(3, [1, 3, 6]), (4, []), (6, [2, 4])]] * 3


def faults() -> list[tuple[int, list[int]]]:
    """What a tally of three processes finds, whose outcomes have the losses that are written here."""
    from dtrain.world import place

    config = TrainConfig.of(recipe="none", arch="x", batch_size="7,5@1", epochs=3)
    plan = plan_of(config, train_size=35, image_size=32, world_size=3)  # 5 steps of 7, then 7 an epoch of 5
    world = World(place(), 30)
    world.meet()
    world.join("gloo")
    tally, found = Tally(CPU, plan.largest_share), []

    def step(number: int, positions: list[int], *, skipped: bool = False) -> None:
        nonlocal tally
        now = plan.at(number - 1)
        losses = torch.ones(now.batch_size)
        losses[positions] = math.nan
        mine = losses[now.shares[world.rank].positions]
        tally += Outcome(torch.zeros(7, dtype=torch.int64), mine, torch.tensor(skipped))

    def read(done: int) -> None:
        fault = tally.first_fault(world, plan, done)
        found.append((fault.step, fault.positions))
        tally.begin_anew()

    step(2, [])
    step(3, [1, 3, 6])
    step(4, [0])
    read(4)
    tally.begin_anew()
    step(4, [], skipped=True)
    step(5, [2])
    read(5)
    step(6, [2, 4])
    read(6)
    world.leave()
    return found


def test_a_fault_is_told_with_its_first_samples() -> None:
    assert told(7, [9, 3]) == "the loss of step 7 is not finite, or above 1048576, for training samples 3, 9"
    assert told(7, [3]) == "the loss of step 7 is not finite, or above 1048576, for training sample 3"
    assert told(7, list(range(7))).endswith("samples 0, 1, 2, 3, 4 and 2 more")
    assert told(7, []) == "the gradient of step 7 is not finite"


def test_the_help_says_when_a_run_gives_up() -> None:
    assert f"{GIVE_UP_STEPS} skipped steps in a row end the run" in SETTINGS["on_nonfinite"].help


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def flags(cache: Path, output: Path, *more: object) -> list[object]:
    own = ["--dataset", "digits", "--recipe", "none", "--loader", "memory", "--threads", 1, "--amp-dtype", "float32"]
    return [*own, "--batch-size", 48, "--eval-every", "end", "--cache-dir", cache, "--output", output, *more]


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def bright_samples(limit: float) -> set[int]:
    """The digits of the training set whose normalised mean is above `limit`, counted by hand."""
    from dtrain.data.sources import find_source

    train = find_source("digits", Path()).splits["train"]
    pixels = np.stack([decode() for decode in train.pictures()]) / 255
    means = ((pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))).mean((1, 2, 3))
    return {int(i) for i in np.flatnonzero(means > limit)}


@pytest.mark.dist
def test_a_run_that_ends_names_the_first_step_and_its_samples_and_replay_shows_them(
    ranks: Warm, tmp_path: Path, cache: Path
) -> None:
    from dtrain.keyed import order

    run = tmp_path / "run"
    argv = flags(
        cache,
        run,
        "--arch",
        BRIGHT,
        "--arch-opt",
        "alone=true",
        "--steps",
        30,
        "--log-interval",
        7,
        "--checkpoint-every",
        "2steps",
    )
    results = ranks(argv, world=2)
    assert [result.code for result in results] == [5, 5]
    batches = [set(order(1437, 0, 0)[at : at + 48].tolist()) for at in range(0, 1437 - 48, 48)]
    bright = bright_samples(0.3)
    wanted = [sorted(batch & bright) for batch in batches]
    first = next(number for number, samples in enumerate(wanted) if samples)
    assert first >= 2, wanted  # else there is nothing to be lost
    (line,) = (result.err for result in results if result.err)
    match = re.fullmatch(
        r"error: the loss of step (\d+) is not finite, or above 1048576, for training samples? ([\d, ]+); "
        r"the last checkpoint is from before it; .*; to look at it: (dtrain .*)\n",
        line,
    )
    assert match, line
    assert int(match[1]) == first + 1
    assert [int(sample) for sample in match[2].split(", ")] == wanted[first]
    assert match[3] == f"dtrain replay {run} --step {first + 1}"
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 5)
    assert int(record["last_checkpoint"].removeprefix("step-")) <= first
    (result,) = ranks([*match[3].split()[1:], "--out", tmp_path / "pictures", "--json"], world=1)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    shown = [row["index"] for row in found["worst"] if row["loss"] is None]
    assert sorted(shown) == wanted[first]
    assert found["not_finite_before"] == []
    assert "network.0.weight" in found["not_finite_after"]


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_skipped_updates_are_skipped_again_after_any_stop_to_the_bit(
    ranks: Warm, tmp_path: Path, cache: Path, world: int
) -> None:
    more = {"arch": BRIGHT, "arch_opt": ["limit=0.2"], "on_nonfinite": "skip"}
    some = Runs(ranks, tmp_path, cache, "sgd", True, more)
    stops = (1, 2, 3, 4, 5) if world == 1 else (2, 4)
    straight = some.go(world, [("straight", None), *((f"at-{k}", k) for k in stops)])["straight"]
    assert some.go(world, [(f"at-{k}", None) for k in stops]) == {f"at-{k}": straight for k in stops}
    skipped = [row["skipped_steps"] for row in rows(tmp_path / "straight", "train")]
    assert 0 < sum(skipped) < 6


def test_skipping_is_told_and_ends_the_run_when_nothing_else_is_left(ranks: Warm, tmp_path: Path, cache: Path) -> None:
    from small_network import __file__ as file

    argv = flags(cache, tmp_path / "run", "--arch", f"{file}:small", "--on-nonfinite", "skip", "--log-interval", 10)
    (result,) = ranks([*argv, "--lr", "1e30", "--opt-opt", "nesterov=false", "--steps", 60], world=1)
    assert result.code == 5, result.err
    *warnings, told_last = result.err.splitlines()
    assert re.match(r"warning: \d updates were skipped up to step 10; the loss of step \d is not finite, ", warnings[0])
    assert re.match(r"warning: 10 updates were skipped up to step 20; the loss of step 11 is not", warnings[1])
    assert len(warnings) == 2
    assert re.match(r"error: 2\d updates in a row were skipped up to step 29; the loss of step", told_last)
    first, second = rows(tmp_path / "run", "train")
    assert 0 < first["skipped_steps"] < 10
    assert second["skipped_steps"] == 10
    assert first["samples"] == 480  # the schedule and the samples go on


def test_copies_are_put_back_into_tensors_of_any_layout() -> None:
    filters = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    was, stride = copy.deepcopy(filters.detach()), filters.stride()
    before = Before([filters])
    with torch.no_grad():
        filters.fill_(math.nan)
    before.put_back(torch.tensor(False))
    assert filters.isnan().all()
    before.put_back(torch.tensor(True))
    assert torch.equal(filters.detach(), was)
    assert filters.stride() == stride
