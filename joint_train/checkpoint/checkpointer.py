"""Saving and resuming a run, on all ranks together."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from joint_train.checkpoint import compat, layout, state
from joint_train.checkpoint.background import BackgroundSave
from joint_train.checkpoint.contents import check_json, json_config, model_config, torch_bytes
from joint_train.checkpoint.loading import Loading
from joint_train.checkpoint.lock import RunLock
from joint_train.checkpoint.mirror import Mirror
from joint_train.checkpoint.search import Search, verify_contents
from joint_train.config import CheckpointConfig, Config
from joint_train.distributed.ranks import Ranks
from joint_train.errors import CheckpointError
from joint_train.pair.model import JointModel

log = logging.getLogger(__name__)

# How long it may take until this rank sees what another one did: its error in this rank's thread, its files over a
# network.
_GRACE_SECONDS = 10.0


class Checkpointer:
    """The checkpoints of one run. Every method but :meth:`close` is collective: all ranks call it, in the same order.

        checkpointer = Checkpointer(cfg.output_dir, cfg.checkpoint, timeout_seconds=cfg.parallel.timeout_seconds)
        if found := checkpointer.resume(cfg.resume, model, optimizer, config=cfg):
            path, saved = found
        …                                   # build loader and schedule from ``saved``
        checkpointer.restore_random_state()
        for step in …:
            …
            checkpointer.poll()
            if step % cfg.checkpoint.every == 0:
                checkpointer.save(step, model, optimizer, {…}, config=cfg, metrics={…})
        checkpointer.close()

    An error is a :class:`CheckpointError` on every rank. The learning rate and the other options of the parameter
    groups are not stored: they follow from the configuration and the step, so that a changed one takes effect.
    """

    def __init__(
        self,
        output_dir: str | Path,
        checkpoint_cfg: CheckpointConfig,
        *,
        timeout_seconds: float = 1800,
        lock_wait_seconds: float = 30,
    ):
        """Locks ``output_dir`` for this run and finishes or removes what a killed one left half done.

        ``timeout_seconds`` bounds each wait for another rank, and a whole background save; ``lock_wait_seconds`` the
        wait for a run that was there before and is still going away.
        """
        self.folder = Path(output_dir).absolute() / "checkpoints"
        self.cfg = checkpoint_cfg
        self.timeout_seconds = timeout_seconds
        self._ranks = Ranks(timeout_seconds)
        # A background save talks while the training loop does.
        self._writer_ranks = Ranks(timeout_seconds, own_group=True) if checkpoint_cfg.background else self._ranks
        self._staging = state.Staging()
        self._plans = uuid.uuid4().hex  # this run's plans: another one in this process has others
        self._save: BackgroundSave | None = None
        self._answers: Callable[[], int] | None = None  # of all ranks to the last poll
        self._step: int | None = None  # of the newest checkpoint known to be good
        self._random: dict | None = None
        self._lock: RunLock | None = None
        self._mirror: Mirror | None = None  # on rank 0
        for note in self._ranks.first("opening output_dir", lambda: self._open(lock_wait_seconds)):
            self._warn(note)

    def find_resume(self, resume: str = "auto") -> Path | None:
        """The checkpoint to resume from, the same on every rank, verified by all of them; None starts from nothing.

        ``auto``: the newest of ``output_dir`` that verifies; those passed over are named in a warning. ``never``: None.
        A path or URL: that checkpoint; but a run that has checkpoints of its own already goes on from them, so that the
        same command can be used again after a preemption. Those of ``checkpoint.mirror`` are its own: if the newest one
        there is newer than those here, or the local copy of it is damaged, rank 0 fetches it, while the others wait up
        to ``timeout_seconds``.

        Raises CheckpointError if ``output_dir`` has complete checkpoints of which none is usable, or newer ones than
        the path's, or any with ``never``: going on there would mix two histories.
        """

        def use(path: Path, manifest: layout.Manifest) -> None:
            if self.cfg.checksums:
                verify_contents(path, manifest, list(manifest.files), self._ranks)

        return self._find(resume, use)

    def load(
        self, path: Path, model: JointModel, optimizer: torch.optim.Optimizer | None = None, *, config: Config | dict
    ) -> dict:
        """Weights, optimizer state and random state into these objects, in place; returns the ``state`` of the save.

        Parameters, buffers and optimizer state may be sharded in another way than when they were saved. With another
        number of ranks the random states can't be those of the save: they are derived from the seed, step and rank. A
        parameter that had no optimizer state (it was frozen) starts with none; state of one that is frozen now is
        dropped. Both are logged, as is each difference of configuration.

        Raises CheckpointError if the models' sizes or vocabulary aren't the checkpoint's, naming the keys.
        """
        manifest = self._ranks.first(f"reading {path}", lambda: layout.verify(path, contents=False))
        return self._load(path, manifest, model, optimizer, config, checksums=False)

    def resume(
        self, resume: str, model: JointModel, optimizer: torch.optim.Optimizer, *, config: Config | dict
    ) -> tuple[Path, dict] | None:
        """:meth:`find_resume` and :meth:`load` in one, which reads each file once: (the checkpoint, ``state`` of the
        save), or None to start from nothing.

        Checksums (``checkpoint.checksums``) are compared while loading. Contents of a damaged checkpoint are in the
        model until an older one replaces them; where there is none, CheckpointError is raised.
        """
        states: list[dict] = []

        def use(path: Path, manifest: layout.Manifest) -> None:
            states.append(self._load(path, manifest, model, optimizer, config, self.cfg.checksums))

        path = self._find(resume, use)
        return (path, states[-1]) if path else None

    def _find(self, resume: str, use: Callable[[Path, layout.Manifest], None]) -> Path | None:
        path = Search(self.folder, self._ranks, use, self._warn, self._mirror).find(resume)
        if self._mirror and path and path.parent.resolve() == self.folder.resolve():
            self._mirror.submit_all(self.folder, layout.step_of(path) or 0)
        return path

    def _load(self, path, manifest, model, optimizer, config, checksums: bool) -> dict:
        loading = Loading(path, manifest, self._ranks, self._warn)
        saved, self._random = loading.run(model, optimizer, json_config(config), checksums)
        self.restore_random_state()
        self._step = manifest.step if path.parent.resolve() == self.folder.resolve() else None
        return saved

    def restore_random_state(self) -> None:
        """Set the generators to where the loaded checkpoint left them (:meth:`load` does it once too).

        Making a data loader draws from them: called last, before the first step, this makes a resume exact.
        """
        if self._random is not None:
            state.set_random_state(self._random)

    def save(
        self,
        step: int,
        model: JointModel,
        optimizer: torch.optim.Optimizer,
        trainer_state: dict,
        *,
        config: Config | dict,
        metrics: dict[str, float] | None = None,
        block: bool = False,
    ) -> None:
        """Save the run after ``step``; a step that is saved already is left alone.

        With ``checkpoint.background`` this returns as soon as the shards are copied to CPU memory and the rest is done
        in the background, unless ``block``. A save that is still being written is waited for first.

        ``trainer_state`` is plain JSON and the same on every rank; ``metrics`` are what ``checkpoint.keep_best`` names.
        """
        self.wait()
        if step == self._step:
            return
        check_json(trainer_state, "state")
        tensors = {**state.pair_tensors(model), "optimizer": state.optimizer_tensors(model, optimizer)}
        shards = {part: state.local_shards(of_part) for part, of_part in tensors.items()}
        background = self.cfg.background and not block
        config = json_config(config)
        documents = {
            "config.json": config,
            "state.json": trainer_state,
            "base/config.json": model_config(model.base),
            "drafter/config.json": model_config(model.drafter),
        }
        frozen = getattr(model, "frozen_base", None)
        if frozen is not None and model.base_stays:
            documents[compat.FROZEN_BASE] = frozen
        job = _Job(
            step=step,
            tensors=tensors,
            shards=self._staging.copy(shards) if background else shards,
            documents={name: json.dumps(document, indent=1).encode() for name, document in documents.items()},
            config_hash=compat.config_hash(config),
            metrics=_finite(metrics or {}),
            random=state.random_state(),
        )
        if background:
            self._save = BackgroundSave(step, lambda: self._write(job, self._writer_ranks))
        else:
            self._write(job, self._ranks)
            self._step = step

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Give the checkpoint that this run goes on from the metrics of its step, which a signal had kept from being
        measured before it was saved; another run's checkpoint is left as it is."""
        if self._step is None:
            return
        folder = self.folder / layout.folder_name(self._step)

        def add() -> None:
            layout.write_metrics(folder, _finite(metrics))
            if self._mirror is not None:
                self._mirror.submit(folder)

        self._ranks.first(f"writing {folder / layout.MANIFEST}", add)

    @property
    def saving(self) -> bool:
        """Whether a background save is under way: the same on every rank."""
        return self._save is not None

    def poll(self) -> None:
        """Raise on every rank if a background save failed on any. Call it each step: it costs next to nothing.

        The ranks' answers to a poll are looked at in the next one, when all have given them: none waits for another.
        """
        if self._save is None:
            return
        if self._answers is not None:
            worst = self._answers()
            self._answers = None
            if worst != BackgroundSave.RUNNING:
                self._finish(self._save, worst)
                return
        self._answers = self._ranks.start_highest(f"saving step {self._save.step}", self._save.status())

    def wait(self) -> None:
        """Wait until a background save is finished, on every rank; raises as :meth:`poll` does."""
        if self._save is None:
            return
        self._save.join(self.timeout_seconds)
        if self._answers is not None:
            self._answers()
            self._answers = None
        self._finish(self._save, self._ranks.highest(f"saving step {self._save.step}", self._save.status(late=True)))

    def _finish(self, save: BackgroundSave, status: int) -> None:
        self._save = None
        if status == BackgroundSave.FAILED:
            if save.error is None:
                save.join(_GRACE_SECONDS)
            save.reraise()
            raise CheckpointError(f"saving step {save.step} failed on another rank, which says why")
        self._step = save.step

    def upload(self, folder: Path) -> None:
        """Copy a complete export to ``checkpoint.mirror``, if there is one, in the background. Not collective."""
        if self._mirror is not None:
            self._mirror.submit(folder)

    def close(self, upload_seconds: float | None = None) -> None:
        """Wait for a background save and for uploads, these up to ``upload_seconds`` (by default
        ``checkpoint.upload_wait_seconds``), and free the run's lock.

        Not collective: also right on a rank that fails alone.
        """
        save, self._save = self._save, None
        try:
            if save is not None:
                save.join(self.timeout_seconds)
                if save.status(late=True) == BackgroundSave.FAILED:
                    save.reraise()
        finally:
            if self._mirror is not None:
                self._mirror.finish(self.cfg.upload_wait_seconds if upload_seconds is None else upload_seconds)
                for note in self._thin(self._step) if self._step is not None else []:
                    log.warning(note)
            if self._lock is not None:
                self._lock.release()

    def _open(self, lock_wait_seconds: float) -> list[str]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"output_dir {self.folder.parent} can't be written: {error.strerror}") from None
        self._lock = RunLock(self.folder.parent, lock_wait_seconds)
        notes = layout.recover(self.folder)
        if self.cfg.mirror:
            self._mirror = Mirror(self.cfg)
            notes += self._mirror.open(self.folder)
        return notes

    def _write(self, job: _Job, ranks: Ranks) -> None:
        """Write everything, agree that it is on disk, then let it appear. In the background where that is set."""
        started = time.monotonic()
        final = self.folder / layout.folder_name(job.step)
        temporary = ranks.first(f"making {final}", lambda: self._make_temporary(final, job))
        try:
            written: dict[str, list] = {}
            for part in job.tensors:
                files = self._collective(
                    f"writing {final / part}",
                    state.save_tensors,
                    temporary / part,
                    job.tensors[part],
                    job.shards[part],
                    ranks,
                    f"{part} {self._plans}",
                )
                written |= {f"{part}/{name}": value for name, value in files.items()}
            random = ranks.each(f"writing {final}", lambda: (job.step, job.random))
            if any(step != job.step for step, _ in random):
                raise CheckpointError(f"the ranks are at different steps: {[step for step, _ in random]}")
            if ranks.rank == 0:
                job.documents["random.pt"] = torch_bytes([of_rank for _, of_rank in random])
            files = ranks.each(f"writing {final}", lambda: written | self._write_small(temporary, job, ranks))
            notes = ranks.first(f"finishing {final}", lambda: self._complete(temporary, final, job, files))
        except CheckpointError:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if ranks.rank == 0:
            for note in notes:
                log.warning(note)
            seconds = time.monotonic() - started
            log.info("saved %s in %.1f s", final, seconds)
            if seconds > self.cfg.grace_seconds:
                log.warning(
                    "that is longer than checkpoint.grace_seconds=%g: a save after a signal would be lost. Set "
                    "checkpoint.grace_seconds=%d, and the launcher's limits above it",
                    self.cfg.grace_seconds, 1.5 * seconds,
                )  # fmt: skip

    @staticmethod
    def _make_temporary(final: Path, job: _Job) -> Path:
        temporary = layout.temporary_path(final)
        for part in job.tensors:
            (temporary / part).mkdir(parents=True)
        return temporary

    @staticmethod
    def _write_small(temporary: Path, job: _Job, ranks: Ranks) -> dict[str, tuple[int, str]]:
        """The small files, on rank 0; then every rank makes the names it has written durable."""
        files = {}
        if ranks.rank == 0:
            files = {name: layout.write_file(temporary / name, data) for name, data in job.documents.items()}
        for folder in {temporary, *(p for part in job.tensors for p in ((temporary / part).parent, temporary / part))}:
            layout.fsync_folder(folder)
        return files

    def _complete(self, temporary: Path, final: Path, job: _Job, files: list[dict]) -> list[str]:
        """On rank 0, when all is on disk: manifest, name, retention."""
        manifest = layout.Manifest(
            step=job.step,
            world_size=len(files),
            config_hash=job.config_hash,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={name: version(name) for name in ("torch", "transformers")},
            metrics=job.metrics,
            files={name: list(value) for of_rank in files for name, value in sorted(of_rank.items())},
        )
        deadline = time.monotonic() + _GRACE_SECONDS
        while problems := layout.check_sizes(temporary, manifest):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"rank 0 doesn't see what the other ranks wrote ({problems[0]}): is output_dir "
                    f"{self.folder.parent} on a file system that all machines share?"
                )
            time.sleep(0.5)
        layout.write_file(temporary / layout.MANIFEST, manifest.to_bytes())
        layout.fsync_folder(temporary)
        notes = layout.publish(temporary, final)
        cfg = self.cfg
        if cfg.keep_best and job.metrics and layout.metric_of(cfg.keep_best)[0] not in job.metrics:
            known = ", ".join(sorted(job.metrics)) or "none"
            notes.append(f"checkpoint.keep_best={cfg.keep_best} is not a metric of {final.name} (those are: {known})")
        if self._mirror is not None:
            self._mirror.submit(final)
        return notes + self._thin(job.step)

    def _thin(self, step: int) -> list[str]:
        """Remove what retention gives up and isn't being uploaded."""
        cfg = self.cfg
        try:
            for folder in layout.prunable(self.folder, cfg.keep_last, cfg.keep_every, cfg.keep_best, step):
                if self._mirror is None or self._mirror.let_go(folder):
                    layout.remove(folder)
        except OSError as error:
            return [f"old checkpoints could not be removed: {error}"]
        return []

    def _collective(self, what: str, function, *args):
        """Run one of torch's collective functions, its errors in our words."""
        try:
            return function(*args)
        except CheckpointException as error:
            failures = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
            raise CheckpointError(f"{what} failed: {failures}") from error
        except Exception as error:
            raise CheckpointError(f"{what} failed: {type(error).__name__}: {error}") from error

    def _warn(self, message: str) -> None:
        if self._ranks.rank == 0:
            log.warning(message)


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that a manifest has: JSON knows no NaN."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


@dataclass
class _Job:
    """All that a save writes, gathered while training stood still."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by folder and name, for their shapes and shardings
    shards: dict[str, dict[str, Tensor]]  # the data
    documents: dict[str, bytes]
    config_hash: str
    metrics: dict[str, float]
    random: dict
