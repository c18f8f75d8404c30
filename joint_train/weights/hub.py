"""``model.export.push_to_hub``: an export as repositories of the Hugging Face hub: ``ID-base``, ``ID-drafter`` and,
where the run has them, ``ID-drafter_last`` and ``ID-adapter``.

One for each, as released pairs are: an engine takes it by its id alone.
"""

import logging
import threading
import time
from pathlib import Path

from huggingface_hub import HfApi

from joint_train.weights.placing import PARTS

log = logging.getLogger(__name__)

OPTIONAL = ("base", "drafter_last", "adapter")  # a base that stays as it is saved isn't exported
ATTEMPTS = 3
PAUSE_SECONDS = 5.0  # after the first failure, and twice as long after each further one


def push(folder: Path, repo_id: str, private: bool) -> list[str]:
    """Push the folders of an export, each in one commit; their URLs. The folder is only read.

    Weights that an earlier push left there under other names are removed in the same commit: loading would prefer a
    ``model.safetensors`` to the shards beside it. An existing repository keeps its visibility.

    Raises:
        Exception: what the hub's client raised last, after :data:`ATTEMPTS` of a repository.
    """
    api, urls = HfApi(), []
    for part in PARTS:
        if part in OPTIONAL and not (folder / part).is_dir():
            continue
        for attempt in range(1, ATTEMPTS + 1):
            try:
                repo = api.create_repo(f"{repo_id}-{part}", private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=repo.repo_id,
                    folder_path=folder / part,
                    commit_message=f"The {part} of a jointly trained pair",
                    delete_patterns=["*.safetensors", "*.safetensors.index.json"],
                )
                urls.append(str(repo))
                break
            except Exception:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    return urls


class Push:
    """:func:`push` in a thread of its own, which doesn't hold up a process that has to go."""

    def __init__(self, folder: Path, repo_id: str, private: bool):
        self._folder, self._repo_id = folder, repo_id
        self._urls: list[str] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(private,), name="push", daemon=True)
        self._thread.start()

    def _run(self, private: bool) -> None:
        try:
            self._urls = push(self._folder, self._repo_id, private)
        except Exception as error:
            self._error = error

    def finish(self, seconds: float) -> None:
        """Wait, up to a time limit, and log the outcome: a failed push is a warning, as the local export is
        complete."""
        self._thread.join(seconds)
        late = self._thread.is_alive()
        if not late and self._error is None:
            log.info("model.export.push_to_hub: pushed %s", " and ".join(self._urls))
            return
        parts = [part for part in PARTS if (self._folder / part).is_dir()]
        reason = f"not finished within {seconds:.0f} s" if late else f"{type(self._error).__name__}: {self._error}"
        log.warning(
            "model.export.push_to_hub: the export was not pushed (%s). It is complete in %s; push it with %s",
            reason, self._folder, " and ".join(f"`hf upload {self._repo_id}-{p} {self._folder / p}`" for p in parts),
        )  # fmt: skip
