"""Claims about batches: batch k is a function of (seed, k), whoever reads it and however it is reached."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from betons import Pixels, converted, feed_of, loaded, pixels_of, source_of
from needs import need_ffcv
from test_pixels import MEAN, STD, reference, shrunk_by_hand, written
from warm import Warm

from dtrain import assembly, keyed
from dtrain.data.augment import Augmentation, decide, mixed_labels
from dtrain.data.batch import Batch, Request
from dtrain.data.beton import Beton
from dtrain.data.dataset import DataSet, Feed
from dtrain.data.loader import Loader, open_loader
from dtrain.data.pixels import lookup_table
from dtrain.errors import DataError, UsageError
from dtrain.plan import Plan
from dtrain.settings.config import TrainConfig

COUNT, SIZE, BATCH = 103, 16, 20  # 5 steps an epoch; 3 samples of each epoch's order are left out
CPU = torch.device("cpu")
AUGMENTATION = Augmentation(flip=True, shift=3, cutout=5)

EVERYTHING: dict[str, Any] = {
    "scale": (0.3, 0.9),
    "affine": (40.0, 0.1, 0.2, 10.0),
    "jitter": (0.4, 0.5, 0.6),
    "erase": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
}

KINDS = ["memory", "ffcv"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return needed(request.param)


def needed(kind: str) -> str:
    if kind == "ffcv":
        need_ffcv()
    return kind


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return pixels_of(COUNT, SIZE)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, pixels: Pixels) -> DataSet:
    train = converted(tmp_path_factory.mktemp("train"), source_of(pixels, pixels[:1]))
    test = converted(tmp_path_factory.mktemp("test"), source_of(pixels[::-1].copy(), pixels[:1]))
    return DataSet(SIZE, 3, train, np.arange(COUNT), test, np.arange(COUNT), "test")


@pytest.fixture
def beton(dataset: DataSet) -> Beton:
    return dataset.train


def config_of(**settings: Any) -> TrainConfig:
    given = {
        "batch_size": BATCH,
        "epochs": 3,
        "seed": 7,
        "flip": True,
        "shift": 3,
        "cutout": 5,
        "mean": MEAN,
        "std": STD,
    }
    return TrainConfig.of(recipe="none", arch="allcnn_c", dataset="pets", **{**given, **settings})


def plan_of(config: TrainConfig, world: int = 1, train_size: int = COUNT) -> Plan:
    return assembly.plan_of(config, train_size=train_size, image_size=SIZE, world_size=world)


def requests(plan: Plan, rank: int = 0) -> Callable[[int], Request | None]:
    def request_at(step: int) -> Request | None:
        if step >= plan.total_steps:
            return None
        now = plan.at(step)
        return Request(plan.batch(step)[now.shares[rank].positions], now.epoch)

    return request_at


def opened(
    beton: Beton,
    request_at: Callable[[int], Request | None],
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    augmentation: Augmentation | None = AUGMENTATION,
    largest: int = BATCH,
    size: int | None = None,
    channels: int = 3,
    channels_last: bool = True,
) -> Loader:
    return open_loader(
        beton,
        request_at,
        kind=kind,
        image_size=size or beton.image_size,
        channels=channels,
        augmentation=augmentation,
        seed=7,
        mean=MEAN,
        std=STD,
        dtype=dtype,
        device=CPU,
        channels_last=channels_last,
        kernel_threads=threads,
        largest=largest,
    )


def digest(batch: Batch) -> str:
    parts = [batch.images.permute(0, 2, 3, 1).view(torch.uint8), batch.labels, batch.indices]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def walked(loader: Loader, steps: range) -> list[str]:
    with loader:
        return [digest(loader.batch(step)) for step in steps]


# -- what a batch is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batch_k_is_what_numpy_makes_of_the_kth_part_of_the_epochs_order(
    beton: Beton, pixels: Pixels, kind: str, dtype: torch.dtype
) -> None:
    lut = lookup_table(MEAN, STD, "float32")
    with opened(beton, requests(plan_of(config_of())), kind, dtype=dtype) as loader:
        for step in (0, 1, 4, 5, 12):
            epoch, place = divmod(step, COUNT // BATCH)
            wanted = keyed.order(COUNT, 7, epoch)[place * BATCH : (place + 1) * BATCH]
            table = decide(AUGMENTATION, 7, epoch, wanted, SIZE).moves
            images = [reference(pixels[i], row, 5, lut) for i, row in zip(wanted, table.tolist(), strict=True)]
            batch = loader.batch(step)
            assert batch.indices.tolist() == wanted.tolist()
            assert batch.labels.tolist() == (wanted * 7 % 3).tolist()
            assert torch.equal(batch.images, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(dtype))


def test_mixed_batches_are_made_of_partners_and_their_labels_are_shares(
    dataset: DataSet, pixels: Pixels, kind: str
) -> None:
    config = config_of(loader=kind, **EVERYTHING)
    with dataset.train_loader(plan_of(config), 0, config.augmentation, feed_of(config)) as loader:
        batch = loader.batch(7)
    indices = batch.indices.numpy()
    decisions = decide(config.augmentation, 7, 1, indices, SIZE)
    images = written(pixels[indices], decisions, SIZE, lookup_table(MEAN, STD, "float32"))
    assert torch.equal(batch.images.permute(0, 2, 3, 1), torch.from_numpy(images))
    labels = mixed_labels(indices * 7 % 3, decisions.tables["mix"], 3)
    assert (batch.labels.dtype, batch.labels.tolist()) == (torch.float32, labels.tolist())


def test_a_batch_has_channels_last_memory_and_the_types_of_its_contract(beton: Beton, kind: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with opened(beton, requests(plan_of(config_of())), kind, dtype=dtype) as loader:
            batch = loader.batch(0)
        assert (tuple(batch.images.shape), batch.images.dtype) == ((BATCH, 3, SIZE, SIZE), dtype)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.labels.dtype, tuple(batch.labels.shape)) == (torch.int64, (BATCH,))
        assert (batch.indices.dtype, tuple(batch.indices.shape)) == (torch.int64, (BATCH,))


def test_an_evaluation_sees_images_as_they_are(beton: Beton, pixels: Pixels, kind: str) -> None:
    samples = np.array([5, 0, 102, 5])
    request = Request(samples, None)
    with opened(beton, lambda turn: request if turn == 0 else None, kind) as loader:
        images = loader.batch(0).images.permute(0, 2, 3, 1)
    wanted = (pixels[samples] / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(images.numpy(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("size", "channels"), [(11, 3), (11, 1), (SIZE, 1)])
def test_a_network_may_see_less_than_is_stored(
    dataset: DataSet, pixels: Pixels, kind: str, size: int, channels: int
) -> None:
    seen = replace(dataset, image_size=size, channels=channels)
    config = config_of(loader=kind)
    weights = (
        np.array(MEAN) @ [0.29899597, 0.58700562, 0.11399841],
        np.array(STD) @ [0.29899597, 0.58700562, 0.11399841],
    )
    lut = lookup_table(*((weights[0],), (weights[1],)) if channels == 1 else (MEAN, STD), "float32")
    gray = ((pixels.astype(np.int64) @ [19595, 38470, 7471] + 32768) >> 16).astype(np.uint8)[..., None]
    stored = gray if channels == 1 else pixels
    plan = assembly.plan_of(config, train_size=COUNT, image_size=size, world_size=1)
    with seen.train_loader(plan, 0, config.augmentation, feed_of(config)) as loader:
        batch = loader.batch(7)
    table = decide(AUGMENTATION, 7, 1, batch.indices.numpy(), size, SIZE).moves
    images = [reference(stored[i], row, 5, lut, size) for i, row in zip(batch.indices, table.tolist(), strict=True)]
    wanted = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    torch.testing.assert_close(batch.images, wanted, rtol=1e-5, atol=1e-5)
    chunks = seen.chunks(0, 1, feed_of(config), chunk_size=500)
    with chunks.loader:
        middle = chunks.loader.batch(0).images.permute(0, 2, 3, 1).numpy()
    corner = (SIZE - size) // 2
    cut = stored[::-1][:, corner : corner + size, corner : corner + size]
    flat = np.stack([reference(image, [0, 0, 0, 0, 0], 0, lut) for image in cut])
    np.testing.assert_allclose(middle, flat, rtol=1e-5, atol=1e-5)


def test_ffcv_and_memory_give_equal_bits_of_crops_in_gray(beton: Beton) -> None:
    wanted = [
        walked(
            opened(beton, requests(plan_of(config_of())), needed(kind), threads=threads, size=9, channels=1), range(6)
        )
        for kind in KINDS
        for threads in (1, 2)
    ]
    assert wanted.count(wanted[0]) == 4


def test_more_than_is_stored_is_refused(beton: Beton) -> None:
    for size, channels in ((17, 3), (16, 4), (16, 2)):
        with pytest.raises(UsageError, match=f"stores 16 x 16 pixels in 3 channels; {size} x {size} in {channels}"):
            opened(beton, lambda step: None, "memory", size=size, channels=channels)


def test_batches_may_be_kept(beton: Beton, kind: str) -> None:
    with opened(beton, requests(plan_of(config_of())), kind) as loader:
        kept = [loader.batch(step) for step in range(15)]
        digests = [digest(batch) for batch in kept[:3]]
        kept[0].labels.zero_()  # and written to: nobody else's memory
        kept[0].images.zero_()
        assert [digest(loader.batch(step)) for step in range(3)] == digests == walked_before(beton, range(3))
    assert len({batch.images.data_ptr() for batch in kept}) == 15


def walked_before(beton: Beton, steps: range, augmentation: Augmentation = AUGMENTATION) -> list[str]:
    """The digests of steps as the memory reader gives them, one after the other."""
    return walked(opened(beton, requests(plan_of(config_of())), "memory", augmentation=augmentation), steps)


# -- however it is read, reached and shared --------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["moves", "everything"])
def test_ffcv_and_memory_with_1_or_2_or_3_kernel_threads_give_equal_bits(beton: Beton, settings: Any) -> None:
    augmentation = config_of(**settings).augmentation
    wanted = walked_before(beton, range(15), augmentation)
    assert len(set(wanted)) == 15
    for kind in KINDS:
        for threads in (1, 2, 3):
            plan = plan_of(config_of())
            loader = opened(beton, requests(plan), needed(kind), threads=threads, augmentation=augmentation)
            assert walked(loader, range(15)) == wanted


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["moves", "everything"])
def test_a_jump_to_any_step_gives_what_walking_there_gives(beton: Beton, kind: str, settings: Any) -> None:
    augmentation = config_of(**settings).augmentation
    wanted = walked_before(beton, range(15), augmentation)
    for start in range(15):
        loader = opened(beton, requests(plan_of(config_of())), kind, augmentation=augmentation)
        assert walked(loader, range(start, min(start + 3, 15))) == wanted[start : start + 3]


def test_steps_in_any_order_give_the_same_batches(beton: Beton, kind: str) -> None:
    wanted = walked_before(beton, range(15))
    steps = [14, 0, 1, 1, 7, 6, 5, 8, 9, 0, 13]
    with opened(beton, requests(plan_of(config_of())), kind) as loader:
        assert [digest(loader.batch(step)) for step in steps] == [wanted[step] for step in steps]


@pytest.mark.parametrize(
    ("size", "wanted", "settings"),
    [
        (20, [10, 10], {}),
        (20, [4, 4, 4, 4, 4], EVERYTHING),
        (64, [21, 21, 22], {}),
        (64, [20, 22, 22], EVERYTHING),  # which mixes images in pairs
        (64, [12, 13, 13, 13, 13], {}),
        (64, [12, 12, 14, 12, 14], EVERYTHING),
    ],
    ids=lambda value: str(value) if isinstance(value, int | list) else "everything" if value else "moves",
)
def test_the_shares_of_all_processes_are_the_batch_of_one(
    dataset: DataSet, kind: str, size: int, wanted: list[int], settings: Any
) -> None:
    config = config_of(loader=kind, batch_size=size, **settings)
    whole = dataset.train_loader(plan_of(config), 0, config.augmentation, feed_of(config))
    plan = plan_of(config, len(wanted))
    shares = [dataset.train_loader(plan, rank, config.augmentation, feed_of(config)) for rank in range(len(wanted))]
    for step in (0, 1, 2, plan.total_steps - 1):
        batch, parts = whole.batch(step), [loader.batch(step) for loader in shares]
        assert [len(part.labels) for part in parts] == wanted
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)
    for loader in (whole, *shares):
        loader.close()


def test_the_checksums_of_all_shares_add_up_to_that_of_the_batch_and_cover_samples_and_draws(dataset: DataSet) -> None:
    config = config_of(loader="memory")

    def checksum(config: TrainConfig, step: int, world: int = 1) -> int:
        total = 0
        for rank in range(world):
            with dataset.train_loader(plan_of(config, world), rank, config.augmentation, feed_of(config)) as loader:
                batch = loader.batch(step)
            assert (batch.checksum.dtype, batch.checksum.shape) == (torch.int64, ())
            total += int(batch.checksum)
        return total

    indices = keyed.order(COUNT, 7, 1)[2 * BATCH : 3 * BATCH]

    def by_hand(*tables: Any) -> int:
        rows = [[1, int(index), *np.concatenate(row).tolist()] for index, *row in zip(indices, *tables, strict=True)]
        return sum(int(keyed.key(0, keyed.Stream.CHECKSUM, *row)) >> 32 for row in rows)

    wanted = by_hand(decide(AUGMENTATION, 7, 1, indices, SIZE).moves)
    assert [checksum(config, 7, world) for world in (1, 2, 3, 4)] == [wanted] * 4
    others = [config_of(loader="memory", **{name: value}) for name, value in {**EVERYTHING, "shift": 2}.items()]
    others += [config_of(loader="memory", flip=False), config_of(loader="memory", seed=8)]
    assert len({wanted, checksum(config, 8), *(checksum(other, 7) for other in others)}) == 11
    everything = config_of(loader="memory", **EVERYTHING)
    d = decide(everything.augmentation, 7, 1, indices, SIZE)
    wanted = by_hand(d.moves, d.maps, d.tables["jitter"], d.tables["mix"], d.tables["erase"])
    assert [checksum(everything, 7, world) for world in (1, 2, 3, 5)] == [wanted] * 4


def test_an_epoch_has_no_sample_twice_and_each_epoch_another_order(dataset: DataSet, kind: str) -> None:
    config = config_of(loader=kind)
    seen = []
    with dataset.train_loader(plan_of(config), 0, config.augmentation, feed_of(config)) as loader:
        for epoch in range(3):
            steps = range(epoch * 5, epoch * 5 + 5)
            seen.append([index for step in steps for index in loader.batch(step).indices.tolist()])
        with pytest.raises(IndexError, match="there is no batch 15"):
            loader.batch(15)
    assert [len(set(epoch)) for epoch in seen] == [len(epoch) for epoch in seen] == [COUNT // BATCH * BATCH] * 3
    assert len({tuple(epoch) for epoch in seen}) == 3
    assert len(set().union(*seen)) == COUNT  # what one epoch leaves out the next ones read


def test_a_loader_of_a_part_of_the_samples_reads_only_these(dataset: DataSet, kind: str) -> None:
    part = replace(dataset, train_samples=np.arange(0, COUNT, 2))
    config = config_of(loader=kind, epochs=2)
    plan = plan_of(config, train_size=52)
    with part.train_loader(plan, 0, config.augmentation, feed_of(config)) as loader:
        seen = [index for step in range(2) for index in loader.batch(step).indices.tolist()]
    assert len(set(seen)) == 40
    assert all(index % 2 == 0 for index in seen)


def test_loaders_of_one_beton_do_not_disturb_each_other(beton: Beton, kind: str) -> None:
    wanted = walked_before(beton, range(15))
    first, second = (opened(beton, requests(plan_of(config_of())), kind) for _ in range(2))
    with first, second:
        for step in range(8):
            assert digest(first.batch(step)) == wanted[step]
            assert digest(second.batch(step + 7)) == wanted[step + 7]


def test_a_beton_that_took_the_place_of_another_is_read(tmp_path: Path, kind: str) -> None:
    request = Request(np.arange(4), None)
    seen = []
    for value in (10, 20):
        for path in tmp_path.iterdir():
            path.unlink()
        images = np.full((4, 8, 8, 3), value, np.uint8)
        beton = converted(tmp_path, source_of(images, images[:1]))
        with opened(beton, lambda turn: request if turn == 0 else None, kind, largest=4) as loader:
            seen.append(float(loader.batch(0).images[0, 0, 0, 0]) * STD[0] + MEAN[0])
    assert seen == pytest.approx([10 / 255, 20 / 255], abs=1e-6)


# -- smaller images in a stage -----------------------------------------------------------------------------------------


def staged(plan: Plan, rank: int = 0, world: int = 1) -> Callable[[int], Request | None]:
    """Each epoch at a size of its own: 16 (all that there is), 12, then 7. Shares may differ by one pair."""

    def request_at(step: int) -> Request | None:
        if step >= plan.total_steps:
            return None
        first, end = (at * (BATCH // 2) // world * 2 for at in (rank, rank + 1))
        return Request(plan.batch(step)[first:end], plan.at(step).epoch, (SIZE, 12, 7)[plan.at(step).epoch])

    return request_at


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["moves", "everything"])
def test_a_stage_shrinks_the_pictures_and_leaves_draws_labels_and_checksums_as_they_are(
    beton: Beton, pixels: Pixels, kind: str, settings: Any
) -> None:
    augmentation, plan = config_of(**settings).augmentation, plan_of(config_of())
    lut = lookup_table(MEAN, STD, "float32")
    full = opened(beton, requests(plan), kind, augmentation=augmentation)
    stages = opened(beton, staged(plan), kind, augmentation=augmentation)
    with full, stages:
        for step, size in ((0, SIZE), (4, SIZE), (5, 12), (9, 12), (10, 7), (14, 7)):
            batch, small = full.batch(step), stages.batch(step)
            assert tuple(small.images.shape) == (BATCH, 3, size, size)
            assert small.images.is_contiguous(memory_format=torch.channels_last)
            indices = batch.indices.numpy()
            decisions = decide(augmentation, 7, step // 5, indices, SIZE)
            wanted = written(pixels[indices], decisions, SIZE, lut, size)
            assert torch.equal(small.images.permute(0, 2, 3, 1), torch.from_numpy(wanted))
            for one, other in ((batch.labels, small.labels), (batch.indices, small.indices)):
                assert torch.equal(one, other)
            assert int(batch.checksum) == int(small.checksum)


def test_stages_are_equal_for_both_readers_any_threads_and_after_a_jump(beton: Beton) -> None:
    plan, augmentation = plan_of(config_of()), config_of(**EVERYTHING).augmentation
    wanted = walked(opened(beton, staged(plan), "memory", augmentation=augmentation), range(15))
    assert len(set(wanted)) == 15
    for kind in KINDS:
        loader = opened(beton, staged(plan), needed(kind), threads=2, augmentation=augmentation)
        assert walked(loader, range(15)) == wanted
        loader = opened(beton, staged(plan), needed(kind), augmentation=augmentation)
        assert walked(loader, range(9, 12)) == wanted[9:12]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_stage_gives_every_world_the_same_batches(beton: Beton, kind: str, world: int) -> None:
    plan, augmentation = plan_of(config_of()), config_of(**EVERYTHING).augmentation
    whole = opened(beton, staged(plan), kind, augmentation=augmentation)
    shares = [opened(beton, staged(plan, rank, world), kind, augmentation=augmentation) for rank in range(world)]
    for step in (4, 5, 12):
        batch, parts = whole.batch(step), [loader.batch(step) for loader in shares]
        assert max(len(part.indices) for part in parts) - min(len(part.indices) for part in parts) in (0, 2)
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        assert sum(int(part.checksum) for part in parts) == int(batch.checksum)
    for loader in (whole, *shares):
        loader.close()


@pytest.mark.parametrize("stored", [SIZE, 11])
def test_an_evaluation_shrinks_the_whole_middle_of_each_picture(
    dataset: DataSet, pixels: Pixels, kind: str, stored: int
) -> None:
    seen = replace(dataset, image_size=stored)
    chunks = seen.chunks(0, 1, feed_of(config_of(loader=kind)), chunk_size=50, image_size=8)
    with chunks.loader:
        images = chunks.loader.batch(1).images.permute(0, 2, 3, 1).numpy()
    corner = (SIZE - stored) // 2
    middle = pixels[::-1][50:100, corner : corner + stored, corner : corner + stored]
    small = np.stack([shrunk_by_hand(picture, 8) for picture in middle])
    lut = lookup_table(MEAN, STD, "float32")
    assert np.array_equal(images, np.stack([lut[c][small[..., c]] for c in range(3)], axis=-1))


@pytest.mark.parametrize("size", [0, SIZE + 1])
def test_a_stage_larger_than_the_image_size_is_refused(beton: Beton, kind: str, size: int) -> None:
    request = Request(np.arange(2), 0, size)
    with opened(beton, lambda step: request, kind) as loader, pytest.raises(UsageError, match=r"a size in 1\.\.16"):
        loader.batch(0)


# -- memory layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_without_channels_last_images_are_contiguous_and_equal_bit_for_bit(
    beton: Beton, kind: str, dtype: torch.dtype, channels: int
) -> None:
    ways = [
        opened(beton, staged(plan_of(config_of())), kind, dtype=dtype, channels=channels, channels_last=channels_last)
        for channels_last in (True, False)
    ]
    for step in (0, 7):
        last, first = (loader.batch(step).images for loader in ways)
        assert first.is_contiguous()
        assert torch.equal(first.view(len(first), -1), last.reshape(len(last), -1))
    for loader in ways:
        loader.close()


def test_a_network_that_views_its_input_trains_without_channels_last(ranks: Warm, tmp_path: Path) -> None:
    net = tmp_path / "net.py"
    net.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(3 * 32 * 32, classes)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x.view(x.shape[0], -1))\n"
        "def net(num_classes):\n"
        "    return Net(num_classes)\n"
    )
    flags = ["--arch", f"{net}:net", "--dataset", "synthetic", "--recipe", "none", "--steps", "2", "--threads", "1"]
    flags += ["--no-channels-last", "--cache-dir", tmp_path / "cache", "--output", tmp_path / "run"]
    (result,) = ranks(flags, world=1)
    assert result.code == 0, result.err


# -- threads and errors ----------------------------------------------------------------------------------------------


def test_100_abandoned_epochs_leave_no_thread(beton: Beton, kind: str) -> None:
    before = set(threading.enumerate())
    with opened(beton, requests(plan_of(config_of())), kind) as loader:
        loader.batch(0)
        running = len(threading.enumerate())
        for epoch in range(50):
            loader.batch(epoch * 4 % 15)  # never the next one: each a jump
            assert len(threading.enumerate()) <= running
    for start in range(50):
        with opened(beton, requests(plan_of(config_of())), kind, threads=2) as loader:
            loader.batch(start % 15)
    assert set(threading.enumerate()) == before


def test_the_kernel_has_the_threads_of_the_process_on_a_gpu_and_one_beside_a_network_on_the_cpu() -> None:
    cuda, cpu = (Feed(torch.float32, torch.device(kind), threads=6) for kind in ("cuda:1", "cpu"))
    assert (cuda.kernel_threads, cpu.kernel_threads) == (6, 1)


def test_deterministic_mode_does_not_fill_the_memory_of_new_batches(ranks: Warm) -> None:
    assert ranks.call("test_loader:filled_in_deterministic_mode", 1) == [(True, False)]


def filled_in_deterministic_mode() -> tuple[bool, bool]:
    """Whether deterministic mode is on, and whether it fills new memory."""
    from dtrain.runtime import Runtime, apply

    apply(Runtime("cpu", "gloo", 1, "float32", deterministic=True, tf32=False, autotune=False, why=()))
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.are_deterministic_algorithms_enabled(), fills


def test_closing_waits_for_a_thread_that_is_at_work(beton: Beton, kind: str) -> None:
    def request_at(step: int) -> Request:
        if step > 1:
            time.sleep(0.2)
        return Request(np.arange(BATCH), 0)

    before = set(threading.enumerate())
    with opened(beton, request_at, kind) as loader:
        loader.batch(0)
        loader.batch(1)
    assert set(threading.enumerate()) == before


def test_a_loader_may_be_closed_before_its_first_batch_and_twice(beton: Beton, kind: str) -> None:
    loader = opened(beton, requests(plan_of(config_of())), kind, threads=2)
    loader.close()
    loader.close()


def failing_at(step: int, failures: list[Exception], plan: Plan) -> Callable[[int], Request | None]:
    """Requests, made in the reader's thread, of which one fails as long as there are failures left."""

    def request_at(asked: int) -> Request | None:
        if asked == step and failures:
            raise failures.pop()
        return requests(plan)(asked)

    return request_at


