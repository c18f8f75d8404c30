"""Train in rounds on what the base says itself, as it is by then: ``python -m joint_train.loop --data FILE``.

A joint run moves the base, and answers that it gave before are no longer what its drafter has to guess. So each round

    1. puts the base of the last round into OUT/served, and reloads the engine, if there is one (--url, --reload)
    2. has it answer the round's prompts                   OUT/rounds/3/answers.jsonl
    3. trains --steps more steps on these answers          OUT/checkpoints, OUT/metrics.jsonl
    4. exports the pair                                    OUT/export

It is one run of the main job, with its optimizer, its schedules and its step numbers; only its data change. The same
command goes on where it was interrupted. Overrides of the main job say the rest: ``model.base=…``, ``data.val=…``.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from joint_train.command import DONE, Parser, above_zero, not_negative, positive, start
from joint_train.config import Config, load
from joint_train.config.values import quoted
from joint_train.errors import ConfigError, JointTrainError
from joint_train.files import replace
from joint_train.retune import launcher, read_rows, run, sources, split_command_line

VLLM = "vllm"
OWN = (
    "output_dir", "max_steps", "epochs", "stop_after", "resume", "eval.patience", "data.train", "model.export.at_end",
)  # fmt: skip


class EngineFailed(JointTrainError):
    """The engine could not be reloaded."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog="python -m joint_train.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--data", required=True, nargs="+", metavar="FILE", help="prompts, in any format of training data")
    top.add_argument("--rounds", type=positive, default=4, help="how often to answer and train (default 4)")
    top.add_argument("--steps", type=positive, required=True, help="optimizer steps in a round")
    top.add_argument("--prompts", type=positive, help="prompts in a round (default: all of the data, over all rounds)")
    top.add_argument(
        "--original", type=not_negative, default=0.0, metavar="WEIGHT",
        help="also train on the data's own answers, weighed so against the base's (default 0: don't); without them the "
        "base learns nothing but what it says already",
    )  # fmt: skip
    top.add_argument("--out", type=Path, default=Path("looped"), help="folder of the run (default: looped)")
    top.add_argument("--max-new-tokens", type=positive, default=512, help="of an answer (default 512)")
    top.add_argument("--temperature", type=not_negative, default=0.0, help="of the answers; 0 is greedy (default)")
    top.add_argument("--nproc-per-node", type=positive, help="ranks (default: the GPUs, or 1)")
    engine = top.add_argument_group("an engine that answers; without it the main job's ranks do, with transformers")
    engine.add_argument("--url", help="of an engine that serves OUT/served/base: vLLM or SGLang")
    engine.add_argument("--concurrency", type=positive, default=64, help="requests at a time (default 64)")
    engine.add_argument(
        "--reload",
        metavar="COMMAND",
        help="shell command that starts the engine, or makes it load its weights again; it may name {base}, {drafter} "
        "and {round}. Or vllm: by the API of a vLLM with VLLM_SERVER_DEV_MODE=1",
    )
    engine.add_argument(
        "--release",
        metavar="COMMAND",
        help="shell command before training that frees the GPUs. Or vllm: vLLM sleeps (--enable-sleep-mode)",
    )
    engine.add_argument("--wait", type=above_zero, default=900.0, help="seconds to wait for the engine (default 900)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Exit codes are those of :data:`joint_train.command.EXIT_CODES`."""
    args, overrides = split_command_line(parser(), argv)
    return start("joint_train.loop", lambda: loop(args, overrides))


def loop(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """All rounds that are left."""
    out = args.out.absolute()
    check(args, overrides)
    cfg = load([*overrides, *sources("train", Path(args.data[0])), f"output_dir={quoted(out)}"])
    if args.url is not None and cfg.model.adapter is not None:
        raise ConfigError(
            "--url with model.adapter: before the first round there is no folder of the merged base that an engine "
            "could serve. Merge the adapter into a folder and give that as model.base, or leave out --url."
        )
    write_prompts(args, out / "rounds")
    for number in range(args.rounds):
        folder = out / "rounds" / str(number)
        if (folder / "DONE").exists():
            continue
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        answers = folder / "answers.jsonl"
        if not answers.exists():
            pair = serve(out, cfg, number)
            if args.url is not None:
                reload(args, out, number)
            run(answering(args, cfg, overrides, pair, folder))
        if args.url is not None:
            release(args)
        run(training(args, cfg, overrides, out, answers, number))
        if not (out / "export/base/config.json").is_file():
            raise ConfigError(f"{out} has no export: the run was stopped. Run it again.")
        replace(folder / "DONE", f"step {(number + 1) * args.steps}\n")
    print(f"{args.rounds} rounds of {args.steps} steps are done; to serve: {out / 'export'}")
    return DONE


def check(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Refuse what can't work.

    Raises:
        ConfigError: naming it.
    """
    if own := [word for word in overrides if word.lstrip("+").split("=")[0] in OWN]:
        raise ConfigError(f"{own[0]}: the loop sets that itself (--out, --rounds, --steps, --data).")
    if args.url is None and (args.reload or args.release):
        raise ConfigError("--reload and --release are for an engine: give its --url.")
    if args.url is not None and args.reload is None:
        raise ConfigError(
            "--url needs --reload: an engine that isn't reloaded answers with the base of the first round. Give the "
            "command that reloads it, or vllm."
        )


def write_prompts(args: argparse.Namespace, folder: Path) -> None:
    """``prompts.jsonl`` of every round: the examples in an order that depends on their text alone, from the beginning
    again when they are used up.

    Raises:
        ConfigError: there are too few, or they were others when the run began.
    """
    rows = [text for _, text in sorted(read_rows(args.data).items())]
    count = args.prompts or len(rows) // args.rounds
    if not 1 <= count <= len(rows):
        raise ConfigError(f"{len(rows)} different examples are too few for {args.rounds} rounds of {max(count, 1)}.")
    for number in range(args.rounds):
        file = folder / str(number) / "prompts.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{rows[index % len(rows)]}\n" for index in range(number * count, (number + 1) * count))
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{file} was made from other data, or for other rounds: give another --out.")
        replace(file, text)


def serve(out: Path, cfg: Config, number: int) -> tuple[str, str]:
    """Have ``OUT/served`` point to the pair whose base answers now; returns that pair."""
    from joint_train.weights.folders import resolve

    m = cfg.model
    if number:
        pair = out / "export/base", out / "export/drafter"
    elif m.adapter is None:
        pair = Path(resolve(m.base, m.revision, m.cache_dir)), Path(resolve(m.drafter, None, m.cache_dir))
    else:
        return m.base, m.drafter  # an adapter that is merged when it is loaded: there is no folder to serve yet
    (out / "served").mkdir(parents=True, exist_ok=True)
    for name, folder in zip(("base", "drafter"), pair, strict=True):
        link, new = out / "served" / name, out / "served" / f".{name}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(folder.absolute())
        os.replace(new, link)
    return str(pair[0]), str(pair[1])


def answering(
    args: argparse.Namespace, cfg: Config, overrides: Sequence[str], pair: tuple[str, str], folder: Path
) -> list[str]:
    """The command that has the base answer a round's prompts."""
    if pair[0] != cfg.model.base:  # an export is merged, and a folder
        replaced = (
            "model.base",
            "model.adapter",
            "model.revision",
            "model.continue_adapter",
            "model.resize_vocabulary",
        )
        overrides = [word for word in overrides if word.lstrip("+").split("=")[0] not in replaced]
        overrides = [*overrides, f"model.base={quoted(pair[0])}"]
        overrides += [f"{key}=null" for key in ("model.adapter", "model.revision")]
    engine = [] if args.url is None else ["--url", args.url, "--concurrency", str(args.concurrency)]
    ranks = launcher(args.nproc_per_node if args.url is None else 1)
    return [
        *ranks, "joint_train.data", "regenerate", str(folder / "answers.jsonl"), *engine, "--max-new-tokens",
        str(args.max_new_tokens), "--temperature", str(args.temperature), *overrides,
        *sources("train", folder / "prompts.jsonl"),
    ]  # fmt: skip


def training(
    args: argparse.Namespace, cfg: Config, overrides: Sequence[str], out: Path, answers: Path, number: int
) -> list[str]:
    """The command that trains a round's steps. Its data start from the beginning, so each round has a seed of its own:
    otherwise all rounds would train on the same first originals."""
    weighed = [f"{{path: {quoted(answers)}}}"]
    if args.original:
        weighed += [f"{{path: {quoted(file)}, weight: {args.original / len(args.data)}}}" for file in args.data]
    return [
        *launcher(args.nproc_per_node), "joint_train", *overrides, f"data.train=[{', '.join(weighed)}]",
        "data.train_on=last_assistant", f"output_dir={quoted(out)}", f"max_steps={args.rounds * args.steps}",
        f"stop_after={(number + 1) * args.steps}", f"seed={cfg.seed + number}",
    ]  # fmt: skip


def reload(args: argparse.Namespace, out: Path, number: int) -> None:
    """Have the engine load ``OUT/served``, and wait until it answers.

    Raises:
        EngineFailed: the command failed, or the engine doesn't answer in time.
    """
    base, drafter = out / "served/base", out / "served/drafter"
    if args.reload == VLLM:
        wait(args.url, args.wait, f"start it now: vllm serve {shlex.quote(str(base))} …")
        asleep = is_asleep(args.url)
        if asleep:
            ask(args.url, "POST", "/wake_up?tags=weights")
        ask(args.url, "POST", "/collective_rpc", b'{"method": "reload_weights"}')
        if asleep:
            ask(args.url, "POST", "/wake_up?tags=kv_cache")
        ask(args.url, "POST", "/reset_prefix_cache")
        return
    names = {"base": shlex.quote(str(base)), "drafter": shlex.quote(str(drafter)), "round": str(number)}
    command = args.reload
    for name, value in names.items():
        command = command.replace(f"{{{name}}}", value)
    shell(command, "--reload")
    wait(args.url, args.wait, f"`{command}` has ended, so the engine should be running")


def release(args: argparse.Namespace) -> None:
    """Free the GPUs for training."""
    if args.release == VLLM:
        if not is_asleep(args.url):
            ask(args.url, "POST", "/sleep?level=2")  # its weights are loaded again anyway
    elif args.release is not None:
        shell(args.release, "--release")


def is_asleep(url: str) -> bool:
    return bool(json.loads(ask(url, "GET", "/is_sleeping"))["is_sleeping"])


def shell(command: str, option: str) -> None:
    """Run a command of the user's."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    code = subprocess.run(command, shell=True).returncode
    if code:
        raise EngineFailed(f"{option} ended with {code}: {command}. The same loop goes on from there.")


def wait(url: str, seconds: float, otherwise: str) -> None:
    """Wait until an engine lists its models."""
    import httpx

    from joint_train.data.engine_client import connect

    until, said = time.monotonic() + seconds, False
    while True:
        try:
            with connect(url, 10) as client:
                client.get("/v1/models").raise_for_status()
                return
        except httpx.HTTPError as error:
            if time.monotonic() > until:
                raise EngineFailed(f"{url} doesn't answer after {seconds:.0f} s ({error}); {otherwise}") from None
            if not said:
                print(f"waiting for {url}: {otherwise}", file=sys.stderr, flush=True)
            said = True
            time.sleep(min(2.0, seconds / 10))


def ask(url: str, method: str, path: str, body: bytes | None = None) -> bytes:
    """vLLM's development API.

    Raises:
        EngineFailed: it isn't there, or fails.
    """
    import httpx

    from joint_train.data.engine_client import connect

    try:
        with connect(url, 600) as client:
            response = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
    except httpx.HTTPError as error:
        raise EngineFailed(f"{method} {url}{path}: {error}") from None
    if response.is_error:
        advice = (
            "it has no such address: start vLLM with VLLM_SERVER_DEV_MODE=1"
            if response.status_code == 404
            else response.text[:300]
        )
        raise EngineFailed(f"{method} {url}{path}: HTTP {response.status_code}: {advice}")
    return response.content


if __name__ == "__main__":
    sys.exit(main())
