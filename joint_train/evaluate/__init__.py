"""Speculative decoding with a pair, measured: ``python -m joint_train.evaluate BASE DRAFTER``."""

from joint_train.evaluate.decoding import accepted_length
from joint_train.evaluate.prompts import validation_prompts

__all__ = ["accepted_length", "validation_prompts"]
