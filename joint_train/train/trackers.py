"""The trackers of others that a run reports to, on rank 0: wandb and TensorBoard."""

import logging
import netrc
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joint_train.config import ConfigError, TrackingConfig
from joint_train.files import code_version, replace

log = logging.getLogger(__name__)

CLOSE_SECONDS = 120  # for wandb's last upload: a dead network must not keep a finished run


class Wandb:
    """A wandb run; the same one after a restart, by the id kept in ``OUTPUT_DIR/wandb/run_id``.

    Starts with the first metrics, so that a failure to start is a failure like any other.
    """

    def __init__(self, cfg: TrackingConfig, output_dir: Path, config: dict[str, Any], step: int) -> None:
        self.cfg, self.output_dir, self.config, self.step = cfg, output_dir, config, step
        self.run: Any = None

    def start(self) -> Any:
        """The run, started at the first call."""
        if self.run is None:
            import wandb  # takes a second: not for those who have it off

            file = self.output_dir / "wandb" / "run_id"
            resumed = self.step > 0 and file.exists()
            run_id = file.read_text().strip() if resumed else uuid.uuid4().hex[:8]
            file.parent.mkdir(parents=True, exist_ok=True)
            replace(file, run_id + "\n")
            self.run = wandb.init(
                project=self.cfg.project,
                name=self.cfg.name or self.output_dir.name,
                id=run_id,
                resume="allow",
                mode=wandb_mode(self.cfg.wandb),
                dir=str(self.output_dir),
                config=self.config | {"versions": code_version()},
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )
            if self.run.offline:
                log.info("wandb is offline; to upload the run later: wandb sync %s", Path(self.run.dir).parent)
            elif self.run.url:
                log.info("wandb: %s", self.run.url)
            # Steps go back after a restart, which wandb's own counter can't.
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
        return self.run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.start().log({"step": step, **metrics})

    def examples(self, step: int, rows: list[dict[str, Any]]) -> None:
        import wandb

        run = self.start()
        run.log({"step": step, "examples": wandb.Table(list(rows[0]), [list(row.values()) for row in rows])})

    def exported(self, folder: Path) -> None:
        if not self.cfg.log_export:
            return
        import wandb

        for part in sorted(path for path in folder.iterdir() if (path / "config.json").exists()):
            artifact = wandb.Artifact(f"{self.start().name}-{part.name}".replace("/", "-"), type="model")
            artifact.add_dir(str(part))
            self.start().log_artifact(artifact)

    def close(self) -> None:
        if self.run is not None:
            finish = threading.Thread(target=self.run.finish, daemon=True)
            finish.start()
            finish.join(CLOSE_SECONDS)
            if finish.is_alive():
                log.warning("wandb didn't finish in %d s; `wandb sync` its folder later", CLOSE_SECONDS)


def check_wandb(cfg: TrackingConfig, rank: int) -> None:
    """Refuse ``tracking.wandb=online`` without a key, before anything takes time.

    Raises:
        ConfigError: saying what to set.
    """
    if rank == 0 and cfg.wandb == "online" and not has_key():
        raise ConfigError(
            "tracking.wandb=online, and there is no key of wandb here: run `wandb login` or set WANDB_API_KEY; "
            "tracking.wandb=auto writes an offline run instead, which `wandb sync` uploads later"
        )


def wandb_mode(mode: str) -> Any:
    """``tracking.wandb`` without ``auto``: ``WANDB_MODE`` if set, else online where there is a key, else offline."""
    if mode != "auto":
        return mode
    if given := os.environ.get("WANDB_MODE"):
        return given
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether wandb would find a key: in the environment, or in the file that ``wandb login`` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoard:
    """TensorBoard event files; those after ``step`` are hidden by a resumed run."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tracking.tensorboard=true needs the tensorboard package: pip install tensorboard") from (
                error
            )
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def examples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for i, row in enumerate(rows):
            text = "\n\n".join(f"**{name}**\n\n{value}" for name, value in row.items())
            self.writer.add_text(f"examples/{i}", text, step)

    def close(self) -> None:
        self.writer.close()
