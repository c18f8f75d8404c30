"""The folders of an export: written under another name, put in place together, and verified when they are loaded.

    OUT/base/  OUT/drafter/  OUT/adapter/    each with joint_train_export.json: size and CRC-32 of its files
    OUT/EXPORT_INCOMPLETE                    while they are being replaced: none of them counts as long as it is there

A new base must never stand beside an old drafter. So older folders are moved away, all of them, before the first new
one comes; and a process that is killed on the way leaves the mark, which every loading of ours refuses. Folders that
other programs made have neither file, and load as they are.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from joint_train.checkpoint import layout
from joint_train.distributed.ranks import run_on_all_ranks
from joint_train.errors import ConfigError, WeightsError
from joint_train.files import naming, replace

MANIFEST = "joint_train_export.json"
MARK = "EXPORT_INCOMPLETE"
PARTS = ("base", "drafter", "drafter_last", "adapter")
WEIGHTS = re.compile(r"\.safetensors$|\.safetensors\.index\.json$")


def refuse_to_replace(out: Path, sources: Sequence[str | os.PathLike], others: bool) -> None:
    """Refuse to export to a folder with a model that would be lost.

    Args:
        out: the folder of the export.
        sources: folders of the models that were trained.
        others: whether models that no export wrote count as well.

    Raises:
        ConfigError: naming the model.
    """
    for folder in (out / part for part in PARTS):
        if any(Path(source).is_dir() and folder.resolve() == Path(source).resolve() for source in sources):
            raise ConfigError(
                f"{folder} is a model that the run was trained from, and the export would replace it: give another "
                "folder."
            )
        empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
        if others and os.path.lexists(folder) and not empty and not (folder / MANIFEST).exists():
            raise ConfigError(f"{folder} is there, and no export wrote it: give another folder, or remove that one.")


def staged(out: Path) -> Path:
    """Where a folder is written before it is put in place."""
    return out.with_name(f".{out.name}.partial")


def place(outs: Sequence[Path], whole: bool = False) -> None:
    """Give complete staged folders of one export their names. Collective.

    Args:
        outs: the names, in one folder.
        whole: they are a whole export: a folder that an older one had and the new one doesn't goes as well.

    Raises:
        OSError: on every rank alike.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    files = {out: sorted(file for file in staged(out).rglob("*") if file.is_file()) for out in outs}
    mine: dict[str, tuple[int, str]] = {}

    def read() -> None:
        for number, file in enumerate(file for of_one in files.values() for file in of_one):
            if number % ranks == rank:
                mine[str(file)] = layout.file_checksum(file)

    run_on_all_ranks(read)
    of_rank: list[dict[str, tuple[int, str]]] = [mine]
    if dist.is_initialized():
        of_rank = [{} for _ in range(ranks)]
        dist.all_gather_object(of_rank, mine)
    sums = {file: found for part in of_rank for file, found in part.items()}

    def finish() -> None:
        for out in outs:
            contents = {str(file.relative_to(staged(out))): list(sums[str(file)]) for file in files[out]}
            body = {"layout": 1, "files": contents}
            text = json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"
            layout.write_file(staged(out) / MANIFEST, text.encode())
            for folder in {staged(out), *(file.parent for file in files[out])}:
                layout.fsync_folder(folder)
        put_in_place(outs, whole)

    run_on_all_ranks(lambda: finish() if rank == 0 else None)


def put_in_place(outs: Sequence[Path], whole: bool = False) -> None:
    """Rename staged folders to their names, in one process; older ones are moved away before and removed after."""
    folder = outs[0].parent
    mark, gone = folder / MARK, list(outs)
    with naming(folder):
        if whole:
            for name in PARTS:
                file = "adapter_config.json" if name == "adapter" else "config.json"
                if (folder / name / file).exists() and folder / name not in outs:
                    gone.append(folder / name)
            names = [out.name for out in gone]
            what = "These folders are being replaced by an export. If no process does that any more, export again."
            layout.write_file(mark, json.dumps({"what": what, "parts": names}, indent=1).encode())
            layout.fsync_folder(folder)
        for out in reversed(gone):
            _remove(_old(out))
            if os.path.lexists(out):
                out.rename(_old(out))
        for out in outs:
            staged(out).rename(out)
        layout.fsync_folder(folder)
        mark.unlink(missing_ok=True)
        layout.fsync_folder(folder)
    for name in {out.name for out in gone} | (set(PARTS) if whole else set()):  # also what a killed one left
        _remove(_old(folder / name))


