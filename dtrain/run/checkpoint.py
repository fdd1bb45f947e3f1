"""Checkpoints: folders of tensors and JSON that are written atomically, verified before each use, and never run code.

    checkpoints/step-00001200/
      network.safetensors, optimizer.safetensors, ...   one file for each part: {name: tensor}, contiguous
      state.json                                        all state that is no tensor: {"run": ..., "learner": ...}
      manifest.json                                     size and SHA-256 of each file; SHA-256 of its own other lines

A checkpoint is called sound if `load` accepts it. Its bytes are read once, and parsed only after their size and SHA-256
agree with the manifest, so the bytes that are parsed are those that were hashed. Only the process that owns the run
directory writes checkpoints; it sends the other processes what it has loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dtrain.errors import DivergedError, StorageError
from dtrain.files import JSON, PARTIAL, canonical_json, remove_partials, set_aside, whole_folder

Tensors = Mapping[str, Tensor]

FORMAT = 2
FOLDER = "checkpoints"  # of a run directory
NETWORK = "network"  # the only part whose values must be finite
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", ".safetensors"
MANIFEST_LIMIT = 16 << 20  # bytes; a class name for each of 100,000 classes fits
_FOLDER = re.compile(r"step-(\d{8,})")
_PART = re.compile(r"[a-z][a-z0-9_]*")


class DamagedError(StorageError):
    """A checkpoint whose files are not those that were saved."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint that was saved after `step` updates.

    parts: tensors by part and name, contiguous, on the CPU, and sharing no memory. state: the content of state.json.
    about: facts about the run, from the manifest.
    """

    step: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    about: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The newest sound checkpoint, or None, and the damaged ones that are newer, each with what is wrong with it."""

    checkpoint: Checkpoint | None
    damaged: list[tuple[Path, str]]


# -- writing ---------------------------------------------------------------------------------------------------------


def name_of(step: int) -> str:
    """The folder's name: step-00001200."""
    return f"step-{step:08d}"


def save(
    checkpoints: Path, step: int, parts: Mapping[str, Tensors], state: Mapping[str, JSON], about: Mapping[str, JSON]
) -> Path:
    """Write the checkpoint of `step`, completely or not at all, and flush it to the disk; returns its folder.

    A sound checkpoint of this step is kept as it is; a damaged one is renamed. The same arguments give the same bytes.
    Raises DivergedError if the part "network" holds a float that is not finite, StorageError if it cannot be written;
    the older checkpoints stay in both cases. Cost: copies one part at a time to the host; writes and hashes each once.
    """
    _refuse_non_finite(step, parts.get(NETWORK, {}))
    path = checkpoints / name_of(step)
    try:
        if os.path.lexists(path):
            if verify(path) is None:
                return path
            set_aside(path, "damaged")
        with whole_folder(path) as folder:
            _write(folder, step, parts, state, about)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space or lower --keep" if full else "older checkpoints are untouched"
        raise StorageError(f"cannot save checkpoint {path}: {error.strerror}; {advice}") from error
    return path


def _refuse_non_finite(step: int, network: Tensors) -> None:
    for name, tensor in network.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DivergedError(
                f"{name} is not finite after step {step}: the training diverged, nothing was saved; lower --lr"
            )


