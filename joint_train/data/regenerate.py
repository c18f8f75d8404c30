"""Self-distillation data: the base answers the prompts of a dataset, since a drafter has to guess what its base says.

Who answers is an :class:`Answerer`: the base in this process (:class:`Base`), or an engine that serves it
(:class:`joint_train.data.engine.Engine`). Both are asked with the same tokens.

Each rank answers every ``world_size``-th prompt and appends each answer to a file of its own beside the output. A run
that was stopped goes on with the prompts that no such file answers, on any number of ranks; answers of another base, to
other prompts or of another sampling don't count. Whoever finds that all are answered puts them together, in the order
of the dataset, and renames the result: no rank waits for another.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import Progress

from joint_train.data import images, readers, sources
from joint_train.data.fit import check_ids
from joint_train.data.render import options_of
from joint_train.data.thinking import prompt_ids
from joint_train.errors import DataError

CHANNEL = re.compile(r"<\|channel>thought\n(.*?)<channel\|>", re.DOTALL)
IMAGE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen.

    Attributes:
        max_new_tokens: where an answer is cut off.
        temperature: 0 is greedy; the others then don't matter.
        top_k: 0: all tokens.
        top_p: 1: all tokens.
        seed: of the sampling.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """What became of a prompt.

    Attributes:
        message: the base's; None if ``max_new_tokens`` cut it off, or there is none.
        tokens: that were generated.
        refused: why there is none, if an engine refused the prompt.
    """

    message: dict | None
    tokens: int = 0
    refused: str | None = None


class Answerer(Protocol):
    """Who answers prompts.

    Attributes:
        name: of the base; answers of another one don't count in a resumed run.
    """

    name: str
    sampling: Sampling

    def answers(self, asked: Sequence[tuple[int, dict]]) -> Iterator[list[tuple[int, Answered]]]:
        """Answer numbered prompts, in any order; each list is on disk before the next one is asked for."""


def prompts(specs, data, pictures: bool = False) -> Iterator[dict]:
    """The examples of the sources, each up to its last user message: ``messages``, and ``tools`` where there are any.

    Args:
        pictures: take prompts with pictures: absolute paths or data URLs in ``images``.

    Raises:
        DataError: a bad example (``data.on_error=raise``); with ``skip`` it is left out.
    """
    for spec in specs:
        for record in readers.read_records(spec, data.max_line_bytes):
            try:
                example = sources.parse(record, spec)
                roles = [message["role"] for message in example.get("messages", [])]
                if "user" not in roles:
                    raise DataError(f"{record.file}:{record.line}: no user message to answer")
                if "images" in example and not pictures:
                    raise DataError(
                        f"{record.file}:{record.line}: a prompt with pictures; an engine can answer it: give --url"
                    )
            except DataError:
                if data.on_error == "raise":
                    raise
                continue
            last = len(roles) - 1 - roles[::-1].index("user")
            prompt = {**example, "messages": example["messages"][: last + 1]}
            if context := [index for index in prompt.pop("context", ()) if index <= last]:
                prompt["context"] = context
            if shown := images.of_messages(prompt, last + 1):
                prompt["images"] = [os.path.abspath(x) if isinstance(x, str) else data_url(x) for x in shown]
            else:
                prompt.pop("images", None)
            yield prompt


def data_url(picture: bytes) -> str:
    """A picture's file in a URL."""
    kind = next((kind for start, kind in IMAGE_TYPES.items() if picture.startswith(start)), "image/png")
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def regenerate(
    examples: list[dict], answerer: Answerer, output: Path, *, rank: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Answer this rank's share of the prompts that are not answered yet; write ``output`` if that was all of them.

    Args:
        examples: what :func:`prompts` yields.
        output: JSONL of conversations; an answer that ``max_new_tokens`` cut off is left out of it, since it would
            teach to stop there, and so is a prompt that an engine refused.
        rank, world_size: this process among those that share the work.

    Returns:
        ``answered`` by this call, their ``tokens`` and the ``seconds`` that they took; ``unfinished`` among all known
        answers; ``refused``: how many prompts, by the engine's reason; ``missing`` in all.

    Raises:
        DataError: there is no prompt, or no answer that can be kept; nothing is written then.
    """
    if not examples:
        raise DataError("there is no prompt to answer: every example was skipped, or the sources are empty")
    parts = output.with_name(f"{output.name}.parts")
    counts: dict[str, Any] = {"answered": 0, "tokens": 0, "seconds": 0.0, "unfinished": 0, "refused": {}, "missing": 0}
    if output.exists():
        return counts
    parts.mkdir(parents=True, exist_ok=True)
    most = answerer.sampling.max_new_tokens
    prompt = [_digest(example, answerer) for example in examples]
    done = _answers(parts, prompt, most)
    # What was refused is asked again: the engine may have been started with other options since.
    known = {index for index, answer in done.items() if answer.refused is None}
    mine = [index for index in range(rank, len(examples), world_size) if index not in known]
    part, started = parts / f"{socket.gethostname()}-{os.getpid()}-{rank}.jsonl", time.perf_counter()
    with open(part, "a") as stream, Progress(transient=True, disable=rank > 0) as progress:
        stream.write("\n")  # after the half of a line that a killed run of the same name may have left
        bar = progress.add_task("prompts", total=len(mine))
        for answers in answerer.answers([(index, examples[index]) for index in mine]):
            for index, answer in answers:
                record = {"index": index, "prompt": prompt[index], "answer": answer.message, "most": most}
                stream.write(json.dumps({**record, "tokens": answer.tokens, "refused": answer.refused}) + "\n")
                counts["tokens"] += answer.tokens
            stream.flush()
            progress.advance(bar, len(answers))
    done = _answers(parts, prompt, most)
    counts |= {"answered": len(mine), "seconds": time.perf_counter() - started, "missing": len(examples) - len(done)}
    counts["refused"] = dict(Counter(answer.refused for answer in done.values() if answer.refused).most_common())
    refused = sum(counts["refused"].values())
    counts["unfinished"] = sum(answer.message is None for answer in done.values()) - refused
    if refused == len(examples):
        raise DataError(f"the engine refused all of {refused} prompts, the first with: {next(iter(counts['refused']))}")
    if counts["unfinished"] + refused == len(examples):
        raise DataError(
            f"none of {counts['unfinished']} answers ended within --max-new-tokens={most}: {output} isn't written. "
            "Raise it; a base that never ends its turn wants training, or its chat template"
        )
    if not counts["missing"]:
        _write_output(examples, done, output)
        shutil.rmtree(parts, ignore_errors=True)
    return counts


def _digest(example: dict, answerer: Answerer) -> str:
    """A digest of an answer's prompt: a resumed run may have other prompts than it started with."""
    asked: list[Any] = [example, answerer.name]
    if answerer.sampling.temperature > 0:
        asked.append({**asdict(answerer.sampling), "max_new_tokens": None})
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _answers(parts: Path, prompt: list[str], max_new_tokens: int) -> dict[int, Answered]:
    """What is answered so far of these prompts (their digests). An answer without an end that had fewer tokens for it
    than there are now doesn't count."""
    answers: dict[int, Answered] = {}
    for part in sorted(parts.glob("*.jsonl")):
        for line in part.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            index, refused = record["index"], record.get("refused")
            if record["answer"] is None and not refused and record.get("most", 0) < max_new_tokens:
                continue
            if index >= len(prompt) or record.get("prompt") != prompt[index]:
                continue
            if refused and index in answers:
                continue
            answers[index] = Answered(record["answer"], record.get("tokens", 0), refused)
    return answers


def _write_output(examples: list[dict], answers: dict[int, Answered], output: Path) -> None:
    temporary = output.with_name(f"{output.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with open(temporary, "w") as stream:
        for index, example in enumerate(examples):
            if (message := answers[index].message) is not None:
                stream.write(json.dumps(_row(example, message)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(output)


def _row(example: dict, answer: dict) -> dict:
    """An example with its answer, as a row of messages."""
    context = example.get("context", ())
    messages = [{**m, "weight": 0} if index in context else m for index, m in enumerate(example["messages"])]
    row = {key: value for key, value in example.items() if key != "context"}
    return {**row, "messages": [*messages, answer]}


class Base:
    """The base in this process.

    Args:
        model: on its device, in eval mode.
        tokenizer: with a chat template.
        batch_size: prompts answered at once.
    """

    def __init__(self, model, tokenizer, sampling: Sampling, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.sampling, self.batch_size = model, tokenizer, sampling, batch_size
        self.name: str = model.name_or_path

    def answers(self, asked: Sequence[tuple[int, dict]]) -> Iterator[list[tuple[int, Answered]]]:
        """Batches in the order of the prompts."""
        for first in range(0, len(asked), self.batch_size):
            indices, examples = zip(*asked[first : first + self.batch_size], strict=True)
            torch.manual_seed(self.sampling.seed + indices[0])
            answers = answer_batch(list(examples), self.model, self.tokenizer, self.sampling)
            yield list(zip(indices, answers, strict=True))


@torch.inference_mode()
def answer_batch(examples: list[dict], model, tokenizer, sampling: Sampling) -> list[Answered]:
    """The base's answers to some prompts."""
    rows = []
    for example in examples:
        rows.append(prompt_ids(tokenizer, example["messages"], **options_of(example)))
    check_ids(rows, tokenizer, model.config)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens, pad_token_id=pad, **options
    )
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    answers = []
    for new in out[:, width:].tolist():
        end = next((index for index, token in enumerate(new) if token in ends), None)
        message = None if end is None else message_of(tokenizer.decode(new[:end]))
        answers.append(Answered(message, len(new) if end is None else end + 1))
    return answers


def message_of(text: str) -> dict:
    """The assistant's message that a base wrote, without the token that ends it: its thoughts apart."""
    message = {"role": "assistant", "content": CHANNEL.sub("", text).strip()}
    if thinking := "\n".join(CHANNEL.findall(text)).strip():
        message["reasoning"] = thinking
    return message