def discard(outs: Sequence[Path]) -> None:
    """Remove staged folders after an error."""
    for out in outs:
        shutil.rmtree(staged(out), ignore_errors=True)


def check(folder: Path) -> None:
    """Refuse a folder of ours that isn't what an export wrote, by its sizes alone.

    Raises:
        WeightsError: if the export that it belongs to was never finished, or a file of its weights has another size.
    """
    folder = folder.resolve()
    if folder.name in _being_replaced(folder.parent):
        raise WeightsError(
            f"{folder} belongs to an export that was never finished: {folder.parent / MARK} is there, so base, drafter "
            "and adapter may not belong together. Export again to that folder; or, if you know that they do, delete "
            "that file"
        )
    wrong = []
    for name, (size, _) in _weights(folder).items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            wrong.append(f"{name} can't be read: {error.strerror}")
            continue
        if found != size:
            wrong.append(f"{name} has {found} bytes instead of {size}")
    _refuse(folder, wrong)


def check_contents(folder: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """What of a folder's weights isn't what its export wrote, every byte read; of this rank's share of the files."""
    weights = sorted(_weights(folder).items(), key=lambda item: (item[1][0], item[0]))
    return layout.compare_files(folder, dict(weights[rank::ranks]))


def verify(folder: Path) -> list[str]:
    """What differs between a folder and what its export wrote, every byte of every file read.

    Raises:
        WeightsError: if it has no checksums to compare with.
    """
    check(folder)
    if (files := read_manifest(folder)) is None:
        raise WeightsError(
            f"{folder} has no {MANIFEST}: no export of this version wrote it, so nothing can be compared."
        )
    return layout.compare_files(folder, files)


def replace_file(folder: Path, name: str, text: str) -> None:
    """Change a file beside the weights, and what the folder's checksums say of it, if it has any.

    Raises:
        WriteError: naming what can't be written.
        WeightsError: if the file that holds the checksums is damaged.
    """
    files = read_manifest(folder)
    replace(folder / name, text)
    if files is not None:
        body = {"layout": 1, "files": {**files, name: list(layout.file_checksum(folder / name))}}
        replace(folder / MANIFEST, json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n")


def refuse_changed(folder: Path, problems: list[str]) -> None:
    """Raises WeightsError naming the problems, if there are any."""
    _refuse(folder, problems)


def read_manifest(folder: Path) -> dict[str, list] | None:
    """[size in bytes, CRC-32 in hex] of each file of an export's folder; None for a folder without them.

    Raises:
        WeightsError: if the file that holds them is damaged.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}") from None
    try:
        body = json.loads(raw)
        if body.pop("checksum") != _checksum(body):
            raise ValueError("its checksum doesn't match its contents")
        files = {str(name): [int(size), str(checksum)] for name, (size, checksum) in body["files"].items()}
        if outside := [name for name in files if not layout.stays_inside(name)]:
            raise ValueError(f"it names {outside[0]}, which is not in the folder")
    except Exception as error:  # what is none can fail in any way
        raise WeightsError(
            f"{path} is damaged ({error}). Export again; or, if the weights are good, delete it"
        ) from None
    return files


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(
            f"{folder} isn't what the export wrote: {'; '.join(problems[:5])}{more}. Export again; or, if you changed "
            f"it on purpose, delete {folder / MANIFEST}"
        )


def _weights(folder: Path) -> dict[str, list]:
    return {name: entry for name, entry in (read_manifest(folder) or {}).items() if WEIGHTS.search(name)}


def _being_replaced(folder: Path) -> list[Any]:
    try:
        return json.loads((folder / MARK).read_bytes())["parts"]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return list(PARTS)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one and not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _checksum(body: dict) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
