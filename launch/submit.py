"""Submit a training run, or a sweep of them, to Slurm.

    python -m launch.submit nodes=2 gpus_per_node=8 time=24:00:00 partition=gpu -- model=gemma4_e4b data=mine
    python -m launch.submit --multirun nodes=1 -- optim.lr=1e-5,3e-5 drafter.loss_weight=0.5,1
    python -m launch.submit --to kubernetes|trainjob|skypilot --help

Before ``--`` stand the options below, after it the overrides of ``python -m joint_train``. The training configuration
is composed and validated here, on the login node: a mistake costs seconds, not hours in the queue. ``--dry-run`` prints
the script and submits nothing. ``--multirun`` splits comma-separated values as Hydra does, into one array job whose
runs have a folder each, ``<output_dir>/<number>``.

Next to the output, in ``<output_dir>/slurm/``, stay the script, the composed configuration, the code version (commit,
uncommitted changes, package versions) and the log.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from jinja2 import Environment, StrictUndefined

from joint_train import config
from joint_train.command import EXPLAINED_ERROR
from joint_train.config.values import mesh_sentence, quoted
from joint_train.data.readers import check_files
from joint_train.errors import DataError
from launch import elsewhere
from launch.options import Plain, SubmitError, option, parse_options

LAUNCH = Path(__file__).resolve().parent
SIGNAL_MARGIN_SECONDS = 30


@dataclass
class Options(Plain):
    nodes: int = option(1, "nodes of the job")
    gpus_per_node: int = option(8, "GPUs and ranks of a node; 0: one rank a node, on CPU")
    time: str = option("24:00:00", "time limit, as sbatch reads it; the run is requeued when it is reached")
    partition: str | None = option(None, "partition; the cluster's default one without it")
    account: str | None = option(None, "account that is charged")
    qos: str | None = option(None, "quality of service")
    cpus_per_node: int | None = option(None, "cores of a node that the job takes; the partition's rule without it")
    mem: str | None = option(None, "memory of a node, e.g. 0 for all of it")
    exclude: str | None = option(None, "nodes to avoid, e.g. one that the health check named")
    name: str = option("joint-train", "name in the queue")
    max_restarts: int = option(3, "restarts after a crash, in one allocation")
    preflight: bool = option(True, "health check before the first step and after a crash (launch/preflight.py)")
    at_once: int | None = option(None, "most runs of a sweep that run at the same time")
    sbatch: str = option("", "further sbatch options, e.g. '--constraint=h100'")
    srun: str = option("", "further srun options, e.g. Pyxis's '--container-image=… --container-mounts=…'")
    python: str = option(sys.executable, "the Python that runs on the nodes; 'python' in a container")

    @property
    def ranks(self) -> int:
        return self.gpus_per_node or 1


@dataclass
class Run:
    directory: str
    overrides: list[str]
    cfg: config.Config


def time_limit_seconds(text: str) -> int:
    """Seconds of a Slurm time limit: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``.

    Raises:
        SubmitError: for anything else.
    """
    days, dash, clock = text.rpartition("-")
    fields = clock.split(":")
    if not all(field.isdigit() for field in fields + [days] * bool(dash)) or len(fields) > 3:
        raise SubmitError(f"time={text}: not a time limit; write e.g. 90 (minutes), 12:00:00 or 2-00:00:00")
    units = [3600, 60, 1] if dash or len(fields) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(int(field) * unit for field, unit in zip(fields, units, strict=False))


def expand(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each run: one, or with ``multirun`` the product of all comma-separated values.

    Raises:
        ConfigError: for a word that is no override.
    """
    if not multirun:
        return [overrides]
    # Hydra's own sweeper, without starting its application: the product, ranges and choices as everywhere else.
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    files = [word for word in overrides if word.startswith("--")]
    swept = config.check_overrides([word for word in overrides if not word.startswith("--")])
    [runs] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(swept), max_batch_size=None)
    return [[*files, *run] for run in runs]


def hydra_text(text: str) -> str:
    """A string as a value of an override, quoted where Hydra's grammar would read it otherwise."""
    if re.fullmatch(r"[\w./-]+", text):
        return text
    return quoted(text)


