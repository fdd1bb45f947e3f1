"""Claims about `dtrain data show`: the real pixels of a step, under the names of their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from betons import feed_of, loaded
from PIL import Image
from warm import Warm

from dtrain.assembly import plan_of
from dtrain.commands.contact_sheet import GAP, MARGIN, SIDE, Tile, contact_sheet
from dtrain.commands.data import show
from dtrain.errors import StorageError, UsageError
from dtrain.settings.config import TrainConfig

HEAD = MARGIN + 64  # above the first row of pictures


def tile(*colours: tuple[int, int, int], lines: tuple[str, ...] = ("a",)) -> Tile:
    """A picture of one row of pixels a colour, square."""
    return Tile(np.array([[colour] * len(colours) for colour in colours], np.uint8), lines, "sample 1")


def pixels_of(sheet: Image.Image) -> Any:
    return np.asarray(sheet)


def test_small_pictures_are_enlarged_by_whole_numbers_and_keep_their_colours() -> None:
    red, blue = (200, 0, 0), (0, 0, 90)
    pixels = pixels_of(contact_sheet("title", "subtitle", [tile(red, blue), tile(blue, red)]))
    first = pixels[HEAD : HEAD + SIDE, MARGIN : MARGIN + SIDE]
    assert (first[: SIDE // 2] == red).all()
    assert (first[SIDE // 2 :] == blue).all()
    second = pixels[HEAD : HEAD + SIDE, MARGIN + SIDE + GAP : MARGIN + 2 * SIDE + GAP]
    assert (second == first[::-1]).all()


def test_gray_pictures_are_gray_and_captions_stay_below_their_pictures() -> None:
    gray = Tile(
        np.full((130, 130, 1), 77, np.uint8), ["a name that is much too long for the width of its picture", "b"], "n"
    )
    pixels = pixels_of(contact_sheet("t", "s", [gray] * 9))
    assert pixels.shape[1] == 2 * MARGIN + 8 * 130 + 7 * GAP
    for left in (MARGIN, MARGIN + 130 + GAP):
        assert (pixels[HEAD : HEAD + 130, left : left + 130] == 77).all()
    between = pixels[HEAD + 135 : HEAD + 180, MARGIN + 130 + 1 : MARGIN + 130 + GAP - 1]
    assert (between == 255).all()  # a caption is cut short before the next one
    assert (pixels[HEAD + 135 : HEAD + 180, MARGIN : MARGIN + 130] < 100).any()


SETTINGS: dict[str, Any] = {
    "arch": "none",
    "channels": "3",
    "dataset": "digits",
    "batch_size": 8,
    "steps": 5,
    "flip": True,
    "shift": 2,
    "loader": "memory",
}


def test_a_sheet_shows_the_pixels_that_the_loader_hands_out(tmp_path: Path) -> None:
    config = TrainConfig.of(recipe="none", **SETTINGS, cache_dir=tmp_path / "cache", jitter=0.5, cutmix=1.0)
    told = show(config, 3, 4, tmp_path / "sheet.png")
    assert told == f"{tmp_path / 'sheet.png'}: digits, step 3 of 5, epoch 1, 4 of 8 images, 32 x 32"
    dataset = loaded(config)
    plan = plan_of(config, **dataset.sizes, world_size=1)
    with dataset.train_loader(plan, 0, config.augmentation, feed_of(config)) as loader:
        images = loader.batch(2).images  # the third
    mean, std = (np.array(of) for of in (dataset.train.mean, dataset.train.std))
    wanted = np.rint((images.permute(0, 2, 3, 1).numpy() * std + mean) * 255).astype(np.uint8)
    sheet = pixels_of(Image.open(tmp_path / "sheet.png"))
    for number in range(4):
        left = MARGIN + number * (SIDE + GAP)
        drawn = sheet[HEAD : HEAD + SIDE : SIDE // 32, left : left + SIDE : SIDE // 32]
        assert np.array_equal(drawn, wanted[number])


def test_a_step_that_is_not_there_and_a_file_that_cannot_be_are_told(tmp_path: Path) -> None:
    config = TrainConfig.of(recipe="none", **SETTINGS, cache_dir=tmp_path / "cache")
    with pytest.raises(UsageError, match="--step 6: the run has steps 1 to 5"):
        show(config, 6, 4, tmp_path / "sheet.png")
    with pytest.raises(StorageError, match="--out .*nowhere/sheet.png: No such file or directory; name a file"):
        show(config, 1, 4, tmp_path / "nowhere" / "sheet.png")


def test_settings_come_from_flags_or_from_a_run(ranks: Warm, tmp_path: Path) -> None:
    out, run = tmp_path / "a.png", tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(
        'arch = "allcnn_c"\ndataset = "digits"\nsteps = 7\nbatch_size = 10\nrecipe = "none"\n'
    )
    places = ["--cache-dir", tmp_path / "cache"]
    for asked, told in (
        (
            ["--out", out, "--images", "2", "--", "--dataset", "digits", "-b", "6", *places],
            "step 1 of 2390, epoch 1, 2 of 6",
        ),
        (["--out", out, "--run", run, "--step", "7", *places], "step 7 of 7, epoch 1, 10 of 10 images"),
    ):
        (result,) = ranks(["data", "show", *asked], world=1)
        assert result.code == 0, result.err
        assert told in result.out
    for asked, told in (
        (["--run", tmp_path / "none"], "none: no run is there; give a run directory"),
        (["--", "--datasett", "digits"], "--datasett is not a flag; did you mean '--dataset'?"),
    ):
        (result,) = ranks(["data", "show", *asked], world=1)
        assert (result.code, told in result.err) == (2, True), result.err


def test_help_of_the_flags_behind_the_dashes_is_help(ranks: Warm) -> None:
    (result,) = ranks(["data", "show", "--", "--help"], world=1)
    assert result.code == 0, result.err
    assert "--mixup" in result.out
