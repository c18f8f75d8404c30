"""Where a run's checkpoints and exports are copied to: what can't work there is refused before the run."""

from pathlib import Path

from fsspec.registry import get_filesystem_class, known_implementations
from fsspec.utils import get_protocol

from joint_train.config.schema import Config, ExportConfig
from joint_train.config.typed import select
from joint_train.errors import ConfigError


def check_uploads(cfg: Config) -> None:
    """Raises ConfigError for ``checkpoint.mirror``, ``resume`` and ``model.export.push_to_hub`` that can't work."""
    for name in ("checkpoint.mirror", "resume"):
        _check_url(name, select(cfg, name))
    resume = Path(cfg.resume)
    if (
        cfg.resume not in ("auto", "never")
        and len(resume.parts) < 2
        and not resume.is_dir()
        and "://" not in cfg.resume
    ):
        raise ConfigError(
            f"resume={cfg.resume}: choose auto, never, or the folder of a checkpoint; there is no folder of this name."
        )
    _check_apart(cfg.checkpoint.mirror, cfg.output_dir)
    if cfg.model.export.push_to_hub:
        _check_hub(cfg.model.export)
    uploads = cfg.checkpoint.mirror or cfg.model.export.push_to_hub
    if uploads and cfg.checkpoint.upload_wait_seconds >= cfg.parallel.timeout_seconds:
        raise ConfigError(
            f"checkpoint.upload_wait_seconds={cfg.checkpoint.upload_wait_seconds}: must be below "
            f"parallel.timeout_seconds={cfg.parallel.timeout_seconds}, which bounds how long the other ranks wait."
        )


def _check_url(name: str, url: str | None) -> None:
    """Refuse a URL whose protocol is unknown or needs a package that isn't there."""
    if url is None or (name == "resume" and "://" not in url):
        return
    if url.endswith("://"):
        raise ConfigError(f"{name}={url} names no bucket and no folder: write e.g. s3://bucket/run.")
    protocol = get_protocol(url)
    known = known_implementations.get(protocol)
    try:
        get_filesystem_class(protocol)
    except ValueError:
        raise ConfigError(f"{name}={url}: fsspec knows no protocol {protocol}; e.g. s3://bucket/run, gs://…") from None
    except ImportError as error:
        package = known["class"].partition(".")[0] if known else "fsspec"
        install = {"s3fs": "pip install 'joint-train[mirror]'", "fsspec": str(error)}.get(
            package, f"pip install {package}"
        )
        raise ConfigError(f"{name}={url}: {protocol}:// needs a package that isn't installed: {install}") from None


def _check_apart(mirror: str | None, output_dir: str) -> None:
    """Refuse a mirror that lies in the run's own folder, on whose disk it is no second copy."""
    if mirror is None or ("://" in mirror and not mirror.startswith(("file://", "local://"))):
        return
    folder, run = Path(mirror.partition("://")[2] or mirror).resolve(), Path(output_dir).resolve()
    if folder == run or run in folder.parents:
        raise ConfigError(f"checkpoint.mirror={mirror} lies in output_dir={output_dir}: set another folder or URL.")


def _check_hub(export: ExportConfig) -> None:
    """Refuse a push to the hub that would fail at the end of the run."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = f"model.export.push_to_hub={export.push_to_hub}"
    try:
        validate_repo_id(f"{export.push_to_hub}-drafter")
    except HFValidationError as error:
        raise ConfigError(f"{name}: give a repository id such as me/my-pair ({error})") from None
    if not export.at_end:
        raise ConfigError(f"{name} pushes the export of the run's end: set model.export.at_end=true.")
    if constants.is_offline_mode():
        raise ConfigError(
            f"{name}: HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or push the export later."
        )
    if get_token() is None:
        raise ConfigError(f"{name} needs a token of the hub: run `hf auth login`, or set HF_TOKEN.")
