"""Many LoRA adapters on one frozen base, each token under its document's own: what a multi-LoRA server computes.

    y = W x + scale · B_a A_a x        a is the adapter of the token; without one y = W x

The adapters of a layer lie side by side, A as ``[R, in]`` and B as ``[out, R]`` with R the sum of their ranks. Of A x
each token keeps the ranks of its own adapter, and the others are 0 before B: two products, whatever a batch mixes. So
a row may hold documents of several adapters; attention never goes from one document to another.

They are no parameters: nothing trains, saves, shards or exports them, and every rank has them whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

INPUT = "adapter_ids"  # of the pair: [B, S] int64, the adapter of each token, -1 for none


class Adapters:
    """The adapters of a base, put on its linear layers by :meth:`put`.

    Args:
        names: of the adapters.

    Attributes:
        of_tokens: the adapter of each token ``[B, S]``, or of all of them ``[]``; None: the base alone.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.of_tokens: Tensor | None = None
        self.layers: list[AdaptedLayer] = []

    def put(self, linear: nn.Linear, found: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Put those of one layer on it.

        Args:
            found: A ``[r, in]`` and B ``[out, r]``, already scaled, by the number of the adapter; in the dtype and on
                the device of compute.
        """
        layer = AdaptedLayer(self, found)
        linear.register_forward_hook(layer)
        self.layers.append(layer)

    def put_on_pair(self, pair: nn.Module) -> None:
        """Let a forward of the pair take :data:`INPUT`; without it the base is alone."""

        def before(module: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
            self.of_tokens = inputs.pop(INPUT, None)
            return args, inputs

        def after(module: nn.Module, args: tuple, outputs: object) -> None:
            self.of_tokens = None

        pair.register_forward_pre_hook(before, with_kwargs=True)
        pair.register_forward_hook(after, always_call=True)

    @contextmanager
    def alone(self, name: str | None) -> Iterator[None]:
        """Every token under one adapter, in forwards of the base; None: under none.

        Raises:
            ValueError: if there is none of that name.
        """
        self.of_tokens = None if name is None else torch.tensor(self.names.index(name))
        try:
            yield
        finally:
            self.of_tokens = None


class AdaptedLayer:
    """A linear layer's forward hook, which adds what the adapters do."""

    def __init__(self, adapters: Adapters, found: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.adapters = adapters
        self.a = torch.cat([a for a, _ in found.values()])
        self.b = torch.cat([b for _, b in found.values()], dim=1)
        owners = [torch.full((len(a),), number) for number, (a, _) in found.items()]
        self.owner = torch.cat(owners).to(self.a.device)  # [R], the adapter of each rank

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if (tokens := self.adapters.of_tokens) is None:
            return None
        low = nn.functional.linear(args[0], self.a.to(args[0].dtype))
        own = tokens.to(low.device)[..., None] == self.owner
        low = low.masked_fill(~(own.view(low.shape) if tokens.dim() else own), 0)
        return output + nn.functional.linear(low, self.b.to(low.dtype))
