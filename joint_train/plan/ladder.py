"""Which of the settings that recompute is the least that fits: ``activation_checkpointing.base=auto``."""

from collections.abc import Callable

# From what takes the most memory and no time to what takes the least memory: (base, every_n, drafter), and roughly the
# share of all activations that it keeps, which decides only what is tried first.
LADDER = (
    ("none", 1, "none", 1.0),
    ("none", 1, "full", 0.9),
    ("every_n", 4, "full", 0.7),
    ("every_n", 2, "full", 0.5),
    ("selective", 1, "full", 0.3),
    ("full", 1, "full", 0.1),
    ("full", 1, "layers", 0.05),
)  # fmt: skip


def rungs(settings) -> list[dict[str, object]]:
    """What ``auto`` may become, as overrides, with what is set otherwise left as it is; the most memory comes first.

    Args:
        settings: the ``activation_checkpointing`` group.
    """
    return [rung for rung, _ in _rungs(settings)]


def likely(settings, excess: float) -> int:
    """The rung to try when the first holds more than fits.

    Args:
        settings: as in :func:`rungs`.
        excess: what must go, as a share of the first rung's activations.
    """
    kept = [share for _, share in _rungs(settings)]
    return next((i for i, share in enumerate(kept) if share <= 1 - excess), len(kept) - 1)


def _rungs(settings) -> list[tuple[dict[str, object], float]]:
    found: dict[tuple, tuple[dict[str, object], float]] = {}
    for base, every_n, drafter, share in LADDER:
        rung: dict[str, object] = {}
        if settings.base == "auto":
            rung |= {"activation_checkpointing.base": base}
            rung |= {"activation_checkpointing.every_n": every_n} if base == "every_n" else {}
        if settings.drafter == "auto":
            rung |= {"activation_checkpointing.drafter": drafter}
        found.setdefault(tuple(rung.items()), (rung, share))
    return list(found.values())


def lowest(count: int, fits: Callable[[int], bool], guess: Callable[[], int]) -> int:
    """The first of so many rungs that fits, where all after it do as well; the last if none does.

    The first is tried first, since it costs nothing, then the guess and those beside it, one after the other.
    """
    if count == 1 or fits(0):
        return 0
    at = max(1, guess())
    if fits(at):
        while at > 1 and fits(at - 1):
            at -= 1
        return at
    while at + 1 < count:
        at += 1
        if fits(at):
            break
    return at
