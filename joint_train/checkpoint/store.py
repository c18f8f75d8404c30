"""A run's folder in object storage, by fsspec: complete checkpoints and exports, and nothing that only looks so.

A folder there has the name it has in ``output_dir``: ``URL/checkpoints/step_00000100``, ``URL/export``. Its manifest
``COMPLETE`` is removed first where one is replaced, and written last, when every other object has the manifest's size:
nothing without it counts. ``URL/mirror.json`` says which run's it is, and which process of that run writes to it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from joint_train.checkpoint import layout
from joint_train.checkpoint.layout import IncompleteCheckpoint, Manifest
from joint_train.config import CheckpointConfig
from joint_train.errors import CheckpointError
from joint_train.progress import shown_progress

log = logging.getLogger(__name__)

ATTEMPTS = 3
PAUSE_SECONDS = 2.0  # after the first failure, and twice as long after each further one

T = TypeVar("T")


class Store:
    """The folder of one run in object storage.

    Errors of the storage, after :data:`ATTEMPTS` of each operation, are a CheckpointError that names the URL.
    """

    def __init__(self, url: str):
        self._address = url.rstrip("/")
        self.url = without_secrets(self._address)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        local = self._address.startswith(("file:", "local:")) or "://" not in self._address
        try:
            fs, root = url_to_fs(self._address, **({"auto_mkdir": True} if local else {}))
        except Exception as error:  # some protocols connect here
            raise CheckpointError(f"{self.url} can't be opened: {type(error).__name__}: {error}") from error
        return fs, root.rstrip("/")

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def owner(self) -> dict[str, Any]:
        """What ``mirror.json`` says; nothing if there is none, or none that can be read."""
        path = self._path("mirror.json")
        try:
            owner = json.loads(self._try("reading mirror.json", lambda: self._fs.cat_file(path), True))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def claim(self, owner: dict[str, Any]) -> None:
        """Write ``mirror.json``: that storage can be written to is known at once."""
        self._try("writing mirror.json", lambda: self._fs.pipe_file(self._path("mirror.json"), to_json(owner)))

    def put_file(self, name: str, file: Path) -> None:
        """Copy a small file, as it is now, to ``name``; one that isn't there is left out."""
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return
        self._try(f"uploading {name}", lambda: self._fs.pipe_file(self._path(name), data))

    def get_file(self, name: str, file: Path) -> bool:
        """Copy a small file from ``name``; whether it is there."""
        path = self._path(name)
        try:
            data = self._try(f"fetching {name}", lambda: self._fs.cat_file(path), True)
        except FileNotFoundError:
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        layout.write_file(file, data)
        return True

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first; of these only names and markers were looked at."""
        return sorted((step for step, complete in self._folders().items() if complete), reverse=True)

    def manifest(self, step: int) -> Manifest:
        return layout.parse_manifest(self._marker(checkpoint_name(step)), f"{self.url}/{checkpoint_name(step)}")

    def upload(self, folder: Path, name: str, files: dict[str, list], marker: bytes) -> None:
        """Copy a complete folder to ``name``; one that is there already, with the same manifest, is left alone, and of
        one with the same files only the manifest is written again.

        Args:
            files: a path below the folder to its [size in bytes, CRC-32 in hex], by which each is checked before it
                is sent. On the way the storage's own protocol checks it; the sizes are compared when all are there.
            marker: the contents of ``COMPLETE``.

        Raises:
            DamagedCheckpoint: if a local file isn't what was written.
            CheckpointError: if the storage fails, or has an object of another size.
        """
        if (stored := self._marker_or_none(name)) == marker:
            return
        if stored is not None and _files(stored) == files:
            self._try(f"completing {name}", lambda: self._fs.pipe_file(self._path(name, layout.MANIFEST), marker))
            return
        self._remove_marker(name)
        manifest = Manifest(0, 0, "", "", {}, files=files)
        for file in files:
            if problems := layout.check_files(folder, manifest, [file]):
                raise layout.damage_error(folder, problems)
            source, target = str(folder / file), self._path(name, file)
            self._try(f"uploading {name}/{file}", partial(self._fs.put_file, source, target))
        found = self._try(f"listing {name}", lambda: self._sizes(name))
        if wrong := [file for file, (size, _) in files.items() if found.get(file) != size]:
            raise CheckpointError(f"{self.url}/{name}/{wrong[0]} has {found.get(wrong[0])} bytes after its upload")
        for extra in found.keys() - files.keys():  # of what was there before: weights that a loader might prefer
            path = self._path(name, extra)
            self._try(f"replacing {name}", partial(self._fs.rm_file, path))
        self._try(f"completing {name}", lambda: self._fs.pipe_file(self._path(name, layout.MANIFEST), marker))

    def fetch(self, step: int, checkpoints: Path) -> Path:
        """Copy a checkpoint into a folder of checkpoints, which has it when every byte was compared.

        Raises:
            DamagedCheckpoint, IncompleteCheckpoint: if what is stored isn't what was saved.
        """
        marker, final = self._marker(checkpoint_name(step)), checkpoints / layout.folder_name(step)
        manifest = layout.parse_manifest(marker, f"{self.url}/{checkpoint_name(step)}")
        temporary = layout.temporary_path(final)
        temporary.mkdir(parents=True)
        try:
            with shown_progress("bytes", brief=True) as show:
                self._fetch_files(step, manifest, temporary, partial(show, f"fetching {self.url}, step {step}"))
            if problems := layout.check_files(temporary, manifest, list(manifest.files)):
                raise layout.damage_error(f"{self.url}/{checkpoint_name(step)}", problems)
            for inner in {(temporary / file).parent for file in manifest.files}:
                layout.fsync_folder(inner)
            layout.write_file(temporary / layout.MANIFEST, marker)
            for note in layout.publish(temporary, final):
                log.warning(note)
        except BaseException:
            layout.remove(temporary)
            raise
        return final

    def _fetch_files(self, step: int, manifest: Manifest, into: Path, show: Callable[[int, int], None]) -> None:
        """Copy the files that are there, and call `show` with how many bytes are, and of how many."""
        done = 0
        for file, (size, _) in manifest.files.items():
            show(done, manifest.nbytes)
            source, target = self._path(checkpoint_name(step), file), into / file
            target.parent.mkdir(parents=True, exist_ok=True)

            def fetch(source: str = source, target: Path = target, before: int = done) -> None:
                of_file = Callback(hooks={"show": lambda _, value, **__: show(before + value, manifest.nbytes)})
                self._fs.get_file(source, str(target), callback=of_file)

            try:
                self._try(f"fetching {file}", fetch, True)
            except FileNotFoundError:
                pass  # the check names it
            else:
                _fsync(target)
            done += size
        show(done, manifest.nbytes)

    def thin(self, newest: int, cfg: CheckpointConfig) -> None:
        """Remove what retention gives up: of the checkpoints up to ``newest``, which is complete, and of the parts of
        older ones whose upload never finished."""
        if cfg.keep_last == 0:
            return
        folders = {step: complete for step, complete in self._folders().items() if step <= newest}
        kept = [(step, self.manifest(step).metrics) for step, complete in folders.items() if complete]
        keep = layout.steps_to_keep(kept, cfg.keep_last, cfg.keep_every, cfg.keep_best)
        for step in sorted(folders.keys() - keep):
            self._remove_marker(checkpoint_name(step))
            self._try(
                f"removing {checkpoint_name(step)}",
                partial(self._fs.rm, self._path(checkpoint_name(step)), recursive=True),
            )

    def _folders(self) -> dict[int, bool]:
        """Whether the folder of a step has its marker."""

        def find() -> dict[int, bool]:
            self._fs.invalidate_cache()
            try:
                names = self._fs.ls(self._path("checkpoints"), detail=False)
            except FileNotFoundError:
                return {}
            steps = {layout.step_of(Path(PurePosixPath(name).name)) for name in names}
            return {
                step: self._fs.exists(self._path(checkpoint_name(step), layout.MANIFEST))
                for step in steps
                if step is not None
            }

        return self._try("listing checkpoints", find)

    def _sizes(self, name: str) -> dict[str, int]:
        self._fs.invalidate_cache()
        found = self._fs.find(self._path(name), detail=True)
        return {path[len(self._path(name)) + 1 :]: entry["size"] for path, entry in found.items()}

    def _marker(self, name: str) -> bytes:
        if (marker := self._marker_or_none(name)) is None:
            raise IncompleteCheckpoint(f"{self.url}/{name} is incomplete: it has no {layout.MANIFEST}")
        return marker

    def _marker_or_none(self, name: str) -> bytes | None:
        path = self._path(name, layout.MANIFEST)
        try:
            return self._try(f"reading {name}/{layout.MANIFEST}", lambda: self._fs.cat_file(path), True)
        except FileNotFoundError:
            return None

    def _remove_marker(self, name: str) -> None:
        path = self._path(name, layout.MANIFEST)
        if self._try(f"looking at {name}", lambda: self._fs.exists(path)):
            self._try(f"replacing {name}", lambda: self._fs.rm_file(path))

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _try(self, what: str, action: Callable[[], T], absent: bool = False) -> T:
        """Do it, a few times if need be. With ``absent`` a FileNotFoundError is an answer, which is raised as it is."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except CheckpointError:
                raise
            except Exception as error:
                gone = isinstance(error, FileNotFoundError)
                if gone and absent:
                    raise
                if gone or attempt == ATTEMPTS:
                    reason = f"{type(error).__name__}: {error}"
                    raise CheckpointError(f"{what} in {self.url} failed, attempt {attempt}: {reason}") from error
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError


def without_secrets(url: str) -> str:
    """A URL as it may be logged: without a password, or whatever else stands before the host."""
    return re.sub(r"(?<=://)[^/@]*@", "…@", url)


def checkpoint_name(step: int) -> str:
    return f"checkpoints/{layout.folder_name(step)}"


def _files(marker: bytes) -> dict[str, list] | None:
    """The sizes and checksums in a ``COMPLETE``; None if it can't be read."""
    try:
        return json.loads(marker)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def to_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
