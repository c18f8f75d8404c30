"""Options of a job: ``key=value`` words, checked against a dataclass."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from joint_train.config import groups, keys
from joint_train.errors import JointTrainError


class SubmitError(JointTrainError):
    """A job that is refused; the message says what to set instead."""


def option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Plain:
    """Options with a number of nodes, of their GPUs, and of restarts."""

    nodes: int = option(1, "nodes of the job")
    gpus_per_node: int = option(8, "GPUs and ranks of a node; 0: one rank a node, on CPU")
    max_restarts: int = option(3, "restarts after a crash")


Options = TypeVar("Options", bound=Plain)


def parse_options(arguments: list[str], of: type[Options]) -> Options:
    """``key=value`` arguments as options.

    Raises:
        SubmitError: naming the unknown option or the value of a wrong type.
    """
    names = [field.name for field in dataclasses.fields(of)]
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and name.lstrip("+") in {"pair", "model", *(key for group in groups() for key, _, _ in keys(group))}:
            raise SubmitError(f"{argument} is a setting of the training, which stands after a lone --: … -- {argument}")
        if not equals or name not in names:
            meant = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {meant[0]}?)" if equals and meant else ""
            raise SubmitError(
                f"{argument}: not an option of the job{hint}; it has {', '.join(names)}. Overrides of the training "
                "configuration stand after a lone --"
            )
    try:
        # Split at the first "=" only, and taken as text: OmegaConf's own parser would read 1:30:00 as a number.
        values = dict(argument.split("=", 1) for argument in arguments)
        options = cast(
            Options, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(of), OmegaConf.create(values)))
        )
    except OmegaConfBaseException as error:
        kinds = {int: "a whole number", float: "a number", bool: "true or false"}
        kind = kinds.get(type(next(field.default for field in dataclasses.fields(of) if field.name == error.full_key)))
        said = f"{kind} is expected" if kind else str(error).splitlines()[0]
        raise SubmitError(f"{error.full_key}={values.get(error.full_key or '')}: {said}") from error
    if options.nodes < 1 or options.gpus_per_node < 0 or options.max_restarts < 0:
        raise SubmitError("nodes must be at least 1, gpus_per_node and max_restarts at least 0")
    return options
