"""LoRA on the base (Hu et al., arXiv 2106.09685), by the peft library: placing the adapters, initialising them, and
merging them into weights.

    y = W x + (alpha / r) B A x        W [out, in] is frozen, A [r, in] and B [out, r] are trained

peft replaces a linear layer ``q_proj`` by a module that holds it as ``q_proj.base_layer``, beside
``q_proj.lora_A.default`` and ``q_proj.lora_B.default``. The base stays the class that it is; only these names change.
"""

import copy
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from joint_train.config import LoraConfig
from joint_train.distributed.placement import local_tensor, part_of, sharded_like
from joint_train.distributed.quantised import stores
from joint_train.errors import ConfigError
from joint_train.torch_private import local_shape_and_offset

if TYPE_CHECKING:
    import peft
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

ADAPTER = re.compile(r"\.lora_[AB]\.default\.")
# Suffixes such as q_proj fit layers of the towers as well.
TOWERS = r".*\b(vision_tower|audio_tower|embed_vision|embed_audio)\b.*"
# What of a peft.LoraConfig is more than the formula above, or other weights' business.
REFUSED = (
    "use_dora", "use_bdlora", "use_qalora", "lora_bias", "modules_to_save", "target_parameters", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config",
    "kasa_config", "megatron_config", "fan_in_fan_out",
)  # fmt: skip


def peft_config_of(cfg: LoraConfig) -> "peft.LoraConfig":
    """The ``lora`` group in peft's terms."""
    import peft

    return peft.LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # peft only divides it by r, so that a fraction works as well
        lora_dropout=cfg.dropout,
        target_modules=list(cfg.target_modules),
        use_rslora=cfg.rank_stabilized,
        task_type="CAUSAL_LM",
    )


def inject_adapters(base: nn.Module, config: "peft.LoraConfig", text: "Gemma4TextModel") -> None:
    """Put adapters on the linear layers that `config` names, in place, and freeze everything else. Works on the meta
    device; :func:`initialise_adapters` gives the adapters their values.

    Args:
        text: the base's language model, whose decoder layers may get adapters.

    Raises:
        ConfigError: for a kind of adapter that isn't supported, and for names of no linear layer of the decoder.
    """
    import peft

    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(f"peft_config is a {type(config).__name__}: give a peft.LoraConfig.")
    config = copy.deepcopy(config)
    wrong = [f"{name}={getattr(config, name)!r}" for name in REFUSED if getattr(config, name, None)]
    wrong += [f"bias={config.bias!r}"] * (config.bias != "none")
    wrong += [f"init_lora_weights={config.init_lora_weights!r}"] * (config.init_lora_weights is not True)
    if wrong:
        raise ConfigError(
            f"peft_config has {', '.join(wrong)}: only plain LoRA on linear layers is supported, with A random and B 0 "
            "at the start."
        )
    if config.target_modules is None:
        config.target_modules = LoraConfig().target_modules
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    if config.exclude_modules is None and any(re.fullmatch(TOWERS, name) for name, _ in base.named_modules()):
        config.exclude_modules = TOWERS
    linear = {id(m): name for layer in text.layers for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    names = ", ".join(sorted({name.rpartition(".")[2] for name in linear.values()}))
    try:
        with warnings.catch_warnings():
            # Towers that have no such layers; and tied weights, which are refused below.
            warnings.filterwarnings("ignore", message="You have passed exclude_modules|Model has `tie_word_embeddings")
            peft.inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error} The decoder's linear layers are {names}.") from error
    wrong = [name for name, module in adapted_modules(base).items() if id(module.base_layer) not in linear]
    if wrong:
        raise ConfigError(
            f"lora.target_modules also names {', '.join(wrong[:3])}, which isn't a linear layer of the decoder. Those "
            f"are {names}. Embedding and head can't have an adapter: the losses and the drafter read the table itself."
        )
    for module in adapted_modules(base).values():
        for part in (module.lora_A, module.lora_B):
            part.to(dtype=module.base_layer.weight.dtype)  # those on the meta device are made in torch's default dtype


