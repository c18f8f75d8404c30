"""PEFT's LoRA folders under a base: merged at the load as peft merges them, or trained on."""

import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from adapters import load_base, make_adapter, merged_by_peft
from configs import compose
from pairs import make_pair
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from joint_train.checkpoint import Checkpointer
from joint_train.config import to_yaml
from joint_train.distributed.lora import adapter_parameters, copy_from_full, folder_tensors
from joint_train.distributed.mesh import init_mesh
from joint_train.errors import CheckpointError, ConfigError, WeightsError
from joint_train.run_export import export_run
from joint_train.train.optim import build_optimizer
from joint_train.weights.composite import load_pair
from joint_train.weights.peft_folder import read_adapter
from joint_train.weights.settle import with_adapter, with_vocabulary


def settled(folders, **settings):
    pair = {"model.base": str(folders[0]), "model.drafter": str(folders[1])}
    return with_adapter(compose(pair | {key.replace("__", "."): value for key, value in settings.items()}))


def loaded(rank: int, folders, settings: dict) -> dict[str, torch.Tensor]:
    """The base's tensors, whole, of a pair that is sharded over all ranks."""
    cfg = settled(folders, **settings)
    tensors = folder_tensors(load_pair(cfg, init_mesh(cfg.parallel), "cpu").base)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def assert_equal(tensors, reference: torch.nn.Module) -> None:
    expected = reference.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        error = (tensor.detach() - expected[name]).abs().max()
        assert tensor.dtype == expected[name].dtype and error <= 1e-6 * expected[name].abs().max(), (name, error)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A pair whose towers have layers of the same names, and two adapters: one of the whole base, one of its language
    model alone."""
    root = tmp_path_factory.mktemp("adapters")
    folders = make_pair(root / "pair", "multimodal")
    whole = make_adapter(folders[0], root / "whole")
    part = make_adapter(
        folders[0], root / "text", seed=1, text_only=True, r=3, target_modules=["q_proj", "down_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 5}, alpha_pattern={"down_proj": 7},
    )  # fmt: skip
    return folders, whole, part


def test_merged_at_load_is_what_peft_merges(multimodal):
    folders, whole, part = multimodal
    before = load_base(folders[0]).state_dict()
    tensors = folder_tensors(load_pair(settled(folders, model__adapter=str(whole)), None, "cpu").base)
    assert_equal(tensors, merged_by_peft(folders[0], whole))
    changed = [name for name in tensors if not torch.equal(tensors[name].detach(), before[name])]
    assert len(changed) == len(load_file(whole / "adapter_model.safetensors")) / 2 > 20


def test_several_are_merged_in_turn_with_their_weights(multimodal):
    folders, whole, part = multimodal
    adapters = [{"path": str(whole), "weight": -0.5}, str(part)]
    tensors = folder_tensors(load_pair(settled(folders, model__adapter=adapters), None, "cpu").base)
    reference = load_base(folders[0])
    first = peft.PeftModel.from_pretrained(reference, whole)
    for module in first.modules():
        if hasattr(module, "lora_A"):
            module.scale_layer(-0.5)
    reference = first.merge_and_unload()
    inner = peft.PeftModel.from_pretrained(load_base(folders[0], text_only=True), part).merge_and_unload()
    plain, expected = load_base(folders[0], text_only=True).state_dict(), reference.state_dict()
    for name, value in inner.state_dict().items():
        target = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        expected[target].add_(value - plain[name])
    assert_equal(tensors, reference)


@pytest.mark.parametrize("shape, ranks, replicate", [("multimodal", 2, 1), ("26b_a4b", 4, 2)])
def test_each_rank_merges_its_slice(tmp_path, shape, ranks, replicate):
    """26B-A4B's layers are narrow enough for four ranks to cut some of them by columns."""
    folders = make_pair(tmp_path / "pair", shape)
    adapter = make_adapter(folders[0], tmp_path / "adapter", use_rslora=True)
    settings = {"model__adapter": str(adapter), "parallel__dp_replicate": replicate}
    assert_equal(run_ranks(loaded, ranks, folders, settings)[0], merged_by_peft(folders[0], adapter))


def test_a_continued_adapter_begins_as_pefts_model(multimodal):
    folders, whole, part = multimodal
    cfg = settled(folders, model__adapter=str(whole), model__continue_adapter=True)
    assert (cfg.lora.r, cfg.lora.alpha, cfg.lora.rank_stabilized) == (4, 8, False)
    base = load_pair(cfg, None, "cpu").base
    reference = peft.PeftModel.from_pretrained(load_base(folders[0]), whole, is_trainable=True)
    expected = {n.removeprefix("base_model.model."): p for n, p in reference.named_parameters() if p.requires_grad}
    trained = {n: p for n, p in base.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys() and all(torch.equal(p, expected[n]) for n, p in trained.items())
    ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(0))
    loss = base(input_ids=ids, labels=ids).loss
    assert torch.allclose(loss, reference(input_ids=ids, labels=ids).loss, atol=1e-6, rtol=0)


