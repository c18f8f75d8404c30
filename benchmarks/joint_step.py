"""Peak memory and time of a joint step (forward and backward), ours against a straightforward one.

    python -m benchmarks.joint_step                                   # S = 512, all and 30 % of the rows supervised
    python -m benchmarks.joint_step --length 512 2048 --head ordered  # a drafter with ordered embeddings

The reference is the joint step as one writes it with transformers alone: every logit of the base and of the K rounds
materialised, the drafter's own forward (with ordered embeddings its own gather), the losses over them. It takes the
same losses; it takes none of our metrics. Both run in fresh processes, on the real vocabulary and head widths of the
E2B pair with few layers and without per-layer embeddings, which cost both the same.

Memory is the largest resident size above that with the weights loaded; it includes the gradients of the weights, which
both must have: the last ratio of memory leaves them out. Ours recomputes the base's layers and the drafter's rounds, as
a run does by default; the reference does with --reference-recompute. On CPU one thread computes and time is its CPU
time, which other processes disturb little. A run that would need more memory than is free is stopped and says so.

The README has a table. What grows with S is what tests/pair/test_joint_memory.py bounds.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

from benchmarks import results
from joint_train.config import LossConfig
from joint_train.pair.loss import memory_budget_mb
from joint_train.weights.composite import Gemma4WithDrafter

HIDDEN, DRAFTER_HIDDEN = 1536, 256
GIB = 2**30
COLUMNS = {
    "head": ("head", ""),
    "length": ("S", ""),
    "supervised": ("supervised", ""),
    "gradients": ("gradients", ".2f GiB"),
    "ours_gib": ("ours", ".2f GiB"),
    "reference_gib": ("reference", ".2f GiB"),
    "gib_ratio": ("memory, ratio", ".2f"),
    "gib_ratio_beyond": ("ratio beyond gradients", ".3f"),
    "ours_seconds": ("ours", ".2f s"),
    "reference_seconds": ("reference", ".2f s"),
    "seconds_ratio": ("time, ratio", ".2f"),
}


def build_pair(vocab_size: int, ordered: bool):
    """The E2B pair's widths and vocabulary; 2 of 35 base layers, 2 of 4 drafter layers, random weights."""
    common = dict(vocab_size=vocab_size, num_key_value_heads=1, num_attention_heads=8, head_dim=256)
    common |= dict(global_head_dim=512, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    common |= dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    base_config = Gemma4TextConfig(hidden_size=HIDDEN, intermediate_size=6144, final_logit_softcapping=30.0, **common)
    drafter_text = Gemma4TextConfig(hidden_size=DRAFTER_HIDDEN, intermediate_size=2048, **common)
    drafter_config = Gemma4AssistantConfig(
        text_config=drafter_text, backbone_hidden_size=HIDDEN, use_ordered_embeddings=ordered
    )
    base, drafter = Gemma4ForCausalLM(base_config), Gemma4AssistantForCausalLM(drafter_config)
    if ordered:
        drafter.masked_embedding.token_ordering.copy_(torch.randperm(vocab_size))
    return base, drafter


def our_step(base, drafter, options):
    cfg = LossConfig(drafter=options.loss, memory_budget_mb=options.budget_mb)
    model = Gemma4WithDrafter(
        base,
        drafter,
        drafter_num_steps=options.rounds,
        freeze_base_for_drafter=options.freeze_base,
        base_activation_checkpointing=True,
        drafter_activation_checkpointing=True,
        loss=cfg,
    )
    return lambda ids, labels: model(input_ids=ids, labels=labels).loss.backward()


def reference_step(base, drafter, options):
    """The joint step without any of our code: serving pairing, causal masks, losses over whole logits."""
    # With ordered embeddings only the routed tokens' logits train: the centroids have no gradient of their own.

    def causal_masks(embeds, attention_mask, shared_kv):
        j = torch.arange(embeds.shape[1], device=embeds.device)
        t = j[:, None]
        window = drafter.config.get_text_config().sliding_window
        full = j <= t
        return {"full_attention": full[None, None], "sliding_attention": (full & (t - j < window))[None, None]}

    drafter.create_attention_masks = causal_masks
    base.requires_grad_(not options.freeze_base)
    if options.reference_recompute:
        for model in (base, drafter):
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def divergence(student, teacher, tokens):
        student, teacher = student.float(), teacher.float()
        if options.loss == "ce":
            return F.cross_entropy(student, tokens)
        return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")

    def step(ids, labels):
        out = base(input_ids=ids, output_hidden_states=True, return_shared_kv_states=True)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        targets = (labels != -100)[0].nonzero()[:, 0]
        loss = 0.0
        if not options.freeze_base:  # as transformers' own loss does: the whole shifted logits, with ignored labels
            loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        teacher, embedding, state = out.logits.detach(), base.get_input_embeddings(), out.hidden_states[-1]
        for k in range(options.rounds):
            tokens = F.pad(ids[:, 1 + k :], (0, 1 + k))
            inputs = torch.cat([embedding(tokens), state], dim=-1)
            drafted = drafter(inputs_embeds=inputs, position_ids=positions, shared_kv_states=out.shared_kv_states)
            state = drafted.last_hidden_state
            p = targets[targets >= 2 + k]
            loss = loss + divergence(drafted.logits[0, p - 2 - k], teacher[0, p - 1], ids[0, p])
        loss.backward()

    return step


def batch(length: int, vocab_size: int, supervised: float):
    """A prompt, then a supervised answer of that fraction of the row: `[1, length]`."""
    ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : round(length * (1 - supervised))] = -100
    return ids, labels


