"""Sizes that change at epochs: what their text means, and what is told where it means nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import UsageError
from dtrain.settings import identity
from dtrain.settings.config import TrainConfig
from dtrain.settings.staged import Staged


def test_each_value_counts_from_its_epoch_to_the_next() -> None:
    size = Staged.parse("16,24@1,32@4")
    assert size.changes == ((0, 16), (1, 24), (4, 32))
    assert [size.at(epoch) for epoch in range(6)] == [16, 24, 24, 24, 32, 32]
    assert (size.values, size.largest, size.last) == ((16, 24, 32), 32, 32)
    falling = Staged.parse("32,16@2")
    assert (falling.largest, falling.last) == (32, 16)


@pytest.mark.parametrize(
    ("given", "text", "plain"),
    [
        (64, "64", 64),
        ("64", "64", 64),
        (64.0, "64", 64),
        (" 64 , 640 @ 200 ", "64,640@200", "64,640@200"),
        ("64,64@3", "64", 64),
        ("64,64@3,8@4,64@9", "64,8@4,64@9", "64,8@4,64@9"),
    ],
)
def test_the_text_is_the_shortest_and_means_the_same(given: Any, text: str, plain: int | str) -> None:
    staged = Staged.parse(given)
    assert (str(staged), staged.plain) == (text, plain)
    assert Staged.parse(text) == Staged.parse(plain) == Staged.parse(staged) == staged
    assert hash(Staged.parse(text)) == hash(staged)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("many", "give a whole number such as 64, or one that changes at epochs such as 64,640@200"),
        ("", "give a whole number"),
        (2.5, "give a whole number"),
        (True, "give a whole number"),
        ([64], "give a whole number"),
        ("64,", "give a whole number"),
        ("64;640@3", "give a whole number"),
        ("64,640@2.5", "give a whole number"),
        ("1" * 5000, "give a whole number"),
        (0, "give whole numbers greater than 0"),
        ("-3", "give a whole number"),
        ("64,0@3", "give whole numbers greater than 0"),
        ("64,640", "640 does not say from which epoch; give value@epoch, such as 640@200"),
        ("64@3", "the first value counts from the start; give it without an epoch, such as 64"),
        ("64,640@0", "epoch 0 does not come after epoch 0; give ascending epochs"),
        ("64,640@9,32@3", "epoch 3 does not come after epoch 9; give ascending epochs"),
    ],
)
def test_what_is_no_such_size_is_told_with_what_to_give(given: Any, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)) as caught:
        TrainConfig.of(arch="allcnn_c", recipe="none", batch_size=given)
    assert str(caught.value).startswith(f"--batch-size {given}: ")


def test_flags_files_and_python_say_it_alike_and_a_run_keeps_it(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('arch = "allcnn_c"\nrecipe = "none"\nbatch_size = "64,640@200"\nimage_size = 24\n')
    from_file = TrainConfig.of(file)
    from_flags = TrainConfig.of(arch="allcnn_c", recipe="none", batch_size="64,640@200", image_size="24")
    by_hand = TrainConfig.of(
        recipe="none", arch="allcnn_c", batch_size=Staged.parse("64,640@200"), image_size=Staged.parse(24)
    )
    assert identity.results(from_file) == identity.results(from_flags) == identity.results(by_hand)
    assert (from_file.settings()["batch_size"], from_file.settings()["image_size"]) == ("64,640@200", 24)
    assert TrainConfig.stored(from_file.settings()).optimization.batch_size == Staged.parse("64,640@200")


def test_images_are_stored_in_the_largest_size() -> None:
    config = TrainConfig.of(recipe="none", arch="x", image_size=Staged.parse("32,48@3,24@5"))
    assert config.data.conversion().image_size == 48