def plan_runs(options: Options, overrides: list[str], multirun: bool) -> list[Run]:
    """Compose and validate the configuration of every run.

    Raises:
        SubmitError: with the configuration's own message, and the run's overrides in a sweep.
    """
    world_size = options.nodes * options.ranks
    try:
        candidates = expand(config.join_options(overrides), multirun)
    except (config.ConfigError, HydraException) as error:
        raise SubmitError(str(error)) from error
    runs = []
    for number, run_overrides in enumerate(candidates):
        try:
            cfg = config.load(run_overrides, world_size, options.ranks)
            directory = Path(cfg.output_dir).resolve() / (str(number) if multirun else "")
            run_overrides = [text for text in run_overrides if not text.startswith("output_dir=")]
            run_overrides.append(f"output_dir={hydra_text(str(directory))}")
            cfg = config.load(run_overrides, world_size, options.ranks)
        except config.ConfigError as error:
            where = f"run {number} ({' '.join(run_overrides)}): " if multirun else ""
            raise SubmitError(f"{where}{error}") from error
        runs.append(Run(str(directory), run_overrides, cfg))
    return runs


def check_text(options: Options, runs: list[Run]) -> None:
    """Refuse control characters in whatever reaches the job script: a new line would end an #SBATCH line, and what
    follows would run as shell.

    Raises:
        SubmitError: naming the option or override.
    """
    texts = {field.name: str(getattr(options, field.name)) for field in dataclasses.fields(Options)}
    for run in runs:
        texts |= {f"the override {text!r}": text for text in run.overrides} | {"output_dir": run.directory}
    for name, text in texts.items():
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text):
            raise SubmitError(f"{name} has a control character (such as a line's end) in it: {text!r}")


def render(options: Options, runs: list[Run], output_dir: Path, multirun: bool) -> str:
    """The job script.

    Raises:
        SubmitError: when the time limit leaves no time between the start and the warning of its end, or a text has a
            control character in it.
    """
    check_text(options, runs)
    grace = max(run.cfg.checkpoint.grace_seconds for run in runs)
    warning = grace + SIGNAL_MARGIN_SECONDS
    # Slurm looks at the limits every 30 s, and warns up to 60 s early rather than late.
    if time_limit_seconds(options.time) < warning + 60:
        raise SubmitError(
            f"time={options.time}: the run is told to save {warning} to {warning + 60} s before the limit "
            f"(checkpoint.grace_seconds={grace}), which leaves nothing to train in"
        )
    sbatch = [
        f"--job-name={options.name}",
        f"--nodes={options.nodes}",
        "--ntasks-per-node=1",
        f"--time={options.time}",
        f"--signal=B:USR1@{warning}",
        "--requeue",
        "--open-mode=append",
    ]
    log = "%a/slurm/%A_%a.log" if multirun else "slurm/%j.log"
    sbatch.append(f"--output={output_dir / log}")
    if options.gpus_per_node:
        sbatch.append(f"--gres=gpu:{options.gpus_per_node}")
    if options.cpus_per_node:
        sbatch.append(f"--cpus-per-task={options.cpus_per_node}")
    if multirun:
        sbatch.append(f"--array=0-{len(runs) - 1}" + (f"%{options.at_once}" if options.at_once else ""))
    for name in ("partition", "account", "qos", "mem", "exclude"):
        if (value := getattr(options, name)) is not None:
            sbatch.append(f"--{name}={value}")
    sbatch += shlex.split(options.sbatch)
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = shlex.quote
    template = environment.from_string((LAUNCH / "job.sbatch").read_text())
    return template.render(
        sbatch=sbatch,
        options=options,
        runs=runs,
        environment=(LAUNCH / "env.sh").read_text().rstrip(),
        shutdown_seconds=grace + SIGNAL_MARGIN_SECONDS // 3,
    )


