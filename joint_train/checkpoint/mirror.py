"""``checkpoint.mirror``: what a run keeps in object storage beside its own folder, and what it fetches from there.

Only rank 0 uploads and fetches, since it sees the files of every rank.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from joint_train.checkpoint import layout
from joint_train.checkpoint.layout import DamagedCheckpoint, IncompleteCheckpoint
from joint_train.checkpoint.store import Store, checkpoint_name, to_json, without_secrets
from joint_train.config import CheckpointConfig
from joint_train.errors import CheckpointError

log = logging.getLogger(__name__)

RECORDS = ("config.yaml", "metrics.jsonl", "wandb/run_id")  # of a run, beside its checkpoints
RUN = "run.json"  # in output_dir: the id of the run whose mirror this is


class OtherRun(CheckpointError):
    """The mirror is another run's, or another process writes to it now."""


class Mirror:
    """Uploads in a thread of its own: the newest first, one at a time. What fails is tried again with the next one.

    The thread is a daemon: a process that has to go isn't held up by storage that hangs.
    """

    def __init__(self, cfg: CheckpointConfig):
        assert cfg.mirror is not None, "made only where checkpoint.mirror is set"
        self.store, self._cfg = Store(cfg.mirror), cfg
        self.answers = False
        self._output_dir: Path | None = None
        self._holder = uuid.uuid4().hex  # of this process, in mirror.json
        self._waiting: list[Path] = []  # the last one goes first
        self._current: Path | None = None
        self._done: set[Path] = set()
        self._failed: dict[Path, str] = {}
        self._warned = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    def open(self, checkpoints: Path) -> list[str]:
        """Check that the mirror is this run's and can be written to. If it can't, a run that can resume locally only
        gets a warning.

        Raises:
            OtherRun: naming the run that it belongs to.
            CheckpointError: for a run that has nothing: it may have checkpoints there.
        """
        self._output_dir = checkpoints.parent
        try:
            self._claim(checkpoints)
            self.answers = True
            for name in RECORDS:
                if not (self._output_dir / name).exists() and self.store.get_file(name, self._output_dir / name):
                    log.info("fetched %s from %s", name, self.store.url)
        except OtherRun:
            raise
        except CheckpointError as error:
            if not layout.find_newest(checkpoints):
                raise CheckpointError(
                    f"checkpoint.mirror: {error}. So it can't be told whether the mirror already has "
                    "checkpoints of this run: try again, or set checkpoint.mirror=null"
                ) from None
            return [f"checkpoint.mirror: {error}. Newer checkpoints there, if any, are not looked for"]
        return []

    def _claim(self, checkpoints: Path) -> None:
        """Make the mirror this process's. A run whose disk was lost is known by its ``output_dir``."""
        file = checkpoints.parent / RUN
        run, owner = _read_id(file), self.store.owner()
        if (other := owner.get("run")) not in (None, run):
            if run or layout.find_newest(checkpoints) or owner.get("output_dir") != str(checkpoints.parent):
                raise OtherRun(
                    f"checkpoint.mirror={self.store.url} is the mirror of another run: {_name(owner)}. Set another "
                    f"checkpoint.mirror, or null. If it is this run's, which was in that output_dir, delete "
                    f"{self.store.url}/mirror.json; resume={self.store.url} with another checkpoint.mirror starts a "
                    "run of its own from its checkpoints"
                )
            run = str(other)
        home = owner.get("output_dir")
        if run and isinstance(home, str) and Path(home) != checkpoints.parent and _read_id(Path(home) / RUN) == run:
            if not os.path.samefile(home, checkpoints.parent):  # a folder that was moved is gone from there
                raise OtherRun(
                    f"checkpoint.mirror={self.store.url} is the mirror of the run in {home}, of which "
                    f"{checkpoints.parent} is a copy: both would write to it. Set another checkpoint.mirror, or null"
                )
        run = run or uuid.uuid4().hex
        layout.write_file(file, to_json({"run": run}))
        self.store.claim(
            {
                "run": run, "output_dir": str(checkpoints.parent), "host": socket.gethostname(), "pid": os.getpid(),
                "since": time.ctime(), "holder": self._holder,
            }
        )  # fmt: skip

    def _check_holder(self) -> None:
        """Raises OtherRun if another process has made the mirror its own since."""
        owner = self.store.owner()
        if owner.get("holder") not in (None, self._holder):
            raise OtherRun(f"{self.store.url} was taken over by {_name(owner)}: nothing more is uploaded from here")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first; none if the storage doesn't answer."""
        return self.store.steps() if self.answers else []

    def submit(self, folder: Path) -> None:
        """Upload a complete checkpoint or export, and soon also earlier ones whose upload failed."""
        with self._changed:
            again = [path for path in self._failed if path != folder and path not in self._waiting]
            self._waiting = [*again, *(path for path in self._waiting if path != folder), folder]
            self._changed.notify_all()

    def submit_all(self, checkpoints: Path, newest: int) -> None:
        """Upload the checkpoints up to a step, which an earlier run may not have uploaded."""
        for folder, _ in layout.list_complete(checkpoints, newest):
            self.submit(folder)

    def let_go(self, folder: Path) -> bool:
        """Whether a local folder may be removed: not while it is uploaded. One that still waits isn't uploaded then."""
        with self._changed:
            if folder == self._current:
                return False
            self._waiting = [path for path in self._waiting if path != folder]
            self._failed.pop(folder, None)
            return True

    def finish(self, seconds: float) -> None:
        """Wait until everything is uploaded, up to a time limit; then log what is there and what is missing."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._current is None, seconds)
            missing = {path.name: reason for path, reason in self._failed.items()}
            missing |= {path.name: f"not begun within {seconds:.0f} s" for path in self._waiting}
            if self._current is not None:
                missing[self._current.name] = f"not finished within {seconds:.0f} s"
            done = len(self._done)
        if missing:
            named = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            log.warning(
                "checkpoint.mirror: %d folders are complete in %s, %d of this run are missing there (%s). They are in "
                "output_dir, and the same command uploads checkpoints when it resumes from them",
                done, self.store.url, len(missing), named,
            )  # fmt: skip
        elif done:
            log.info("checkpoint.mirror: %d folders are complete in %s, none is missing", done, self.store.url)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                folder = self._current = self._waiting.pop()
            reason = None
            try:
                self._upload(folder)
            except Exception as error:
                reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            with self._changed:
                self._current = None
                self._failed.pop(folder, None)
                if reason is None:
                    self._done.add(folder)
                else:
                    self._failed[folder] = reason
                self._changed.notify_all()
            if reason and not self._warned:
                self._warned = True
                log.warning(
                    "checkpoint.mirror: %s was not uploaded (%s). Training goes on; it is tried again with the next "
                    "checkpoint, further failures are counted and reported at the end of the run",
                    folder.name, reason,
                )  # fmt: skip

    def _upload(self, folder: Path) -> None:
        started = time.monotonic()
        self._check_holder()
        if self._output_dir is not None:
            for name in RECORDS:
                self.store.put_file(name, self._output_dir / name)
        if layout.step_of(folder) is None:
            # What an export is made of: no links, and nothing that another export has left half done.
            found = {f.relative_to(folder): f for f in sorted(folder.rglob("*")) if f.is_file() and not f.is_symlink()}
            files = {str(p): f for p, f in found.items() if not any(part.startswith(".") for part in p.parts)}
            sums: dict[str, list] = {name: list(layout.file_checksum(file)) for name, file in files.items()}
            self.store.upload(folder, folder.name, sums, to_json({"files": sums}))
        else:
            manifest = layout.read_manifest(folder)
            marker = (folder / layout.MANIFEST).read_bytes()
            self.store.upload(folder, checkpoint_name(manifest.step), manifest.files, marker)
        log.info("uploaded %s to %s in %.1f s", folder.name, self.store.url, time.monotonic() - started)
        newest = max((step for path in {folder, *self._done} if (step := layout.step_of(path)) is not None), default=-1)
        if newest >= 0:
            self._check_holder()
            self.store.thin(newest, self._cfg)


def fetch_url(url: str, into: Path) -> Path:
    """Copy a checkpoint of another run, or that run's newest, into a folder; one that is there already stays.

    Args:
        url: of a run, or of its ``checkpoints/step_XXXXXXXX``.

    Raises:
        CheckpointError: if there is none, it is damaged, or the storage fails.
    """
    root, _, last = url.rstrip("/").rpartition("/checkpoints/")
    step = layout.step_of(Path(last)) if root else None
    store = Store(root if step is not None else url)
    if step is None and not (steps := store.steps()):
        raise CheckpointError(
            f"resume={without_secrets(url)}: no complete checkpoint is there. Give the URL of a run (with checkpoints/ "
            "in it) or of its checkpoints/step_XXXXXXXX"
        )
    step = steps[0] if step is None else step
    into.mkdir(parents=True, exist_ok=True)
    layout.recover(into)
    done = into / layout.folder_name(step)
    try:
        if layout.verify(done).to_bytes() == store.manifest(step).to_bytes():
            return done
    except (DamagedCheckpoint, IncompleteCheckpoint):
        pass
    return store.fetch(step, into)


def _read_id(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_bytes())["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _name(owner: dict) -> str:
    """The owner of a mirror, in words."""
    at = f"output_dir {owner.get('output_dir', 'unknown')} on {owner.get('host', 'an unknown host')}"
    return f"{at} (process {owner.get('pid', 'unknown')}, since {owner.get('since', 'unknown')})"
