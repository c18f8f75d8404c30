"""Costly diagnostics, every ``tracking.diagnose_every`` steps: what joint training does to the base."""

import torch
import torch.distributed as dist
from torch import Tensor

from joint_train.distributed.lora import ADAPTER, adapted_modules, delta_weight
from joint_train.distributed.parallelize import reshard
from joint_train.distributed.placement import counts_here, local_tensor
from joint_train.distributed.quantised import stores
from joint_train.pair.model import JointModel
from joint_train.pair.targets import JointTargets
from joint_train.train.optim import total_norm

POSITIONS = 64  # targets whose distribution at the start is kept: 64 MiB at V = 262,144


class BaseDrift:
    """How far the base has moved from where it started.

    Made right after the pair is loaded from its folders, before a checkpoint is. Keeps the starting weights that are
    trained, this rank's shards of them, in CPU memory, as bfloat16 (what they are on disk), and the log-probabilities
    of a few targets. Adapters add nothing at the start: what they add later is the way that the base has moved.

    Args:
        model: the pair, in its starting state.
        inputs, targets: a fixed batch, on the device, with ``inputs`` as the model takes them.
    """

    def __init__(self, model: JointModel, inputs: dict, targets: JointTargets) -> None:
        self.model, self.inputs, self.rows = model, inputs, targets.rows[:POSITIONS]
        named = model.base.named_parameters()
        counted = [p for name, p in named if not ADAPTER.search(name) and counts_here(p) and p.is_floating_point()]
        self.size = sum(local_tensor(p).detach().bfloat16().float().square().sum().double().cpu() for p in counted)
        for store in stores(model.base).values():
            if counts_here(store.codes):
                self.size += store.numbers(torch.float32).square().sum().double().cpu()
        self.start = {
            p: local_tensor(p).detach().to("cpu", torch.bfloat16, copy=True) for p in counted if p.requires_grad
        }
        self.log_probs = self._log_probs()

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        """``[POSITIONS, V]`` of the base on the fixed batch."""
        training = self.model.training
        self.model.eval()
        hidden = self.model(**self.inputs, return_logits=False).hidden_states[-1].flatten(0, 1)[self.rows]
        logits = self.model.base.within(self.model.base_logits, hidden)
        self.model.train(training)
        reshard(self.model)  # what stays gathered would hide the shards and their gradients, also from `zero_grad`
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``base_drift``, ``|W - W_start| / |W_start|`` over all weights, and ``base_drift_kl``, KL(start || now)."""
        sums = torch.zeros(4, dtype=torch.float64)
        for parameter, start in self.start.items():
            sums[0] += (local_tensor(parameter).detach().float().cpu() - start.float()).square().sum()
        for module in adapted_modules(self.model.base).values():
            change = delta_weight(module)  # on every rank: it is collective
            layer = module.base_layer
            cut = layer.store.codes if hasattr(layer, "store") else layer.weight
            sums[0] += counts_here(cut) * change.square().sum().cpu()
        sums[1] = self.size
        log_probs = self._log_probs()
        sums[2] = (self.log_probs.exp() * (self.log_probs - log_probs)).sum()
        sums[3] = len(self.rows)
        sums = sums.to(log_probs.device)
        dist.all_reduce(sums)
        moved, size, divergence, rows = sums.tolist()
        return {"base_drift": (moved / size) ** 0.5, "base_drift_kl": divergence / max(1, rows)}


def base_gradient_from_drafter(model: JointModel, inputs: dict, targets: JointTargets, counts: Tensor) -> float:
    """Norm of the base's gradient from the drafter's loss alone, on one micro-batch of every rank.

    To be called between steps: it takes the place of the gradients of the last one, and leaves none behind.

    Args:
        counts: ``[1 + K]`` targets of that micro-batch on all ranks.
    """
    weights = model.loss_weights(counts)
    weights[0] = 0
    model.zero_grad()
    model(**inputs, targets=targets, weights=weights).loss.backward()
    norm = total_norm(p.grad for p in model.base.parameters()).item()
    model.zero_grad()
    return norm
