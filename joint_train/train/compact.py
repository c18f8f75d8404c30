"""AdamW with moments in 8 bits or in bfloat16, which leaves out a step by a flag on the device.

The arithmetic is torch's fused kernel in fp32, and the 8-bit format torchao's (dynamic, block-wise:
https://arxiv.org/abs/2110.02861). torchao's own ``AdamW8bit`` isn't used: its blocks follow a rank's shard, so that
other ranks have others, and it can't leave out a step unless the host waits for the norm.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from joint_train.distributed.moments import block_size
from joint_train.errors import ConfigError


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zeros(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros of another last dimension or dtype, sharded like the parameter."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    found = empty_dtensor(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
    found.to_local().zero_()
    return found


class CompactAdamW(Optimizer):
    """AdamW of which the moments are kept in less than fp32.

    Args:
        name: ``adamw_8bit`` or ``adamw_bf16``.

    ``found_inf``, a scalar on the device, leaves out the next step where it isn't 0: nothing changes, not a bit.

    Raises:
        ConfigError: for a weight whose shards cut a block in two.
    """

    def __init__(self, groups, name: str, betas: tuple[float, float], eps: float):
        self.name = name
        self.found_inf: Tensor | None = None
        self.grad_scale = None
        # As with torch's fused AdamW the counter of steps is on the parameter's device.
        super().__init__(groups, {"betas": betas, "eps": eps, "fused": True})
        if name == "adamw_8bit":
            self.maps = _maps()
            for group in self.param_groups:
                for parameter in group["params"]:
                    block = block_size(parameter.shape)
                    if block and local(parameter).numel() and local(parameter).shape[-1] % block:
                        raise ConfigError(
                            f"optim.name=adamw_8bit: the shards of a weight of shape {list(parameter.shape)} cut its "
                            f"last dimension inside a block of {block}. Use fewer shards (parallel.dp_shard) or "
                            "optim.name=adamw_bf16."
                        )

    def entries(self, parameter: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each tensor of state but ``step``."""
        shape = parameter.shape
        if self.name == "adamw_bf16":
            return {name: (shape, torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
        block = block_size(shape)
        if not block:
            return {name: (shape, torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        scales = torch.Size((*shape[:-1], shape[-1] // block))
        return {
            f"{name}_{part}": of_part
            for name in ("exp_avg", "exp_avg_sq")
            for part, of_part in (("codes", (shape, torch.uint8)), ("scale", (scales, torch.float32)))
        }

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: zeros(parameter, *entry) for name, entry in self.entries(parameter).items()}
        weight, gradient = local(parameter), local(parameter.grad)
        if weight.numel() == 0:  # a rank without a part of it: the step counts nevertheless
            state["step"] += 1 if self.found_inf is None else (self.found_inf == 0)
            return
        master = weight.float()
        moments = [self._read(state, name) for name in ("exp_avg", "exp_avg_sq")]
        beta1, beta2 = group["betas"]
        adamw(
            [master], [gradient.float()], [moments[0]], [moments[1]], [], [state["step"]],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False, found_inf=self.found_inf,
        )  # fmt: skip
        if master is not weight:
            weight.copy_(master)
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            self._write(state, name, moment)

    def _read(self, state: dict[str, Tensor], name: str) -> Tensor:
        if name in state:
            return local(state[name]).float()  # fp32: the very tensor
        from torchao.optim.quant_utils import dequant_with_qmap

        codes, scale = local(state[f"{name}_codes"]), local(state[f"{name}_scale"])
        return dequant_with_qmap(codes, self.maps[name].to(codes.device), scale.flatten())

    def _write(self, state: dict[str, Tensor], name: str, moment: Tensor) -> None:
        if name in state:
            kept = local(state[name])
            if kept.dtype != moment.dtype:
                kept.copy_(moment)
            return
        from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

        codes, scale = local(state[f"{name}_codes"]), local(state[f"{name}_scale"])
        scaled, new_scale = scale_tensor(moment, moment.numel() // scale.numel())
        new_codes = quantize_8bit_with_qmap(scaled, self.maps[name].to(codes.device))
        new_scale = new_scale.view(scale.shape)
        if self.found_inf is not None:
            # What is read and quantised again isn't always what it was: the map has a 1 and no -1.
            skipped = self.found_inf != 0
            new_codes, new_scale = torch.where(skipped, codes, new_codes), torch.where(skipped, scale, new_scale)
        codes.copy_(new_codes)
        scale.copy_(new_scale)


def _maps() -> dict[str, Tensor]:
    """torchao's 256 values of a code: signed for the first moment, unsigned for the second."""
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError as error:
        raise ConfigError(f"optim.name=adamw_8bit needs the torchao package: pip install torchao ({error})") from None
    return {
        "exp_avg": torch.tensor(create_dynamic_map(signed=True)),
        "exp_avg_sq": torch.tensor(create_dynamic_map(signed=False)),
    }
