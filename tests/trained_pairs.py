"""Small pairs of the released shapes, trained until their drafts are sometimes right, and exported: for the suites that
serve them with an engine."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from configs import compose
from pairs import make_pair

from joint_train import Gemma4WithDrafter
from joint_train.drafter import main as new_drafter
from joint_train.weights.composite import load_pair
from joint_train.weights.settle import with_vocabulary

K = 4
EOS, BOS = 1, 2
# The reduced released shapes.
SHAPES = {
    "e2b": {},  # ordered embeddings, KV sharing, a configuration with room for towers
    "text": {"drafter_overrides": {"use_ordered_embeddings": False}},
    "multimodal": {},
    "26b_a4b": {},  # a mixture of experts; keys equal values, no KV sharing
    "31b": {},
    "12b_unified": {},
}
GROWN = {"e2b_grown": "e2b", "31b_grown": "31b"}  # with model.resize_vocabulary
# With a drafter of `joint_train.drafter new`.
NEW = {"31b_new": "31b", "e2b_new": "e2b"}
ORDERED = {"e2b_new": ["--ordered", "--centroids", "16", "--top-k", "4"]}


def chain(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """``[count, length]`` tokens, each one of four successors of the one before it; some texts end and begin again."""
    successors = torch.randint(3, 240, (256, 4), generator=torch.Generator().manual_seed(0))
    successors[::31, 0] = EOS
    successors[EOS] = BOS
    rows = [torch.full((count,), BOS)]
    rows.append(torch.randint(3, 240, (count,), generator=generator))
    for _ in range(length - 2):
        choice = torch.multinomial(torch.tensor([0.7, 0.15, 0.1, 0.05]), count, replacement=True, generator=generator)
        rows.append(successors[rows[-1], choice])
    return torch.stack(rows, 1)


def texts(name: str, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """:func:`chain`; with a grown vocabulary some of its tokens are new ones."""
    ids = chain(count, length, generator)
    return torch.where((ids % 5 == 3) & (name in GROWN), 256 + ids % 8, ids)


def train(name: str, folder: Path, steps: int = 70, rope_position: str = "last_kv", **overrides) -> tuple[Path, Path]:
    """A pair of a shape, trained until its drafts are sometimes right and sometimes not, and exported.

    Args:
        overrides: of the base's text configuration. vLLM's attention on CPU takes heads of multiples of 32.
    """
    shape = (GROWN | NEW).get(name, name)
    overrides = {"head_dim": 32, "global_head_dim": 64, **overrides}
    source = make_pair(folder / "source", shape, **SHAPES[shape], **overrides)
    if name in NEW:
        size = ["--hidden-size", "64", "--intermediate-size", "128"]
        assert new_drafter(["new", str(source[0]), str(folder / "new"), *size, *ORDERED.get(name, [])]) == 0
        source = source[0], folder / "new"
    model = Gemma4WithDrafter.from_pretrained(
        *source, drafter_num_steps=K, loss={"centroid_weight": 0.3}, rope_position=rope_position
    ).train()
    if name in GROWN:
        settings = {"model.base": str(source[0]), "model.drafter": str(source[1]), "model.resize_vocabulary": True}
        vocabulary = SimpleNamespace(get_vocab=lambda: {str(number): number for number in range(264)}, name_or_path="")
        cfg = compose(settings | {"drafter.num_steps": K, "loss.centroid_weight": 0.3})
        model = load_pair(with_vocabulary(cfg, vocabulary), None, "cpu").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = texts(name, 16, 40, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "export")
    return folder / "export/base", folder / "export/drafter"


def prompts(name: str) -> list[list[int]]:
    """Eight prompts for :func:`train`'s pairs, shorter and longer than the sliding window."""
    generator = torch.Generator().manual_seed(2)
    return [texts(name, 1, 4 + 3 * i, generator)[0].tolist() for i in range(8)]


def job(*overrides: str) -> None:
    """The main job on the starter pair, with one CPU rank."""
    subprocess.run(
        [sys.executable, "-m", "joint_train", "+experiment=starter", "tracking.wandb=disabled", *overrides],
        check=True, timeout=600, stdout=subprocess.DEVNULL,
    )  # fmt: skip
