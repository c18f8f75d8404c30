"""Muon for the weights that are matrices, AdamW for the others.

Muon (https://kellerjordan.github.io/posts/muon/) moves a matrix by its momentum with all singular values brought near
1, by torch's Newton-Schulz iteration. That takes whole matrices: of as many as there are shards, each rank gets one, in
bfloat16 as the iteration computes, and the others get their rows of the result from it. So the same gradients have the
same update on any number of ranks. Gradients that differ in their last bits, as sums in another order do, may fall on
either side of a rounding to bfloat16, and the iteration amplifies that in directions of small singular values: real
runs on 1 and 2 ranks differ by a few percent of an update.

The update is multiplied by 0.2 sqrt(max(rows, columns)), so that its size is that of AdamW's (arXiv 2502.16982, section
2.2) and a learning rate serves for both.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from joint_train.distributed.placement import local, part_of
from joint_train.torch_private import newton_schulz
from joint_train.train.compact import CompactAdamW

MOMENTUM = 0.95
COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7  # of the iteration, as Muon's author and torch have them


class Muon(CompactAdamW):
    """As :class:`CompactAdamW`, also in what ``found_inf`` does. All ranks step together.

    Args:
        matrices: the weights, ``[rows, columns]`` each, that Muon moves; AdamW moves the others of the groups.
    """

    def __init__(self, groups, matrices: Iterable[Tensor], betas: tuple[float, float], eps: float):
        self.matrices = {id(parameter) for parameter in matrices}
        super().__init__(groups, "muon", betas, eps)

    def entries(self, parameter: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        if id(parameter) in self.matrices:
            return {"momentum_buffer": (parameter.shape, parameter.dtype)}
        return super().entries(parameter)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # no loss: no closure is run
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        matrices = [(p, group) for p, group in found if id(p) in self.matrices]
        for parameter, group in found:
            if id(parameter) not in self.matrices:
                self._update(parameter, group)
        if not matrices:
            return
        first = matrices[0][0]
        shards = first.device_mesh.get_group(first.device_mesh.ndim - 1) if isinstance(first, DTensor) else None
        size, rank = (1, 0) if shards is None else (shards.size(), shards.rank())
        for start in range(0, len(matrices), size):
            batch, mine = matrices[start : start + size], None
            for owner, (parameter, _) in enumerate(batch):
                whole = self._direction(parameter)
                if owner == rank:
                    mine = newton_schulz(whole, COEFFICIENTS, STEPS, EPS)
            for owner, (parameter, group) in enumerate(batch):
                change = torch.empty(parameter.shape, dtype=torch.bfloat16, device=local(parameter).device)
                if mine is not None and owner == rank:
                    change.copy_(mine)
                if size > 1:
                    dist.broadcast(change, group=shards, group_src=owner)
                self._move(parameter, group, change)

    def _direction(self, parameter: Tensor) -> Tensor:
        """The whole matrix ``[rows, columns]`` to be orthogonalised, Nesterov's, in bfloat16. Collective."""
        gradient = parameter.grad
        assert gradient is not None
        momentum = self._state(parameter)["momentum_buffer"]
        new = momentum.lerp(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(new, MOMENTUM).bfloat16()
        self._keep(momentum, new)
        return direction.full_tensor() if isinstance(direction, DTensor) else direction

    def _move(self, parameter: Tensor, group: dict, change: Tensor) -> None:
        """Add a whole change ``[rows, columns]`` to this rank's shard."""
        weight, change = local(parameter), part_of(change, parameter)
        moved = weight * (1 - group["lr"] * group["weight_decay"])
        moved -= group["lr"] * 0.2 * max(parameter.shape) ** 0.5 * change.to(weight.dtype)
        self._keep(weight, moved)
        self.state[parameter]["step"] += 1 if self.found_inf is None else (self.found_inf == 0)

    def _keep(self, old: Tensor, new: Tensor) -> None:
        """Set `old` to `new`, unless this step is left out."""
        old, new = local(old), local(new)
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf == 0, new, old))
