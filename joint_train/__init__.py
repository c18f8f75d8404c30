"""Joint fine-tuning of a Gemma 4 base and its multi-token-prediction drafter, on FSDP2."""

from joint_train.lazy import lazy_names

__all__ = ["Gemma4JointOutput", "Gemma4WithDrafter"]

__getattr__ = lazy_names(
    __name__, {"Gemma4JointOutput": "joint_train.pair.model", "Gemma4WithDrafter": "joint_train.weights.composite"}
)