def code_version() -> tuple[dict[str, Any], str]:
    """Commit, state and package versions of the code that runs, and its uncommitted changes as a patch."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(LAUNCH), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return result.stdout if result.returncode == 0 else ""

    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    version = {
        "commit": git("rev-parse", "HEAD").strip() or None,
        "changed": git("status", "--porcelain").splitlines(),
        "python": sys.version.split()[0],
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }
    return version, git("diff", "HEAD", "--binary")


def snapshot(runs: list[Run], output_dir: Path, script: str) -> Path:
    """Keep what was submitted next to its output; the path of the script."""
    folder = output_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    version, patch = code_version()
    (folder / "code.json").write_text(json.dumps(version, indent=2) + "\n")
    (folder / "code.patch").write_text(patch)
    (folder / "job.sh").write_text(script)
    for run in runs:
        run_folder = Path(run.directory) / "slurm"
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / "config.yaml").write_text(config.to_yaml(run.cfg))
    return folder / "job.sh"


def warn_of_missing(runs: list[Run]) -> None:
    """Name the data files and model folders that aren't on this machine: most jobs see the same file system."""
    missing = []
    for cfg in (run.cfg for run in runs):
        for source in [*cfg.data.train, *cfg.data.val]:
            try:
                check_files(source)
            except DataError as error:
                missing.append(str(error))
        folders = [folder for folder in (cfg.model.base, cfg.model.drafter) if "/" in folder]
        missing += [
            f"there is no folder {os.path.abspath(folder)}"
            for folder in folders
            if (folder.startswith(("/", ".")) or cfg.pair is not None) and not Path(folder).is_dir()
        ]
    for what in dict.fromkeys(missing):
        print(f"warning: {what}, on this machine; the job fails unless its nodes have it", file=sys.stderr)


def usage() -> str:
    lines = [__doc__.strip(), "", "Options:"]
    for field in dataclasses.fields(Options):
        lines.append(f"  {field.name:<14} {str(field.default):<12} {field.metadata['help']}")
    return "\n".join(lines)


def _where(words: list[str]) -> tuple[str | None, list[str]]:
    """What ``--to`` names, None for Slurm; and the other words."""
    for index, word in enumerate(words):
        if word == "--to" or word.startswith("--to="):
            inside = word.startswith("--to=")
            to = word.removeprefix("--to=") if inside else "".join(words[index + 1 : index + 2])
            return None if to == "slurm" else to, words[:index] + words[index + 2 - inside :]
    return None, words


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    before, overrides = arguments[:split], arguments[split + 1 :]
    to, before = _where(before)
    flags = {argument for argument in before if argument.startswith("-")}
    if flags & {"-h", "--help"}:
        print(elsewhere.usage() if to else usage())
        return 0
    multirun = bool(flags & {"-m", "--multirun"})
    try:
        if late := [word for word in overrides if word in ("--dry-run", "--to", "-m", "--multirun")]:
            raise SubmitError(f"{late[0]} is an option of the job: it stands before the --")
        if unknown := flags - {"-m", "--multirun", "--dry-run"}:
            raise SubmitError(f"{' '.join(sorted(unknown))}: unknown; see --help")
        if to is not None:
            if multirun:
                raise SubmitError("--multirun submits to Slurm; elsewhere write a file for each run")
            given = [argument for argument in before if argument not in flags]
            return elsewhere.main(to, given, overrides, "--dry-run" in flags)
        options = parse_options([argument for argument in before if argument not in flags], Options)
        runs = plan_runs(options, overrides, multirun)
        output_dir = Path(runs[0].directory).parent if multirun else Path(runs[0].directory)
        script = render(options, runs, output_dir, multirun)
    except (SubmitError, config.ConfigError) as error:
        print(f"refused, nothing was submitted: {error}", file=sys.stderr)
        return EXPLAINED_ERROR
    warn_of_missing(runs)
    if "--dry-run" in flags:
        print(script)
        return 0
    path = snapshot(runs, output_dir, script)
    try:
        result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        print(f"sbatch is not on this machine; the script is {path}", file=sys.stderr)
        return EXPLAINED_ERROR
    if result.returncode:
        print(f"sbatch refused {path}: {result.stderr.strip()}", file=sys.stderr)
        return EXPLAINED_ERROR
    job = result.stdout.strip().split(";")[0]
    log = output_dir / (f"*/slurm/{job}_*.log" if multirun else f"slurm/{job}.log")
    print(f"job {job}: {len(runs)} x {options.nodes} node(s) x {options.ranks} rank(s)")
    for mesh in dict.fromkeys(
        mesh_sentence(run.cfg.parallel, options.nodes * options.ranks, options.ranks) for run in runs
    ):
        print(f"  mesh    {mesh}")
    print(f"  follow  tail -F {log if multirun else shlex.quote(str(log))}")
    print(f"  state   squeue -j {job}")
    print(f"  result  {Path(options.python).name} -m launch.summary {output_dir}")
    print(f"  stop    scancel {job}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
