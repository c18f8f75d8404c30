"""Which of the settings that recompute is the least that fits: ``activation_checkpointing.base=auto``."""

from collections.abc import Callable

# From what takes the most memory and no time to what takes the least memory: (base, every_n, drafter).
LADDER = (
    ("none", 1, "none"),
    ("none", 1, "full"),
    ("every_n", 4, "full"),
    ("every_n", 2, "full"),
    ("selective", 1, "full"),
    ("full", 1, "full"),
    ("full", 1, "layers"),
)  # fmt: skip


def rungs(settings) -> list[dict[str, object]]:
    """What ``auto`` may become, as overrides, with what is set otherwise left as it is; the most memory comes first.

    Args:
        settings: the ``activation_checkpointing`` group.
    """
    found: list[dict[str, object]] = []
    for base, every_n, drafter in LADDER:
        rung: dict[str, object] = {}
        if settings.base == "auto":
            rung |= {"activation_checkpointing.base": base}
            rung |= {"activation_checkpointing.every_n": every_n} if base == "every_n" else {}
        if settings.drafter == "auto":
            rung |= {"activation_checkpointing.drafter": drafter}
        if rung not in found:
            found.append(rung)
    return found


def lowest(count: int, fits: Callable[[int], bool]) -> int:
    """The first of so many rungs that fits, where all after it do as well; the last if none does.

    The first is tried first, since it costs nothing, then the last but one of those that are left by halves.
    """
    if count == 1 or fits(0):
        return 0
    low, high = 1, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low
