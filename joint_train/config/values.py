"""Keys whose value is a small language of its own, and what they mean: losses, weights of rounds, steps, the mesh."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from joint_train.config.schema import LossConfig, ParallelConfig
from joint_train.errors import ConfigError

KINDS = ("ce", "ce_argmax", "kl", "reverse_kl", "js", "tv", "nla", "lk_hybrid")

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")

MOST_SHARDS = 64
"""Ranks that ``parallel.dp_shard=-1`` shards over at most."""

DEFAULT_STEPS = 1000
"""Of a run that has neither ``max_steps`` nor epochs."""

REFUSED = {
    "pp": "the drafter reads the keys and values of the base's last layers in the same forward, so the pair can't be "
    "split into pipeline stages",
    "cp": "the drafter's rows attend to the base's whole key/value sequence, so the sequence can't be split",
    "tp": "the drafter and the loss read the base's embedding and head whole, which tensor parallelism splits",
}


def parse_drafter_loss(loss: LossConfig) -> dict[str, float]:
    """``loss.drafter`` as ``{kind: weight}`` without zero weights; ValueError if it isn't a kind or a mix of kinds."""
    choice = loss.drafter
    mix = {choice: 1.0} if isinstance(choice, str) else choice
    hint = f"one of {', '.join(KINDS)}, or a weighted mix of them such as {{ce: 0.1, nla: 0.9}}"
    if not isinstance(mix, Mapping) or any(kind not in KINDS for kind in mix):
        raise ValueError(f"loss.drafter={choice!r}: must be {hint}")
    for kind, weight in mix.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"loss.drafter: the weight of {kind} is {weight!r}, must be a number of 0 or more")
    mix = {kind: float(weight) for kind, weight in mix.items() if weight > 0}
    if not mix:
        raise ValueError(f"loss.drafter={choice!r} gives no loss a weight: set {hint}")
    return mix


def teacher_grad(loss: LossConfig) -> float:
    """``loss.teacher_grad`` as a number, true as 1 and false as 0; ValueError unless it is a number of 0 or more."""
    choice = loss.teacher_grad
    return float(choice) if isinstance(choice, bool) else _number("loss.teacher_grad", choice)


def round_weights(loss: LossConfig, num_steps: int) -> list[float]:
    """``loss.round_weights`` as one number for each of the `num_steps` rounds; ValueError names the key."""
    choice = loss.round_weights
    if choice is None:
        return [1.0] * num_steps
    if isinstance(choice, Mapping):
        if set(choice) != {"decay"}:
            raise ValueError(f"loss.round_weights={choice!r}: a mapping has the one key decay, e.g. {{decay: 0.8}}")
        weights = [_number("loss.round_weights.decay", choice["decay"]) ** k for k in range(num_steps)]
    elif isinstance(choice, Sequence) and not isinstance(choice, str):
        if len(choice) != num_steps:
            raise ValueError(f"loss.round_weights has {len(choice)} numbers, drafter.num_steps is {num_steps}")
        weights = [_number(f"loss.round_weights[{k}]", weight) for k, weight in enumerate(choice)]
    else:
        raise ValueError(f"loss.round_weights={choice!r}: must be a list of drafter.num_steps numbers or {{decay: b}}")
    if not any(weights):
        raise ValueError("loss.round_weights are all 0: the drafter would not train; give a round a positive weight")
    return weights


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{key} is {value!r}, must be a number of 0 or more")
    return float(value)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of ``model.adapter`` or ``model.adapters``."""

    path: str  # folder or hub id
    weight: float = 1.0  # factor on what it adds to the base
    revision: str | None = None  # of the hub
    name: str = ""  # by which sources and metrics know it


def parse_adapters(choice: Any, key: str = "model.adapter") -> list[AdapterSpec]:
    """``model.adapter`` as a list: of nothing, a folder, or folders with their weights; or those of another key.

    Raises:
        ConfigError: for anything else.
    """
    several = isinstance(choice, Sequence) and not isinstance(choice, str)
    items = [] if choice is None else choice if several else [choice]
    known = ("path", "weight", "revision") + (("name",) if key == "model.adapters" else ())
    specs = []
    for item in items:
        given = {"path": item} if isinstance(item, str) else item
        if not isinstance(given, Mapping) or not isinstance(given.get("path"), str) or not given["path"]:
            raise ConfigError(f"{key}: {item!r} isn't an adapter: give a folder, or {{path: DIR, weight: 0.5}}.")
        if unknown := sorted(map(str, given.keys() - {*known})):
            raise ConfigError(
                f"{key}: {given['path']}: there is no key {', '.join(unknown)}; known are {', '.join(known)}."
            )
        weight = given.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"{key}: the weight of {given['path']} is {weight!r}; it must be a number.")
        name = str(given.get("name") or os.path.basename(os.path.normpath(given["path"])))
        specs.append(AdapterSpec(given["path"], float(weight), given.get("revision"), name))
    return specs


def parse_served(choice: Any) -> list[AdapterSpec]:
    """``model.adapters``, each with a name of its own: the one that is given, or the last part of its path.

    Raises:
        ConfigError: as :func:`parse_adapters`, and for two of one name.
    """
    specs = parse_adapters(choice, "model.adapters")
    names = [spec.name for spec in specs]
    for spec in specs:
        if names.count(spec.name) > 1:
            raise ConfigError(
                f"model.adapters: two adapters have the name {spec.name!r}: give one of them another, as in "
                f"{{path: {spec.path}, name: NAME}}."
            )
    return specs


def adapter_index(specs: Sequence[AdapterSpec], named: str | None) -> int:
    """Which adapter of ``model.adapters`` a source names, by name or path; -1 where it names none.

    Raises:
        ValueError: if it is none of them.
    """
    if named is None:
        return -1
    found = [index for index, spec in enumerate(specs) if named == spec.name]
    found += [index for index, spec in enumerate(specs) if named == spec.path]
    if not found:
        raise ValueError(
            f"{named!r} is not one of model.adapters ({', '.join(spec.name for spec in specs) or 'empty'})"
        )
    return found[0]


def base_of_adapter(cfg) -> str | None:
    """The base that an exported adapter names: the run's, or none where others were merged into that."""
    merged = len(parse_adapters(cfg.model.adapter)) - bool(cfg.model.continue_adapter)
    return None if merged > 0 else cfg.model.base


