"""Loading: what each rank holds equals what ``from_pretrained`` gives, and wrong folders are refused with a list."""

import json
import re
import shutil
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from configs import compose
from pairs import SHAPES, make_pair
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from joint_train.errors import ConfigError, WeightsError
from joint_train.pair.compatibility import check_pair
from joint_train.weights import composite, folders, loading
from joint_train.weights.folders import read_config, read_configs, resolve
from joint_train.weights.loading import build_meta, load_model, materialize


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folders of every shape, in several files each: ``pairs / shape / "base"``."""
    root = tmp_path_factory.mktemp("pairs")
    for shape in SHAPES:
        make_pair(root / shape, shape, max_shard_size="100KB")
    return root


@pytest.fixture
def e2b(tmp_path):
    return make_pair(tmp_path, "e2b")


def assert_same_model(model, reference, full=lambda tensor: tensor):
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(full(ours[name]), tensor), name
    ours, theirs = dict(model.named_buffers()), dict(reference.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # among them those that no folder holds
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_from_pretrained(pairs, shape, dtype, monkeypatch):
    monkeypatch.setattr(loading, "READ_BYTES", 1000)  # so that tensors are read in pieces
    for part in ("base", "drafter"):
        model = load_model(pairs / shape / part, dtype)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert_same_model(model, type(model).from_pretrained(pairs / shape / part, dtype=dtype))


def test_a_filled_model_is_overwritten_in_place(tmp_path, e2b):
    model = load_model(e2b[0], torch.float32)
    before = dict(model.named_parameters())
    make_pair(tmp_path / "other", "e2b", seed=1)
    materialize(model, tmp_path / "other/base", "cpu")
    assert all(before[name] is parameter for name, parameter in model.named_parameters())  # an optimizer's still
    assert_same_model(model, type(model).from_pretrained(tmp_path / "other/base", dtype=torch.float32))


def pair_config(folder, **parallel):
    pair = {"model.base": f"{folder}/base", "model.drafter": f"{folder}/drafter"}
    return compose(pair | {f"parallel.{key}": value for key, value in parallel.items()})


def load_sharded(rank, root, shapes, replicate):
    from joint_train.distributed.mesh import init_mesh

    torch.manual_seed(0)
    world = dist.get_world_size()
    reads, read_slice = [], loading._read_slice
    loading._read_slice = lambda *args: (reads.append(args[1]), read_slice(*args))
    for shape in shapes:
        cfg = pair_config(f"{root}/{shape}", dp_replicate=replicate)
        mesh = init_mesh(cfg.parallel)
        reads.clear()
        pair = composite.load_pair(cfg, mesh, "cpu")
        assert bool(reads) == (mesh["dp_replicate"].get_local_rank() == 0)  # the other replicas get it from there
        for part, model in (("base", pair.base), ("drafter", pair.drafter)):
            reference = type(model).from_pretrained(f"{root}/{shape}/{part}", dtype=torch.float32)
            for name, parameter in model.named_parameters():
                if any(
                    f".{tower}." in name for tower in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
                ):
                    assert not isinstance(parameter, DTensor)  # frozen: whole on every rank
                    continue
                # FSDP2 gives rank r the r-th of torch.chunk's pieces: of the first dimension, but where that is the
                # three experts, whose padding would add a third, of the second
                whole = reference.get_parameter(name).detach()
                dim = 1 if len(whole) == 3 and whole.dim() > 1 and world > replicate else 0
                pieces = whole.chunk(world // replicate, dim)
                mine = mesh["dp_shard"].get_local_rank()
                piece = pieces[mine] if mine < len(pieces) else pieces[0][:0]
                assert isinstance(parameter, DTensor) and torch.equal(parameter.to_local(), piece), name
            assert_same_model(model, reference, lambda t: t.full_tensor() if isinstance(t, DTensor) else t)
            if part == "base":
                ids = torch.randint(3, 240, (1, 12))
                expected = reference(ids).logits
        with torch.no_grad():
            assert torch.equal(pair(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("world", "replicate", "shapes"),
    [(1, 1, list(SHAPES)), (2, 1, list(SHAPES)), (4, 1, list(SHAPES)), (4, 2, ["26b_a4b"])],
)
def test_each_rank_holds_its_slice(pairs, world, replicate, shapes):
    run_ranks(load_sharded, world, str(pairs), shapes, replicate)


def test_attention_and_overrides_are_forwarded(pairs):
    config = read_config(pairs / "multimodal/base", text_config={"sliding_window": 4, "final_logit_softcapping": 20.0})
    model = build_meta(config, torch.float32, "eager")
    text = model.config.get_text_config()
    assert (text.sliding_window, text.final_logit_softcapping) == (4, 20.0)
    assert text._attn_implementation == "eager"
    assert model.config.audio_config._attn_implementation == "eager"  # the only one that it has
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert config.get_text_config()._attn_implementation is None  # the caller's is left alone
    assert build_meta(config, torch.float32, "flex_attention").config.audio_config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="no slidin_window"):
        read_config(pairs / "multimodal/base", text_config={"slidin_window": 4})


def test_a_shape_that_an_override_changes_is_refused(pairs):
    config = read_config(pairs / "31b/base", text_config={"intermediate_size": 100})
    with pytest.raises(WeightsError, match=r"misshaped.*\n.*mlp.down_proj.weight \[64, 96\], should be \[64, 100\]"):
        materialize(build_meta(config, torch.float32), pairs / "31b/base", "cpu")


def reconfigure(folder: Path, **values):
    """Set values of the text configuration in a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(values)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_drafter_with_capped_logits_is_refused(e2b):
    reconfigure(e2b[0], final_logit_softcapping=30.0)  # the base's is trained as it is served
    read_configs(*e2b)
    reconfigure(e2b[1], final_logit_softcapping=30.0)
    with pytest.raises(
        ConfigError, match=r"model.drafter=.*drafter: .* final_logit_softcapping=30.0, which vLLM and SG"
    ):
        read_configs(*e2b)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("inside", [False, True])
