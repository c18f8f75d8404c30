"""Speculative decoding with a base and its drafter, measured against plain decoding.

    python -m joint_train.evaluate BASE DRAFTER [options]
    python -m joint_train.evaluate BASE DRAFTER --engine vllm              how to serve this pair
    python -m joint_train.evaluate --engine vllm --url URL [options]       measures a running server
    python -m joint_train.evaluate compare RUN RUN …

Prompt sets: `general` (40 prompts in eight categories), `starter` (held-out docstrings of the standard library), or a
JSONL file in any format that training data has.
"""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Literal

from joint_train.command import start
from joint_train.errors import ConfigError

SERVING: dict[str, bool | Literal["llamacpp"]] = {"transformers": False, "engine": True, "llamacpp": "llamacpp"}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m joint_train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", nargs="?", help="folder or hub id of the base")
    parser.add_argument("drafter", metavar="DRAFTER", nargs="?", help="folder or hub id of its drafter")
    parser.add_argument("--prompts", default="general", help="general | starter | a JSONL file (default: general)")
    parser.add_argument("--limit", type=int, help="at most this many prompts")
    parser.add_argument(
        "--chat-template-kwargs",
        type=template_options,
        default={},
        metavar="JSON",
        help="for the chat template, as data.chat_template_kwargs in training, e.g. '{\"enable_thinking\": true}'",
    )
    parser.add_argument("--num-steps", type=step_list, help="K: 4, 1-8 or 1,2,4 (default 1-8)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens for a prompt (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="also sample at this temperature (0: don't)")
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
    parser.add_argument("--seed", type=int, default=0, help="of samples and bootstrap (default 0)")
    server = parser.add_argument_group("a running server")
    server.add_argument(
        "--engine", choices=["vllm", "sglang", "llamacpp"], help="measure this engine; without --url: how to serve"
    )
    server.add_argument("--url", help="where it is served, e.g. http://localhost:8000")
    server.add_argument(
        "--concurrency", type=step_list, default=[1, 4, 16], help="requests at a time (default 1,4,16; 1 is always)"
    )
    server.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take (default 600)")
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
        raise argparse.ArgumentTypeError(f"{text!r} is none of 4, 1-8 or 1,2,4")
    return steps


def threshold_list(text: str) -> list[float]:
    """``0.2,0.8`` as a list; zeros are left out."""
    try:
        thresholds = [float(part) for part in text.split(",")]
    except ValueError:
        thresholds = [-1.0]
    if not all(0 <= threshold < 1 for threshold in thresholds):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of probabilities such as 0.2,0.4,0.8")
    return sorted({threshold for threshold in thresholds if threshold})


def template_options(text: str) -> dict:
    """``{"enable_thinking": true}`` as a dictionary."""
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as {{"enable_thinking": true}}')
    return options


def check(args: argparse.Namespace) -> None:
    """Refuse options that don't go together.

    Raises:
        ValueError: naming them.
    """
    if args.url and not args.engine:
        raise ConfigError("--url needs --engine vllm, --engine sglang or --engine llamacpp.")
    if (args.drafter is None) and (args.base is not None or not args.url):
        raise ConfigError("give the base and its drafter: BASE DRAFTER.")
    if args.engine:
        given = {"--serving": args.serving, "--device": args.device, "--thresholds": args.thresholds}
        if args.url:  # the server was started with them
            given |= {"--num-steps": args.num_steps, "--dtype": args.dtype}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(unused)}: the server decides that; leave it out with --engine.")


def run(args: argparse.Namespace) -> int:
    """Evaluate a pair; 1 if speculative decoding gave another text by more than rounding."""
    import torch
    import transformers

    from joint_train.data.fit import check_ids
    from joint_train.data.tokenizer import read_tokenizer
    from joint_train.evaluate.measure import measure, sampling
    from joint_train.evaluate.prompts import load_prompts, warn_of_template
    from joint_train.evaluate.report import page, text
    from joint_train.files import code_version, replace
    from joint_train.pair.compatibility import check_pair
    from joint_train.weights.folders import resolve
    from joint_train.weights.loading import load_to_generate

    args.num_steps, args.serving = args.num_steps or step_list("1-8"), args.serving or "transformers"
    engine = SERVING[args.serving]
    thresholds = threshold_list("0.2,0.4,0.6,0.8") if args.thresholds is None else args.thresholds
    transformers.utils.logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    automatic = torch.bfloat16 if device.startswith("cuda") else torch.float32
    dtype = automatic if args.dtype in (None, "auto") else getattr(torch, args.dtype)
    folders = [resolve(args.base), resolve(args.drafter)]
    configs = [transformers.AutoConfig.from_pretrained(folder) for folder in folders]
    for folder, config, drafts in zip(folders, configs, (False, True), strict=True):
        if hasattr(config, "backbone_hidden_size") != drafts:
            raise ConfigError(f"{folder} is a {config.model_type}: give the base first, then its drafter.")
    check_pair(*configs)
    tokenizer = read_tokenizer(folders[0])
    prompts = load_prompts(args.prompts, tokenizer, args.limit, args.chat_template_kwargs)
    check_ids([prompt.ids for prompt in prompts], tokenizer, configs[0])
    base, drafter = (load_to_generate(folder, dtype, device) for folder in folders)
    warn_of_template(tokenizer, base.generation_config, args.chat_template_kwargs)

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
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "seed": args.seed,
        },
        "prompts": {"name": args.prompts, "count": len(prompts), "turns": bool(tokenizer.chat_template)},
        **measure(
            base, drafter, tokenizer, prompts, args.num_steps, args.max_new_tokens,
            ignore_eos=args.ignore_eos, engine=engine, thresholds=thresholds, seed=args.seed, progress=progress,
        ),
        "sampling": None,
    }  # fmt: skip
    if args.temperature > 0:
        k = max(args.num_steps)
        results["sampling"] = sampling(
            base, drafter, prompts, k, args.max_new_tokens, args.temperature, args.seed, engine
        )
    args.out.mkdir(parents=True, exist_ok=True)
    replace(args.out / "evaluation.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    replace(args.out / "evaluation.html", page(results))
    print(text(results))
    print(f"written: {args.out / 'evaluation.json'}, {args.out / 'evaluation.html'}")
    margins = [d["margin"] for s in results["speculative"] for d in s["differences"]]
    # Two orders of the same sum differ by a few units in the last place of logits of size 10 to 30. Nothing excuses a
    # text that just ends where the other goes on: it has no margin.
    return int(any(m is None or abs(m) > 256 * torch.finfo(dtype).eps for m in margins))


def progress(what: str, done: int, total: int) -> None:
    """One line that is written over, on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{what}: {done}/{total} prompts" + ("\n" if done == total else ""))
        sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        from joint_train.evaluate.compare import main as compare

        return start("joint_train.evaluate", lambda: compare(argv[1:]))
    args = parser().parse_args(argv)

    def work() -> int:
        check(args)
        if not args.engine:
            return run(args)
        try:
            from joint_train.evaluate.served import run as run_served
        except ModuleNotFoundError as error:
            if error.name not in ("httpx", "prometheus_client"):
                raise
            raise ConfigError(f"--engine needs {error.name}: pip install 'joint-train[serving]'") from None
        return run_served(args, progress)

    return start("joint_train.evaluate", work)


if __name__ == "__main__":
    sys.exit(main())
