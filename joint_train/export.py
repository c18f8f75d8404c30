"""A distributed checkpoint as two Hugging Face folders: ``python -m joint_train.export CHECKPOINT OUT --verify``."""

import sys
from pathlib import Path

from joint_train.command import Parser, start


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 if ``--verify`` finds a difference; 2 for an error, a damaged checkpoint among them."""
    parser = Parser(
        prog="python -m joint_train.export",
        description="Write a checkpoint of a run as two Hugging Face folders, OUT/base and OUT/drafter.",
    )
    parser.add_argument("checkpoint", type=Path, help="OUTPUT_DIR/checkpoints/step_NNNNNNNN; with --verify and without "
                        "OUT, an export")  # fmt: skip
    parser.add_argument("out", type=Path, nargs="?", help="folder to write base/ and drafter/ to")
    parser.add_argument(
        "--verify", action="store_true",
        help="compare names, shapes and dtypes with the source folders, values with the checkpoint, the tokens of a "
        "conversation with training's, and what is on disk with the export's checksums; load both folders with "
        "transformers; of an export alone, only the last two",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", help="largest safetensors file; the run's model.export.max_shard_size by default"
    )
    parser.add_argument("--base", help="source folder of the base, if the run's model.base isn't there any more")
    parser.add_argument(
        "--drafter", help="source folder of the drafter, if the run's model.drafter isn't there any more"
    )
    parser.add_argument(
        "--tokenizer", help="folder or hub id of the run's tokenizer, if its data.tokenizer isn't there any more"
    )
    parser.add_argument(
        "--kv-shared-weights", action="store_true",
        help="write the unused keys and values of KV-shared layers where the base's folder has none, as the run does "
        "with model.export.kv_shared_weights=true",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.out is None and not args.verify:
        parser.error("give the folder to write to, OUT; or --verify, to compare an export with its checksums")

    def run() -> int:
        from joint_train.run_export import export_run, verify_export  # torch and transformers take seconds to import

        if args.out is None:
            return verify_export(args.checkpoint)
        return export_run(
            args.checkpoint, args.out, args.verify, args.max_shard_size, args.base, args.drafter,
            args.kv_shared_weights, args.tokenizer,
        )  # fmt: skip

    return start("joint_train.export", run)


if __name__ == "__main__":
    sys.exit(main())
