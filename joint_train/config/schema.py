"""The configuration: every key, its type, its default and what it means, each defined once, here.

``conf/`` holds choices of values for these keys, never keys of its own: Hydra merges it onto the schema below, so a
misspelt key or a wrong type is an error that names it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast, get_origin

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict


def key(default: Any, help: str) -> Any:
    """A configuration key: its default and one line for ``--help``."""
    if isinstance(default, (list, dict)) or (isinstance(default, type) and dataclasses.is_dataclass(default)):
        factory = default if isinstance(default, type) else (lambda: type(default)(default))
        return dataclasses.field(default_factory=factory, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class ExportConfig:
    at_end: bool = key(True, "write OUTPUT_DIR/export/{base,drafter} when the run ends")
    weights: str = key(
        "last", "what is exported at the end: last: the last step | best: the best checkpoint by checkpoint.keep_best"
    )
    max_shard_size: str = key("5GB", "largest safetensors file of an export")
    push_to_hub: str | None = key(None, "also push the export at the end to the repositories ID-base and ID-drafter")
    private: bool = key(True, "create the repositories of push_to_hub as private ones")
    drafter_last: bool = key(False, "with optim.drafter_ema: also write the drafter's last weights, to drafter_last/")
    kv_shared_weights: bool = key(False, "write unused k/v of KV-shared layers where the base's folder has none")


@dataclass
class ModelConfig:
    base: str = key(MISSING, "folder or hub id of the Gemma 4 base")
    drafter: str = key(MISSING, "folder or hub id of its drafter")
    adapter: Any = key(
        None, "PEFT LoRA folder or hub id on top of the base, or a list of them, each also as {path: DIR, weight: 0.5}"
    )
    adapters: list[Any] = key(
        [],
        "PEFT LoRA folders or hub ids that one drafter is trained for, each also as {path: DIR, name: NAME}; the base "
        "stays as it is (freeze.base=true), and sources name theirs (adapter)",
    )
    continue_adapter: bool = key(False, "train the (last) adapter on instead of merging it; lora.r is then its own")
    resize_vocabulary: Any = key(
        False, "true: grow the tables of both models to what the tokenizer needs | a number of rows | false"
    )
    dtype: str = key("bfloat16", "dtype of loaded and exported weights; only bfloat16, as drafters have no other")
    quantization: str = key(
        "none",
        "with freeze.base=true or adapters (lora.r): none | as_saved: the base's folder holds quantised weights "
        "(compressed-tensors, fp8, gemma, gptq, awq, modelopt, GGUF), which stay as they are | nf4, int8, fp8: keep "
        "the weights of a bfloat16 folder so in memory",
    )
    quantization_activations: str = key(
        "none",
        "with quantization=as_saved: none | as_saved: also round what goes into the base's linear layers as its "
        "engines do (W8A8, W4A4, static ranges), straight through",
    )
    revision: str | None = key(None, "hub revision of the base")
    drafter_revision: str | None = key(None, "hub revision of the drafter")
    cache_dir: str | None = key(None, "hub cache folder")
    attn_implementation: str = key(
        "auto", "auto: by_layer_type on GPU, sdpa on CPU | by_layer_type | sdpa | flex_attention | eager"
    )
    text_config: dict[str, Any] = key({}, "overrides of the base's text configuration")
    use_liger_kernel: bool = key(False, "liger's RMSNorm and MLP kernels (GPU only, needs the liger-kernel package)")
    export: ExportConfig = key(ExportConfig, "Hugging Face folders")


@dataclass
class DrafterConfig:
    num_steps: int = key(4, "K, drafter rounds for each row")
    pairing: str = key("serving", "serving: round k reads x[t+1+k], as engines do | same_token: the published recipe")
    rope_position: str = key(
        "last_kv", "last_kv: row t rotates at t (vLLM, SGLang) | next_token: at t+1 (transformers)"
    )
    loss_weight: float = key(1.0, "lambda, the weight of the drafter's loss")
    base_grad_scale: float = key(
        0.1, "factor on the drafter's gradient into the base (keys, values, embedding and hidden state); 0 to 1"
    )
    prompt_rows: bool | None = key(
        None, "also train the drafter at rows that decoding never visits; by default only with pairing=same_token"
    )
    share_embedding_with_base: bool = key(
        False, "copy the base's input embedding into the drafter's, once, at the start"
    )


@dataclass
class FreezeConfig:
    base: bool = key(False, "train the drafter alone")
    base_after: Any = key(
        None,
        "train the drafter alone after so many steps | after this share of the run, below 1 | auto: in the steps that "
        "training jointly has saved until then, by the plan's FLOPs, against training one model after the other",
    )
    towers: bool = key(True, "freeze the vision tower and its projection; the audio tower always is frozen")
    embeddings: bool = key(False, "freeze the base's embedding tables (and the head tied to them)")


@dataclass
class LoraConfig:
    r: int = key(0, "rank of the base's adapters, which are trained in its place; 0: no adapters")
    alpha: float = key(32, "the adapters' product is multiplied by alpha / r")
    dropout: float = key(0.0, "share of the adapters' inputs that is dropped in training")
    target_modules: list[str] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "linear layers of the base's decoder that get an adapter, by name suffix",
    )
    rank_stabilized: bool = key(False, "multiply by alpha / sqrt(r) instead")


@dataclass
class SourceConfig:
    path: str = key(MISSING, "JSON(L), Parquet, CSV or text file, glob, or a Hugging Face dataset id or folder")
    name: str | None = key(None, "name in the metrics; the file's stem by default")
    format: str = key("auto", "auto | messages | sharegpt | alpaca | prompt_response | text")
    weight: float = key(1.0, "share of the mixture, relative to the other sources")
    split: str = key("train", "split of a Hugging Face dataset")
    subset: str | None = key(None, "configuration name of a Hugging Face dataset")
    streaming: bool = key(False, "read a Hugging Face dataset as a stream")
    columns: dict[str, str] = key({}, "columns to read as the format's fields, e.g. {prompt: question}")
    chat_template_kwargs: dict[str, Any] = key({}, "options of the chat template, on top of data.chat_template_kwargs")
    ignore: list[str] = key([], "columns to ignore, though their names suggest a part of the conversation")
    adapter: str | None = key(None, "the one of model.adapters that the base has on it, by name or path; null: none")
    limit: int | None = key(None, "use at most this many examples of the source")


@dataclass
class DataConfig:
    train: list[SourceConfig] = key([], "training sources")
    val: list[SourceConfig] = key([], "validation sources")
    tokenizer: str | None = key(None, "folder or hub id of the tokenizer; the base's by default")
    chat_template_kwargs: dict[str, Any] = key(
        {}, "options of the chat template, as in serving, e.g. {enable_thinking: true}"
    )
    max_length: int = key(2048, "tokens in a row")
    micro_batch_size: int = key(1, "rows on a rank in one forward")
    packing: bool = key(True, "pack several documents into a row")
    overlong: str = key("truncate", "a document longer than max_length: truncate | split | drop")
    train_on: str = key("assistant", "supervised turns: assistant | last_assistant | all")
    unroll: str = key(
        "all", "where the template needs a document for each answer of a conversation, the ones to keep: all | last N"
    )
    mixture: str = key("endless", "endless: sources by weight, each repeated | epoch: each example once an epoch")
    shuffle: bool = key(True, "shuffle by the seed; false keeps the files' order")
    on_error: str = key("raise", "a bad example: raise | skip (counted and reported)")
    num_workers: int = key(1, "loader processes of a rank")
    cache_dir: str | None = key(None, "tokenised data; ~/.cache/joint_train/data by default")
    max_line_bytes: int = key(16_777_216, "longest line that is accepted in a JSONL file, in bytes")


@dataclass
class OptimConfig:
    name: str = key(
        "adamw", "adamw | adamw_8bit (moments in 8 bits, by torchao) | adamw_bf16 (moments in bfloat16) | muon"
    )
    lr: float = key(1e-5, "peak learning rate of the base")
    drafter_lr: float = key(1e-4, "peak learning rate of the drafter")
    weight_decay: float = key(
        0.01, "for matrices, adapters and untied heads; norms, biases and embedding tables have none"
    )
    betas: list[float] = key([0.9, 0.95], "AdamW's betas; with moments in bfloat16 the second is at most 0.99")
    eps: float = key(1e-8, "AdamW's epsilon")
    warmup_steps: int = key(50, "linear warm-up")
    schedule: str = key(
        "cosine",
        "cosine | linear | constant | wsd (constant, then linear), after the warm-up and until freeze.base_after",
    )
    min_lr_ratio: float = key(0.1, "final learning rate as a fraction of the peak")
    drafter_schedule: str | None = key(
        "wsd", "the drafter's schedule, which stays up while the base moves; null: as schedule"
    )
    drafter_min_lr_ratio: float | None = key(0.0, "the drafter's min_lr_ratio; null: as min_lr_ratio")
    drafter_ema: float = key(
        0.0,
        "decay of an average of the drafter's weights over the steps, such as 0.98, which is validated and exported in "
        "place of the last ones; 0: none",
    )
    decay_share: float = key(0.2, "with wsd: share of the run, at its end, in which the learning rate decays")
    clip: str = key("separate", "separate: clip each model by its own norm | joint: clip the norm over both together")
    max_grad_norm: float = key(
        1.0, "largest gradient norm: of both models, or with clip=separate of the base; 0: no clipping"
    )
    drafter_max_grad_norm: float = key(1.0, "with clip=separate: largest gradient norm of the drafter; 0: no clipping")
    grad_accum: int = key(1, "micro-batches in a step")


@dataclass
class ParallelConfig:
    pp: int = key(1, "pipeline parallel size; only 1")
    dp_replicate: int = key(1, "replicas of the sharded pair (HSDP)")
    dp_shard: int = key(-1, "ranks that the weights are sharded over; -1: all remaining ranks, or at most 64 (HSDP)")
    cp: int = key(1, "context parallel size; only 1")
    tp: int = key(1, "tensor parallel size; only 1")
    reshard_after_forward: bool = key(True, "free a base layer's gathered weights after its forward")
    cpu_offload: str = key(
        "none",
        "none | optimizer: optimizer states in CPU memory | all: weights and gradients too, updated on the CPU",
    )
    compile: bool = key(False, "torch.compile each decoder layer of both models")
    timeout_seconds: int = key(1800, "seconds to wait for a collective")


@dataclass
class PrecisionConfig:
    compute: str = key("auto", "auto: bfloat16 on GPU, float32 on CPU | bfloat16 | float32")
    params: str = key("float32", "master weights and optimizer state: float32 | bfloat16")
    reduce: str = key("float32", "gradient reduction: float32 | bfloat16")


@dataclass
class ActivationCheckpointingConfig:
    base: str = key(
        "auto",
        "what the backward recomputes of the base: auto: the least that fits, as planned | none | every_n: each n-th "
        "layer | selective: every layer, but not its attention | full: every layer",
    )
    every_n: int = key(2, "recompute each n-th layer with base=every_n")
    drafter: str = key(
        "auto", "auto: the least that fits, as planned | none | full: every round | layers: layer by layer"
    )
    offload: bool = key(False, "keep the inputs of recomputed layers in CPU memory, for long rows")


@dataclass
class LossConfig:
    drafter: Any = key(
        "lk_hybrid", "ce | ce_argmax | kl | reverse_kl | js | tv | nla | lk_hybrid, or a mix {ce: 0.1, nla: 0.9}"
    )
    temperature: float = key(1.0, "of teacher and student in the distillation losses")
    teacher_grad: Any = key(
        False, "factor on the distillation losses' gradient into the base as the teacher; true: 1, false: 0"
    )
    round_weights: Any = key(None, "w_k: a list of num_steps numbers, or {decay: b} for b**k; 1 each by default")
    centroid_weight: float = key(0.1, "weight of the routing loss of ordered embeddings; 0 freezes the centroids")
    compile: Any = key("auto", "compile the loss's operations on logits into few kernels; auto: on a GPU with Triton")
    memory_budget_mb: int | None = key(
        None,
        "memory of a rank for logits and their gradients; by default 384 on CPU and on GPU an eighth of "
        "what the plan leaves free, from 1024 to 4096",
    )


@dataclass
class CheckpointConfig:
    every: int = key(500, "steps between checkpoints; the last step is always saved")
    keep_last: int = key(3, "number of newest checkpoints to keep; 0 keeps all")
    keep_every: int = key(0, "also keep each checkpoint whose step is a multiple of this; 0: none")
    keep_best: str | None = key(
        None,
        "also keep the checkpoint with the lowest (with a leading '-', highest) value of this metric of the "
        "validation, e.g. val/base_loss or -val/accepted_length_expected",
    )
    grace_seconds: int = key(120, "seconds to save after SIGTERM, SIGUSR1, SIGHUP or Ctrl-C")
    checksums: bool = key(True, "re-read checksums when choosing the checkpoint to resume from")
    mirror: str | None = key(
        None, "also keep complete checkpoints and exports there, and resume from there, e.g. s3://bucket/run (fsspec)"
    )
    upload_wait_seconds: int = key(900, "seconds to wait for uploads at the end of a run; less after a signal")
    background: bool = key(False, "keep training while a checkpoint is written")


@dataclass
class EvalConfig:
    every: int = key(100, "steps between validation losses; 0: only before and after the run")
    batches: int = key(16, "validation micro-batches of a rank")
    generate_every: int = key(
        0, "steps between assisted generations, with a validation; 0: only before and after the run"
    )
    prompts: int | None = key(
        None,
        "validation prompts in an assisted generation; 0: none; null: 8, or none where it would outlast the validation",
    )
    max_new_tokens: int = key(64, "tokens generated for a prompt")
    own_text: bool = key(
        True, "at every validation also measure the drafter on what the base wrote in the last assisted generation"
    )
    patience: int = key(
        0, "end the run after so many validations in a row that are no better by checkpoint.keep_best; 0: never"
    )


@dataclass
class TrackingConfig:
    wandb: str = key("auto", "auto: online with a key, else offline | online | offline | disabled")
    project: str = key("joint-train", "wandb project")
    name: str | None = key(None, "wandb run name; output_dir's last part by default")
    log_export: bool = key(False, "also upload the folders of the export to wandb, as artifacts of the type model")
    tensorboard: bool = key(False, "also write TensorBoard files (needs the tensorboard package)")
    log_every: int = key(10, "steps between logged metrics; the host waits for the device only then")
    diagnose_every: int = key(0, "steps between the costly diagnostics (base gradient of the drafter's loss, drift)")
    max_bad_steps: int = key(10, "consecutive steps with a non-finite loss or gradient before the run stops")


@dataclass
class ProfileConfig:
    steps: str | None = key(None, "e.g. 10-12: trace these steps into OUTPUT_DIR/profile")


@dataclass
class Config:
    model: ModelConfig = key(ModelConfig, "the pair")
    drafter: DrafterConfig = key(DrafterConfig, "the joint forward")
    freeze: FreezeConfig = key(FreezeConfig, "what is not trained")
    lora: LoraConfig = key(
        LoraConfig, "adapters on the base, whose own weights are then frozen; needs the peft package"
    )
    data: DataConfig = key(DataConfig, "sources, rows and batches")
    optim: OptimConfig = key(OptimConfig, "AdamW and its schedule")
    parallel: ParallelConfig = key(ParallelConfig, "the device mesh")
    precision: PrecisionConfig = key(PrecisionConfig, "dtypes of compute, weights and reduction")
    activation_checkpointing: ActivationCheckpointingConfig = key(ActivationCheckpointingConfig, "recomputation")
    loss: LossConfig = key(LossConfig, "the drafter's loss")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "saving and resuming")
    eval: EvalConfig = key(EvalConfig, "validation during the run")
    tracking: TrackingConfig = key(TrackingConfig, "metrics, wandb, guards")
    profile: ProfileConfig = key(ProfileConfig, "where time and memory go")
    pair: str | None = key(None, "a folder with base/ and drafter/: model.base and model.drafter, unless they are set")
    seed: int = key(0, "data order and random state")
    max_steps: int | None = key(None, "optimizer steps; by default 1000, or one epoch with data.mixture=epoch")
    epochs: float | None = key(None, "instead of max_steps: passes over all training data; may be a fraction")
    stop_after: int | None = key(
        None, "end at this step with a checkpoint and an export, as if it were the last; schedules are those of the run"
    )
    output_dir: str = key("outputs", "folder of the run: configuration, metrics, checkpoints, export")
    resume: str = key(
        "auto",
        "auto: newest complete checkpoint of output_dir and checkpoint.mirror | never | a checkpoint folder or URL",
    )

    def __post_init__(self) -> None:
        self.interpolations: dict[tuple[str | int, ...], tuple[str, Any]] = {}
        """The interpolations, such as ``${oc.env:HF_TOKEN}``, that the configuration was composed with: their text,
        which is what is written to disk, and their value. Not a key."""


RENAMED = {"checkpoint.async": "checkpoint.background"}
"""Earlier names of keys, which are still accepted."""


def schema() -> DictConfig:
    """What Hydra merges files and overrides onto: :class:`Config`, where a dictionary takes any key, and with the
    earlier names of keys, unset."""
    node = OmegaConf.structured(Config)
    for old in RENAMED:
        group, _, name = old.rpartition(".")
        parent = OmegaConf.select(node, group)
        with open_dict(parent):
            parent[name] = None
    _open_dictionaries(node, Config)
    return node


def _open_dictionaries(node: DictConfig, of: type) -> None:
    """Exempt dictionaries from Hydra's rule that only known keys may be set: users choose their keys."""
    for field in dataclasses.fields(of):
        if dataclasses.is_dataclass(field.type):
            _open_dictionaries(node[field.name], cast(type, field.type))
        elif get_origin(field.type) is dict:
            OmegaConf.set_struct(node[field.name], False)


ConfigStore.instance().store(name="schema", node=schema())
