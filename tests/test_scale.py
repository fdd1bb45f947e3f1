"""Claims about large sources: as many or as large files as there are, memory stays flat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pets import pixels_of, png

CONVERT = """if True:
    import json, re, sys, time
    from pathlib import Path
    from dtrain.data.cache import prepare
    started, steps = time.monotonic(), prepare(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[2]) / "cache")
    while True:
        try:
            next(steps)
        except StopIteration as end:
            betons = end.value
            break
    # not getrusage, which counts what the parent held when it started this process
    megabytes = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps([len(betons["train"].labels), megabytes, time.monotonic() - started]))"""


def converted(source: Path, place: Path) -> tuple[int, float, float]:
    """Training images, peak memory in MB, and seconds of a conversion in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CONVERT, source, place], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images, megabytes, seconds = json.loads(done.stdout)
    return images, megabytes, seconds


def sparse_tar(path: Path, members: int, member_bytes: int) -> Path:
    """A tar of pictures that have a hole behind their end: as long as it says, a few blocks on the disk."""
    with path.open("wb") as file:
        for index in range(members):
            part, label = ("test" if index % 10 == 9 else "train"), index % 3
            info = tarfile.TarInfo(f"{part}/class{label}/{index:06}.png")
            info.size = member_bytes
            at = file.tell()
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.write(png(pixels_of(index % 50)))
            file.seek(at + 512 + member_bytes)
        file.truncate(file.tell() + 1024)  # the mark of its end
    assert path.stat().st_blocks * 512 < path.stat().st_size / 10
    return path


def test_a_tar_ten_times_as_large_takes_no_more_memory(tmp_path: Path) -> None:
    small, large = (sparse_tar(tmp_path / f"{n}.tar", n, 1 << 20) for n in (30, 300))
    peaks = []
    for path, count in ((small, 27), (large, 270)):
        images, megabytes, _ = converted(path, tmp_path)
        assert images == count
        peaks.append(megabytes)
    assert peaks[1] < peaks[0] + 64  # a few blocks of 16 files of 1 MB, whatever the length of the tar


@pytest.mark.slow
def test_a_tar_of_ten_gigabytes_is_streamed(tmp_path: Path) -> None:
    images, megabytes, seconds = converted(sparse_tar(tmp_path / "pets.tar", 2560, 4 << 20), tmp_path)
    assert (images, megabytes < 1024, seconds < 300) == (2304, True, True)


@pytest.mark.slow
def test_a_hundred_thousand_small_files_are_converted_in_flat_memory(tmp_path: Path) -> None:
    data = [png(np.full((4, 4, 3), level, np.uint8)) for level in range(50)]
    for part, count in (("train", 90_000), ("test", 10_000)):
        for label in range(10):
            (tmp_path / "pets" / part / f"class{label}").mkdir(parents=True)
        for index in range(count):
            (tmp_path / "pets" / part / f"class{index % 10}" / f"{index}.png").write_bytes(data[index % 50])
    images, megabytes, seconds = converted(tmp_path / "pets", tmp_path)
    assert (images, seconds < 300) == (90_000, True)
    assert megabytes < 512, megabytes
    again = converted(tmp_path / "pets", tmp_path)
    assert again[2] < 60  # names, sizes and times are looked at, nothing is read
    shutil.rmtree(tmp_path / "pets")  # else pytest does, minutes after somebody's next start
    assert os.path.getsize(next((tmp_path / "cache").glob("pets-*/train.beton"))) > 90_000 * 48  # noqa: PTH202
