"""What only a CUDA device can show; benchmarks/gpu.sh runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtrain import assembly
from dtrain.model.metrics import Tally
from dtrain.model.optimization import set_lr
from dtrain.model.step import seed_step, train_step
from dtrain.run.console import Console
from dtrain.settings.config import TrainConfig
from dtrain.world import Place, World

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]
NETWORK = f"{Path(__file__).with_name('small_network.py')}:small"


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


def parts_of(tmp_path: Path, **settings: object) -> assembly.Parts:
    """A run on digits, set up on the device."""
    given = {
        "arch": NETWORK,
        "recipe": "none",
        "dataset": "digits",
        "batch_size": 64,
        "cache_dir": tmp_path,
        "lr": 0.01,
    }
    config, world, console = TrainConfig.of(**{**given, **settings}), World.alone(), Console(False)
    machine = assembly.agreed_machine(config, Place(), world, {})
    dataset = assembly.dataset_of(config, console)
    plan = assembly.plan_of(config, **dataset.sizes, world_size=1)
    return assembly.parts_of(config, machine, dataset, plan, world, console)


@pytest.mark.parametrize(
    "settings",
    [
        {"opt": "sgd"},
        {"opt": "adamw", "ema": 0.9, "clip_grad": 1.0},
        {"opt": "muon", "freeze": "0.*@9", "grad_accum_steps": 2},
        {"opt": "sgd", "on_nonfinite": "skip", "flip": True, "shift": 2, "jitter": 0.3, "mixup": 0.2},
        {"opt": "sgd", "image_size": "16,32@1", "batch_size": "700,300@1"},
    ],
    ids=["sgd", "ema", "frozen", "skip", "stages"],
)
def test_no_step_of_the_loop_waits_for_the_device(tmp_path: Path, settings: dict[str, object]) -> None:
    parts = parts_of(tmp_path, **settings)
    tally = Tally(parts.learner.network.device, parts.plan.largest_share)
    try:
        for step in range(6):
            now, batch = parts.plan.at(step), parts.loader.batch(step)
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step makes state and kernels
            set_lr(parts.learner.optimizer, now.lr_factor)
            seed_step(0, step, 0, parts.learner.network.device)
            tally += train_step(parts.learner, batch, parts.options, now.shares[0], now.epoch)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        parts.close()
    assert int(tally.sums[0]) == sum(parts.plan.at(step).batch_size for step in range(6))


def test_a_batch_on_the_device_has_the_bytes_of_one_on_the_host(tmp_path: Path) -> None:
    given = {"image_size": "16,24@1,32@2", "flip": True, "shift": 2, "cutout": 4, "jitter": 0.3, "amp_dtype": "float32"}
    there, here = (parts_of(tmp_path, **given, device=device) for device in ("cuda", "cpu"))
    try:
        for step in (0, 1, 22, 23, 44, 45):
            ours, theirs = there.loader.batch(step), here.loader.batch(step)
            assert torch.equal(ours.images.cpu(), theirs.images)
            assert torch.equal(ours.checksum.cpu(), theirs.checksum)
    finally:
        there.close()
        here.close()


def test_the_draws_of_a_step_are_those_after_torchs_own_seeding() -> None:
    cuda = torch.device("cuda")
    seed_step(3, 5, 0, cuda)
    ours = torch.rand(4, device=cuda)
    from dtrain.keyed import Stream, torch_seed

    torch.manual_seed(torch_seed(3, Stream.DROPOUT, 5, 0))
    assert torch.equal(ours, torch.rand(4, device=cuda))
