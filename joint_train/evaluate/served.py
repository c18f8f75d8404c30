"""A running server measured: tokens per base forward, acceptance by position, tokens/s at several concurrencies.

    python -m joint_train.evaluate BASE DRAFTER --engine vllm                          # how to serve this pair
    python -m joint_train.evaluate [BASE DRAFTER] --engine vllm --url http://host:8000

(``sglang`` and ``llamacpp`` likewise.)

Prompts go to the server as token ids, so that it completes exactly those of ``python -m joint_train.evaluate``; those
with pictures go to vLLM as chats, and the tokens that it makes of them are compared with those. One at
a time first, which gives every prompt its own counts and so the intervals, then ``--concurrency`` at a time.

``tokens_per_forward`` is (tokens - answers) / verifications: the first token of an answer comes from the prompt's
forward, which settles one token with any drafter. vLLM's "mean acceptance length" is 1 + accepted drafts /
verifications, which also counts accepted drafts that lie behind an end token or past the limit and are thrown away.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import cycle, islice
from typing import Any

from joint_train.data.tokenizer import read_tokenizer
from joint_train.errors import ConfigError
from joint_train.evaluate.engines import ENGINES, Engine, Phase, Request
from joint_train.evaluate.intervals import interval
from joint_train.evaluate.page import Section, Table, html
from joint_train.evaluate.prompts import Prompt, load_prompts, warn_of_template
from joint_train.evaluate.report import (
    acceptance_section,
    category_section,
    examples_section,
    format_interval,
    setting_section,
)
from joint_train.evaluate.serving import serve_command, why_text_only

WARM_UP_TOKENS = 8
SAMPLING = (
    "For requests with a temperature, see whether more drafts are accepted if the drafter samples them: --temperature "
    'adds "draft_sample_method": "probabilistic". It takes GPU memory for the logits of the drafts; greedy requests '
    "gain nothing."
)
REQUESTS_IN_FLIGHT = 4  # a concurrency is measured on at least so many times as many requests


def measure_served(
    engine: Engine,
    prompts: Sequence[Prompt],
    request: Request,
    concurrencies: Sequence[int],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Complete every prompt one at a time, then ``concurrencies`` at a time.

    Returns:
        JSON-able: ``speculative`` (one entry, shaped as that of :func:`joint_train.evaluate.measure.measure`),
        ``concurrency`` (one entry each) and ``examples``. Intervals are 95 % bootstrap intervals over prompts.
    """
    warm_up = Request(min(WARM_UP_TOKENS, request.max_new_tokens))
    engine.run(prompts[:1], warm_up, 1)
    phases = []
    for i, prompt in enumerate(prompts):
        progress("one at a time", i, len(prompts))
        phases.append(engine.run([prompt], request, 1))
    progress("one at a time", len(prompts), len(prompts))
    rows = [concurrency_row(1, phases, sum(phase.seconds for phase in phases))]
    for count in concurrencies:
        if count == 1:
            continue
        progress(f"{count} at a time", 0, len(prompts))
        several = list(islice(cycle(prompts), max(len(prompts), REQUESTS_IN_FLIGHT * count)))
        engine.run(several[:count], warm_up, count)
        phase = engine.run(several, request, count)
        rows.append(concurrency_row(count, [phase], phase.seconds))
        progress(f"{count} at a time", len(prompts), len(prompts))
    return {
        "plain": None,
        "speculative": [served_summary(engine.num_steps, prompts, phases, request.seed)],
        "concurrency": rows,
        "examples": [
            {"category": prompt.category, "prompt": prompt.text, "text": phase.answers[0].text}
            for prompt, phase in zip(prompts, phases, strict=True)
        ],
    }


def concurrency_row(count: int, phases: Sequence[Phase], seconds: float) -> dict[str, Any]:
    """Totals of all requests that were made ``count`` at a time, in ``seconds``."""
    tokens, verifications = sum(p.tokens for p in phases), sum(p.verifications for p in phases)
    answers = [answer for phase in phases for answer in phase.answers]
    return {
        "concurrency": count,
        "requests": len(answers),
        "tokens": tokens,
        "seconds": seconds,
        "verifications": verifications,
        "tokens_per_forward": sum(p.settled for p in phases) / verifications if verifications else None,
        "tokens_per_second": tokens / seconds,
        "seconds_per_request": statistics.median(answer.seconds for answer in answers),
    }


def served_summary(num_steps: int, prompts: Sequence[Prompt], phases: Sequence[Phase], seed: int) -> dict[str, Any]:
    """What the server did with each prompt alone."""
    tokens, seconds = [p.tokens for p in phases], [p.seconds for p in phases]
    settled, verifications = [p.settled for p in phases], [p.verifications for p in phases]

    def per_forward(rows: Sequence[int]) -> dict[str, Any]:
        return interval([[settled[i] for i in rows], [verifications[i] for i in rows]], lambda s, v: s / v, seed)

    acceptance, reached = [], verifications
    for k in range(num_steps):
        accepted = [p.accepted[k] for p in phases]
        acceptance.append(
            {
                "drafted": sum(verifications),
                "accepted": sum(accepted),
                "share": interval([accepted, verifications], lambda a, v: a / v, seed),
                "share_if_reached": interval([accepted, reached], lambda a, r: a / r, seed),
            }
        )
        reached = accepted
    return {
        "num_steps": num_steps,
        "tokens": sum(tokens),
        "seconds": sum(seconds),
        "verifications": sum(verifications),
        "tokens_per_forward": per_forward(range(len(phases))),
        "tokens_per_second": interval([tokens, seconds], lambda t, s: t / s, seed),
        "acceptance": acceptance,
        "tokens_per_forward_by_category": {
            category: per_forward([i for i, p in enumerate(prompts) if p.category == category])
            for category in sorted({p.category for p in prompts})
        },
    }


