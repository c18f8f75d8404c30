"""The pair as users know it: :class:`JointModel`, read from Hugging Face folders and written to them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from joint_train import checkpoint
from joint_train.config import (
    ActivationCheckpointingConfig,
    Config,
    DrafterConfig,
    FreezeConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    group_of,
)
from joint_train.config.values import as_saved, base_of_adapter, grown_rows
from joint_train.distributed.agreement import agree
from joint_train.distributed.lora import adapted_modules, inject_adapters, peft_config_of
from joint_train.distributed.mesh import check_mesh
from joint_train.distributed.parallelize import DTYPES, compute_dtype, parallelize, prepare, share_streams, text_model
from joint_train.distributed.quantised import KINDS, keep_quantised, rounding, stores
from joint_train.distributed.ranks import Ranks
from joint_train.errors import ConfigError
from joint_train.pair.attention import check_flex, implementation, kernels
from joint_train.pair.model import JointModel
from joint_train.weights import quantised
from joint_train.weights.activations import round_as_saved
from joint_train.weights.adapter import export_adapter, fill_base, load_adapter, warn_of_merged
from joint_train.weights.average import averaged
from joint_train.weights.changes import UNCHANGED, Changes, file_digest
from joint_train.weights.export import export_model
from joint_train.weights.folders import HUB_OPTIONS, read_configs, resolve
from joint_train.weights.identity import check_folders, frozen_base
from joint_train.weights.loading import build_meta, materialize
from joint_train.weights.peft_folder import FILE as ADAPTER_FILE
from joint_train.weights.placing import check as check_folder
from joint_train.weights.placing import discard, place
from joint_train.weights.run_files import RunFiles
from joint_train.weights.served import put_served, read_served
from joint_train.weights.settle import changes_of_base, changes_of_drafter, read_adapters, split_adapters

if TYPE_CHECKING:
    import peft

log = logging.getLogger(__name__)


class Gemma4WithDrafter(JointModel):
    """A base and its drafter, trained together, read from and written to Hugging Face folders.

    Arguments, forward and errors are those of :class:`joint_train.pair.model.JointModel`.

    Attributes:
        sources: the folders of base and drafter that the pair was loaded from, if it was.
        changes: what was changed in their weights at the load.
        base_as_saved: whether the base's weights are those of a quantised folder, which stays what is served.
        quantization_error: how far the base's weights are from their folder's, as a share of them, where they are kept
            in codes; the export has the folder's.
    """

    sources: tuple[Path, Path] | None = None
    changes: tuple[Changes, Changes] = (UNCHANGED, UNCHANGED)
    base_as_saved: bool = False
    quantization_error: float | None = None

    @classmethod
    def from_pretrained(
        cls,
        base_path: str | None = None,
        drafter_path: str | None = None,
        *,
        pretrained_model_name_or_path: str | None = None,
        drafter_loss_weight: float = 1.0,
        drafter_num_steps: int = 1,
        freeze_base_for_drafter: bool = False,
        share_embedding_with_base: bool = False,
        base_activation_checkpointing: bool = False,
        drafter_activation_checkpointing: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        use_liger_kernel: bool | None = None,
        use_sdpa_patching: bool | None = None,
        text_config: dict[str, Any] | None = None,
        peft_config: Any = None,
        device_mesh: DeviceMesh | None = None,
        moe_mesh: Any = None,
        distributed_config: ParallelConfig | dict | None = None,
        pipeline_config: Any = None,
        distributed_setup: Any = None,
        freeze_config: FreezeConfig | dict | None = None,
        cache_dir: str | None = None,
        revision: str | None = None,
        drafter_revision: str | None = None,
        pairing: str = "serving",
        rope_position: str = "last_kv",
        base_grad_scale: float = 1.0,
        prompt_rows: bool | None = None,
        loss: LossConfig | dict | None = None,
        quantization: str = "none",
        quantization_activations: str = "none",
        **kwargs: Any,
    ) -> Gemma4WithDrafter:
        """Load a base and its drafter, sharded over a mesh if there is one.

        Args:
            base_path: folder or hub id of the base.
            drafter_path: folder or hub id of the drafter.
            pretrained_model_name_or_path: another name of ``base_path``.
            drafter_loss_weight, drafter_num_steps, freeze_base_for_drafter, share_embedding_with_base,
                base_activation_checkpointing, drafter_activation_checkpointing, pairing, rope_position,
                base_grad_scale, prompt_rows, loss: as for the class.
            torch_dtype: dtype of the weights in memory; ``torch.bfloat16``, the drafter's only one. By default they are
                float32 masters of the bfloat16 weights on disk, as in a run.
            attn_implementation: of both models' text layers: auto, by_layer_type, sdpa, flex_attention or eager.
            use_liger_kernel: liger's kernels in both models.
            text_config: overrides of the base's text configuration.
            device_mesh: from :func:`joint_train.distributed.mesh.init_mesh`, shared by both; ``None``: whole, on the
                CPU.
            distributed_config: the ``parallel`` configuration group, or a dictionary of its keys.
            distributed_setup: an object with ``pp_size`` and ``cp_size`` (itself or its ``mesh_context``), which must
                be 1; its ``device_mesh`` is used if no other is given.
            freeze_config: the ``freeze`` configuration group, or a dictionary of its keys, for the base; the drafter is
                trained whole.
            cache_dir, revision, drafter_revision: of the hub.
            quantization, quantization_activations: of the base, as in the ``model`` configuration group; with
                ``freeze_base_for_drafter`` or ``peft_config``.
            use_sdpa_patching: ``None`` or ``False``: nothing is patched here.
            peft_config: a ``LoraConfig`` of the peft library: the base is frozen, and adapters on linear layers of its
                decoder are trained; with ``target_modules=None`` on those of the ``lora`` configuration group.
            moe_mesh, pipeline_config: must be ``None``.
            kwargs: ``token``, ``local_files_only`` and ``force_download`` of the hub, forwarded to both loads.

        Raises:
            TypeError: for any other keyword, naming it.
            ValueError: for a refused argument, saying why, or a pair that doesn't fit together.
        """
        if unknown := sorted(kwargs.keys() - HUB_OPTIONS):
            raise TypeError(
                f"from_pretrained doesn't know {', '.join(unknown)}: beside its named arguments it forwards "
                f"{', '.join(sorted(HUB_OPTIONS))} to both loads. The base's text configuration is overridden with "
                "text_config."
            )
        refused = {
            "pipeline_config": (pipeline_config, "the drafter reads the base's keys and values: no pipeline stages"),
            "moe_mesh": (moe_mesh, "experts are sharded over device_mesh like all other weights"),
        }
        for name, (value, why) in refused.items():
            if value is not None:
                raise ValueError(f"{name} must be None: {why}.")
        if use_sdpa_patching not in (None, False):
            raise ValueError(
                f"use_sdpa_patching={use_sdpa_patching!r}: nothing is patched here; leave it None or False, and choose "
                "the kernel with attn_implementation."
            )
        if torch_dtype not in (None, torch.bfloat16, "bfloat16", "torch.bfloat16"):
            raise ValueError(f"torch_dtype={torch_dtype}: the drafter is bfloat16-only; set torch.bfloat16.")
        if distributed_setup is not None:
            context = getattr(distributed_setup, "mesh_context", None) or distributed_setup
            for name in ("pp_size", "cp_size"):
                if getattr(context, name, 1) != 1:
                    raise ValueError(
                        f"distributed_setup.{name}={getattr(context, name)} must be 1: the drafter reads the base's "
                        "keys and values of the whole sequence in the same forward."
                    )
            device_mesh = device_mesh or getattr(context, "device_mesh", None)
        if device_mesh is not None:
            check_mesh(device_mesh)
        if peft_config is not None and freeze_base_for_drafter:
            raise ValueError("peft_config trains adapters on the base, and freeze_base_for_drafter=True nothing of it.")
        base_path = base_path or pretrained_model_name_or_path
        if base_path is None or drafter_path is None:
            raise ValueError("from_pretrained needs base_path (or pretrained_model_name_or_path) and drafter_path.")

        cfg = Config(
            model=ModelConfig(
                base=str(base_path),
                drafter=str(drafter_path),
                attn_implementation=attn_implementation or "auto",
                use_liger_kernel=bool(use_liger_kernel),
                text_config=text_config or {},
                cache_dir=cache_dir,
                revision=revision,
                drafter_revision=drafter_revision,
                quantization=quantization,
                quantization_activations=quantization_activations,
            ),
            drafter=DrafterConfig(
                num_steps=drafter_num_steps,
                pairing=pairing,
                rope_position=rope_position,
                base_grad_scale=base_grad_scale,
                prompt_rows=prompt_rows,
                loss_weight=drafter_loss_weight,
                share_embedding_with_base=share_embedding_with_base,
            ),
            freeze=dataclasses.replace(group_of(FreezeConfig, freeze_config), base=freeze_base_for_drafter),
            parallel=group_of(ParallelConfig, distributed_config),
            precision=PrecisionConfig(params="float32" if torch_dtype is None else "bfloat16"),
            activation_checkpointing=ActivationCheckpointingConfig(
                base="full" if base_activation_checkpointing else "none",
                drafter="full" if drafter_activation_checkpointing else "none",
            ),
            loss=group_of(LossConfig, loss),
        )
        return load_pair(
            cfg, device_mesh, device_mesh.device_type if device_mesh is not None else "cpu", kwargs, peft_config
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        checkpointer: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_shard_size: str | int = "5GB",
        kv_shared_weights: bool = False,
        end_token_ids: Sequence[int] = (),
        cards: Mapping[str, str] | None = None,
        drafter_last: bool = False,
    ) -> None:
        """Write ``base/`` and ``drafter/``, each for ``from_pretrained`` alone, in bfloat16, with the original's names.

        Where there is an average of the drafter's weights, ``drafter/`` has that.

        With adapters on the base, ``base/`` has them merged into its weights, and ``adapter/`` has them alone, for
        peft's ``PeftModel.from_pretrained``. A base that is used as it is quantised in its folder isn't written: that
        folder is what is served, with ``adapter/`` if there is one.

        Under a process group all ranks call it; no rank gathers a model. ``checkpointer`` isn't needed and ignored.

        Args:
            tokenizer: that training used: it, its chat template and its image processor are written to both folders
                where the original ones differ.
            end_token_ids: tokens that end an answer in training: generation ends with them, too.
            cards: the text of README.md of each folder, by its name; the original's stays without one.
            max_shard_size, kv_shared_weights: see :func:`joint_train.weights.export.export_model`.
            drafter_last: beside an average, also write the last weights, as ``drafter_last/``.

        Raises:
            ValueError: if neither model was loaded from a folder: there are no files to go with the weights then.
        """
        sources = self.sources or tuple(Path(model.config._name_or_path) for _, model in self.parts())
        for source, (name, _) in zip(sources, self.parts(), strict=True):
            if not (source / "config.json").is_file():
                raise ValueError(
                    f"save_pretrained copies the tokenizer and other files of the {name}'s folder, and this one was "
                    "not loaded with from_pretrained from a local folder. Save it with its own save_pretrained first, "
                    "and load it from there."
                )
        folder = Path(save_directory)
        parts = ["base"] * (not self.base_as_saved) + ["drafter"] + ["adapter"] * bool(adapted_modules(self.base))
        parts += ["drafter_last"] if drafter_last and self.drafter_average is not None else []
        outs = [folder / part for part in parts]
        files = {part: RunFiles(tokenizer, tuple(end_token_ids), (cards or {}).get(part)) for part in parts}
        try:
            for out in outs:
                if out.name == "base":
                    export_model(
                        self.base, sources[0], out, max_shard_size, kv_shared_weights=kv_shared_weights,
                        in_place=False, files=files["base"], changes=self.changes[0],
                    )  # fmt: skip
                    continue
                if out.name == "adapter":
                    export_adapter(self.base, out, in_place=False, card=files["adapter"].card)
                    continue
                with averaged(self) if out.name == "drafter" else nullcontext():
                    export_model(
                        self.drafter, sources[1], out, max_shard_size, num_assistant_tokens=self.drafter_num_steps,
                        in_place=False, files=files[out.name], changes=self.changes[1],
                    )  # fmt: skip
            place(outs, whole=True)
        except BaseException:
            discard(outs)
            raise

    def load_pretrained(self, load_directory: str | os.PathLike, checkpointer: Any = None, **kwargs: Any) -> None:
        """Read weights into this pair, from what :meth:`save_pretrained` wrote or from a run's checkpoint.

        With adapters on the base, these are read from either, and the base's other weights stay as they are.

        ``checkpointer`` and ``kwargs`` are reserved and ignored.

        Raises:
            FileNotFoundError: if the folder has neither layout.
            WeightsError: if its weights don't fit.
        """
        from joint_train.checkpoint.reader import stored_tensors

        folder = Path(load_directory)
        if all((folder / part / "model").is_dir() for part in ("base", "drafter")):
            if self.read_base is not None and not stored_tensors(checkpoint.locate(folder) / "base" / "model"):
                self.read_base()  # it was frozen: the checkpoint doesn't hold it
            checkpoint.load_model(folder, self.base, "base", frozen=self.frozen_base)
            checkpoint.load_model(folder, self.drafter, "drafter")
        elif all((folder / part / "config.json").is_file() for part in ("base", "drafter")[self.base_as_saved :]):
            for part in ("base", "drafter")[self.base_as_saved :]:
                check_folder(folder / part)
            lora = bool(adapted_modules(self.base))
            if lora:
                if not (folder / "adapter").is_dir():
                    raise FileNotFoundError(f"{folder} has no adapter/, and this pair's base has adapters to fill.")
                load_adapter(self.base, folder / "adapter")
            for part, model in self.parts()[lora or self.base_as_saved :]:
                materialize(model, folder / part, next(model.parameters()).device)
        else:
            raise FileNotFoundError(
                f"{folder} has neither base/model and drafter/model (a checkpoint) nor base/ and drafter/ with a "
                "config.json each (an export)."
            )


def load_pair(
    cfg: Config,
    mesh: DeviceMesh | None,
    device: torch.device | str,
    hub: dict[str, Any] | None = None,
    peft_config: Any = None,
) -> Gemma4WithDrafter:
    """The pair of a configuration, sharded over `mesh` (whole without one) and filled from its folders.

    Args:
        hub: those of :data:`HUB_OPTIONS` that are given, for both downloads.
        peft_config: adapters of the base, instead of those of the ``lora`` group.

    Raises:
        ConfigError: for a pair that can't be found or doesn't fit together.
        WeightsError: for weights that don't fit.
    """
    m = cfg.model
    base_dir = resolve(m.base, m.revision, m.cache_dir, hub)
    drafter_dir = resolve(m.drafter, m.drafter_revision, m.cache_dir, hub)
    configs = read_configs(
        base_dir, drafter_dir, text_config=m.text_config, rows=grown_rows(cfg), quantized=as_saved(cfg)
    )
    device = torch.device(device)
    model = meta_pair(cfg, *configs, DTYPES[cfg.precision.params], device.type, peft_config)
    text = model.base.config.get_text_config()
    compute = compute_dtype(cfg.precision, device.type)
    check_flex(text, compute, device.type)
    log.info("attention: %s", kernels(text, compute, device.type))
    model.sources, model.base_as_saved = (base_dir, drafter_dir), as_saved(cfg)
    if model.base_as_saved:
        log.info("%s", quantised.sentence(base_dir, m.quantization_activations))
    if mesh is not None:
        parallelize(model, mesh, cfg)
    ranks = Ranks(cfg.parallel.timeout_seconds) if mesh is not None else None
    check_folders({"base": base_dir, "drafter": drafter_dir}, ranks)
    everyone = Ranks(cfg.parallel.timeout_seconds)
    adapters, served = read_adapters(cfg), read_served(cfg)
    if ranks is not None and (read := [*adapters, *served]):
        digests = {f"adapter {number}": file_digest(a.folder / ADAPTER_FILE) for number, a in enumerate(read)}
        agree(ranks, "weights", digests, {f"adapter {number}": str(a.folder) for number, a in enumerate(read)})
    merged, continued = split_adapters(cfg, adapters)
    model.changes = (
        changes_of_base(cfg, model.base, base_dir, everyone, merged),
        changes_of_drafter(cfg, model.drafter, drafter_dir, everyone),
    )
    shard_device = "cpu" if cfg.parallel.cpu_offload == "all" else None
    base_changes, adapter = model.changes[0], None if continued is None else continued.folder
    model.read_base = partial(
        fill_base, model.base, base_dir, device, shard_device, base_changes, seed=cfg.seed, adapter=adapter
    )
    model.read_base()
    materialize(model.drafter, drafter_dir, device, shard_device, model.changes[1])
    if adapted_modules(model.base) and merged:
        warn_of_merged([adapter.folder for adapter in merged], m.base)
    model.frozen_base = everyone.first(
        f"reading {base_dir}", lambda: frozen_base(base_dir, base_changes, m.quantization)
    )
    if kept := stores(model.base).values():
        model.quantization_error = rounding(kept, everyone)
    if m.quantization_activations == "as_saved":
        round_as_saved(model.base, base_dir)
    if served:
        dtype = DTYPES[cfg.precision.params] if mesh is None else compute
        model.adapters = put_served(model, cfg, served, dtype, device)
    if mesh is not None:
        share_streams(model)
    if cfg.drafter.share_embedding_with_base:
        model.share_embedding()
    return model


def meta_pair(
    cfg: Config,
    base_config: PreTrainedConfig,
    drafter_config: PreTrainedConfig,
    dtype: torch.dtype,
    device_type: str = "cpu",
    peft_config: Any = None,
) -> Gemma4WithDrafter:
    """The pair of a configuration on the meta device: what is frozen, recomputed and compiled is decided, and the
    adapters are there.

    Args:
        device_type: that it is for, which ``model.attn_implementation=auto`` depends on.
    """
    attention = implementation(cfg.model.attn_implementation, device_type)
    base = build_meta(base_config, dtype, attention)
    if peft_config is None and cfg.lora.r:
        peft_config = peft_config_of(cfg.lora)
    if peft_config is not None:
        inject_adapters(base, peft_config, text_model(base))
        injected = cast("peft.LoraConfig", base.peft_config["default"])
        injected.base_model_name_or_path, injected.revision = base_of_adapter(cfg), cfg.model.revision
    if cfg.model.quantization != "none" and peft_config is None and not cfg.freeze.base:
        raise ConfigError("quantised weights can't be trained: freeze the base, or give it adapters.")
    if cfg.model.quantization in KINDS:
        keep_quantised(text_model(base), cfg.model.quantization)
    model = Gemma4WithDrafter(
        base,
        build_meta(drafter_config, dtype, attention),
        drafter_loss_weight=cfg.drafter.loss_weight,
        drafter_num_steps=cfg.drafter.num_steps,
        freeze_base_for_drafter=cfg.freeze.base,
        share_embedding_with_base=cfg.drafter.share_embedding_with_base,
        pairing=cfg.drafter.pairing,
        rope_position=cfg.drafter.rope_position,
        base_grad_scale=cfg.drafter.base_grad_scale,
        prompt_rows=cfg.drafter.prompt_rows,
        loss=cfg.loss,
    )
    model.base_stays = cfg.freeze.base or bool(adapted_modules(base))
    prepare(model, cfg)
    return model
