"""Folders as trainers leave them: what a model needs is read, under older names as well; nothing else goes along."""

import json
import shutil

import pytest
import torch
from pairs import make_pair
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from joint_train.errors import ConfigError, WeightsError
from joint_train.weights.export import export_model, verify
from joint_train.weights.folders import read_config
from joint_train.weights.loading import current_name, load_model
from joint_train.weights.to_generate import load_to_generate

# What is in the output folders of these programs beside the model, by their sources and by public repositories.
EXTRA = {
    "HF Trainer": [
        "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt",
        "all_results.json", "train_results.json", "eval_results.json", "checkpoint-500/model.safetensors",
        "checkpoint-500/config.json", "checkpoint-500/optimizer.pt", "runs/Nov26_host/events.out.tfevents.1.host.0",
        "global_step500/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest", "zero_to_fp32.py",
        "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", ".gitattributes",
    ],
    "axolotl": [
        "config.yml", "axolotl_config.yaml", "debug.log", "tokens_state.json", "merged/model.safetensors",
        "adapter_config.json", "adapter_model.safetensors", "checkpoint-9/adapter_config.json",
    ],
    "LLaMA-Factory": [
        "trainer_log.jsonl", "training_loss.png", "training_eval_loss.png", "training_args.yaml", "running_log.txt",
        "llamaboard_config.yaml", "Modelfile", "predict_results.json", "generated_predictions.jsonl",
    ],
    "unsloth": ["unsloth.Q4_K_M.gguf", "unsloth.BF16-mmproj.gguf", "lora_model/adapter_config.json", "Modelfile"],
    "NeMo": [
        "losses.json", "training.jsonl", "validation.jsonl", "config.yaml", "step_scheduler.pt", "rng/rng_dp_rank_0.pt",
        "dataloader/dataloader_dp_rank_0.pt", "optim/__0_0.distcp", "fqn_to_file_index_mapping.json",
    ],
    "torchtune": [
        "torchtune_config.yaml", "recipe_state/recipe_state.pt", "original_repo_id.json", "adapter_0.pt", "log.txt",
        "ft-model-00001-of-00001.safetensors", "model-00001-of-00001.bin",
    ],
}  # fmt: skip
BELONGING = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "chat_template.jinja", "additional_chat_templates/tools.jinja", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "generation_config.json", "LICENSE", "NOTICE.txt", "README.md",
}  # fmt: skip