def test_an_adapter_is_continued_on_top_of_merged_ones_and_by_its_own_names(multimodal, tmp_path):
    folders, whole, _ = multimodal
    text = make_adapter(
        folders[0], tmp_path / "text", seed=2, text_only=True, target_modules=r".*layers\.[13]\..*o_proj"
    )
    cfg = settled(folders, model__adapter=[str(whole), str(text)], model__continue_adapter=True)
    assert cfg.lora.target_modules == ["layers.1.self_attn.o_proj", "layers.3.self_attn.o_proj"]
    base = load_pair(cfg, None, "cpu").base
    assert_equal(folder_tensors(base), merged_by_peft(folders[0], whole))
    found = load_file(text / "adapter_model.safetensors")
    trained = {n: p for n, p in base.named_parameters() if p.requires_grad}
    assert len(trained) == len(found) == 4
    for name, parameter in trained.items():
        key = name.replace("language_model.", "").replace(".default", "")
        assert torch.equal(parameter, found[f"base_model.model.{key}"])


def test_an_adapter_names_its_base_and_brings_its_tokenizer(multimodal, tmp_path, starter_dir):
    folders, whole, _ = multimodal
    adapter = tmp_path / "adapter"
    shutil.copytree(whole, adapter)
    shutil.copy(starter_dir / "base/tokenizer_config.json", adapter)
    cfg = with_adapter(compose({"model.base": "", "model.adapter": str(adapter)}))
    assert cfg.model.base == str(folders[0]) and cfg.data.tokenizer == str(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"revision": "v2"}))
    assert with_adapter(compose({"model.base": "", "model.adapter": str(adapter)})).model.revision == "v2"
    with pytest.raises(ConfigError, match=f"set model.base={folders[0]} model.adapter={adapter}"):
        with_adapter(compose({"model.base": str(adapter)}))
    with pytest.raises(ConfigError, match=f"holds adapters .PEFT. on {folders[0]}, and no model"):
        load_pair(compose({"model.base": str(adapter), "model.drafter": str(folders[1])}), None, "cpu")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"peft_type": "IA3"}, "is of the kind IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters="),
        ({"lora_alpha": None}, "adapter_config.json has lora_alpha=None, which isn't a number"),
        ({"r": "4"}, "adapter_config.json has r='4', which isn't a number"),
    ],
)
def test_other_kinds_are_refused_by_name(multimodal, tmp_path, settings, said):
    folders, whole, _ = multimodal
    shutil.copytree(whole, tmp_path / "a")
    config = json.loads((whole / "adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ConfigError, match=said):
        settled(folders, model__adapter=str(tmp_path / "a"))


def test_what_does_not_fit_is_named(multimodal, tmp_path):
    folders, whole, part = multimodal
    with pytest.raises(ConfigError, match="has no adapter_config.json"):
        settled(folders, model__adapter=str(folders[0]))
    with pytest.raises(ConfigError, match="lora.r=8: .* whose rank is 4"):
        settled(folders, model__adapter=str(whole), model__continue_adapter=True, lora__r=8)
    with pytest.raises(ConfigError, match="rank_pattern, alpha_pattern, which can be merged"):
        settled(folders, model__adapter=str(part), model__continue_adapter=True)
    with pytest.raises(ConfigError, match="model.adapter names none"):
        settled(folders, model__continue_adapter=True)
    with pytest.raises(ConfigError, match="the weight of a is 'x'"):
        settled(folders, model__adapter={"path": "a", "weight": "x"})
    shutil.copytree(whole, tmp_path / "several/second")
    with pytest.raises(ConfigError, match=f"give one of the adapters in it: {tmp_path}/several/second"):
        settled(folders, model__adapter=str(tmp_path / "several"))
    config = json.loads((whole / "adapter_config.json").read_text())
    (tmp_path / "several/second/adapter_config.json").write_text(json.dumps(config | {"r": 64}))
    with pytest.raises(WeightsError, match="has the rank 4, and adapter_config.json says 64"):
        load_pair(settled(folders, model__adapter=str(tmp_path / "several/second")), None, "cpu")
    other = make_pair(tmp_path / "other", "multimodal", num_attention_heads=8)
    with pytest.raises(WeightsError, match=r"q_proj is \[64, 64\], and in the base \[128, 64\]"):
        load_pair(settled(other, model__adapter=str(whole)), None, "cpu")
    shutil.copytree(whole, tmp_path / "a")
    found = load_file(whole / "adapter_model.safetensors")
    key = "base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_{}.weight"
    save_file(found | {key.format(c): torch.ones(4, 4) for c in "AB"}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(WeightsError, match="layers.9.self_attn.q_proj, which the base doesn't have"):
        load_pair(settled(folders, model__adapter=str(tmp_path / "a")), None, "cpu")


def test_keys_and_values_that_nothing_reads_are_left_out(multimodal, tmp_path, caplog):
    """Layers 3 and 4 reuse the keys and values of others; trainers that keep their weights train adapters on them."""
    folders, whole, _ = multimodal
    shutil.copytree(whole, tmp_path / "a")
    found = load_file(whole / "adapter_model.safetensors")
    key = "base_model.model.model.language_model.layers.{}.self_attn.k_proj.lora_{}.weight"
    unused = {key.format(4, c): found[key.format(0, c)].clone() for c in "AB"}
    assert not unused.keys() & found.keys()
    save_file(found | unused, tmp_path / "a/adapter_model.safetensors")
    with caplog.at_level("INFO"):
        tensors = folder_tensors(load_pair(settled(folders, model__adapter=str(tmp_path / "a")), None, "cpu").base)
    assert_equal(tensors, merged_by_peft(folders[0], whole))
    assert "1 layers whose keys and values nothing reads" in caplog.text


def adapted_again(rank: int, folders, out, settings: dict) -> None:
    """New adapters on a base with merged ones, as if trained: a checkpoint and an export."""
    cfg = settled(folders, **settings)
    model = load_pair(cfg, init_mesh(cfg.parallel), "cpu").train()
    for number, (name, parameter) in enumerate(adapter_parameters(model.base).items()):
        if ".lora_B." in name:
            generator = torch.Generator().manual_seed(number)
            copy_from_full(parameter, torch.randn(parameter.shape, generator=generator) / 20)
    checkpointer = Checkpointer(out, cfg.checkpoint, timeout_seconds=60)
    checkpointer.save(1, model, build_optimizer(model, cfg.optim), {"step": 1}, config=cfg)
    checkpointer.close()
    if rank == 0:
        (out / "config.yaml").write_text(to_yaml(cfg))
    model.save_pretrained(out / "export")


def test_a_checkpoint_of_adapters_on_a_merged_base_exports_what_the_run_does(multimodal, tmp_path):
    folders, whole, _ = multimodal
    settings = {"model__adapter": str(whole), "lora__r": 2, "lora__target_modules": ["q_proj", "down_proj"]}
    run_ranks(adapted_again, 2, folders, tmp_path, settings)
    checkpoint = tmp_path / "checkpoints/step_00000001"
    assert export_run(checkpoint, tmp_path / "out", check=True) == 0
    one, other = (load_file(tmp_path / path / "base/model.safetensors") for path in ("export", "out"))
    assert one.keys() == other.keys()
    for key, value in one.items():  # a sum of the same three products, in slices or at once, rounded to bfloat16
        assert torch.allclose(value.float(), other[key].float(), rtol=2**-7, atol=1e-6), key
    merged = merged_by_peft(folders[0], whole, tmp_path / "export/adapter").state_dict()
    for key, value in one.items():
        assert torch.allclose(value.float(), merged[key], rtol=2**-7, atol=1e-6), key
    for path in ("export/adapter", "out/adapter"):  # no folder holds the base that they are for
        assert read_adapter(tmp_path / path, 1.0).base is None
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace(f"adapter: {whole}", "adapter: null"))
    with pytest.raises(CheckpointError, match="differ from that base. Set model.base"):
        export_run(checkpoint, tmp_path / "again")


def test_an_adapter_with_trained_tables_of_new_tokens(tmp_path):
    """peft saves embedding and head of a model whose vocabulary was resized, beside the adapters."""
    folders = make_pair(tmp_path / "pair", "31b")
    torch.manual_seed(0)
    model = load_base(folders[0])
    model.resize_token_embeddings(260)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) / 10)
    table = model.lm_head.weight.detach().clone()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / "a/adapter_model.safetensors"))
    vocabulary = {f"token{number}": number for number in range(258)}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, name_or_path="tuned")
    cfg = settled(folders, model__adapter=str(tmp_path / "a"))
    with pytest.raises(WeightsError, match="260 rows, and in the base 256 .set model.resize_vocabulary=true"):
        load_pair(cfg, None, "cpu")
    cfg.model.resize_vocabulary = True
    cfg = with_vocabulary(cfg, tokenizer)
    assert cfg.model.resize_vocabulary == 320
    pair = load_pair(cfg, None, "cpu")
    head = pair.base.lm_head.weight.detach()
    assert pair.base.get_input_embeddings().weight is pair.base.lm_head.weight
    assert torch.equal(head[:260], table) and torch.equal(head[260:], table.double().mean(0).float().expand(60, -1))
    # A table of its own beside a head that is tied in the base: no folder can hold both.
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    key = next(key for key in found if "embed_tokens" in key)
    save_file(found | {key: found[key] + 1}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(WeightsError, match="the base ties"):
        load_pair(cfg, None, "cpu")
