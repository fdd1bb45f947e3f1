"""Claims about what makes a run what it is: commands keep finding their runs, whatever a later version adds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from dtrain.errors import UsageError
from dtrain.flags import with_flags
from dtrain.settings import identity
from dtrain.settings.config import SETTINGS, TrainConfig
from dtrain.settings.values import Setting

# What these commands are called from the second storey on. A name that changes here orphans the runs of users: a new
# setting with a default must not change any. A recipe that changes does, since it is then another run.
GOLDEN = {
    "--arch allcnn_c": "allcnn_c-cifar10-4fcf0c8c",
    "--arch allcnn_c --dataset digits": "allcnn_c-digits-b99ce304",
    "--arch allcnn_c --recipe none": "allcnn_c-cifar10-ffb2abf0",
    (
        "--arch allcnn_c --recipe none --dataset digits --threads 3 --track csv --log-interval 7 --keep 1"
    ): "allcnn_c-digits-b33eaed9",
    "--arch resnet18 --dataset cifar100 --epochs 3": "resnet18-cifar100-53af0c4f",
    "--arch resnet18 --recipe none --opt muon --lr 0.02 --opt-opt aux_lr=0.1 --seed 3": "resnet18-cifar10-cfdc80f4",
    (
        "--arch resnet18 --recipe none --dataset some/birds.tar --image-size 128 --store-size 160 "
        "--scale 0.35 --jitter 0.3"
    ): "resnet18-birds-7b86ac52",
    (
        "--arch allcnn_c --recipe none --batch-size 64,640@200 --image-size 16,24@1,32@2 --steps 900"
    ): "allcnn_c-cifar10-b74d80a7",
    (
        "--arch ./nets.py:wide --recipe none --dataset digits --freeze 'stem.*@3' --layer-decay 0.75 --head-lr 0.1"
    ): "nets-wide-digits-5cc74623",
    (
        "--arch allcnn_c --recipe none --mixup 0.2 --smoothing 0.1 --ema 0.99 --amp-dtype float32 --deterministic"
    ): "allcnn_c-cifar10-7212d8b1",
}


def parsed(command: str) -> TrainConfig:
    """The config that a command line means, through the flags themselves."""
    given: list[dict[str, Any]] = []

    def keep(settings: dict[str, Any]) -> None:
        given.append(settings)

    parser = typer.Typer(add_completion=False)
    parser.command()(with_flags(keep))
    typer.main.get_command(parser).main(args=shlex.split(command), standalone_mode=False)
    return TrainConfig.of(**given[0])


@pytest.mark.parametrize("command", GOLDEN)
def test_a_command_finds_its_run_again_in_every_later_version(command: str) -> None:
    assert identity.run_name(parsed(command)) == GOLDEN[command]


def test_a_new_setting_with_a_default_leaves_every_run_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig.of(arch="resnet18", recipe="none", lr=0.25)
    before, before_settings = identity.digest(config), config.settings()
    new = Setting("brightness", type(config.augmentation), float, False, 1.0, "new", None, (), False, None, None)
    monkeypatch.setitem(SETTINGS, "brightness", new)
    object.__setattr__(config.augmentation, "brightness", 1.0)
    assert config.settings() == {**before_settings, "brightness": 1.0}
    assert identity.digest(config) == before
    object.__setattr__(config.augmentation, "brightness", 2.0)
    assert identity.digest(config) != before


def test_the_inputs_of_a_run_are_part_of_what_it_is() -> None:
    config = TrainConfig.of(arch="resnet18", recipe="none")
    digests = {identity.digest(config, inputs) for inputs in (None, {"weights": "a"}, {"weights": "b"})}
    assert len(digests) == 3
    assert identity.digest(config, {}) == identity.digest(config)


def test_a_resume_goes_on_in_its_own_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    same = TrainConfig.of(arch="x", recipe="none", resume=str(run), output=str(tmp_path / "." / "run"))
    identity.check_resume(same)
    assert identity.run_path(same) == run
    other = TrainConfig.of(arch="x", recipe="none", resume=str(run), output=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="a run goes on in its own directory; leave --output out"):
        identity.check_resume(other)