@pytest.mark.timeout(20)
@pytest.mark.parametrize("step", [0, 1, 7])
def test_an_error_in_a_readers_thread_reaches_the_caller_and_the_loader_goes_on(
    beton: Beton, kind: str, step: int
) -> None:
    wanted = walked_before(beton, range(15))
    error = ZeroDivisionError("in the thread")
    with opened(beton, failing_at(step, [error], plan_of(config_of())), kind) as loader:
        assert [digest(loader.batch(before)) for before in range(step)] == wanted[:step]
        started = time.monotonic()
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            loader.batch(step)
        assert time.monotonic() - started < 5
        assert [digest(loader.batch(after)) for after in range(step, 15)] == wanted[step:]


@pytest.mark.timeout(20)
def test_an_error_in_the_kernels_thread_reaches_the_caller(beton: Beton, kind: str) -> None:
    damaged = replace(beton, labels=beton.labels[:50])  # the 51st sample has pixels and no label
    for index, error in ((49, None), (50, DataError)):
        request = Request(np.array([0, index]), None)
        with opened(damaged, lambda turn, request=request: request if turn < 2 else None, kind) as loader:
            if error is None:
                assert loader.batch(0).indices.tolist() == [0, 49]
            else:
                with pytest.raises(error):
                    loader.batch(0)


