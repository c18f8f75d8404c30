"""Ranks that see different files or were started differently would train on silently: here they compare first."""

import socket
from collections.abc import Mapping

from joint_train.distributed.ranks import Ranks
from joint_train.errors import ConfigError


def agree(ranks: Ranks, what: str, mine: Mapping[str, str], where: Mapping[str, str] | None = None) -> None:
    """Compare what each rank has. Collective.

    Args:
        what: is compared, for the message.
        mine: a fingerprint of each thing, by a name that is the same on every rank.
        where: this rank's path of a thing, for the message.

    Raises:
        ConfigError: on every rank, naming the first things that differ, and which ranks have what.
    """
    if problems := differing(ranks, what, mine, where):
        raise ConfigError(
            f"the ranks were not started with the same {what}: {'; '.join(list(problems.values())[:5])}"
            f"{f'; and {len(problems) - 5} more' if len(problems) > 5 else ''}. Give every node the same files and "
            "every rank the same command"
        )


def differing(
    ranks: Ranks, what: str, mine: Mapping[str, str], where: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What differs between ranks, by name, in words: the same on every rank. Collective."""
    host = socket.gethostname()
    of_rank = ranks.each(f"comparing {what}", lambda: (dict(mine), dict(where or {}), host))
    problems = {}
    for name in sorted({name for found, _, _ in of_rank for name in found}):
        groups: dict[str | None, list[int]] = {}
        for rank, (found, _, _) in enumerate(of_rank):
            groups.setdefault(found.get(name), []).append(rank)
        if len(groups) > 1:
            said = []
            for value, members in groups.items():
                _, paths, at = of_rank[members[0]]
                place = f"{paths[name]} on {at}" if name in paths else f"on {at}"
                verb = "has" if len(members) == 1 else "have"
                has = "none" if value is None else value[:8]
                said.append(f"{_format_ranks(members)} {verb} {has} ({place})")
            problems[name] = f"{name} differs: {', '.join(said)}"
    return problems


def _format_ranks(ranks: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``ranks 0-2, 5``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans[:10])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', …' if len(spans) > 10 else ''}"
