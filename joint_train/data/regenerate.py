"""Self-distillation data: the base answers the prompts of a dataset, since a drafter has to guess what its base says.

Each rank answers every ``world_size``-th prompt and appends each answer to a file of its own beside the output. A run
that was stopped goes on with the prompts that no such file answers, on any number of ranks; answers of another base, or
to other prompts, don't count. Whoever finds that all are answered puts them together, in the order of the dataset, and
renames the result: no rank waits for another.
"""

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import Progress

from joint_train.data import readers, sources
from joint_train.data.fit import check_ids
from joint_train.data.render import options_of
from joint_train.data.thinking import prompt_ids
from joint_train.errors import DataError

CHANNEL = re.compile(r"<\|channel>thought\n(.*?)<channel\|>", re.DOTALL)


def prompts(specs, data) -> Iterator[dict]:
    """The examples of the sources, each up to its last user message: ``messages``, and ``tools`` where there are any.

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
                if "images" in example:
                    raise DataError(f"{record.file}:{record.line}: prompts with images can't be answered here")
            except DataError:
                if data.on_error == "raise":
                    raise
                continue
            last = len(roles) - 1 - roles[::-1].index("user")
            prompt = {**example, "messages": example["messages"][: last + 1]}
            if context := [index for index in prompt.pop("context", ()) if index <= last]:
                prompt["context"] = context
            yield prompt


def regenerate(
    examples: list[dict],
    model,
    tokenizer,
    output: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 8,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, int]:
    """Answer this rank's share of the prompts that are not answered yet; write ``output`` if that was all of them.

    Args:
        examples: what :func:`prompts` yields.
        model: the base, on its device, in eval mode.
        tokenizer: with a chat template.
        output: JSONL of conversations; an answer that ``max_new_tokens`` cut off is left out of it, since it would
            teach to stop there.
        rank, world_size: this process among those that share the work.
        batch_size: prompts answered at once.
        temperature: 0 is greedy.
        seed: of the sampling.

    Returns:
        ``answered`` by this call, ``unfinished`` among all known answers, ``missing`` in all.

    Raises:
        DataError: there is no prompt, or no answer that can be kept; nothing is written then.
    """
    if not examples:
        raise DataError("there is no prompt to answer: every example was skipped, or the sources are empty")
    parts = output.with_name(f"{output.name}.parts")
    if output.exists():
        return {"answered": 0, "unfinished": 0, "missing": 0}
    parts.mkdir(parents=True, exist_ok=True)
    prompt = [_digest(example, model.name_or_path) for example in examples]
    done = _answers(parts, prompt, max_new_tokens)
    mine = [index for index in range(rank, len(examples), world_size) if index not in done]
    part = parts / f"{socket.gethostname()}-{os.getpid()}-{rank}.jsonl"
    with open(part, "a") as stream, Progress(transient=True, disable=rank > 0) as progress:
        stream.write("\n")  # after the half of a line that a killed run of the same name may have left
        bar = progress.add_task("prompts", total=len(mine))
        for first in range(0, len(mine), batch_size):
            indices = mine[first : first + batch_size]
            torch.manual_seed(seed + indices[0])
            batch = [examples[index] for index in indices]
            answers = answer_batch(batch, model, tokenizer, max_new_tokens, temperature)
            for index, answer in zip(indices, answers, strict=True):
                record = {"index": index, "prompt": prompt[index], "answer": answer, "most": max_new_tokens}
                stream.write(json.dumps(record) + "\n")
            stream.flush()
            progress.advance(bar, len(indices))
    done = _answers(parts, prompt, max_new_tokens)
    unfinished = sum(answer is None for answer in done.values())
    missing = len(examples) - len(done)
    if unfinished == len(examples):
        raise DataError(
            f"none of {unfinished} answers ended within --max-new-tokens={max_new_tokens}: {output} isn't written. "
            "Raise it; a base that never ends its turn wants training, or its chat template"
        )
    if not missing:
        _write_output(examples, done, output)
        shutil.rmtree(parts, ignore_errors=True)
    return {"answered": len(mine), "unfinished": unfinished, "missing": missing}


def _digest(example: dict, model: str) -> str:
    """A digest of an answer's prompt: a resumed run may have other prompts than it started with."""
    return hashlib.sha256(json.dumps([example, model], sort_keys=True).encode()).hexdigest()[:16]


def _answers(parts: Path, prompt: list[str], max_new_tokens: int) -> dict[int, dict | None]:
    """What is answered so far of these prompts (their digests); None where the answer had no end. One that had fewer
    tokens for it than there are now doesn't count."""
    answers = {}
    for part in sorted(parts.glob("*.jsonl")):
        for line in part.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            if record["answer"] is None and record.get("most", 0) < max_new_tokens:
                continue
            if record["index"] < len(prompt) and record.get("prompt") == prompt[record["index"]]:
                answers[record["index"]] = record["answer"]
    return answers


def _write_output(examples: list[dict], answers: dict[int, dict | None], output: Path) -> None:
    temporary = output.with_name(f"{output.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with open(temporary, "w") as stream:
        for index, example in enumerate(examples):
            if (answer := answers[index]) is not None:
                stream.write(json.dumps(_row(example, answer)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(output)


def _row(example: dict, answer: dict) -> dict:
    """An example with its answer, as a row of messages."""
    context = example.get("context", ())
    messages = [{**m, "weight": 0} if index in context else m for index, m in enumerate(example["messages"])]
    row = {key: value for key, value in example.items() if key != "context"}
    return {**row, "messages": [*messages, answer]}


@torch.inference_mode()
def answer_batch(examples: list[dict], model, tokenizer, max_new_tokens: int, temperature: float) -> list[dict | None]:
    """The base's message for each prompt; None where ``max_new_tokens`` cut it off."""
    rows = []
    for example in examples:
        rows.append(prompt_ids(tokenizer, example["messages"], **options_of(example)))
    check_ids(rows, tokenizer, model.config)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
    )
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    return [_message(new, ends, tokenizer) for new in out[:, width:].tolist()]


def _message(tokens: list[int], ends: set[int], tokenizer) -> dict | None:
    end = next((index for index, token in enumerate(tokens) if token in ends), None)
    if end is None:
        return None
    text = tokenizer.decode(tokens[:end])
    message = {"role": "assistant", "content": CHANNEL.sub("", text).strip()}
    if thinking := "\n".join(CHANNEL.findall(text)).strip():
        message["reasoning"] = thinking
    return message
