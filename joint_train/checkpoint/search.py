"""Which checkpoint a run resumes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from joint_train.checkpoint import layout
from joint_train.checkpoint.layout import DamagedCheckpoint, IncompleteCheckpoint, Manifest
from joint_train.distributed.ranks import Ranks
from joint_train.errors import CheckpointError


class Search:
    """Looks through a run's checkpoints, on all ranks together.

    Args:
        folder: the run's ``checkpoints``.
        ranks: every method is collective over them.
        use: called on all ranks for a checkpoint whose manifest and sizes are right, to look at its contents. Where it
            raises DamagedCheckpoint, which has to be on all ranks, an older one is tried.
        warn: takes what a user should know.
    """

    def __init__(self, folder: Path, ranks: Ranks, use: Callable[[Path, Manifest], None], warn: Callable[[str], None]):
        self.folder, self._ranks, self._use, self._warn = folder, ranks, use, warn

    def find(self, resume: str) -> Path | None:
        """See :meth:`joint_train.checkpoint.Checkpointer.find_resume`."""
        own = self._ranks.first("looking for checkpoints", lambda: layout.list_steps(self.folder))
        if resume == "never":
            complete = self._ranks.first("looking for checkpoints", lambda: layout.newest(self.folder))
            if complete:
                raise CheckpointError(
                    f"resume=never, but {complete} is there: set another output_dir, or resume=auto to go on from it"
                )
            return None
        if resume != "auto":
            path = self._ranks.first("looking for the checkpoint", lambda: layout.locate(Path(resume).absolute()))
            if path.parent.resolve() == self.folder.resolve():
                return self._resume_own(path, own)
            if not self._ranks.first("looking for checkpoints", lambda: layout.newest(self.folder)):
                return self._checked(path)
            self._warn(f"output_dir has checkpoints of its own: resuming from those and ignoring resume={resume}")
        return self._newest_good(own)

    def _resume_own(self, path: Path, own: list[Path]) -> Path:
        newer = [other for other in own if (layout.step_of(other) or 0) > (layout.step_of(path) or 0)]
        if self._ranks.first("looking for checkpoints", lambda: any((f / layout.MANIFEST).exists() for f in newer)):
            raise CheckpointError(
                f"resume={path}, but {newer[0].name} of the same run is newer: "
                "resuming from the older one would mix two histories. "
                "Set another output_dir, which reads from this one, or remove the newer ones"
            )
        return self._checked(path)

    def _checked(self, path: Path) -> Path:
        if problem := self._problem(path):
            raise problem
        return path

    def _newest_good(self, own: list[Path]) -> Path | None:
        lost = []
        for path in own:
            problem = self._problem(path)
            if problem is None:
                return path
            if not isinstance(problem, (DamagedCheckpoint, IncompleteCheckpoint)):
                raise problem
            self._warn(f"{problem}. This checkpoint is left untouched and an older one is tried")
            lost += [path] if isinstance(problem, DamagedCheckpoint) else []
        if lost:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} is usable ({len(lost)} damaged). "
                "Starting from nothing would hide that: set another output_dir, or remove them"
            )
        return None

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
        raise layout.damaged(path, found)