def as_saved(cfg) -> bool:
    """Whether the base's weights are used as they are quantised in its folder. An export has no base then."""
    return cfg.model.quantization == "as_saved"


def grown_rows(cfg) -> int | None:
    """Rows that ``model.resize_vocabulary`` gives the vocabulary's tables, where it is a number; None otherwise."""
    rows = cfg.model.resize_vocabulary
    return None if isinstance(rows, bool) else rows


def base_after(choice: object) -> int | float | str | None:
    """``freeze.base_after``: steps (an integer), a share of the run (below 1), ``auto``, or None for never.

    Raises:
        ConfigError: it is none of these.
    """
    if choice is None or choice == "auto":
        return cast("str | None", choice)
    number = isinstance(choice, (int, float)) and not isinstance(choice, bool)
    if number and (0 < cast(float, choice) < 1 or (isinstance(choice, int) and choice >= 1)):
        return cast("int | float", choice)
    raise ConfigError(
        f"freeze.base_after={choice}: give a number of steps, a share of the run between 0 and 1 such as 0.55, or auto."
    )


def quoted(value: str | os.PathLike) -> str:
    """A text or path in the quotes of Hydra's grammar of overrides."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def is_override(word: str) -> bool:
    """Whether a word of a command line is ``KEY=VALUE``, and not a file or folder with a ``=`` in its name."""
    return "=" in word and not os.path.exists(word)


def parse_steps(spec: str | None) -> range:
    """``"10-12"`` as the steps 10, 11 and 12; ``"10"`` as that one; ``None`` as none.

    Raises:
        ConfigError: for anything else.
    """
    if spec is None:
        return range(0)
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", str(spec))
    first, last = (int(n) for n in (numbers[1], numbers[2] or numbers[1])) if numbers else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"profile.steps={spec}: give a first and a last step, e.g. 10-12; steps start at 1.")
    return range(first, last + 1)


def run_length(cfg) -> tuple[int | None, float | None]:
    """How long a run is: ``max_steps`` or ``epochs``, and None for the other.

    With neither it is :data:`DEFAULT_STEPS`, or one epoch with ``data.mixture=epoch``.

    Raises:
        ConfigError: both are set.
    """
    if cfg.max_steps is not None and cfg.epochs is not None:
        raise ConfigError(
            f"max_steps={cfg.max_steps} and epochs={cfg.epochs:g}: only one of them can say how long the run is. Set "
            "the other one to null."
        )
    if cfg.max_steps is None and cfg.epochs is None:
        return (None, 1.0) if cfg.data.mixture == "epoch" else (DEFAULT_STEPS, None)
    return cfg.max_steps, cfg.epochs


def unroll_limit(unroll: str) -> int | None:
    """``data.unroll``: how many documents of a conversation are kept, the last ones; None for ``all``.

    Raises:
        ConfigError: it is neither ``all`` nor ``last N``.
    """
    if unroll == "all":
        return None
    if found := re.fullmatch(r"last[ _]([1-9]\d*)", unroll):
        return int(found[1])
    raise ConfigError(f"data.unroll={unroll!r}: must be all, or last N such as 'last 4'.")


def default_shards(ranks: int, node: int) -> int:
    """How many of the ranks hold one copy of the weights between them where ``parallel.dp_shard`` is -1.

    All of them, up to :data:`MOST_SHARDS`. Beyond, the shards hardly get smaller while every gather crosses the whole
    network: the largest number up to that which divides the ranks and is whole nodes, or half of one, a third, … where
    a node has more than that.

    Args:
        ranks: of the run.
        node: of them on a node.

    Raises:
        ConfigError: if there is no such number; a smaller part of a node would hold many times as much on each rank.
    """
    if ranks <= MOST_SHARDS:
        return ranks
    numbers = range(2, MOST_SHARDS + 1)
    fit = [n for n in numbers if ranks % n == 0 and (n % node == 0 or (node > MOST_SHARDS and node % n == 0))]
    if not fit:
        raise ConfigError(
            f"parallel.dp_shard=-1 shards over whole nodes of {node}, up to {MOST_SHARDS} ranks, and none of these "
            f"numbers above 1 divides {ranks} ranks. Set parallel.dp_shard and parallel.dp_replicate so that their "
            f"product is {ranks}; parallel.dp_shard={ranks} shards over all of them."
        )
    return fit[-1]


def node_size() -> int:
    """Ranks on this node, as torchrun says; 8 where nobody says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 8))