@pytest.fixture(scope="module")
def e2b(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), "e2b")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("text"), "text")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def renamed(source, folder, rename):
    """A copy of a folder whose tensors have other names."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    changed = {rename(name): tensor for name, tensor in weights.items()}
    assert changed.keys() != weights.keys()
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("trainer", EXTRA)
def test_only_what_belongs_to_a_model_goes_along(e2b, tmp_path, caplog, trainer):
    source = tmp_path / "source"
    load_model(e2b[0], torch.float32).save_pretrained(source, max_shard_size="100KB")  # sharded, by index, fp32
    for name in [*EXTRA[trainer], *(BELONGING - {"generation_config.json"})]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    model = load_model(source, torch.float32)
    with caplog.at_level("INFO"):
        export_model(model, source, tmp_path / "out")
    weights = {"config.json", "model.safetensors", "joint_train_export.json"}
    assert files(tmp_path / "out") == BELONGING | weights
    assert verify(tmp_path / "out", source) == []
    assert "not copied to the export" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


COMPOSITE = {
    "before 4.52": lambda name: name.replace("model.language_model.", "language_model.model."),
    "the text model's": lambda name: name.replace("model.language_model.", "model."),
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "FSDP": lambda name: name.replace(".layers.0.", "._fsdp_wrapped_module.layers.0._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("names", COMPOSITE)
def test_names_that_transformers_does_not_know_are_read_and_exported_as_today(e2b, tmp_path, names):
    folder = renamed(e2b[0], tmp_path / "source", COMPOSITE[names])
    model, wanted = load_model(folder, torch.float32), load_model(e2b[0], torch.float32)
    assert all(torch.equal(x, wanted.state_dict()[name]) for name, x in model.state_dict().items())
    export_model(model, folder, tmp_path / "out")
    assert verify(tmp_path / "out", folder) == []
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(e2b[0] / "model.safetensors").keys()


def test_a_text_model_under_the_names_of_a_multimodal_one(text, tmp_path):
    folder = renamed(text[0], tmp_path / "source", lambda name: name.replace("model.", "model.language_model.", 1))
    model, wanted = load_model(folder, torch.float32), load_model(text[0], torch.float32)
    assert all(torch.equal(x, wanted.state_dict()[name]) for name, x in model.state_dict().items())


def test_names_of_drafters_and_of_today_stay(e2b):
    for folder in e2b:
        kind = read_config(folder).model_type
        for name in load_file(folder / "model.safetensors"):
            assert current_name(name, kind) == name


def test_two_models_in_one_file_are_refused(e2b, tmp_path):
    folder = shutil.copytree(e2b[0], tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    name = "model.language_model.norm.weight"
    save_file(weights | {f"module.{name}": weights[name].clone()}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"1 tensors under two names, such as .*{name}"):
        load_model(folder, torch.float32)


def test_a_forgotten_adapter_config_is_not_taken_for_an_adapter(e2b, tmp_path):
    folder = shutil.copytree(e2b[0], tmp_path / "merged")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing", "peft_type": "LORA"}')
    model = load_to_generate(folder, torch.float32, "cpu")
    wanted = load_model(e2b[0], torch.float32)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in wanted.state_dict().items())


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("checkpoint-500", "There are models in it: .*checkpoint-500"),
        ("epoch_0_step_99/model/consolidated", "There are models in it: .*epoch_0_step_99/model/consolidated"),
    ],
)
def test_a_folder_of_checkpoints_names_the_models_in_it(e2b, tmp_path, inside, words):
    shutil.copytree(e2b[0], tmp_path / inside)
    with pytest.raises(ConfigError, match=f"no config.json.*{words}"):
        read_config(tmp_path)
    shutil.copyfile(e2b[0] / "config.json", tmp_path / "config.json")
    with pytest.raises(WeightsError, match=f"neither model.safetensors.*{words}"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model-00001-of-00002.bin", "runs code when it is read. Save the model again"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "accelerate merge-weights .*pytorch_model_fsdp_0 OUT"),
        ("global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("__0_0.distcp", "export the model with the program that wrote them"),
        ("model.gguf", "model.gguf can't be read as GGUF"),
        ("mmproj-model.gguf", "of the towers alone"),
        ("model.safetensors.incomplete", "was never downloaded to its end"),
        ("model-00001-of-00002.safetensors", "shards, and no index"),
        ("consolidated.safetensors", "it has .*consolidated.safetensors: call it model.safetensors"),
    ],
)
def test_weights_in_another_format_are_named_with_what_to_do(e2b, tmp_path, name, words):
    folder = shutil.copytree(e2b[0], tmp_path / "source")
    (folder / "model.safetensors").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    with pytest.raises(WeightsError, match=words):
        load_model(folder, torch.float32)


def test_files_that_were_never_fetched_are_named(e2b, tmp_path):
    folder = shutil.copytree(e2b[0], tmp_path / "source")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(WeightsError, match="model.safetensors: this is a Git LFS pointer, .* run git lfs pull"):
        load_model(folder, torch.float32)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0")
    with pytest.raises(WeightsError, match="model.safetensors is a link to ../blobs/0, which isn't there"):
        load_model(folder, torch.float32)
    (folder / "model.safetensors").unlink()
    shutil.copy(e2b[0] / "model.safetensors", folder)
    (folder / "generation_config.json").write_text(pointer)
    with pytest.raises(WeightsError, match="generation_config.json can't be used: "):
        load_model(folder, torch.float32)
    (folder / "config.json").write_text(pointer)
    with pytest.raises(ConfigError, match="config.json: this is a Git LFS pointer"):
        read_config(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": "5"}, "config.json that transformers refuses: .*num_hidden_layers"),
        ({"num_hidden_layers": 6}, "config.json that transformers refuses: "),
        ({"hidden_activation": "gelut"}, "no Gemma4ForCausalLM can be built from .*config.json: KeyError: 'gelut'"),
    ],
)
def test_values_that_no_model_has_are_refused(text, tmp_path, values, words):
    folder = shutil.copytree(text[0], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(ConfigError, match=words):
        load_model(folder, torch.float32)


def test_a_head_of_its_own_does_not_replace_the_table_that_it_is_tied_to(text, tmp_path):
    folder = shutil.copytree(text[0], tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.clone()}, folder / "model.safetensors")
    assert torch.equal(load_model(folder, torch.bfloat16).lm_head.weight, table)
    head = table.clone()
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="one tensor .*tie_word_embeddings=true.*, and they have different values"):
        load_model(folder, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert torch.equal(load_model(folder, torch.bfloat16).lm_head.weight, head)


def test_an_order_of_tokens_that_is_no_permutation_is_refused(e2b, tmp_path):
    folder = shutil.copytree(e2b[1], tmp_path / "drafter")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("token_ordering"))
    for changed in (torch.zeros_like(weights[name]), weights[name] + 1, weights[name].roll(1).clamp(max=254)):
        save_file(weights | {name: changed}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match="token_ordering .* isn.t a permutation of the 256 tokens"):
            load_model(folder, torch.float32)
    save_file(weights | {name: weights[name].roll(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder, torch.float32)
    assert json.loads((folder / "config.json").read_text())["use_ordered_embeddings"]