def test_a_quantised_folder_is_refused(e2b, part, inside):
    method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    file = e2b[part] / "config.json"
    config = json.loads(file.read_text())
    (config["text_config"] if inside else config)["quantization_config"] = method
    file.write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"quantised weights \(compressed-tensors \(float-quantized\)\), .*give the bfloat16 folder"
    ) as error:
        read_configs(*e2b)
    assert str(e2b[part]) in str(error.value)


# Names


def rewrite(folder: Path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.language_model.layers.0"


def test_every_wrong_weight_is_listed(e2b):
    def change(tensors):
        del tensors[f"{LAYER}.self_attn.k_proj.weight"], tensors[f"{LAYER}.layer_scalar"]
        tensors["model.language_model.layers.0.surprise"] = torch.zeros(2)
        tensors[f"{LAYER}.mlp.up_proj.weight"] = torch.zeros(3, 64, dtype=torch.bfloat16)
        tensors[f"{LAYER}.mlp.down_proj.weight"] = torch.zeros(64, 96, dtype=torch.int8)

    rewrite(e2b[0], change)
    with pytest.raises(WeightsError) as error:
        load_model(e2b[0], torch.float32)
    assert str(error.value).replace(str(e2b[0]), "DIR") == textwrap.dedent(f"""\
        the weights in DIR don't fit Gemma4ForConditionalGeneration:
          missing (2): 
            {LAYER}.layer_scalar [1]
            {LAYER}.self_attn.k_proj.weight [16, 64]
          unexpected (1): 
            model.language_model.layers.0.surprise [2] in model.safetensors
          misshaped (2): 
            {LAYER}.mlp.down_proj.weight I8, can't be read as torch.float32
            {LAYER}.mlp.up_proj.weight [3, 64], should be [96, 64]""")  # noqa: W291


def test_what_the_format_leaves_out_is_no_error(e2b):
    reference = load_model(e2b[0], torch.float32)

    def change(tensors):
        for layer in (3, 4):  # released folders hold unused k/v of the layers that share
            for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
                tensors[f"model.language_model.layers.{layer}.self_attn.{name}"] = torch.ones(16, 64)
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()  # tied, and written out

    rewrite(e2b[0], change)
    assert_same_model(load_model(e2b[0], torch.float32), reference)

    def only_the_head(tensors):
        del tensors["model.language_model.embed_tokens.weight"]

    rewrite(e2b[0], only_the_head)
    assert_same_model(load_model(e2b[0], torch.float32), reference)


def test_names_on_disk_may_differ_from_the_model(pairs):
    """transformers renames the unified pair's embedder on the way in and out."""
    names = loading.stored_tensors(pairs / "12b_unified/base")
    assert "model.vision_embedder.patch_dense.weight" in names
    assert "model.embed_vision.patch_dense.weight" in dict(
        build_meta(read_config(pairs / "12b_unified/base"), torch.float32).named_parameters()
    )


def test_a_broken_folder_is_refused(tmp_path, pairs):
    folder = shutil.copytree(pairs / "31b/base", tmp_path / "base")
    shard = sorted(folder.glob("*.safetensors"))[0]
    with pytest.raises(WeightsError, match="can't read .*" + shard.name):
        shard.write_bytes(shard.read_bytes()[:-10])
        load_model(folder, torch.float32)
    shard.unlink()
    with pytest.raises(WeightsError, match="names files that aren't in the folder: " + shard.name):
        load_model(folder, torch.float32)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match="neither model.safetensors nor"):
        load_model(folder, torch.float32)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json"):
        load_model(folder, torch.float32)


def test_files_that_the_index_does_not_name_are_not_read(tmp_path, pairs):
    folder = shutil.copytree(pairs / "31b/base", tmp_path / "base")
    (folder / "consolidated.safetensors").write_bytes(b"something else")
    load_model(folder, torch.float32)


# Pairs