def mesh_shape(
    parallel: ParallelConfig, world_size: int | None, node: int | None = None
) -> tuple[int, int, int, int, int]:
    """Sizes of :data:`DIMENSIONS`.

    Args:
        parallel: the ``parallel`` configuration group.
        world_size: number of ranks; ``None`` where it isn't known yet (``dp_shard=-1`` stays -1 then). With
            ``dp_shard=-1`` and ``dp_replicate=1`` more than :data:`MOST_SHARDS` are HSDP, see :func:`default_shards`.
        node: ranks on a node; by default what torchrun says.

    Raises:
        ConfigError: for pp, cp or tp above 1, and for a mesh that doesn't fit the world size.
    """
    for name, why in REFUSED.items():
        if (size := getattr(parallel, name)) != 1:
            raise ConfigError(
                f"parallel.{name}={size} is not supported: {why}. Set parallel.{name}=1 and use "
                "parallel.dp_shard (FSDP2) and parallel.dp_replicate (HSDP) instead."
            )
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if replicate < 1 or (shard < 1 and shard != -1):
        raise ConfigError(
            f"parallel.dp_replicate={replicate}, parallel.dp_shard={shard}: sizes are at least 1; only dp_shard may "
            "be -1, for all the ranks that are left."
        )
    if world_size is not None:
        if shard == -1 and replicate == 1:
            shard = default_shards(world_size, node or node_size())
            replicate = world_size // shard
        elif shard == -1 and world_size % replicate == 0:
            shard = world_size // replicate
        if shard == -1 or replicate * shard != world_size:
            ranks = f"{world_size} rank{'s' * (world_size != 1)}"
            given = f"dp_replicate x dp_shard = {replicate} x {shard} = {replicate * shard} doesn't fit {ranks}"
            if shard == -1:
                given = f"dp_replicate = {replicate} doesn't divide {ranks}"
            raise ConfigError(
                f"parallel: {given}. Set parallel.dp_shard=-1 and a parallel.dp_replicate that divides {world_size}."
            )
    return 1, replicate, shard, 1, 1


def mesh_sentence(parallel: ParallelConfig, world_size: int, node: int | None = None) -> str:
    """What the mesh is, and who chose it."""
    _, replicate, shard, _, _ = mesh_shape(parallel, world_size, node)
    said = f"weights are sharded over {shard} of {world_size} ranks" + (f", {replicate} replicas" * (replicate > 1))
    if parallel.dp_shard == -1 and parallel.dp_replicate == 1 and replicate > 1:
        said += (
            f" (HSDP): parallel.dp_shard=-1 shards over at most {MOST_SHARDS}, since beyond that the shards hardly get "
            "smaller and every gather crosses the whole network. parallel.dp_shard and parallel.dp_replicate choose"
        )
    return said


def shown_setting(value: Any) -> str:
    """A setting in a table: of a list of sources their paths alone."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and "path" in one for one in value):
        return ", ".join(str(one["path"]) for one in value)
    return str(value)
