"""``python -m joint_train.checkpoint ls|verify|prune DIR``: look at a run's checkpoints and thin them out.

DIR is a run's OUTPUT_DIR, its ``checkpoints`` folder, or one checkpoint.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from joint_train.checkpoint import layout
from joint_train.checkpoint.lock import RunLock
from joint_train.command import Parser, from_zero, start
from joint_train.config import resolve_interpolations
from joint_train.errors import CheckpointError

METRICS_SHOWN = 4


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 if ``verify`` finds damage; 2 for an error."""
    parser = Parser(
        prog="python -m joint_train.checkpoint", description="Look at a run's checkpoints and thin them out."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("ls", "a table of what is there, without reading contents"),
        ("verify", "read every byte and compare it with what was written"),
        ("prune", "remove complete checkpoints that the rules below don't keep; never the newest"),
    ):
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("dir", type=Path)
        if name != "prune":
            command.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    command.add_argument("--keep-last", type=from_zero, help="default: the run's checkpoint.keep_last; 0 keeps all")
    command.add_argument("--keep-every", type=from_zero, help="default: the run's checkpoint.keep_every")
    command.add_argument("--keep-best", help="default: the run's checkpoint.keep_best")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    args = parser.parse_args(argv)
    console = Console()
    work = {"ls": _list, "verify": _verify, "prune": _prune}[args.command]
    return start("joint_train.checkpoint", lambda: work(args, console))


def _folders(path: Path) -> list[Path]:
    """Every folder of a checkpoint that DIR means, oldest first, temporary and set-aside ones too."""
    if layout.step_of(path.absolute()) is not None:
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folders = sorted(folder for folder in checkpoints.iterdir() if folder.name.startswith("step_"))
    if not folders:
        raise CheckpointError(f"no checkpoints in {checkpoints}")
    return folders


def _status(folder: Path, contents: bool) -> tuple[str, layout.Manifest | None]:
    if layout.step_of(folder.absolute()) is None:
        kind = folder.suffix[1:].partition("-")[0]
        return {"tmp": "being written, or left by a killed run", "trash": "being removed"}.get(kind, "set aside"), None
    try:
        manifest = layout.verify(folder, contents)
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder} is ").removeprefix(f"{folder} has "), None
    return ("verified" if contents else "complete"), manifest


def _show(args, contents: bool, console: Console) -> bool:
    """Prints the table, or JSON; whether every checkpoint is good."""
    return (_json if args.json else _table)(_folders(args.dir), contents, console)


def _json(folders: list[Path], contents: bool, console: Console) -> bool:
    rows, good = [], True
    for folder in folders:
        status, manifest = _status(folder, contents)
        good &= manifest is not None or layout.step_of(folder.absolute()) is None
        row: dict[str, Any] = {"path": str(folder.absolute()), "status": status, "good": manifest is not None}
        if manifest:
            row |= {"step": manifest.step, "saved_at": manifest.saved_at, "bytes": manifest.nbytes}
            row |= {"ranks": manifest.world_size, "metrics": manifest.metrics}
        rows.append(row)
    print(json.dumps(rows, indent=1))
    return good


def _table(folders: list[Path], contents: bool, console: Console) -> bool:
    """Prints the table; whether every checkpoint in it is good."""
    # Without frames, whole values fit 80 columns.
    table = Table("checkpoint", "saved (UTC)", "size", "ranks", "metrics", "status", box=None, pad_edge=False)
    good = True
    for folder in folders:
        status, manifest = _status(folder, contents)
        if manifest:
            saved = manifest.saved_at[: len("YYYY-MM-DDTHH:MM")].replace("T", " ")
            shown = [f"{name.removeprefix('val/')}={value:.4g}" for name, value in manifest.metrics.items()]
            metrics = "\n".join(shown[:METRICS_SHOWN] + ["…"] * (len(shown) > METRICS_SHOWN))
            table.add_row(folder.name, saved, _size(manifest.nbytes), str(manifest.world_size), metrics, status)
        else:
            good &= layout.step_of(folder.absolute()) is None
            table.add_row(folder.name, "", "", "", "", status, style="yellow")
    console.print(table)
    return good


def _list(args, console: Console) -> int:
    _show(args, False, console)
    return 0


def _verify(args, console: Console) -> int:
    return 0 if _show(args, True, console) else 1


def _prune(args, console: Console) -> int:
    folder = _folders(args.dir)[0].absolute().parent
    if layout.step_of(args.dir.absolute()) is not None:
        raise CheckpointError(f"{args.dir} is one checkpoint; prune takes a run's folder")
    newest = layout.find_newest(folder)
    if newest is None:
        raise CheckpointError(f"no complete checkpoint in {folder}: nothing is removed")
    rules = resolve_interpolations(json.loads((newest / "config.json").read_text())).get("checkpoint", {})
    for name, default in (("keep_last", 0), ("keep_every", 0), ("keep_best", None)):
        given = getattr(args, name)
        rules[name] = rules.get(name, default) if given is None else given
    if args.keep_best:  # a misspelt one would keep nothing
        layout.find_best(folder, args.keep_best)
    lock = RunLock(folder.parent, wait_seconds=0)
    try:
        for note in [] if args.dry_run or not lock.held else layout.recover(folder):
            console.print(note)
        victims = layout.prunable(folder, rules["keep_last"], rules["keep_every"], rules["keep_best"])
        if victims and not args.dry_run:
            # What is kept has to be good before anything goes: the newest is read from end to end.
            layout.verify(layout.find_newest(folder) or newest)
        for victim in victims:
            if not args.dry_run:
                layout.remove(victim)
            console.print(f"{'would remove' if args.dry_run else 'removed'} {victim.name}")
        if not victims:
            console.print("nothing to remove")
    finally:
        lock.release()
    return 0


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


if __name__ == "__main__":
    sys.exit(main())
