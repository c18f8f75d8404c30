"""Which checkpoint a run resumes from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from joint_train.checkpoint import layout
from joint_train.checkpoint.layout import DamagedCheckpoint, IncompleteCheckpoint, Manifest
from joint_train.checkpoint.mirror import Mirror, fetch_url
from joint_train.checkpoint.store import without_secrets
from joint_train.distributed.ranks import Ranks
from joint_train.errors import CheckpointError

log = logging.getLogger(__name__)

FETCHING = "fetching a checkpoint (parallel.timeout_seconds bounds the wait for it)"


class Search:
    """Looks through a run's checkpoints, on all ranks together.

    Args:
        folder: the run's ``checkpoints``.
        ranks: every method is collective over them.
        use: called on all ranks for a checkpoint whose manifest and sizes are right, to look at its contents. Where it
            raises DamagedCheckpoint, which has to be on all ranks, the mirror's copy or an older one is tried.
        warn: takes what a user should know.
        mirror: on rank 0, what the run has in object storage, if anything.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        use: Callable[[Path, Manifest], None],
        warn: Callable[[str], None],
        mirror: Mirror | None = None,
    ):
        self.folder, self._ranks, self._use, self._warn, self._mirror = folder, ranks, use, warn, mirror
        self._there: list[int] = []  # steps that the mirror has

    def find(self, resume: str) -> Path | None:
        """See :meth:`joint_train.checkpoint.Checkpointer.find_resume`."""
        own = self._ranks.first("looking for checkpoints", lambda: layout.list_steps(self.folder))
        complete = self._ranks.first("looking for checkpoints", lambda: layout.find_newest(self.folder))
        self._there = self._ranks.first(
            "looking into checkpoint.mirror", lambda: self._mirror.steps() if self._mirror else []
        )
        if resume == "never":
            if complete:
                raise CheckpointError(
                    f"resume=never, but {complete} is there: set another output_dir, or resume=auto to go on from it"
                )
            if self._there:
                raise CheckpointError(
                    f"resume=never, but checkpoint.mirror has checkpoints (step {self._there[0]}): set another "
                    "checkpoint.mirror, or resume=auto to go on from them"
                )
            return None
        if resume == "auto":
            return self._newest_good(own)
        if "://" in resume:
            if not (complete or self._there):
                into = self.folder.parent / "fetched"
                return self._checked(self._ranks.first(FETCHING, lambda: fetch_url(resume, into)))
        else:
            path = self._ranks.first("looking for the checkpoint", lambda: layout.locate(Path(resume).absolute()))
            if path.parent.resolve() == self.folder.resolve():
                return self._resume_own(path, own)
            if not (complete or self._there):
                return self._checked(path)
        self._warn(
            f"output_dir has checkpoints of its own: resuming from those and ignoring resume={without_secrets(resume)}"
        )
        return self._newest_good(own)

    def _resume_own(self, path: Path, own: list[Path]) -> Path:
        step = layout.step_of(path) or 0
        newer = [other for other in own if (layout.step_of(other) or 0) > step]
        complete = self._ranks.first(
            "looking for checkpoints", lambda: [f.name for f in newer if (f / layout.MANIFEST).exists()]
        )
        if complete or any(other > step for other in self._there):
            newest = layout.folder_name(max([*self._there, *(layout.step_of(Path(name)) or 0 for name in complete)]))
            raise CheckpointError(
                f"resume={path}, but {newest} of the same run is newer: "
                "resuming from the older one would mix two histories. "
                "Set another output_dir, which reads from this one, or remove the newer ones"
            )
        return self._checked(path)

    def _checked(self, path: Path) -> Path:
        if problem := self._problem(path):
            if path.parent.resolve() != self.folder.resolve() or layout.step_of(path) not in self._there:
                raise problem
            self._warn(f"{problem}. It is set aside, and fetched from checkpoint.mirror")
            path = self._fetched(layout.step_of(path) or 0)
            if problem := self._problem(path):
                raise problem
        return path

    def _newest_good(self, own: list[Path]) -> Path | None:
        """The newest that is good: the local copy, else the mirror's, else an older one."""
        local = {layout.step_of(path) or 0: path for path in own}
        lost = []
        for step in sorted(local.keys() | set(self._there), reverse=True):
            for source in ("local", "mirror"):
                if source == "local" and step not in local or source == "mirror" and step not in self._there:
                    continue
                try:
                    path = local[step] if source == "local" else self._fetched(step)
                    problem = self._problem(path)
                except (DamagedCheckpoint, IncompleteCheckpoint) as error:
                    problem = error
                if problem is None:
                    return path
                if not isinstance(problem, (DamagedCheckpoint, IncompleteCheckpoint)):
                    raise problem
                if source == "local" and step in self._there:
                    self._warn(f"{problem}. The copy in checkpoint.mirror is tried")
                else:
                    self._warn(f"{problem}. This checkpoint is left untouched and an older one is tried")
                lost += [str(problem)] if isinstance(problem, DamagedCheckpoint) or source == "mirror" else []
        if lost:
            where = f"{self.folder}{' and checkpoint.mirror' if self._there else ''}"
            raise CheckpointError(
                f"none of the checkpoints in {where} is usable ({len(lost)} damaged). Starting from nothing would hide "
                f"that: set another output_dir, or remove them. The last one: {lost[-1]}"
            )
        return None

    def _fetched(self, step: int) -> Path:
        """A checkpoint from the mirror; what was in its place is set aside."""

        def fetch() -> Path:
            assert self._mirror is not None, "rank 0 has it where there are steps in it"
            path = self._mirror.store.fetch(step, self.folder)
            log.info("fetched %s from %s", path.name, self._mirror.store.url)
            return path

        return self._ranks.first(FETCHING, fetch)

    def _problem(self, path: Path) -> CheckpointError | None:
        """What is wrong with a checkpoint: rank 0 looks at manifest and sizes, then all use it."""
        try:
            manifest = self._ranks.first(f"verifying {path}", lambda: layout.verify(path, contents=False))
            self._use(path, manifest)
        except CheckpointError as error:
            return error
        return None


def verify_contents(path: Path, manifest: Manifest, names: list[str], ranks: Ranks) -> None:
    """Compare files with their checksums, each rank its share. Collective.

    Raises:
        DamagedCheckpoint: naming every wrong file, on all ranks.
    """
    by_size = sorted(names, key=lambda name: (manifest.files[name][0], name))
    share = by_size[ranks.rank :: ranks.size]
    problems = ranks.each(f"verifying {path}", lambda: layout.check_files(path, manifest, share))
    if found := [problem for of_rank in problems for problem in of_rank]:
        raise layout.damage_error(path, found)