def _write(
    folder: Path, step: int, parts: Mapping[str, Tensors], state: Mapping[str, JSON], about: Mapping[str, JSON]
) -> None:
    files: dict[str, JSON] = {}

    def write(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    for part in sorted(parts):
        # serialised in memory, since the error that safetensors' own writer raises for a full disk has no errno
        write(part + TENSORS, safetensors.torch.save(_contiguous(parts[part])))
    write(STATE, _json(state))
    manifest = {"format": FORMAT, "step": step, "files": files, "about": about}
    (folder / MANIFEST).write_bytes(_signed(manifest))


def _contiguous(tensors: Tensors) -> dict[str, Tensor]:
    """Contiguous copies on the host: safetensors refuses channels-last tensors, and tensors that share memory."""
    return {
        name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def _signed(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of the manifest, to which the SHA-256 of its content is added as the last entry."""
    return _json({**manifest, "sha256": hashlib.sha256(canonical_json(manifest)).hexdigest()})


# -- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, bytes]:
    """The content of each file of a checkpoint folder, by name, for `load`.

    Opens only regular files that the manifest lists, if their sizes agree with it; `load` checks the digests.
    Raises DamagedError, or StorageError if a file cannot be read. Cost: the checkpoint's size in memory.
    """
    try:
        if path.is_symlink():
            raise DamagedError(f"{path.name} is a link")
        with os.scandir(path) as entries:
            found = {entry.name: entry for entry in entries}
        for entry in found.values():
            if not entry.is_file(follow_symlinks=False):
                raise DamagedError(f"{entry.name} is not a regular file")
        sizes = {name: entry.stat(follow_symlinks=False).st_size for name, entry in found.items()}
        if sizes.get(MANIFEST, 0) > MANIFEST_LIMIT:
            raise DamagedError(f"{MANIFEST} is larger than {MANIFEST_LIMIT} bytes")
        files = {name: _bytes_of(path / name) for name in (MANIFEST,) if name in found}
        listed_files = _listed_files(_manifest(files), sizes)
        return files | {name: _bytes_of(path / name) for name in listed_files}
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror}"
        # these mean that the checkpoint is lost; others, such as EACCES (no permission), can be repaired
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EIO):
            raise DamagedError(reason) from error
        raise StorageError(f"cannot read checkpoint {reason}") from error


def load(source: Path | Mapping[str, bytes]) -> Checkpoint:
    """Verify and parse a checkpoint, given as a folder or as the bytes that `read` returned. Executes nothing in it.

    Raises DamagedError with the reason if anything differs from what was saved, StorageError if the checkpoint has
    another format version. Cost: reads and hashes everything once; for a moment, twice the checkpoint's size in memory.
    """
    files = read(source) if isinstance(source, Path) else source
    manifest = _manifest(files)
    for name, told in _listed_files(manifest, {name: len(content) for name, content in files.items()}).items():
        if hashlib.sha256(files[name]).hexdigest() != told["sha256"]:
            raise DamagedError(f"{name} does not have the SHA-256 in {MANIFEST}")
    parts = {name.removesuffix(TENSORS): _parse(name, files[name]) for name in files if name.endswith(TENSORS)}
    return Checkpoint(manifest["step"], parts, _object(STATE, files[STATE]), manifest["about"])


def verify(path: Path) -> str | None:
    """The reason why `load` refuses this checkpoint folder; None if it is sound. Costs as much as `load`."""
    try:
        load(path)
    except StorageError as error:
        return str(error)
    return None


def _manifest(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The content of the manifest, after checks.

    Its bytes must be exactly those that would be written for its content, so that every single byte is checked.
    """
    if MANIFEST not in files:
        raise DamagedError(f"{MANIFEST} is missing")
    signed = _object(MANIFEST, files[MANIFEST])
    manifest = {key: value for key, value in signed.items() if key != "sha256"}
    try:
        sound = files[MANIFEST] == _signed(manifest)
    except ValueError:  # content that cannot be written: NaN, which Python's parser accepts, or half a surrogate pair
        sound = False
    if not sound:
        raise DamagedError(f"{MANIFEST} does not have its own SHA-256")
    if manifest.get("format") != FORMAT:
        raise StorageError(
            f"checkpoint has format {manifest.get('format')!r}, this dtrain reads format {FORMAT}; "
            "use the version of dtrain that wrote it"
        )
    shape = {"format": int, "step": int, "files": dict, "about": dict}
    if {key: type(value) for key, value in manifest.items()} != shape:
        raise DamagedError(f"{MANIFEST} does not have the entries of a manifest")
    return manifest


def _listed_files(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The files that the manifest lists, after checks of their names, and that they are the files in `sizes`."""
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, told in files.items():
        if name != STATE and not (name.endswith(TENSORS) and _PART.fullmatch(name.removesuffix(TENSORS))):
            raise DamagedError(f"{MANIFEST} lists {name!r}, which is no file of a checkpoint")
        if not isinstance(told, dict) or told.keys() != {"size", "sha256"}:
            raise DamagedError(f"{MANIFEST} does not give the size and SHA-256 of {name}")
        if name not in sizes:
            raise DamagedError(f"{name} is missing")
        if sizes[name] != told["size"]:
            raise DamagedError(f"{name} has {sizes[name]} bytes, but {MANIFEST} says {told['size']}")
    if unknown := sorted(sizes.keys() - files.keys() - {MANIFEST}):
        raise DamagedError(f"{unknown[0]!r} is not in {MANIFEST}")
    if STATE not in files:
        raise DamagedError(f"{MANIFEST} does not list {STATE}")
    return files


def _bytes_of(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:  # noqa: PTH123 - pathlib cannot refuse links
        return file.read()


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise DamagedError(f"{name} is not JSON") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{name} is not a JSON object")
    return value


def _parse(name: str, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:  # all that bad bytes can raise
        raise DamagedError(f"{name} is not a safetensors file: {error}") from None


# -- many checkpoints ------------------------------------------------------------------------------------------------


def listed(checkpoints: Path) -> list[int]:
    """The steps, ascending, of the folders that are named like a checkpoint; their content is not read."""
    if not checkpoints.is_dir():
        return []
    matches = (_FOLDER.fullmatch(entry.name) for entry in checkpoints.iterdir())
    return sorted(int(match[1]) for match in matches if match and name_of(int(match[1])) == match[0])


def find(checkpoints: Path) -> Found:
    """Find the newest sound checkpoint, without changing anything.

    Raises StorageError for a checkpoint that is not damaged but cannot be used, such as one of another format version.
    """
    damaged = []
    for step in reversed(listed(checkpoints)):
        path = checkpoints / name_of(step)
        try:
            saved = load(path)
        except DamagedError as error:
            damaged.append((path, str(error)))
            continue
        if saved.step == step:
            return Found(saved, damaged)
        damaged.append((path, f"{MANIFEST} is of step {saved.step}"))
    return Found(None, damaged)


def newest(checkpoints: Path) -> Found:
    """Like `find`, but also renames damaged checkpoints to `<name>.damaged` and removes unfinished ones.

    Only the owner of the run may call it. The result has the new names of the damaged ones. Raises StorageError.
    """
    found = find(checkpoints)
    try:
        remove_partials(checkpoints)
        aside = [(set_aside(path, "damaged"), reason) for path, reason in found.damaged]
    except OSError as error:
        raise StorageError(f"cannot set damaged checkpoints aside in {checkpoints}: {error.strerror}") from error
    return replace(found, damaged=aside)


def undo_after(path: Path) -> list[Path]:
    """Rename the checkpoints that are newer than the one at `path` to `<name>.undone`; returns their new paths.

    Raises StorageError if the checkpoint at `path` is not sound, before anything is renamed, or if renaming fails.
    """
    try:
        step = load(path).step
    except DamagedError as error:
        raise StorageError(f"--resume {path}: not a sound checkpoint: {error}") from None
    try:
        newer = [path.parent / name_of(later) for later in listed(path.parent) if later > step]
        return [set_aside(later, "undone") for later in newer]
    except OSError as error:
        raise StorageError(f"cannot set aside what is newer than {path}: {error.strerror}") from error


def stale(steps: Sequence[int], *, keep: int, best: int | None) -> list[int]:
    """The steps whose checkpoints may be removed: all but the newest, the best, and the `keep` newest of the others."""
    others = sorted(set(steps) - {max(steps, default=0), best})
    return others[: max(0, len(others) - keep)]


def prune(checkpoints: Path, *, keep: int, best: int | None) -> list[int]:
    """Remove the checkpoints that `stale` names; returns their steps. Call it after a save. Raises StorageError.

    Each is renamed before its files are removed, so that a folder with a checkpoint's name is always complete.
    """
    gone = stale(listed(checkpoints), keep=keep, best=best)
    try:
        for step in gone:
            doomed = checkpoints / f"{PARTIAL}{name_of(step)}-removed"
            shutil.rmtree(doomed, ignore_errors=True)
            (checkpoints / name_of(step)).rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise StorageError(f"cannot remove an old checkpoint in {checkpoints}: {error.strerror}") from error
    return gone


# -- comparing -------------------------------------------------------------------------------------------------------


def digest(tensors: Tensors) -> str:
    """SHA-256 of names, dtypes, shapes and values: equal for equal tensors, whatever their memory layout.

    Values are compared by their bits, so -0.0 is not 0.0. Cost: a copy to the host, tensor by tensor.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        total.update(_bytes_by_element(tensor).numpy().data)
    return total.hexdigest()


def first_difference(a: Tensors, b: Tensors) -> str | None:
    """A message about the first tensor, by name, in which `a` and `b` differ; None if they have the same `digest`."""
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            return f"{name} is only in the {'first' if name in a else 'second'}"
        one, two = a[name], b[name]
        kinds = [f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (one, two)]
        if kinds[0] != kinds[1]:
            return f"{name} is {kinds[0]} in the first, {kinds[1]} in the second"
        unequal = (_bytes_by_element(one) != _bytes_by_element(two)).any(dim=1).nonzero().flatten()
        if len(unequal):
            place = [int(i) for i in torch.unravel_index(unequal[0], one.shape)]
            values = [t[tuple(place)].item() for t in (one, two)]
            return (
                f"{name}{place} is {values[0]!r} in the first, {values[1]!r} in the second; "
                f"{len(unequal)} of {one.numel()} elements differ"
            )
    return None


def _bytes_by_element(tensor: Tensor) -> Tensor:
    """The bytes of each element, uint8 [elements, bytes in an element], on the host, in the order of the indices."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), flat.element_size())
