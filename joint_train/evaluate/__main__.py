"""Speculative decoding with a base and its drafter, measured against plain decoding.

    python -m joint_train.evaluate BASE DRAFTER [options]                  or: OUTPUT_DIR/export [options]
    python -m joint_train.evaluate BASE DRAFTER --against OTHER_DRAFTER    before and after, paired
    python -m joint_train.evaluate BASE DRAFTER --recommend --gpu h100     how many tokens to draft
    python -m joint_train.evaluate BASE DRAFTER --engine vllm              how to serve this pair
    python -m joint_train.evaluate --engine vllm --url URL [options]       measures a running server
    python -m joint_train.evaluate compare RUN RUN …

Prompt sets: `general` (40 prompts in eight categories), `starter` (held-out docstrings of the standard library), or a
JSONL file in any format that training data has, also of prompts without answers (`{"prompt": …}`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from joint_train.command import Parser, above_zero, from_zero, not_negative, positive, start
from joint_train.errors import ConfigError
from joint_train.plan.machine import CARDS

SERVING: dict[str, bool | Literal["llamacpp"]] = {"transformers": False, "engine": True, "llamacpp": "llamacpp"}


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m joint_train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "base", metavar="BASE", nargs="?", help="folder or hub id of the base, or a folder with base/ and drafter/"
    )
    parser.add_argument("drafter", metavar="DRAFTER", nargs="?", help="folder or hub id of its drafter")
    parser.add_argument(
        "--prompts",
        action="append",
        help="general | starter | a JSONL file (default: general); given again: more of them, reported by source",
    )
    parser.add_argument("--limit", type=positive, help="at most this many prompts of each set")
    parser.add_argument(
        "--chat-template-kwargs",
        type=template_options,
        action="append",
        metavar="JSON",
        help="for the chat template, as data.chat_template_kwargs in training, e.g. '{\"enable_thinking\": true}'; "
        "given again: measured with each, side by side",
    )
    parser.add_argument(
        "--adapters",
        action="append",
        metavar="[NAME=]DIR",
        help="PEFT LoRA folder or hub id that is served on the base (model.adapters of the run): also measured with "
        "it; may be given again",
    )
    parser.add_argument(
        "--against", metavar="DRAFTER", help="another drafter of the base, such as the one before tuning"
    )
    parser.add_argument(
        "--write-card", action="store_true", help="put the table of --against into the README.md of DRAFTER's folder"
    )
    parser.add_argument("--num-steps", type=step_list, help="K: 4, 1-8 or 1,2,4 (default 1-8)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="tokens for a prompt (default 128)")
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, help="also sample at this temperature (0: don't)"
    )
    parser.add_argument(
        "--thresholds",
        type=threshold_list,
        help="confidences below which drafting stops, each measured with the last K (default 0.2,0.4,0.6,0.8; 0: none)",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    parser.add_argument(
        "--serving",
        choices=list(SERVING),
        help="what the drafter sees: as transformers 5.22 has it, as vLLM and SGLang (engine), or as llama.cpp "
        "(default: transformers)",
    )
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], help="auto (default): bfloat16 on GPU")
    parser.add_argument("--device", help="cuda, cpu, … (default: a GPU if there is one)")
    parser.add_argument("--seed", type=from_zero, default=0, help="of samples and bootstrap (default 0)")
    advice = parser.add_argument_group("how many tokens to draft")
    advice.add_argument("--recommend", action="store_true", help="find what makes the most tokens a second")
    advice.add_argument("--gpu", choices=sorted(CARDS), help="card to serve on (default: this machine's, or h100)")
    advice.add_argument(
        "--batch-sizes", type=step_list, default=[1, 8, 64], help="sequences that are decoded together (default 1,8,64)"
    )
    advice.add_argument(
        "--set-drafts",
        type=positive,
        metavar="BATCH",
        help="write the best number for this batch size into DRAFTER's generation_config.json (num_assistant_tokens)",
    )
    server = parser.add_argument_group("a running server")
    server.add_argument(
        "--engine", choices=["vllm", "sglang", "llamacpp"], help="measure this engine; without --url: how to serve"
    )
    server.add_argument("--url", help="where it is served, e.g. http://localhost:8000")
    server.add_argument(
        "--concurrency", type=step_list, default=[1, 4, 16], help="requests at a time (default 1,4,16; 1 is always)"
    )
    server.add_argument(
        "--timeout", type=above_zero, default=600.0, help="seconds that a request may take (default 600)"
    )
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder to write (default: evaluation)")
    return parser


def step_list(text: str) -> list[int]:
    """``1-8``, ``4`` or ``1,2,4`` as a list of K."""
    first, dash, last = text.partition("-")
    try:
        steps = list(range(int(first), int(last) + 1)) if dash else sorted({int(part) for part in text.split(",")})
    except ValueError:
        steps = []
    if not steps or steps[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 4, 1-8 or 1,2,4")
    return steps


def threshold_list(text: str) -> list[float]:
    """``0.2,0.8`` as a list; zeros are left out."""
    try:
        thresholds = [float(part) for part in text.split(",")]
    except ValueError:
        thresholds = [-1.0]
    if not all(0 <= threshold < 1 for threshold in thresholds):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a list of probabilities such as 0.2,0.4,0.8")
    return sorted({threshold for threshold in thresholds if threshold})


def template_options(text: str) -> dict:
    """``{"enable_thinking": true}`` as a dictionary."""
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"enable_thinking": true}}')
    return options


def check(args: argparse.Namespace) -> None:
    """Refuse options that don't go together.

    Raises:
        ValueError: naming them.
    """
    if args.url and not args.engine:
        raise ConfigError("--url needs --engine vllm, --engine sglang or --engine llamacpp.")
    if args.base and args.drafter is None and (Path(args.base) / "drafter").is_dir():
        args.base, args.drafter = f"{args.base}/base", f"{args.base}/drafter"  # an export, or the folder of a pair
    if (args.drafter is None) and (args.base is not None or not args.url):
        export = Path(args.base or "") / "export"
        of_run = f", such as this run's {export}" if args.base and export.is_dir() else ""
        raise ConfigError(f"give the base and its drafter: BASE DRAFTER, or a folder with both{of_run}.")
    if args.write_card and not args.against:
        raise ConfigError("--write-card writes the table of --against: give the other drafter.")
    if args.against and Path(args.against) == Path(args.drafter or ""):
        raise ConfigError(f"--against={args.against} is DRAFTER itself: give the other one.")
    if args.set_drafts is not None and not args.recommend:
        raise ConfigError("--set-drafts needs --recommend.")
    if args.set_drafts is not None and args.set_drafts not in args.batch_sizes and not args.engine:
        raise ConfigError(f"--set-drafts={args.set_drafts} is not one of --batch-sizes.")
    for option in ("prompts", "chat_template_kwargs", "adapters"):
        given = getattr(args, option) or []
        if twice := [value for i, value in enumerate(given) if value in given[:i]]:
            raise ConfigError(f"--{option.replace('_', '-')}: {twice[0]} is given twice.")
    writes = {"--write-card": args.write_card, "--set-drafts": args.set_drafts is not None}
    if (asked := [name for name, given in writes.items() if given]) and not Path(args.drafter or "").is_dir():
        raise ConfigError(f"{asked[0]}: {args.drafter} isn't a folder on this machine; give the export's.")
    if args.engine:
        given = {"--serving": args.serving, "--device": args.device, "--thresholds": args.thresholds}
        if args.url:  # the server was started with them
            given |= {"--num-steps": args.num_steps, "--dtype": args.dtype}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(unused)}: the server decides that; leave it out with --engine.")
        if args.against or args.adapters:
            raise ConfigError("--against and --adapters: a server has one pair; leave them out with --engine.")
        if len(args.prompts or []) > 1 or len(args.chat_template_kwargs or []) > 1:
            raise ConfigError("--prompts and --chat-template-kwargs: give each once with --engine.")
        if args.recommend and not (args.url and args.drafter):
            raise ConfigError("--recommend with --engine measures a running server: give BASE DRAFTER and --url.")


@dataclass(frozen=True)
class Column:
    """One way to measure the prompts: with these options of the chat template, and this adapter on the base."""

    name: str
    options: dict[str, Any]
    adapter: str | None


def columns_of(options: Sequence[dict[str, Any]], adapters: Sequence[str]) -> list[Column]:
    """Every choice of options without and with each adapter."""
    made = []
    for chosen in options:
        for adapter in (None, *adapters):
            said = ", ".join(f"{name}={json.dumps(value)}" for name, value in chosen.items())
            parts = [said or "no options"] if len(options) > 1 else []
            parts += [adapter or "the base alone"] if adapters else []
            made.append(Column(", ".join(parts), chosen, adapter))
    return made


def run(args: argparse.Namespace, progress: Callable[[str, int, int], None]) -> int:
    """Evaluate a pair; 1 if speculative decoding gave another text by more than rounding."""
    import torch
    import transformers

    from joint_train.config.values import parse_served
    from joint_train.data.fit import check_ids
    from joint_train.data.tokenizer import read_tokenizer
    from joint_train.evaluate import advice, against
    from joint_train.evaluate.measure import measure, sampling
    from joint_train.evaluate.prompts import load_prompts, warn_of_template
    from joint_train.evaluate.report import page, text
    from joint_train.files import code_version, replace
    from joint_train.pair.compatibility import check_pair
    from joint_train.weights.folders import read_config, resolve
    from joint_train.weights.peft_folder import read_folders
    from joint_train.weights.served import put_on_base
    from joint_train.weights.to_generate import load_to_generate

    args.num_steps, args.serving = args.num_steps or step_list("1-8"), args.serving or "transformers"
    engine = SERVING[args.serving]
    thresholds = threshold_list("0.2,0.4,0.6,0.8") if args.thresholds is None else args.thresholds
    transformers.utils.logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device={device} can't be used here: {str(error).splitlines()[0]}") from None
    automatic = torch.bfloat16 if device.startswith("cuda") else torch.float32
    dtype = automatic if args.dtype in (None, "auto") else getattr(torch, args.dtype)
    drafters = [args.drafter, *([args.against] if args.against else [])]
    folders = [resolve(path) for path in (args.base, *drafters)]
    configs = [read_config(folder, quantized=None) for folder in folders]
    for folder, config, drafts in zip(folders, configs, (False, *[True] * len(drafters)), strict=True):
        if hasattr(config, "backbone_hidden_size") != drafts:
            raise ConfigError(f"{folder} is a {config.model_type}: give the base first, then its drafter.")
    for config in configs[1:]:
        check_pair(configs[0], config)
    specs = parse_served([adapter_spec(text) for text in args.adapters or []])
    adapter_folders = read_folders(specs, None, "--adapters")
    tokenizer = read_tokenizer(folders[0])
    columns = columns_of(args.chat_template_kwargs or [{}], [spec.name for spec in specs])
    prompts_of = [load_prompts(args.prompts or ["general"], tokenizer, args.limit, c.options) for c in columns]
    check_ids([prompt.ids for prompts in prompts_of for prompt in prompts], tokenizer, configs[0])
    base, drafter, *others = (load_to_generate(folder, dtype, device) for folder in folders)
    adapters = put_on_base(base, [s.name for s in specs], adapter_folders, dtype, device, "--adapters")
    for options in (args.chat_template_kwargs or [{}])[: None if tokenizer.chat_template else 1]:
        warn_of_template(tokenizer, base.generation_config, options)

    def measured(column: int, drafter: transformers.PreTrainedModel, thresholds: Sequence[float], what: str) -> dict:
        def named(of: str, done: int, total: int) -> None:
            progress(f"{what}{of}", done, total)

        with adapters.alone(columns[column].adapter):
            return measure(
                base, drafter, tokenizer, prompts_of[column], args.num_steps, args.max_new_tokens,
                ignore_eos=args.ignore_eos, engine=engine, thresholds=thresholds, seed=args.seed, progress=named,
            )  # fmt: skip

    several = len(columns) > 1
    prompts = prompts_of[0]
    results = {
        "base": args.base,
        "drafter": args.drafter,
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": code_version(),
        "options": {
            "num_steps": args.num_steps,
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "ignore_eos": args.ignore_eos,
            "serving": args.serving,
            "thresholds": thresholds,
            "chat_template_kwargs": columns[0].options,
            "adapters": {spec.name: spec.path for spec in specs},
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "seed": args.seed,
        },
        "prompts": {
            "name": ", ".join(args.prompts or ["general"]),
            "count": len(prompts),
            "turns": bool(tokenizer.chat_template),
        },
        **measured(0, drafter, thresholds, f"{columns[0].name}: " if several else ""),
        "sampling": None,
    }
    if several:
        made = [results, *(measured(i, drafter, (), f"{columns[i].name}: ") for i in range(1, len(columns)))]
        keys = ("plain", "speculative", "where", "examples")
        results["columns"] = [
            {"name": c.name, "chat_template_kwargs": c.options, "adapter": c.adapter, **{k: m[k] for k in keys}}
            for c, m in zip(columns, made, strict=True)
        ]
    with adapters.alone(columns[0].adapter):
        if args.temperature > 0:
            k, n, temperature = max(args.num_steps), args.max_new_tokens, args.temperature
            results["sampling"] = sampling(base, drafter, prompts, k, n, temperature, args.seed, engine, progress)
        if args.recommend:
            results["recommend"] = advice.of_pair(args, base, drafter, prompts, thresholds, progress)
    if args.against:
        other = measured(0, others[0], (), "against: ")
        rows = against.compare(results, other, args.seed)
        results["against"] = {"drafter": args.against, "rows": rows, "speculative": other["speculative"]}
    args.out.mkdir(parents=True, exist_ok=True)
    written = [args.out / "evaluation.json", args.out / "evaluation.html"]
    replace(written[0], json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    replace(written[1], page(results))
    print(text(results))
    if args.against:
        table = against.markdown(results)
        written.append(args.out / "before_after.md")
        replace(written[-1], table + "\n")
        if args.write_card:
            written.append(against.put_into_card(args.drafter, table))
    if args.set_drafts is not None:
        written += advice.set_drafts(args, results["recommend"])
    print(f"written: {', '.join(map(str, written))}")
    decoded = [results, *results.get("columns", [])[1:], *([results["against"]] if args.against else [])]
    margins = [d["margin"] for found in decoded for s in found["speculative"] for d in s["differences"]]
    # Two orders of the same sum differ by a few units in the last place of logits of size 10 to 30. Nothing excuses a
    # text that just ends where the other goes on: it has no margin.
    return int(any(m is None or abs(m) > 256 * torch.finfo(dtype).eps for m in margins))


def adapter_spec(text: str) -> Any:
    """``NAME=DIR`` or ``DIR`` as ``model.adapters`` has it."""
    name, equals, path = text.partition("=")
    return {"path": path, "name": name} if equals and "/" not in name else text


def run_on_server(args: argparse.Namespace, progress: Callable[[str, int, int], None]) -> int:
    """Measure a running server, or print how to serve the pair."""
    try:
        from joint_train.evaluate.served import run as run_served
    except ModuleNotFoundError as error:
        if error.name not in ("httpx", "prometheus_client"):
            raise
        raise ConfigError(f"--engine needs {error.name}: pip install 'joint-train[serving]'") from None
    args.prompts = (args.prompts or ["general"])[0]
    args.chat_template_kwargs = (args.chat_template_kwargs or [{}])[0]
    code = run_served(args, progress)
    if args.recommend:
        from joint_train.evaluate import advice

        print(advice.written_for_server(args))
    return code


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        from joint_train.evaluate.compare import main as compare

        return start("joint_train.evaluate", lambda: compare(argv[1:]))
    args = parser().parse_args(argv)

    def work() -> int:
        from joint_train.progress import shown_progress

        check(args)
        with shown_progress("prompts") as progress:
            return (run_on_server if args.engine else run)(args, progress)

    return start("joint_train.evaluate", work)


if __name__ == "__main__":
    sys.exit(main())
