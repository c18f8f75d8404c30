"""AdamW with moments in 8 bits, in bfloat16 or in the host's memory, which skips a step by a flag on the device.

The arithmetic is torch's fused kernel in fp32, and the 8-bit format torchao's (dynamic, block-wise:
https://arxiv.org/abs/2110.02861). torchao's own ``AdamW8bit`` isn't used: its blocks follow a rank's shard, so that
other ranks have others, and it can't leave out a step unless the host waits for the norm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from joint_train.command import let_torchao_in
from joint_train.distributed.moments import block_size
from joint_train.distributed.placement import local_tensor
from joint_train.errors import ConfigError
from joint_train.torch_private import local_shape_and_offset


class CompactAdamW(Optimizer):
    """AdamW of which the moments are kept in less than fp32, or in the host's memory.

    Args:
        name: ``adamw``, ``adamw_8bit`` or ``adamw_bf16``.
        on_host: keep the moments in the CPU's memory (pinned, if the weights are on a GPU). Those of one weight at a
            time are copied to the weight's device for its update, and back.

    ``found_inf``, a scalar on the device, leaves out the next step where it isn't 0: nothing changes, not a bit.

    Raises:
        ConfigError: for a weight whose shards cut a block in two.
    """

    def __init__(self, groups, name: str, betas: tuple[float, float], eps: float, on_host: bool = False):
        self.name, self.on_host = name, on_host
        self.found_inf: Tensor | None = None
        self.grad_scale = None
        # As with torch's fused AdamW the counter of steps is on the parameter's device.
        super().__init__(groups, {"betas": betas, "eps": eps, "fused": True})
        if name == "adamw_8bit":
            self.maps = _maps()
            for group in self.param_groups:
                for parameter in group["params"]:
                    block = block_size(parameter.shape)
                    if block and local_tensor(parameter).numel() and local_tensor(parameter).shape[-1] % block:
                        raise ConfigError(
                            f"optim.name=adamw_8bit: the shards of a weight of shape {list(parameter.shape)} cut its "
                            f"last dimension inside a block of {block}. Use fewer shards (parallel.dp_shard) or "
                            "optim.name=adamw_bf16."
                        )

    def entries(self, parameter: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each tensor of state but ``step``."""
        shape = parameter.shape
        if self.name != "adamw_8bit":
            dtype = torch.bfloat16 if self.name == "adamw_bf16" else parameter.dtype
            return {name: (shape, dtype) for name in ("exp_avg", "exp_avg_sq")}
        block = block_size(shape)
        if not block:
            return {name: (shape, torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        scales = torch.Size((*shape[:-1], shape[-1] // block))
        return {
            f"{name}_{part}": of_part
            for name in ("exp_avg", "exp_avg_sq")
            for part, of_part in (("codes", (shape, torch.uint8)), ("scale", (scales, torch.float32)))
        }

    def zeros(self, parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor of state, sharded like the parameter, where this optimizer keeps it."""
        device = torch.device("cpu") if self.on_host else parameter.device
        options: dict[str, Any] = {"dtype": dtype, "device": device, "pin_memory": self.on_host and parameter.is_cuda}
        if not isinstance(parameter, DTensor):
            return torch.zeros(shape, **options)
        mesh, placements = parameter.device_mesh, parameter.placements
        own, _ = local_shape_and_offset(shape, mesh, placements)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            torch.zeros(own, **options), mesh, placements, run_check=False, shape=shape, stride=stride
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # no loss: no closure is run
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        assert parameter.grad is not None
        state = self._state(parameter)
        weight, gradient = local_tensor(parameter), local_tensor(parameter.grad)
        if weight.numel() == 0:  # a rank without a part of it: the step counts nevertheless
            state["step"] += 1 if self.found_inf is None else (self.found_inf == 0)
            return
        master = weight.float()
        moments = [self._read(state, name, weight.device) for name in ("exp_avg", "exp_avg_sq")]
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

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: self.zeros(parameter, *entry) for name, entry in self.entries(parameter).items()}
        return state

    def _read(self, state: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
        if name in state:
            return (
                local_tensor(state[name]).to(device, non_blocking=True).float()
            )  # fp32, and there already: the very tensor
        from torchao.optim.quant_utils import dequant_with_qmap

        codes, scale = (
            local_tensor(state[f"{name}_{part}"]).to(device, non_blocking=True) for part in ("codes", "scale")
        )
        return dequant_with_qmap(codes, self.maps[name].to(device), scale.flatten())

    def _write(self, state: dict[str, Tensor], name: str, moment: Tensor) -> None:
        if name in state:
            kept = local_tensor(state[name])
            if kept.dtype != moment.dtype or kept.device != moment.device:
                kept.copy_(moment.to(kept.dtype), non_blocking=True)
            return
        from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

        parts = local_tensor(state[f"{name}_codes"]), local_tensor(state[f"{name}_scale"])
        codes, scale = (part.to(moment.device, non_blocking=True) for part in parts)
        scaled, new_scale = scale_tensor(moment, moment.numel() // scale.numel())
        new_codes = quantize_8bit_with_qmap(scaled, self.maps[name].to(codes.device))
        new_scale = new_scale.view(scale.shape)
        if self.found_inf is not None:
            # What is read and quantised again isn't always what it was: the map has a 1 and no -1.
            skipped = self.found_inf != 0
            new_codes, new_scale = torch.where(skipped, codes, new_codes), torch.where(skipped, scale, new_scale)
        for old, new in zip(parts, (new_codes, new_scale), strict=True):
            old.copy_(new, non_blocking=True)


def _maps() -> dict[str, Tensor]:
    """torchao's 256 values of a code: signed for the first moment, unsigned for the second."""
    let_torchao_in()
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError as error:
        raise ConfigError(f"optim.name=adamw_8bit needs the torchao package: pip install torchao ({error})") from None
    return {
        "exp_avg": torch.tensor(create_dynamic_map(signed=True)),
        "exp_avg_sq": torch.tensor(create_dynamic_map(signed=False)),
    }