def edit(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        target[last] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_hidden_size": 32}, "hidden size of the base .* is 32 in the drafter and 64 in the base"),
        ({"text_config__vocab_size": 300}, "vocab_size is 300 in the drafter and 256 in the base"),
        ({"text_config__num_key_value_heads": 2}, "num_key_value_heads of sliding_attention is 2 .* and 1"),
        ({"text_config__head_dim": 8}, "head_dim of sliding_attention is 8 in the drafter and 16"),
        (
            {"text_config__rope_parameters__sliding_attention__rope_theta": 9.0},
            "rope_theta of sliding_attention is 9.0 in the drafter and 10000.0 in the base",
        ),
    ],
)
def test_a_drafter_of_another_base_is_refused(e2b, changes, message):
    read_configs(*e2b)
    edit(e2b[1], **changes)
    with pytest.raises(ConfigError, match=message):
        read_configs(*e2b)


def test_a_drafter_needs_a_store_layer_of_each_type(tmp_path):
    pair = make_pair(tmp_path, "e2b")
    edit(pair[0], text_config__layer_types=["sliding_attention"] * 4 + ["full_attention"])
    with pytest.raises(ConfigError, match="has full_attention layers, the base has none that computes keys"):
        read_configs(*pair)


def test_models_of_another_family_are_refused(e2b, tmp_path):
    with pytest.raises(ConfigError, match="model.base is a gemma4_assistant model: a drafter, not a base. Are"):
        read_configs(e2b[1], e2b[1])
    with pytest.raises(ConfigError, match="model.drafter is a gemma4 model: a base, not a drafter. Are base"):
        read_configs(e2b[0], e2b[0])
    for given in (e2b[::-1], (e2b[0], e2b[0]), (e2b[1], e2b[1])):  # the plan and the evaluation look at configurations
        with pytest.raises(ConfigError, match="Are base and drafter swapped"):
            check_pair(*map(read_config, given))
    edit(e2b[0], model_type="llama")
    with pytest.raises(ConfigError, match="is a llama model"):
        read_configs(*e2b)
    with pytest.raises(ConfigError, match="no model configuration at .*nowhere"):
        read_config(tmp_path / "nowhere")


# The hub


def test_a_missing_folder_is_an_error_without_network(tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(ConfigError, match="there is no folder"):
            resolve(name)


def resolve_on_ranks(rank, folder, failing):
    calls = []

    def snapshot_download(name, *, local_files_only=False, **options):
        calls.append((name, options["revision"], options["cache_dir"], local_files_only))
        if failing and rank == 0:
            raise OSError("no route to host")
        return folder

    folders.snapshot_download = snapshot_download
    try:
        found = resolve("google/gemma-4-E2B-it", "v1", "/cache")
    except ConfigError as e:
        found = str(e)
    return found, calls


def test_one_rank_of_a_node_downloads(tmp_path):
    (found, calls), (found_too, calls_too) = run_ranks(resolve_on_ranks, 2, str(tmp_path), False)
    assert found == found_too == tmp_path
    id_ = ("google/gemma-4-E2B-it", "v1", "/cache")
    assert calls == [(*id_, False), (*id_, True)] and calls_too == [(*id_, True)]


def test_a_failed_download_fails_on_every_rank(tmp_path):
    for found, _ in run_ranks(resolve_on_ranks, 2, str(tmp_path), True):
        assert "can't be had from the hub (revision v1): " in found and "no route to host. Without network" in found
        assert "there is no folder google/gemma-4-E2B-it" in found and "\n" not in found


# Memory


def anonymous_memory() -> int:
    """Bytes of this process's own memory, now; mapped files, which the system can drop, don't count."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_of_loading(rank, folder):
    from joint_train.distributed.mesh import init_mesh

    cfg = pair_config(folder)
    cfg.precision.params = "bfloat16"
    mesh = init_mesh(cfg.parallel)
    before, highest, done = anonymous_memory(), 0, threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    pair = composite.load_pair(cfg, mesh, "cpu")
    done.set()
    watcher.join()
    local = sum(p.to_local().nbytes for p in pair.parameters()) + sum(b.nbytes for b in pair.buffers())
    return sum(p.nbytes for p in pair.parameters()), local, highest - before


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_host_memory_of_a_rank_is_its_shard(tmp_path, ranks):
    """A folder of more than 4 GB: no rank's own memory goes above its shard by more than 256 MiB at any moment."""
    make_pair(
        tmp_path, "31b", vocab_size=131_072, hidden_size=2048, intermediate_size=16_384, num_hidden_layers=18,
        layer_types=["sliding_attention", "full_attention"] * 9, max_shard_size="1GB",
    )  # fmt: skip
    assert sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")) >= 4e9
    for whole, local, peak in run_ranks(peak_of_loading, ranks, str(tmp_path), timeout=400):
        print(f"{peak / 2**20:.0f} MiB for a shard of {local / 2**20:.0f} MiB, of {whole / 2**20:.0f} MiB")
        assert local < 1.1 * whole / ranks
        assert local < peak < local + 256 * 2**20