HEADS = ["at a time", "requests", "tokens per base forward", "tokens/s", "seconds for a request, median"]


def concurrency_rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells under ``HEADS``; one at a time with its intervals."""
    one = results["speculative"][0]
    rows = []
    for row in results["concurrency"]:
        per_forward, speed = row["tokens_per_forward"], f"{row['tokens_per_second']:.1f}"
        cells = ["–" if per_forward is None else f"{per_forward:.2f}", speed]
        if row["concurrency"] == 1:
            cells = [format_interval(one["tokens_per_forward"]), format_interval(one["tokens_per_second"], 1)]
        rows.append([str(row["concurrency"]), str(row["requests"]), *cells, f"{row['seconds_per_request']:.2f}"])
    return rows


def text(results: dict[str, Any]) -> str:
    """The tables for a terminal, at most 80 columns wide."""
    one = results["speculative"][0]
    lines = [f"{'at a time':>9}  {'requests':>8}  {'tokens/forward':<20}{'tokens/s':<22}{'s/request':>9}"]
    for at_a_time, requests, per_forward, speed, latency in concurrency_rows(results):
        lines.append(f"{at_a_time:>9}  {requests:>8}  {per_forward:<20}{speed:<22}{latency:>9}")
    lines += ["", f"{'draft':>5}  accepted (with all before it), K = {one['num_steps']}"]
    lines += [f"{k + 1:>5}  {format_interval(position['share'])}" for k, position in enumerate(one["acceptance"])]
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """The page."""
    one, prompts, options = results["speculative"][0], results["prompts"], results["options"]
    lead = (
        f"{options['engine']} at {options['url']} with K = {one['num_steps']} drafts: "
        f"{format_interval(one['tokens_per_forward'])} tokens per base forward and "
        f"{format_interval(one['tokens_per_second'], 1)} tokens/s one request at a time, on "
        f"{prompts['count']} prompts ({prompts['name']}). Brackets are 95 % bootstrap intervals over prompts."
    )
    speed = Section(
        "Speed",
        "Tokens per base forward is the mean number of tokens that a verification settles: the accepted drafts and one "
        "of the base's own. The prompt's forward isn't counted. Where several requests are served at a time, tokens/s "
        "is of all of them together, from the first request to the last answer.",
        tables=[Table(HEADS, concurrency_rows(results))],
    )
    sections = [speed, acceptance_section(results), category_section(one)]
    return html("A server, measured", lead, [*sections, examples_section(results), setting_section(results)])


def run(args: argparse.Namespace, progress: Callable[[str, int, int], None]) -> int:
    """What the command does with ``--engine``: measure ``args.url``, or print how to serve the pair."""
    from joint_train.files import code_version, replace
    from joint_train.weights.folders import read_configs, resolve

    if args.base:
        folders = resolve(args.base), resolve(args.drafter)
        read_configs(*folders, quantized=None)
    if args.url is None:
        num_steps = max(args.num_steps) if args.num_steps else None
        print(serve_command(args.engine, *folders, num_steps, args.dtype, args.temperature))
        if why := why_text_only(args.engine, folders[0]):
            print(why, file=sys.stderr)
        if args.engine == "vllm" and not args.temperature:
            print(SAMPLING, file=sys.stderr)
        return 0
    engine = ENGINES[args.engine](args.url, args.timeout)
    source = args.base or engine.folder
    try:
        tokenizer = read_tokenizer(folders[0] if args.base else source)
    except ConfigError as e:
        raise ConfigError(
            f"no tokenizer at {source}, where {args.url} has its model from: give BASE and DRAFTER, with the base's "
            f"tokenizer in its folder. ({e})"
        ) from e
    prompts = load_prompts(args.prompts, tokenizer, args.limit, args.chat_template_kwargs)
    warn_of_template(tokenizer)
    if (pictures := sum(prompt.chat is not None for prompt in prompts)) and not engine.takes_pictures:
        raise ConfigError(
            f"{pictures} of {len(prompts)} prompts have pictures, which are sent to vLLM only: leave them out of "
            f"--prompts with --engine {engine.name}, or measure without --engine."
        )
    engine.tokenizer = tokenizer
    request = Request(args.max_new_tokens, args.temperature, args.ignore_eos, args.seed)
    results = {
        "base": str(source),
        "drafter": args.drafter or "the server's",
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": code_version(),
        "options": {
            "engine": args.engine,
            "url": args.url,
            "num_steps": engine.num_steps,
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "ignore_eos": args.ignore_eos,
            "seed": args.seed,
        },
        "prompts": {"name": args.prompts, "count": len(prompts), "turns": bool(tokenizer.chat_template)},
        **measure_served(engine, prompts, request, args.concurrency, progress),
        "sampling": None,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    replace(args.out / "evaluation.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    replace(args.out / "evaluation.html", page(results))
    print(text(results))
    print(f"written: {args.out / 'evaluation.json'}, {args.out / 'evaluation.html'}")
    return 0