@pytest.mark.timeout(20)
def test_a_beton_that_vanished_is_an_error_not_a_wait(tmp_path: Path, kind: str) -> None:
    beton = converted(tmp_path, source_of(pixels_of(30, 8), pixels_of(1, 8)))
    beton.path.unlink()
    request = Request(np.arange(10), None)
    with opened(beton, lambda turn: request, kind) as loader, pytest.raises(FileNotFoundError):
        loader.batch(0)


@pytest.mark.parametrize("indices", [[COUNT], [-1], [0, 1, 2**40]])
def test_a_sample_that_is_not_there_is_refused_by_both_readers(beton: Beton, kind: str, indices: list[int]) -> None:
    request = Request(np.array(indices), None)
    with opened(beton, lambda turn: request, kind) as loader, pytest.raises(DataError, match="outside of its 103"):
        loader.batch(0)


def test_a_batch_larger_than_was_announced_is_refused(beton: Beton, kind: str) -> None:
    request = Request(np.arange(21), None)
    with (
        opened(beton, lambda turn: request, kind) as loader,
        pytest.raises(DataError, match="21 samples in a batch of 20"),
    ):
        loader.batch(0)


def test_ffcv_leaves_threads_environment_and_numpys_generator_as_they_were(beton: Beton) -> None:
    need_ffcv()
    code = """if True:
        import os, sys
        from pathlib import Path
        import numba, numpy as np, torch
        from dtrain.data.beton import open_beton
        torch.set_num_threads(2)
        np.random.seed(3)
        before = torch.get_num_threads(), numba.get_num_threads(), dict(os.environ), repr(np.random.get_state())
        beton = open_beton(Path(sys.argv[1]))
        from dtrain.data.ffcv_reader import FfcvReader
        reader = FfcvReader(beton, iter([np.arange(5)]), 5)
        print(sum(int(flat.sum()) for flat, _ in reader))
        reader.close()
        after = torch.get_num_threads(), numba.get_num_threads(), dict(os.environ), repr(np.random.get_state())
        assert before == after, (before, after)"""
    done = subprocess.run([sys.executable, "-c", code, str(beton.path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == int(pixels_of(COUNT, SIZE)[:5].sum())


# -- the data set of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 10, 40, 103, 500])
def test_an_evaluation_reads_each_sample_once_in_the_same_chunks_for_every_world(
    dataset: DataSet, kind: str, size: int
) -> None:
    config = config_of(loader=kind)
    wanted = [list(range(first, min(first + size, COUNT))) for first in range(0, COUNT, size)]
    for world in (1, 2, 3):
        chunks: dict[int, list[int]] = {}
        for rank in range(world):
            mine = dataset.chunks(rank, world, feed_of(config), chunk_size=size)
            assert mine.rounds == -(-len(wanted) // world)
            for turn in range(mine.rounds):
                batch = mine.batch(turn)
                if batch is not None:
                    chunks[turn * world + rank] = batch.indices.tolist()
            mine.loader.close()
        assert [chunks[number] for number in range(len(chunks))] == wanted


def test_a_validation_split_is_disjoint_from_training_stratified_and_the_same_twice(tmp_path: Path) -> None:
    given = {"arch": "allcnn_c", "dataset": "digits", "cache_dir": tmp_path, "val_split": 0.1}
    sets = [loaded(TrainConfig.of(recipe="none", **given, seed=seed)) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    held, again, other = (data.evaluation_samples.tolist() for data in sets)
    assert held == again != other
    data = sets[0]
    assert data.evaluation_split == "val"
    assert data.evaluation is data.train  # the test set is not looked at
    assert sorted([*data.train_samples.tolist(), *held]) == list(range(1437))
    # a tenth of 142, 146, 141, 147, 145, 146, 145, 143, 138 and 144 images, rounded, halves to even
    assert np.bincount(data.train.labels[held]).tolist() == [14, 15, 14, 15, 14, 15, 14, 14, 14, 14]
    assert data.train_samples.tolist() == sorted(data.train_samples.tolist())


def test_without_a_validation_split_the_test_set_is_evaluated(tmp_path: Path) -> None:
    data = loaded(TrainConfig.of(recipe="none", arch="allcnn_c", dataset="digits", cache_dir=tmp_path))
    assert (len(data.train_samples), len(data.evaluation_samples), data.evaluation_split) == (1437, 360, "test")
    assert data.evaluation.sha256 != data.train.sha256


@pytest.mark.parametrize("given", [None, (0.5, 0.25)])
def test_images_are_normalised_by_the_training_set_unless_told_otherwise(
    dataset: DataSet, pixels: Pixels, given: tuple[float, float] | None
) -> None:
    settings: dict[str, Any] = {"mean": None, "std": None}
    mean, std = pixels.mean((0, 1, 2)) / 255, (pixels / 255).std((0, 1, 2))
    if given is not None:
        settings = {"mean": given[:1], "std": given[1:]}
        mean, std = np.full(3, given[0]), np.full(3, given[1])
    chunks = dataset.chunks(0, 1, feed_of(config_of(loader="memory", **settings)), chunk_size=500)
    batch = chunks.batch(0)
    chunks.loader.close()
    assert batch is not None
    wanted = (pixels[::-1] / 255 - mean) / std
    np.testing.assert_allclose(batch.images.permute(0, 2, 3, 1).numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_ffcv_leaves_numba_s_types_as_they_are(beton: Beton) -> None:
    need_ffcv()
    flat = numba.uint8[::1]
    assert flat.mutable
    with opened(beton, lambda step: Request(np.arange(2), 0) if step == 0 else None, "ffcv") as loader:
        loader.batch(0)
    assert numba.uint8[::1] is flat
    assert flat.mutable


def test_where_ffcv_cannot_be_imported_memory_takes_its_place_and_says_why(ranks: Warm) -> None:
    need_ffcv()
    auto, asked = ranks.call("test_loader:without_opencv", 1)[0]
    assert auto == (
        "MemoryReader",
        "memory (FFCV cannot be imported: libopencv_core.so.4: cannot open shared object file)",
    )
    assert asked.startswith("--loader ffcv: FFCV cannot be imported (libopencv_core.so.4: cannot open")


def without_opencv() -> tuple[tuple[str, str], str]:
    """What the loader chooses where a library that FFCV needs is gone."""
    import importlib.abc
    import sys

    from dtrain.data.loader import _chosen

    class Gone(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            if name == "ffcv.loader" or name == "ffcv.fields":
                raise ImportError("libopencv_core.so.4: cannot open shared object file")

    sys.meta_path.insert(0, Gone())
    try:
        _chosen("ffcv")
    except UsageError as error:
        asked = str(error)
    reader, told = _chosen("auto")
    return (reader.__name__, told), asked