def adapted_modules(base: nn.Module) -> dict[str, Any]:
    """peft's modules in the place of linear layers, by name; none without adapters."""
    return {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}


def adapter_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' weights, by name."""
    return {name: p for name, p in base.named_parameters() if ADAPTER.search(name)}


def folder_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the names that they have without adapters, and without the adapters'.

    What stands for a weight that is kept in codes is its :attr:`joint_train.distributed.quantised.Store.dense`.
    """
    tensors = model.state_dict(keep_vars=True)
    for name, store in stores(model).items():
        del tensors[f"{name}_codes"], tensors[f"{name}_scales"]
        tensors[name] = store.dense
    return {name.replace(".base_layer.", "."): t for name, t in tensors.items() if not ADAPTER.search(name)}


@torch.no_grad()
def initialise_adapters(base: nn.Module, seed: int) -> None:
    """Give the adapters the values that peft starts with: B is 0, so that the base is what it was, and A is uniform
    within 1 / sqrt(in).

    The values depend on the seed and the name of a weight alone: they are the same on any mesh, without communication.
    """
    for name, parameter in adapter_parameters(base).items():
        whole = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        copy_from_full(parameter, whole)


@torch.no_grad()
def copy_from_full(parameter: nn.Parameter, whole: Tensor) -> None:
    """Set a weight, or this rank's shard of it, to a value that every rank has whole."""
    local_tensor(parameter).copy_(part_of(whole, parameter))


@torch.no_grad()
def gather_full(parameter: Tensor) -> Tensor:
    """A whole weight, on the device of the mesh. Collective where it is sharded."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    # It may be in CPU memory (parallel.cpu_offload=all).
    return sharded_like(parameter.to_local().to(parameter.device_mesh.device_type), parameter).full_tensor()


@torch.no_grad()
def delta_weight(module: Any) -> Tensor:
    """(alpha / r) B A of an adapted layer, in float32: what is added to this rank's shard of W.

    Collective where the adapters are sharded.
    """
    weight, store = module.base_layer.weight, getattr(module.base_layer, "store", None)
    a, b = (gather_full(part["default"].weight).float() for part in (module.lora_A, module.lora_B))
    if store is not None:
        rows, columns = store.part()
        a, b = a[:, columns], b[rows]
    elif isinstance(weight, DTensor):
        shape, (row, column) = local_shape_and_offset(weight.shape, weight.device_mesh, weight.placements)
        a, b = a[:, column : column + shape[1]], b[row : row + shape[0]]
    return module.scaling["default"] * (b @ a)


@torch.no_grad()
def merged_weight(module: Any, weight: Tensor | None = None) -> Tensor:
    """W + (alpha / r) B A of an adapted layer, in float32, sharded like W. Collective where the adapters are sharded.

    Args:
        module: of :func:`adapted_modules`.
        weight: W, where the layer's own isn't there, or is kept in codes: whole, or sharded as they are.
    """
    weight = module.base_layer.weight.detach() if weight is None else weight
    shard = local_tensor(weight)
    shard = shard.float() + delta_weight(module).to(shard.device)
    return sharded_like(shard, weight) if isinstance(weight, DTensor) else shard


class Merged(Mapping[str, Tensor]):
    """A model's tensors with what the adapters add to them, each made when it is asked for: all ranks in one order.

    Args:
        names: the names that the tensors have without adapters, by the keys of this mapping.
        read: a part of a weight that is kept in codes here, from the folder that it was read from, by its key.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        read: Callable[[str, tuple[slice, ...]], Tensor] | None = None,
    ):
        self.names, self.tensors, self.read = names, folder_tensors(model), read
        self.modules = {f"{name}.weight": module for name, module in adapted_modules(model).items()}

    def __getitem__(self, key: str) -> Tensor:
        name = self.names[key]
        weight, module = self.tensors[name], self.modules.get(name)
        if (store := getattr(weight, "store", None)) is not None:
            assert self.read is not None, "an export reads the source folder"
            weight = store.sharded(self.read(key, store.part()).float().to(local_tensor(store.codes).device))
            return weight if module is None else merged_weight(module, weight)
        return weight if module is None else merged_weight(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
