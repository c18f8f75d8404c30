"""Joint fine-tuning of a Gemma 4 base and its multi-token-prediction drafter, on FSDP2."""

from importlib import import_module

__all__ = ["Gemma4JointOutput", "Gemma4WithDrafter"]

HOME = {"Gemma4JointOutput": "joint_train.pair.model", "Gemma4WithDrafter": "joint_train.weights.composite"}


def __getattr__(name: str):
    # Deferred: torch and transformers take seconds to import, and `--help` or a misspelt key shouldn't wait for them.
    if name in HOME:
        return getattr(import_module(HOME[name]), name)
    raise AttributeError(f"module 'joint_train' has no attribute {name!r}")
