"""``checkpoint.mirror``: what a run keeps in object storage beside its own folder, and what it fetches from there.

Only rank 0 uploads and fetches, since it sees the files of every rank.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from joint_train.checkpoint import layout
from joint_train.checkpoint.layout import DamagedCheckpoint, IncompleteCheckpoint
from joint_train.checkpoint.store import Store, checkpoint_name, to_json
from joint_train.config import CheckpointConfig
from joint_train.errors import CheckpointError

log = logging.getLogger(__name__)


class Mirror:
    """Uploads in a thread of its own: the newest first, one at a time. What fails is tried again with the next one.

    The thread is a daemon: a process that has to go isn't held up by storage that hangs.
    """

    def __init__(self, cfg: CheckpointConfig):
        """Raises CheckpointError if there is no such storage."""
        self.store, self._cfg = Store(cfg.mirror), cfg
        self.answers = False
        self._waiting: list[Path] = []  # the last one goes first
        self._current: Path | None = None
        self._done: set[Path] = set()
        self._failed: dict[Path, str] = {}
        self._warned = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    def open(self, checkpoints: Path) -> list[str]:
        """See that the storage can be written to. If not, this is a note for a run that has something to go on from.

        Raises:
            CheckpointError: for a run that has nothing: it may have checkpoints there.
        """
        try:
            self.store.claim()
            self.answers = True
        except CheckpointError as error:
            if not layout.newest(checkpoints):
                raise CheckpointError(
                    f"checkpoint.mirror: {error}. Without it this can't be known to be a new run: try again, or set "
                    "checkpoint.mirror=null"
                ) from None
            return [f"checkpoint.mirror: {error}. Newer checkpoints there, if any, are not looked for"]
        return []

    def submit(self, folder: Path) -> None:
        """Upload a complete checkpoint or export, and before long what failed before and is still there."""
        with self._changed:
            again = [path for path in self._failed if path != folder and path not in self._waiting]
            self._waiting = [*again, *(path for path in self._waiting if path != folder), folder]
            self._changed.notify_all()

    def submit_all(self, checkpoints: Path, newest: int) -> None:
        """Upload the checkpoints up to a step: what an earlier run may not have come to."""
        for folder, _ in layout.complete(checkpoints, newest):
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
        """Wait until all is uploaded, at most so long; then say what is there and what is missing."""
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
                    "checkpoint, further failures are counted and said at the end of the run",
                    folder.name, reason,
                )  # fmt: skip

    def _upload(self, folder: Path) -> None:
        started = time.monotonic()
        if layout.step_of(folder) is None:
            files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
            sums: dict[str, list] = {name: list(layout.file_checksum(file)) for name, file in files.items()}
            self.store.upload(folder, folder.name, sums, to_json({"files": sums}))
        else:
            manifest = layout.read_manifest(folder)
            marker = (folder / layout.MANIFEST).read_bytes()
            self.store.upload(folder, checkpoint_name(manifest.step), manifest.files, marker)
        log.info("uploaded %s to %s in %.1f s", folder.name, self.store.url, time.monotonic() - started)
        newest = max((step for path in {folder, *self._done} if (step := layout.step_of(path)) is not None), default=-1)
        if newest >= 0:
            self.store.thin(newest, self._cfg)


def bring(resume: str, checkpoints: Path, mirror: Mirror | None) -> tuple[str, list[str]]:
    """Fetch the newest good checkpoint of the mirror if it is newer than the local ones; or, for a run that has none,
    that of ``resume`` if it is a URL, into ``output_dir/fetched``.

    Returns:
        What ``resume`` means now, and what a user should know.

    Raises:
        CheckpointError: if the storage fails, if all that it has is damaged and there is nothing local, or with
            ``resume=never`` if it has checkpoints.
    """
    own, notes = layout.newest(checkpoints), []
    if mirror is not None and mirror.answers:
        store = mirror.store
        newer = [step for step in store.steps() if own is None or step > (layout.step_of(own) or 0)]
        if newer and resume == "never":
            raise CheckpointError(
                f"resume=never, but {store.url} has checkpoints (step {newer[0]}): set another checkpoint.mirror, or "
                "resume=auto to go on from them"
            )
        for step in newer:
            try:
                own = store.fetch(step, checkpoints)
            except (DamagedCheckpoint, IncompleteCheckpoint) as error:
                notes.append(f"{error}. It is left untouched in the mirror and an older one is tried")
                continue
            log.info("fetched %s from %s", own.name, store.url)
            break
        else:
            if newer and own is None:
                raise CheckpointError(f"none of the checkpoints in {store.url} is usable: {'; '.join(notes)}")
    if "://" in resume and own is not None:
        notes.append(f"output_dir has checkpoints of its own: resuming from those and ignoring resume={resume}")
        return "auto", notes
    if "://" in resume:
        return str(_from_url(resume, checkpoints.parent / "fetched")), notes
    return resume, notes


def _from_url(url: str, into: Path) -> Path:
    root, _, last = url.rstrip("/").rpartition("/checkpoints/")
    step = layout.step_of(Path(last)) if root else None
    store = Store(root if step is not None else url)
    if step is None and not (steps := store.steps()):
        raise CheckpointError(
            f"resume={url}: no complete checkpoint is there. Give the URL of a run (with checkpoints/ in it) or of its "
            "checkpoints/step_XXXXXXXX"
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
