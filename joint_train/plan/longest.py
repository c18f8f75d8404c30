"""The longest rows that fit."""

from joint_train.config import Config, with_overrides
from joint_train.plan.ladder import rungs
from joint_train.plan.planner import Machine, Plan, make_plan, pinned


def longest(cfg: Config, machine: Machine, plan: Plan, unit: int = 256, most: int = 2**20) -> int:
    """The largest ``data.max_length`` that fits, in multiples of `unit` and up to `most`, to 6 %; 0 if none does.

    What is recomputed by ``auto`` is then as much as can be. The peak is nearly linear in the length: the first guess
    takes all activations to grow with it, the others are on the line through the two nearest lengths, and a length that
    fits is the last one where that line says so.

    Args:
        plan: of the configuration.
    """
    as_set, cfg = cfg.activation_checkpointing, pinned(cfg)
    start, most = cfg.data.max_length // unit, most // unit
    low, high = (start, None) if plan.peak <= machine.usable else (0, -(-cfg.data.max_length // unit))
    if low >= most:
        return cfg.data.max_length
    peaks: dict[int, int] = {}
    last, at = plan, cfg.data.max_length / unit
    if plan.chosen in ({}, rungs(as_set)[-1]) and cfg.data.max_length % unit == 0:
        peaks[start] = plan.peak
    while high is None or high - low > max(1, low // 16):
        if len(peaks) < 2:
            activations = last.memory["activations"]
            limit = at * max(0.0, activations + machine.usable - last.peak) / activations
        else:
            (x, a), (y, b) = sorted(peaks.items(), key=lambda point: abs(point[1] - machine.usable))[:2]
            limit = x + (machine.usable - a) * (y - x) / (b - a) if a != b else 2 * max(x, y)
        if low in peaks and len(peaks) > 1 and limit < low + 1 + low / 16:
            break
        guess = int(limit * (1 - 1 / 24))
        guess = min(max(guess, low + 1, 1), most if high is None else high - 1)
        last, at = make_plan(with_overrides(cfg, {"data.max_length": guess * unit}), machine), guess
        peaks[guess] = last.peak
        if last.peak <= machine.usable:
            low = guess
        else:
            high = guess
        if low == most:
            break
    return low * unit or (cfg.data.max_length if plan.peak <= machine.usable else 0)
