"""A drafter for a base that none was released for: ``python -m joint_train.drafter new BASE OUT``."""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from joint_train.command import Parser, from_zero, positive, start
from joint_train.errors import ConfigError

NAMES = {"sliding": "sliding_attention", "full": "full_attention"}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m joint_train.drafter", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser(
        "new",
        help="make a drafter for any Gemma 4 base",
        description="Write a drafter for BASE to OUT: sizes derived from the base, weights begun from the base's "
        "embedding. It drafts nothing useful yet: train it with freeze.base=true model.base=BASE model.drafter=OUT.",
    )
    new.add_argument("base", metavar="BASE", help="folder or hub id of the base")
    new.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    new.add_argument("--like", metavar="DRAFTER", help="take width, layers, heads and ordering of this drafter")
    new.add_argument("--layers", nargs="+", choices=NAMES, help="by default sliding sliding sliding full")
    new.add_argument("--hidden-size", type=positive, help="by default 256, or 1024 for bases wider than 2560")
    new.add_argument("--intermediate-size", type=positive, help="by default 8 times the width")
    new.add_argument("--num-attention-heads", type=positive, help="query heads of a layer")
    new.add_argument("--ordered", action="store_true", default=None, help="ordered embeddings, as E2B's and E4B's have")
    new.add_argument("--centroids", type=positive, help="of ordered embeddings (default 2048)")
    new.add_argument("--top-k", type=positive, help="centroids whose tokens are scored (default 32)")
    new.add_argument("--random", action="store_true", help="begin with random weights throughout")
    new.add_argument("--seed", type=from_zero, default=0)
    args = parser.parse_args(argv)
    return start("joint_train.drafter", lambda: make(args))


def make(args: argparse.Namespace) -> None:
    """What ``new`` does: OUT is whole or isn't there."""
    # torch and transformers take seconds to import
    from transformers import AutoTokenizer

    from joint_train.weights.folders import BASES, DRAFTERS, read_config, resolve
    from joint_train.weights.new_drafter import drafter_config, new_drafter
    from joint_train.weights.released import released_config

    out = args.out.absolute()
    if out.exists():
        raise ConfigError(f"{out} exists: name a new folder")
    folder = resolve(args.base)
    base = read_config(folder, quantized=None)
    if base.model_type not in BASES:
        raise ConfigError(f"{args.base} is a drafter ({base.model_type}): give the base that a drafter is made for")
    like = args.like and (released_config(args.like) or read_config(resolve(args.like)))
    if like and like.model_type not in DRAFTERS:
        raise ConfigError(f"--like {args.like} is a base ({like.model_type}): give a drafter")
    config = drafter_config(
        base,
        like,
        layers=args.layers and [NAMES[name] for name in args.layers],
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_attention_heads=args.num_attention_heads,
        ordered=args.ordered,
        num_centroids=args.centroids,
        top_k=args.top_k,
    )
    drafter = new_drafter(base, folder, config, args.seed, projected=not args.random)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        drafter.bfloat16().save_pretrained(work)
        if (folder / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(folder).save_pretrained(work)
        work.chmod(0o755)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = config.get_text_config()
    print(f"made: {args.out}")
    print(f"  {sum(p.numel() for p in drafter.parameters()):,} parameters, width {text.hidden_size}, ", end="")
    print(f"{text.num_attention_heads} heads, layers {', '.join(kind.partition('_')[0] for kind in text.layer_types)}")
    print(f"Train it: torchrun -m joint_train freeze.base=true model.base={args.base} model.drafter={args.out} …")


if __name__ == "__main__":
    sys.exit(main())
