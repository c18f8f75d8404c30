"""A checkpoint on disk: names, manifest, verification, retention. Standard library only.

    checkpoints/step_00000100/
      base/config.json     base/model/       Hugging Face configuration and distributed checkpoint of the base
      drafter/config.json  drafter/model/    the same of the drafter
                           drafter/ema/      with optim.drafter_ema: the average of its weights
      optimizer/                             distributed checkpoint of the optimizer's state, by parameter name
      state.json                             step, schedule, data position: what the trainer asked to keep
      random.pt                              random states of Python, NumPy and torch, one entry a rank
      config.json                            the run's configuration
      COMPLETE                               the manifest, written last: every other file, its size and checksum

A checkpoint is written under ``step_00000100.tmp-<unique>``. Once every rank's files are on disk its manifest is
written there, and one rename gives it its name: nothing without a whole manifest ever has a checkpoint's name. A run
killed between manifest and rename loses nothing, the next one finishes the rename (:func:`recover`). Two more suffixes
exist: ``.trash-`` (being removed) and ``.damaged-`` (set aside because it isn't usable; never removed here).
"""

import errno
import json
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from joint_train.errors import CheckpointError
from joint_train.progress import tracked

LAYOUT = 1
MANIFEST = "COMPLETE"
PARTS = ("base/model", "drafter/model", "optimizer")
AVERAGE = "drafter/ema"
DOCUMENTS = ("config.json", "state.json", "base/config.json", "drafter/config.json")
REQUIRED = (*DOCUMENTS, "random.pt", *(f"{part}/.metadata" for part in PARTS))

_STEP = re.compile(r"step_([0-9]{8,})")
_LEFTOVER = re.compile(r"step_([0-9]{8,})\.(tmp|trash)-\w+")


class IncompleteCheckpoint(CheckpointError):
    """The folder has no manifest: its save never finished, or it isn't a checkpoint of this project."""


class DamagedCheckpoint(CheckpointError):
    """A file is missing, has another size or another checksum than the manifest says."""


class NewerLayout(CheckpointError):
    """A later version of joint-train wrote it."""


@dataclass
class Manifest:
    """Contents of ``COMPLETE``. ``files`` maps a path below the checkpoint to [size in bytes, CRC-32 in hex]."""

    step: int
    world_size: int
    config_hash: str
    saved_at: str
    versions: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, list] = field(default_factory=dict)
    layout: int = LAYOUT

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def to_bytes(self) -> bytes:
        body = asdict(self)
        return json.dumps({**body, "checksum": _json_checksum(body)}, indent=1).encode()


