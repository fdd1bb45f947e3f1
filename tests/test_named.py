"""Claims about the sets that come with dtrain: the digits, and the synthetic pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pets import images_of

from dtrain.data.named import SYNTHETIC_SIZES, upsample
from dtrain.data.sources import find_source


def test_digits_are_1437_and_360_real_digits_of_32x32_with_36_of_each_class_held_out(tmp_path: Path) -> None:
    source = find_source("digits", tmp_path)
    train, test = source.splits["train"], source.splits["test"]
    # how often each digit occurs in scikit-learn's load_digits, as its documentation and UCI's page count them
    counts = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert (len(train.labels), len(test.labels), len(source.class_names)) == (1437, 360, 10)
    assert np.bincount(test.labels).tolist() == [36] * 10
    assert (np.bincount(train.labels) + 36).tolist() == counts.tolist()
    images = [*images_of(source, "train"), *images_of(source, "test")]
    assert {(image.shape, str(image.dtype)) for image in images} == {((32, 32, 3), "uint8")}
    assert len({image.tobytes() for image in images}) == 1797


def test_the_digits_of_the_package_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(Path(__file__).parents[1] / "dtrain" / "data" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    # the first digit of load_digits(), a zero, stands in scikit-learn's documentation
    assert images[0, :3].tolist() == [
        [0, 0, 5, 13, 9, 1, 0, 0],
        [0, 0, 13, 15, 10, 15, 5, 0],
        [0, 3, 15, 2, 0, 11, 8, 0],
    ]
    assert labels[:10].tolist() == list(range(10))
    for name, value in (("KMP_DUPLICATE_LIB_OK", "True"), ("KMP_INIT_AT_FORK", "FALSE")):
        monkeypatch.setenv(name, value)  # else scikit-learn sets them for good
    from sklearn import datasets

    bunch = datasets.load_digits()
    assert np.array_equal(images, bunch.images.astype(np.uint8))
    assert np.array_equal(labels, bunch.target)


def test_upsampling_is_the_bilinear_interpolation_of_torch_to_half_a_level() -> None:
    import torch

    for seed in range(5):
        small = np.random.default_rng(seed).integers(0, 17, (8, 8), dtype=np.uint8)
        wanted = torch.nn.functional.interpolate(
            torch.from_numpy(small.astype(np.float64))[None, None] * (255 / 16), size=(32, 32), mode="bilinear"
        )[0, 0].numpy()
        large = upsample(small)
        assert (large.shape, large.dtype) == ((32, 32, 3), np.uint8)
        for channel in range(3):
            assert np.abs(large[..., channel] - wanted).max() <= 0.5 + 1e-9


def test_synthetic_images_take_no_files_and_are_learnable_by_their_nearest_mean(tmp_path: Path) -> None:
    source = find_source("synthetic", tmp_path / "absent")
    train, test = source.splits["train"], source.splits["test"]
    assert (len(train.labels), len(test.labels)) == (SYNTHETIC_SIZES["train"], SYNTHETIC_SIZES["test"]) == (2000, 400)
    first = np.stack(images_of(source, "train")[:100]).astype(float)
    means = np.stack([first[train.labels[:100] == label].mean(0) for label in range(10)])
    hits = sum(
        int(np.argmin(((means - image) ** 2).sum((1, 2, 3))) == label)
        for image, label in zip(images_of(source, "test"), test.labels, strict=True)
    )
    assert hits >= 396