class PeakMemory:
    """Largest resident size (CPU) or allocation (GPU) in the block, above that on entry, in bytes."""

    def __enter__(self):
        self.stop, self.peak = threading.Event(), 0
        self.start = self.resident()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    @staticmethod
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def sample(self):
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, self.resident())

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        self.bytes = self.peak - self.start


def measure(options) -> dict:
    """One step in this process."""
    torch.set_num_threads(1)
    if options.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (options.limit, options.limit))
    torch.manual_seed(0)
    base, drafter = build_pair(options.vocab_size, options.head == "ordered")
    step = {"ours": our_step, "reference": reference_step}[options.side](base, drafter, options)
    step(*batch(16, options.vocab_size, 1.0))  # loads and initialises what a first call does
    base.zero_grad(), drafter.zero_grad()
    ids, labels = batch(options.length, options.vocab_size, options.supervised)
    with PeakMemory() as memory:
        start = time.process_time(), time.perf_counter()
        step(ids, labels)
        seconds, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    gradients = sum(p.grad.nbytes for m in (base, drafter) for p in m.parameters() if p.grad is not None)
    return {"gradients": gradients / GIB, "gib": memory.bytes / GIB, "seconds": seconds, "wall": wall}


def available_memory() -> int:
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(info["MemAvailable"].split()[0]) * 1024


def fresh_process(side: str, options, length: int, supervised: float, head: str) -> dict:
    """`measure` in a new process; only the `limit` in bytes that it ran under, if it needs more memory than that."""
    limit = available_memory() - options.spare_gib * GIB
    command = [sys.executable, "-m", "benchmarks.joint_step", "--side", side, "--head", head]
    command += ["--length", str(length), "--supervised", str(supervised), "--loss", options.loss]
    command += ["--rounds", str(options.rounds), "--vocab-size", str(options.vocab_size)]
    command += ["--budget-mb", str(options.budget_mb)]
    command += ["--limit", str(limit)]
    command += ["--freeze-base"] * options.freeze_base + ["--reference-recompute"] * options.reference_recompute
    # glibc otherwise keeps freed blocks of up to 32 MiB, which would count as memory of the step.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=options.timeout)
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    if "not enough memory" in result.stderr or "Cannot allocate memory" in result.stderr:
        return {"limit": limit}
    raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[512], help="S, tokens in the row")
    parser.add_argument("--supervised", type=float, nargs="+", default=[1.0, 0.3], help="fraction of supervised tokens")
    parser.add_argument("--head", nargs="+", default=["dense"], choices=["dense", "ordered"])
    parser.add_argument("--loss", default="kl", choices=["ce", "kl"], help="loss.drafter")
    parser.add_argument("--rounds", type=int, default=4, help="K")
    parser.add_argument("--vocab-size", type=int, default=262_144)
    budget = memory_budget_mb(LossConfig(), "cpu")
    parser.add_argument("--budget-mb", type=int, default=budget, help="loss.memory_budget_mb; by default that of a CPU")
    parser.add_argument("--freeze-base", action="store_true", help="train the drafter alone, in both")
    parser.add_argument("--reference-recompute", action="store_true", help="activation checkpointing there too")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one process")
    parser.add_argument("--spare-gib", type=int, default=2, help="free memory that no run may take")
    parser.add_argument("--skip-reference", action="store_true", help="measure only ours")
    parser.add_argument("--side", choices=["ours", "reference"], help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    results.add_option(parser)
    options = parser.parse_args()
    if options.side:
        options.length, options.supervised, options.head = options.length[0], options.supervised[0], options.head[0]
        print(json.dumps(measure(options)))
        return

    print(
        f"V = {options.vocab_size}, K = {options.rounds}, fp32, loss.drafter={options.loss}; memory above the weights"
    )
    sides = ["ours"] if options.skip_reference else ["ours", "reference"]
    rows = []
    for head in options.head:
        for length in options.length:
            for supervised in options.supervised:
                found = {side: fresh_process(side, options, length, supervised, head) for side in sides}
                rows.append({"head": head, "length": str(length), "supervised": f"{supervised:.0%}", **row(found)})
                print(f"measured: {head}, S = {length}, {supervised:.0%}", file=sys.stderr, flush=True)
    results.finish(results.record("joint_step", COLUMNS, rows), options.results)


def row(sides: dict[str, dict[str, float]]) -> dict[str, results.Value]:
    """What was measured of both sides, and the ratios; a side that wasn't run has no numbers."""
    found: dict[str, results.Value] = {"gradients": max(side.get("gradients", 0) for side in sides.values())}
    for name, side in sides.items():
        too_much = f"over {side['limit'] / GIB:.0f} GiB with weights" if "limit" in side else None
        found |= {f"{name}_gib": side.get("gib", too_much), f"{name}_seconds": side.get("seconds")}
    ours, reference = (sides.get(name, {}) for name in ("ours", "reference"))
    if "gib" in ours and "gib" in reference:
        gradients = ours["gradients"]
        found["gib_ratio"] = ours["gib"] / reference["gib"]
        found["gib_ratio_beyond"] = (ours["gib"] - gradients) / (reference["gib"] - gradients)
        found["seconds_ratio"] = ours["seconds"] / reference["seconds"]
    return found


if __name__ == "__main__":
    main()
