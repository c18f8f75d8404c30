"""Ranks: the device mesh, FSDP2 and activation checkpointing, agreement between ranks, preemption."""
