"""Claims about torchvision's sets: what torchvision reads is what is offered, and nothing is downloaded twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pets import images_of, pixels_of, png
from PIL import Image
from test_layouts import write_mnist

from dtrain.data.sources import digest_of, find_source, locate
from dtrain.data.torchvision_sets import SPLITS
from dtrain.errors import DataError, PluginError


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # which the import of torchvision would set, and leave


def test_this_torchvision_has_every_class_and_it_takes_what_is_passed() -> None:
    import inspect

    from torchvision import datasets

    for name, parts in SPLITS.items():
        parameters = inspect.signature(getattr(datasets, name)).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        wanted = {"root", "download", *(key for part in parts or () for key in part)}
        assert wanted <= parameters.keys() or open_ended, name


def test_arrays_of_torchvision_come_through_as_they_are(tmp_path: Path) -> None:
    from torchvision import datasets

    root = tmp_path / "torchvision" / "FashionMNIST"
    write_mnist(root, zipped=False).rename(root / "FashionMNIST")
    source = find_source("torchvision/FashionMNIST", tmp_path)
    assert (source.name, source.image_size) == ("FashionMNIST", 28)
    for split, train in (("train", True), ("test", False)):
        wanted = datasets.FashionMNIST(root, train=train)
        assert list(source.class_names) == wanted.classes
        assert source.splits[split].labels.tolist() == wanted.targets.tolist()
        assert np.array_equal(np.stack(images_of(source, split))[..., 0], wanted.data.numpy())


def test_photographs_come_through_torchvision_one_by_one_and_the_digest_needs_none(tmp_path: Path) -> None:
    folder = tmp_path / "torchvision" / "Food101" / "food-101"
    for seed, (kind, number) in enumerate((kind, number) for kind in ("pie", "rice") for number in range(3)):
        (folder / "images" / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(seed, 20 + seed)).save(folder / "images" / kind / f"{number}.jpg")
    (folder / "meta").mkdir()
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        listed = {kind: [f"{kind}/{number}" for number in numbers] for kind in ("pie", "rice")}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
    source = find_source("torchvision/Food101", tmp_path)
    assert (source.class_names, source.image_size) == (("pie", "rice"), 224)
    assert [source.splits[split].labels.tolist() for split in ("train", "test")] == [[0, 0, 1, 1], [0, 1]]
    assert {image.shape for image in images_of(source, "test")} == {(224, 224, 3)}
    before = digest_of(locate("torchvision/Food101", tmp_path))
    assert digest_of(locate("torchvision/Food101", tmp_path)) == before
    (folder / "images" / "pie" / "2.jpg").write_bytes(b"")
    assert digest_of(locate("torchvision/Food101", tmp_path)) != before


def test_a_fifth_of_each_class_is_held_out_where_a_set_has_a_single_split(tmp_path: Path) -> None:
    folder = tmp_path / "torchvision" / "EuroSAT" / "eurosat" / "2750"
    for kind in ("Forest", "River"):
        (folder / kind).mkdir(parents=True)
        for number in range(10):
            (folder / kind / f"{number}.png").write_bytes(png(pixels_of(number + 10 * (kind == "River"))))
    source = find_source("torchvision/EuroSAT", tmp_path)
    assert (source.class_names, source.image_size) == (("Forest", "River"), 4)
    assert [np.bincount(source.splits[split].labels).tolist() for split in ("train", "test")] == [[8, 8], [2, 2]]
    every = {image.tobytes() for split in ("train", "test") for image in images_of(source, split)}
    assert every == {pixels_of(seed).tobytes() for seed in range(20)}


def test_a_set_that_is_not_there_and_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--dataset torchvision/SVHN: no folder .*; let torchvision download it"):
        locate("torchvision/SVHN", tmp_path, {"download": "false"})
    with pytest.raises(PluginError, match="torchvision/SVNH: not in the family torchvision; did you mean 'SVHN'?"):
        locate("torchvision/SVNH", tmp_path)
    assert not (tmp_path / "torchvision").exists()
