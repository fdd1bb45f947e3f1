"""Claims about checkpoints: what is saved comes back, what is damaged is found, what is hostile runs nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dtrain.errors import DivergedError, StorageError
from dtrain.run import checkpoint

Edit = Callable[[dict[str, Any]], None]

ABOUT: dict[str, Any] = {"config": {"arch": "allcnn_c", "lr": 0.05}, "classes": ["cat", "dög"], "plugins": {"x": "1.0"}}
STATE: dict[str, Any] = {"samples": 6400, "best": None, "seconds": {"train": 1.5}}


def tensors(fill: float = 1.0) -> dict[str, dict[str, Tensor]]:
    """Two small parts with what real ones hold: channels-last filters, counts, half precision, scalars, nothing."""
    filters = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).reshape(2, 3, 2, 2) * fill
    return {
        "network": {
            "conv.weight": filters.to(memory_format=torch.channels_last),
            "norm.num_batches_tracked": torch.tensor(640),
            "half": torch.tensor([1.5, -0.0, 3e38], dtype=torch.bfloat16),
            "empty": torch.zeros(0, 3),
        },
        "optimizer": {"step": torch.tensor(640.0), "momentum": torch.full((5,), -fill)},
    }


def save(folder: Path, step: int, fill: float = 1.0) -> Path:
    return checkpoint.save(folder, step, tensors(fill), STATE, ABOUT)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


# -- what comes back -------------------------------------------------------------------------------------------------


def test_everything_saved_comes_back_from_the_folder_and_from_its_bytes(tmp_path: Path) -> None:
    path = save(tmp_path, 640)
    assert path == tmp_path / "step-00000640"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "network.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    for loaded in (checkpoint.load(path), checkpoint.load(checkpoint.read(path))):
        assert (loaded.step, loaded.state, loaded.about) == (640, STATE, ABOUT)
        for part, wanted in tensors().items():
            assert loaded.parts[part].keys() == wanted.keys()
            assert all(same(loaded.parts[part][name], wanted[name]) for name in wanted)
    assert all(t.is_contiguous() for t in loaded.parts["network"].values())


def test_two_names_for_one_weight_are_both_saved(tmp_path: Path) -> None:
    weight = torch.ones(3)
    path = checkpoint.save(tmp_path, 1, {"network": {"in": weight, "out": weight, "row": weight[1:]}}, {}, {})
    loaded = checkpoint.load(path).parts["network"]
    assert {name: t.tolist() for name, t in loaded.items()} == {"in": [1, 1, 1], "out": [1, 1, 1], "row": [1, 1]}


def test_the_same_tensors_give_the_same_bytes_in_any_order_and_layout(tmp_path: Path) -> None:
    first = save(tmp_path / "a", 1)
    turned = {part: dict(reversed(items.items())) for part, items in reversed(tensors().items())}
    turned["network"]["conv.weight"] = turned["network"]["conv.weight"].contiguous()
    second = checkpoint.save(tmp_path / "b", 1, turned, STATE, ABOUT)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_the_manifest_tells_what_sha256sum_tells(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_bytes())
    out = subprocess.run(
        ["sha256sum", *sorted(manifest["files"])], cwd=path, capture_output=True, text=True, check=True
    )
    told = {name: digest for digest, name in (line.split() for line in out.stdout.splitlines())}
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == told
    assert {name: file["size"] for name, file in manifest["files"].items()} == {
        n: (path / n).stat().st_size for n in told
    }


def test_a_sound_checkpoint_of_the_same_step_is_kept_and_a_damaged_one_makes_way(tmp_path: Path) -> None:
    path = save(tmp_path, 1, fill=1.0)
    assert save(tmp_path, 1, fill=2.0) == path
    assert checkpoint.load(path).parts["optimizer"]["momentum"].tolist() == [-1.0] * 5
    for name in ("step-00000001.damaged", "step-00000001.damaged-2"):
        (path / "state.json").write_text("{}")
        save(tmp_path, 1, fill=2.0)
        assert checkpoint.load(path).parts["optimizer"]["momentum"].tolist() == [-2.0] * 5
        assert (tmp_path / name / "state.json").read_text() == "{}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_network_that_is_not_finite_is_named_and_never_saved(tmp_path: Path, bad: float) -> None:
    parts = tensors()
    parts["network"]["conv.weight"][1, 2, 0, 1] = bad
    with pytest.raises(DivergedError, match="conv.weight is not finite after step 7"):
        checkpoint.save(tmp_path, 7, parts, STATE, ABOUT)
    assert list(tmp_path.iterdir()) == []


# -- what is damaged -------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    files = checkpoint.read(save(tmp_path, 1))
    assert sum(map(len, files.values())) > 1000
    for name, content in files.items():
        for place in range(len(content)):
            for mask in (0x01, 0xFF):
                flipped = bytearray(content)
                flipped[place] ^= mask
                with pytest.raises(StorageError):
                    checkpoint.load(files | {name: bytes(flipped)})


def test_every_truncation_and_every_longer_file_is_found(tmp_path: Path) -> None:
    files = checkpoint.read(save(tmp_path, 1))
    for name, content in files.items():
        for wrong in [*(content[:length] for length in range(len(content))), content + b"\0", content + b" "]:
            with pytest.raises(checkpoint.DamagedError):
                checkpoint.load(files | {name: wrong})


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "network.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_the_newest_sound_one_is_used_and_the_damaged_ones_are_named_and_set_aside(
    tmp_path: Path, name: str, damage: str
) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step)
    for step in (200, 300):
        file = tmp_path / f"step-{step:08d}" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes({"flipped": content, "cut": content[:-1], "empty": b""}[damage])
    looked = checkpoint.find(tmp_path)
    assert (looked.checkpoint.step, [path.name for path, _ in looked.damaged]) == (
        100,
        ["step-00000300", "step-00000200"],
    )
    found = checkpoint.newest(tmp_path)
    assert found.checkpoint.step == 100
    assert [path.name for path, _ in found.damaged] == ["step-00000300.damaged", "step-00000200.damaged"]
    assert all(name in reason for _, reason in found.damaged)
    assert checkpoint.listed(tmp_path) == [100]
    assert checkpoint.newest(tmp_path).damaged == []


def test_a_folder_renamed_to_another_step_is_not_that_step(tmp_path: Path) -> None:
    save(tmp_path, 100).rename(tmp_path / "step-00000900")
    found = checkpoint.newest(tmp_path)
    assert found.checkpoint is None
    assert found.damaged == [(tmp_path / "step-00000900.damaged", "manifest.json is of step 100")]


def test_where_nothing_was_saved_nothing_is_found(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "checkpoints") == checkpoint.Found(None, [])


# -- what is hostile -------------------------------------------------------------------------------------------------


def sign(path: Path, edit: Edit | None = None) -> None:
    """Write the manifest that fits the folder as it is, the way the format is described, changed by `edit`."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"]
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if edit:
        edit(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def header(tensors: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


class Bomb:
    """A pickle that leaves a marker file if it is ever loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def test_a_signature_made_by_hand_is_accepted(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text("{}")
    path_again = save(tmp_path / "again", 1)
    shutil.copy(path_again / "manifest.json", path / "manifest.json")
    sign(path)
    assert checkpoint.verify(path) is None


@pytest.mark.parametrize(
    "content",
    [
        header(b"", length=2**63),
        header(b"", length=2**40),
        header({"a": f32(0, 8, [2]), "b": f32(4, 12, [2])}, bytes(12)),  # overlapping
        header({"a": f32(0, 4, [1]), "b": f32(8, 12, [1])}, bytes(12)),  # a hole
        header({"a": f32(0, 8, [2])}, bytes(4)),  # beyond the end
        header({"a": f32(0, 4, [1])}, bytes(8)),  # bytes left over
        header({"a": f32(0, 4, [2**62, 2])}, bytes(4)),  # more elements than there are bytes, or numbers
        header({"a": f32(4, 0, [1])}, bytes(4)),
        header({"a": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        header(b"[" * 100_000),
        header(b'{"a": 1e999}'),
        b"",
        b"1234567",
    ],
)
def test_hostile_safetensors_whose_digests_match_are_refused_by_the_parser(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "network.safetensors").write_bytes(content)
    sign(path)
    with pytest.raises(StorageError, match="network.safetensors is not a safetensors file"):
        checkpoint.load(path)
    assert checkpoint.newest(tmp_path).checkpoint.step == 1


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))

    def list_pickle(manifest: dict[str, Any]) -> None:
        manifest["files"]["network.pt"] = {"size": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}

    cases: list[tuple[str, Edit | None, str]] = [
        ("network.pt", None, "not in manifest"),
        ("network.pt", list_pickle, "no file of a checkpoint"),
        ("network.safetensors", None, "not a safetensors file"),
        ("state.json", None, "not JSON"),
    ]
    for number, (name, edit, reason) in enumerate(cases):
        path = save(tmp_path / str(number), 1)
        (path / name).write_bytes(bomb)
        sign(path, edit)
        with pytest.raises(StorageError, match=reason):
            checkpoint.load(path)
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # the bomb was live


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/hostname", "..", "", ".", "a/b.safetensors", ".hidden.safetensors", "a\0.json"],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    outside = safetensors.torch.save({"a": torch.zeros(1)})
    (tmp_path / "outside.safetensors").write_bytes(outside)

    def add(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"size": len(outside), "sha256": hashlib.sha256(outside).hexdigest()}

    sign(path, add)
    for source in (path, {p.name: p.read_bytes() for p in path.iterdir()} | {name: outside}):
        with pytest.raises(checkpoint.DamagedError, match="no file of a checkpoint"):
            checkpoint.load(source)


@pytest.mark.parametrize("name", ["network.safetensors", "state.json", "manifest.json"])
def test_links_pipes_and_folders_in_the_place_of_files_are_refused(tmp_path: Path, name: str) -> None:
    for kind in ("link", "pipe", "folder"):
        path = save(tmp_path / kind, 1)
        (path / name).rename(tmp_path / kind / name)
        if kind == "link":
            (path / name).symlink_to(tmp_path / kind / name)
        elif kind == "pipe":
            os.mkfifo(path / name)
        else:
            (path / name).mkdir()
        assert checkpoint.verify(path) == f"{name} is not a regular file"


def test_a_link_to_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").symlink_to(save(tmp_path, 1))
    found = checkpoint.newest(tmp_path)
    assert (found.checkpoint.step, found.damaged[0][1]) == (1, "step-00000002 is a link")
    assert checkpoint.verify(tmp_path / "step-00000001") is None


def replaced(key: str, value: Any) -> Edit:
    return lambda manifest: manifest.__setitem__(key, value)


@pytest.mark.parametrize(
    "edit",
    [
        replaced("step", "1"),
        replaced("step", True),
        replaced("files", []),
        replaced("files", {}),
        replaced("files", {"state.json": 5}),
        replaced("files", {"state.json": {"size": 3}}),
        replaced("about", None),
        replaced("surprise", 1),
        lambda manifest: manifest.pop("about"),
    ],
)
def test_a_signed_manifest_that_is_no_manifest_is_refused(tmp_path: Path, edit: Edit) -> None:
    path = save(tmp_path, 1)
    sign(path, edit)
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["[]", "null", "{}", "NaN", '{"sha256": NaN}', "[" * 100_000, '"\\ud800"', "\xff"])
def test_a_manifest_that_is_not_even_an_object_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text, encoding="latin-1")
    assert str(checkpoint.verify(path)).startswith("manifest.json")


@pytest.mark.parametrize("other", [1, 3])
def test_a_sound_checkpoint_of_another_format_is_refused_but_never_moved(tmp_path: Path, other: int) -> None:
    path = save(tmp_path, 1)
    sign(path, replaced("format", other))
    with pytest.raises(StorageError, match=f"format {other}, this dtrain reads format 2; use the version"):
        checkpoint.newest(tmp_path)
    assert path.is_dir()


# -- what a kill or a full disk leaves -------------------------------------------------------------------------------

SAVE_UNTIL_KILLED = """
import os, signal, sys, time, torch
from pathlib import Path
from dtrain.run import checkpoint
torch.set_num_threads(1)
parts = {"network": {f"w{i}": torch.full((50_000,), float(i)) for i in range(8)}}

def save_for_ever(folder):
    begun = (folder / "begun").open("a", buffering=1)
    for step in range(2, 10_000):
        begun.write(f"{step}\\n")
        checkpoint.save(folder, step, parts, {}, {})
        checkpoint.prune(folder, keep=0, best=None)

for folder in map(Path, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        save_for_ever(folder)
    while not checkpoint.listed(folder)[-1] >= 2:
        time.sleep(0.001)
    time.sleep(0.0017 * int(folder.name))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_kill_9_in_the_middle_of_a_save_costs_this_save_and_no_other(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(16)]
    for folder in folders:
        save(folder, 1)
    subprocess.run([sys.executable, "-c", SAVE_UNTIL_KILLED, *map(str, folders)], check=True)
    interrupted = 0
    for folder in folders:
        last_begun = int((folder / "begun").read_text().split()[-1])
        interrupted += any(folder.glob(".partial-*"))
        found = checkpoint.newest(folder)
        assert found.checkpoint is not None
        assert found.damaged == []
        assert found.checkpoint.step in (last_begun - 1, last_begun)
        assert not any(folder.glob(".*"))
    assert interrupted > 0  # some of the 16 kills fell into a save


SAVE_WITHIN_LIMIT = """
import resource, signal, sys, torch
from pathlib import Path
from dtrain.errors import StorageError
from dtrain.run import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(Path(sys.argv[1]), 2, {"network": {"w": torch.zeros(50_000)}}, {}, {})
except StorageError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_leaves_the_older_one_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    child = subprocess.run(
        [sys.executable, "-c", SAVE_WITHIN_LIMIT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert child.stdout == (
        f"cannot save checkpoint {tmp_path}/step-00000002: File too large; free some space or lower --keep\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path).checkpoint.step == 1


def test_a_folder_that_cannot_be_made_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot save checkpoint .*file/checkpoints/step-00000001: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


# -- many checkpoints ------------------------------------------------------------------------------------------------


def test_only_names_of_checkpoints_are_listed(tmp_path: Path) -> None:
    for name in ("step-00000010", "step-123456789", "step-00000002", "step-2", "step-00000003.damaged", "step-0000000x",
                 ".partial-step-00000004-17", "step-000000005", "notes"):  # fmt: skip
        (tmp_path / name).mkdir()
    assert checkpoint.listed(tmp_path) == [2, 10, 123456789]


def test_the_newest_the_best_and_keep_more_stay() -> None:
    steps = [50, 10, 20, 30, 40]
    assert checkpoint.stale(steps, keep=0, best=None) == [10, 20, 30, 40]
    assert checkpoint.stale(steps, keep=0, best=20) == [10, 30, 40]
    assert checkpoint.stale(steps, keep=2, best=None) == [10, 20]
    assert checkpoint.stale(steps, keep=2, best=40) == [10]
    assert checkpoint.stale(steps, keep=2, best=50) == [10, 20]
    assert checkpoint.stale(steps, keep=2, best=60) == [10, 20]
    assert checkpoint.stale(steps, keep=9, best=None) == []
    assert checkpoint.stale([], keep=0, best=None) == []


def test_prune_removes_what_is_stale_and_nothing_else(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (tmp_path / "step-00000001.damaged").mkdir()
    assert checkpoint.prune(tmp_path, keep=1, best=2) == [1, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000001.damaged",
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]


# -- comparing -------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_names_types_shapes_and_bits() -> None:
    by_hand = hashlib.sha256(
        b'["a","torch.float32",[2]]' + struct.pack("<2f", 1.0, -0.0) + b'["b","torch.int64",[]]' + struct.pack("<q", 7)
    )
    a = {"a": torch.tensor([1.0, -0.0]), "b": torch.tensor(7)}
    assert checkpoint.digest(a) == by_hand.hexdigest()
    others = (
        {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(7)},
        {"a": torch.tensor([1.0, -0.0]), "c": torch.tensor(7)},
        {"a": torch.tensor([[1.0, -0.0]]), "b": torch.tensor(7)},
        {"a": torch.tensor([1.0, -0.0]).view(torch.int32), "b": torch.tensor(7)},
        {"a": torch.tensor([1.0, -0.0])},
    )
    assert len({checkpoint.digest(other) for other in (a, *others)}) == 6
    assert all(checkpoint.first_difference(a, other) for other in others)


def test_the_digest_does_not_see_order_and_memory_layout() -> None:
    plain = tensors()["network"]
    turned = {name: t.contiguous() for name, t in reversed(plain.items())}
    assert checkpoint.digest(plain) == checkpoint.digest(turned)
    assert checkpoint.first_difference(plain, turned) is None


def test_the_first_difference_is_told_with_place_and_values() -> None:
    a = tensors()["network"]
    b = {name: t.clone() for name, t in a.items()}
    b["conv.weight"][0, 2, 1, 0] = 0.5
    b["conv.weight"][1, 0, 0, 0] = 0.5
    b["half"][0] = 9
    assert checkpoint.first_difference(a, b) == (
        "conv.weight[0, 2, 1, 0] is 10.0 in the first, 0.5 in the second; 2 of 24 elements differ"
    )
    scalar = {"step": torch.tensor(1)}, {"step": torch.tensor(2)}
    assert checkpoint.first_difference(*scalar) == "step[] is 1 in the first, 2 in the second; 1 of 1 elements differ"
    assert checkpoint.first_difference(scalar[0], {}) == "step is only in the first"
    assert checkpoint.first_difference(scalar[0], {"step": torch.zeros(2)}) == (
        "step is int64 [] in the first, float32 [2] in the second"
    )
    nan = {"x": torch.tensor([float("nan")])}
    assert checkpoint.first_difference(nan, nan) is None