def stays_inside(name: str) -> bool:
    """Whether a path below a folder stays in it, links aside."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name, or None for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_steps(checkpoints: Path) -> list[Path]:
    """Folders with a checkpoint's name, newest first, complete or not."""
    if not checkpoints.is_dir():
        return []
    steps = {path: step for path in checkpoints.iterdir() if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def read_manifest(folder: Path) -> Manifest:
    """Raises IncompleteCheckpoint, DamagedCheckpoint (the manifest itself) or NewerLayout."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise DamagedCheckpoint(f"{path} is damaged: it isn't a file")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise IncompleteCheckpoint(f"{folder} is incomplete: it has no {MANIFEST}, its save never finished") from None
    except NotADirectoryError:
        raise IncompleteCheckpoint(f"{folder} is incomplete: it is a file, not a checkpoint's folder") from None
    except OSError as error:  # a loop of links, a folder of that name, a disk that fails
        raise DamagedCheckpoint(f"{path} is damaged: it can't be read: {error.strerror}") from None
    return parse_manifest(raw, folder)


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Put the metrics of a complete checkpoint's step into its manifest, which is replaced as a whole."""
    write_file(folder / MANIFEST, replace(read_manifest(folder), metrics=metrics).to_bytes())
    fsync_folder(folder)


def parse_manifest(raw: bytes, folder: Path | str) -> Manifest:
    """The contents of the ``COMPLETE`` of a folder (a path, or a URL), which is named in errors.

    Raises DamagedCheckpoint or NewerLayout.
    """
    path = f"{folder}/{MANIFEST}"
    try:
        body = json.loads(raw)
        layout, checksum = body["layout"], body.pop("checksum")
        if checksum != _json_checksum(body):
            raise DamagedCheckpoint(f"{path} is damaged: its checksum doesn't match its contents")
        if layout > LAYOUT:
            raise NewerLayout(
                f"{folder} has layout {layout}, this joint-train reads up to {LAYOUT}: use the newer version"
            )
        if outside := [name for name in body.get("files", {}) if not stays_inside(name)]:
            raise DamagedCheckpoint(f"{path} is refused: it names {outside[0]}, which is not in the folder")
        manifest = Manifest(**body)
        manifest.files = {name: [int(size), str(checksum)] for name, (size, checksum) in manifest.files.items()}
        manifest.step, manifest.world_size = int(manifest.step), int(manifest.world_size)
    except CheckpointError:
        raise
    except Exception as error:  # what is not a manifest can fail in any way, by nesting that is too deep for one
        raise DamagedCheckpoint(f"{path} is damaged: not a manifest ({type(error).__name__}: {error})") from None
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """Every file that is missing or has the wrong size, in words."""
    problems = []
    for name, (size, _) in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{name} is missing")
            continue
        except OSError as error:
            problems.append(f"{name} can't be read: {error.strerror}")
            continue
        if found != size:
            problems.append(f"{name} has {found} bytes instead of {size}")
    return problems


def check_files(folder: Path, manifest: Manifest, names: list[str]) -> list[str]:
    """Reads every byte of these files and describes each one that isn't what was written."""
    return compare_files(folder, {name: manifest.files[name] for name in names})


def compare_files(folder: Path, files: Mapping[str, Sequence[Any]]) -> list[str]:
    """Describes each file that hasn't its size and checksum, as :func:`file_checksum` gives them."""
    problems = []
    for name, (size, checksum) in tracked(f"comparing the checksums of {folder}", files.items(), "files"):
        try:
            found = file_checksum(folder / name)
        except OSError as error:
            problems.append(f"{name} can't be read: {error.strerror}")
            continue
        if found != (size, checksum):
            problems.append(f"{name} has checksum {found[1]} ({found[0]} bytes) instead of {checksum} ({size} bytes)")
    return problems


def verify(folder: Path, contents: bool = True) -> Manifest:
    """The manifest of a checkpoint whose files all have the right size and, with ``contents``, the right bytes.

    Raises IncompleteCheckpoint, NewerLayout, or DamagedCheckpoint naming every wrong file.
    """
    manifest = read_manifest(folder)
    problems = check_sizes(folder, manifest) or (contents and check_files(folder, manifest, list(manifest.files)))
    if problems:
        raise damage_error(folder, problems)
    return manifest


def damage_error(folder: Path | str, problems: list[str]) -> DamagedCheckpoint:
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    return DamagedCheckpoint(f"{folder} is damaged: {shown}")


def find_newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose manifest and sizes are right, or None."""
    for folder in list_steps(checkpoints):
        try:
            verify(folder, contents=False)
        except CheckpointError:
            continue
        return folder
    return None


def locate(path: Path) -> Path:
    """The checkpoint folder that ``path`` means, checked to be one: itself, or the newest of a run's folder.

    Raises CheckpointError, for a Hugging Face folder, half a pair and so on with what to do instead.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; a checkpoint is OUTPUT_DIR/checkpoints/step_XXXXXXXX")
    for checkpoints in (path / "checkpoints", path):
        if list_steps(checkpoints):
            if found := find_newest(checkpoints):
                return found
            raise CheckpointError(f"{checkpoints} has no complete checkpoint (python -m joint_train.checkpoint ls)")
    if (path / MANIFEST).exists():
        read_manifest(path)
        return path
    if (path / "config.json").exists() and any(path.glob("*.safetensors*")):
        raise CheckpointError(
            f"{path} is a Hugging Face folder, not a distributed checkpoint: it has weights only. "
            "Start a run from it with model.base or model.drafter and leave resume=auto"
        )
    parts = [part for part in PARTS if (path / part).is_dir()]
    if (path / "model").is_dir() or len(parts) == 1:
        half = parts[0] if parts else "model"
        raise CheckpointError(
            f"{path} is only part of a checkpoint ({half}): a resume needs {', '.join(PARTS)} and {MANIFEST}, "
            "so give the step_XXXXXXXX folder"
        )
    raise IncompleteCheckpoint(f"{path} is not a complete checkpoint: it has no {MANIFEST}")


def steps_to_keep(
    checkpoints: list[tuple[int, dict[str, float]]], keep_last: int, keep_every: int, keep_best: str | None
) -> set[int]:
    """Steps to keep out of (step, metrics) pairs: the newest always.

    ``keep_last`` 0 keeps all; ``keep_every`` keeps its multiples; ``keep_best`` keeps the lowest value of a metric, or
    the highest with a leading '-', the newest of equals; a checkpoint without the metric or with NaN isn't the best.
    """
    steps = sorted((step for step, _ in checkpoints), reverse=True)
    keep = set(steps if keep_last == 0 else steps[: max(keep_last, 1)])
    if keep_every:
        keep |= {step for step in steps if step % keep_every == 0}
    if keep_best and (best := best_step(checkpoints, keep_best)) is not None:
        keep.add(best)
    return keep


def metric_of(keep_best: str) -> tuple[str, int]:
    """The metric that ``checkpoint.keep_best`` names, and 1 if its lowest value is the best, -1 if its highest is."""
    return keep_best.removeprefix("-"), -1 if keep_best.startswith("-") else 1


def best_step(checkpoints: list[tuple[int, dict[str, float]]], keep_best: str) -> int | None:
    """The best of (step, metrics) pairs, as :func:`steps_to_keep` says; None if none has the metric."""
    name, sign = metric_of(keep_best)
    values = [(sign * metrics[name], -step) for step, metrics in checkpoints if name in metrics]
    values = [pair for pair in values if pair[0] == pair[0]]
    return -min(values)[1] if values else None


def find_best(checkpoints: Path, keep_best: str) -> tuple[Path, Manifest]:
    """The best complete checkpoint by a metric, as :func:`steps_to_keep` says.

    Raises CheckpointError if none has it, naming those that there are.
    """
    found = {manifest.step: (folder, manifest) for folder, manifest in list_complete(checkpoints)}
    best = best_step([(step, manifest.metrics) for step, (_, manifest) in found.items()], keep_best)
    if best is None:
        known = sorted({name for _, manifest in found.values() for name in manifest.metrics})
        raise CheckpointError(
            f"no checkpoint in {checkpoints} has the metric {metric_of(keep_best)[0]}; they have "
            f"{', '.join(known) or 'none'}"
        )
    return found[best]


def prunable(
    checkpoints: Path, keep_last: int, keep_every: int, keep_best: str | None, newest_step: int | None = None
) -> list[Path]:
    """Complete checkpoints that retention gives up, oldest first.

    Only those up to ``newest_step`` count (by default: all): what is newer was found damaged, so it may not push a
    good one out. Incomplete and damaged folders neither count nor are listed.
    """
    found = list_complete(checkpoints, newest_step)
    keep = steps_to_keep([(m.step, m.metrics) for _, m in found], keep_last, keep_every, keep_best)
    return [folder for folder, manifest in found if manifest.step not in keep]


def list_complete(checkpoints: Path, newest_step: int | None = None) -> list[tuple[Path, Manifest]]:
    """The checkpoints up to a step (by default: all) whose manifest and sizes are right, oldest first."""
    found = {}
    for folder in list_steps(checkpoints):
        try:
            manifest = verify(folder, contents=False)
        except CheckpointError:
            continue
        if newest_step is None or manifest.step <= newest_step:
            found[manifest.step] = (folder, manifest)
    return [found[step] for step in sorted(found)]


def recover(checkpoints: Path) -> list[str]:
    """Finish what a killed run left half done, and return a description of what was done. Only for the holder of the
    run's lock.

    A temporary folder with a manifest was written to the last byte: it gets its name. One without, and trash, is
    removed: the lock shows that the process which would have finished it is gone. One whose manifest or files are not
    what was written is set aside. What can't be removed or renamed is named, and left.
    """
    done = []
    for folder in sorted(checkpoints.iterdir()):
        match = _LEFTOVER.fullmatch(folder.name)
        if not match:
            continue
        try:
            done += _finish(folder) if match[2] == "tmp" else _discard(folder)
        except OSError as error:
            done.append(f"{folder.name}, left by a killed run, could not be finished or removed: {error}")
    return done


def _finish(folder: Path) -> list[str]:
    """Give a killed save's folder its name if it is whole."""
    try:
        manifest = verify(folder, contents=False)
    except IncompleteCheckpoint:
        return _discard(folder)
    except DamagedCheckpoint as error:
        leftover = _LEFTOVER.fullmatch(folder.name)
        assert leftover is not None, "it is called for these names"
        aside = _with_suffix(folder.with_name(folder_name(int(leftover[1]))), "damaged")
        folder.rename(aside)
        return [f"{error}. A killed run left it; it is set aside as {aside.name}"]
    notes = publish(folder, folder.with_name(folder_name(manifest.step)))
    return [*notes, f"finished saving {folder_name(manifest.step)}"]


def _discard(folder: Path) -> list[str]:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink()
    return [f"removed {folder.name}, left by a killed run"]


def publish(folder: Path, final: Path) -> list[str]:
    """Give a finished temporary folder its name. What had the name (never a good one) is set aside and named."""
    notes = []
    if os.path.lexists(final):
        aside = _with_suffix(final, "damaged")
        final.rename(aside)
        notes.append(f"{final.name} was there already and isn't usable: set aside as {aside.name}")
    folder.rename(final)
    fsync_folder(final.parent)
    return notes


def remove(folder: Path) -> None:
    """Remove a checkpoint: one rename takes its name away, then its files are deleted."""
    trash = _with_suffix(folder, "trash")
    try:
        folder.rename(trash)
    except FileNotFoundError:
        return
    fsync_folder(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)


def temporary_path(final: Path) -> Path:
    return _with_suffix(final, "tmp")


def write_file(path: Path, data: bytes) -> tuple[int, str]:
    """Write atomically and durably; returns (size, checksum)."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return len(data), hex_checksum(zlib.crc32(data))


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Some network file systems can't and needn't: EINVAL is no error."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def file_checksum(path: Path, chunk: int = 1 << 22) -> tuple[int, str]:
    """(size in bytes, CRC-32 in hex) of what is on disk."""
    size = checksum = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(chunk):
            size += len(data)
            checksum = zlib.crc32(data, checksum)
    return size, hex_checksum(checksum)


def hex_checksum(crc: int) -> str:
    return f"{crc:08x}"


def _json_checksum(body: dict) -> str:
    return hex_checksum(zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()))


def _with_suffix(final: Path, suffix: str) -> Path:
    return final.with_name(f"{final.name}.{suffix}-{uuid.uuid4().hex[:8]}")
