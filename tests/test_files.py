"""Claims about files: whole or not at all, digests that others agree with, locks that death frees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain import files
from dtrain.files import Lock, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert (path.read_text(), names(tmp_path)) == ("new", ["file"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_or_no_folder_and_nothing_beside_them(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("half")
        raise error
    with pytest.raises(error), whole_folder(tmp_path / "folder") as part:
        (part / "file").write_text("half")
        raise error
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_a_writer_that_writes_nothing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert path.read_text() == "old"


def test_a_folder_appears_with_all_its_files_at_once(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "folder") as part:
        (part / "a").write_text("1")
        assert not (tmp_path / "deep" / "folder").exists()
        (part / "b").write_text("2")
    assert names(tmp_path / "deep") == ["folder"]
    assert names(tmp_path / "deep" / "folder") == ["a", "b"]


def test_a_folder_that_holds_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("1")
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "folder") as part:
        (part / "new").write_text("2")
    assert (names(tmp_path), names(tmp_path / "folder")) == (["folder"], ["old"])


def test_what_a_killed_writer_leaves_is_recognised_and_removed_and_nothing_else(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from dtrain.files import whole_file, whole_folder
        with whole_folder(Path(sys.argv[1]) / "folder") as folder, whole_file(Path(sys.argv[1]) / "file") as file:
            (folder / "inside").write_text("half")
            file.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)"""
    (tmp_path / "kept").write_text("1")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(names(tmp_path)) == 3
    (tmp_path / ".partial-link").symlink_to(tmp_path / "kept")
    files.remove_partials(tmp_path)
    assert names(tmp_path) == ["kept"]


def test_what_is_set_aside_overwrites_nothing(tmp_path: Path) -> None:
    for text in ("1", "2", "3"):
        (tmp_path / "file").write_text(text)
        files.set_aside(tmp_path / "file", "damaged")
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "file.damaged": "1",
        "file.damaged-2": "2",
        "file.damaged-3": "3",
    }


# -- JSON and digests ------------------------------------------------------------------------------------------------


def test_a_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(3_000_000))
    told = subprocess.run(["sha256sum", tmp_path / "file"], capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    assert files.sha256_of(tmp_path / "file") == told


def test_canonical_json_has_one_spelling_and_none_for_nan() -> None:
    assert files.canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json({"loss": float("nan")})


def test_written_json_has_null_for_what_is_not_finite_and_leaves_its_input_alone(tmp_path: Path) -> None:
    value = {"a": [float("nan"), (1, float("inf"))], "b": {"c": float("-inf"), "d": 0.1}, "e": "nan", "f": True}
    files.write_json(tmp_path / "file", value)
    assert json.loads((tmp_path / "file").read_text()) == {
        "a": [None, [1, None]],
        "b": {"c": None, "d": 0.1},
        "e": "nan",
        "f": True,
    }
    assert value["b"] == {"c": float("-inf"), "d": 0.1}


# -- locks -----------------------------------------------------------------------------------------------------------


def test_a_lock_has_one_owner_who_is_named(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "new" / "lock"), Lock(tmp_path / "new" / "lock")
    assert (first.is_held(), first.owner()) == (False, "unknown")
    assert not (tmp_path / "new").exists()
    assert first.acquire()
    assert not second.acquire()
    assert (first.is_held(), second.is_held()) == (True, True)
    assert second.owner().endswith(f" process {os.getpid()}")
    first.release()
    first.release()
    assert not second.is_held()
    assert second.acquire()
    second.release()


def test_looking_at_a_lock_leaves_no_trace(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    lock.path.write_text("somewhere process 1\n")
    assert not lock.is_held()
    assert lock.path.read_text() == "somewhere process 1\n"


def test_death_frees_a_lock(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from dtrain.files import Lock\n"
    code += "print(Lock.acquire(lock := Lock(Path(sys.argv[1]))), flush=True); time.sleep(60)"
    lock = Lock(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", code, str(lock.path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "True\n"
        assert lock.is_held()
        assert not lock.acquire()
        assert lock.owner().endswith(f"process {child.pid}")
        child.kill()
    assert not lock.is_held()
    assert lock.acquire()
    lock.release()
