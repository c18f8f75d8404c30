"""Speculative decoding with a pair, measured: ``python -m joint_train.evaluate BASE DRAFTER``."""

from typing import TYPE_CHECKING

from joint_train.lazy import lazy_names

if TYPE_CHECKING:
    from joint_train.evaluate.decoding import accepted_length
    from joint_train.evaluate.prompts import validation_prompts

__all__ = ["accepted_length", "validation_prompts"]

__getattr__ = lazy_names(
    __name__, {"accepted_length": "joint_train.evaluate.decoding", "validation_prompts": "joint_train.evaluate.prompts"}
)
