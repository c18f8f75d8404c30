"""Export: the folder that comes out is the folder that went in, whoever holds the weights in between."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from configs import compose
from pairs import SHAPES, make_pair, model_class
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from joint_train import progress
from joint_train.checkpoint import layout
from joint_train.config import to_yaml
from joint_train.errors import ConfigError, WeightsError
from joint_train.export import main
from joint_train.weights import writing
from joint_train.weights.composite import load_pair
from joint_train.weights.export import export_checkpoint, export_model, parse_size, plan_shards, verify
from joint_train.weights.folders import read_config
from joint_train.weights.loading import build_meta, load_model, materialize

PARTS = ("base", "drafter")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for shape in SHAPES:
        make_pair(root / shape, shape)
    return root


@pytest.fixture
def e2b(tmp_path):
    return make_pair(tmp_path / "pair", "e2b")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as safetensors' own reader sees them."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_tensors(ours: Path, theirs: Path):
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys()
    for name in b:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def pair_config(folder, **parallel):
    pair = {"model.base": f"{folder}/base", "model.drafter": f"{folder}/drafter"}
    return compose(pair | {f"parallel.{key}": value for key, value in parallel.items()})


# Round trips


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_in_one_process(pairs, tmp_path, shape):
    for part in PARTS:
        source = pairs / shape / part
        export_model(load_model(source, torch.float32), source, tmp_path / part, max_shard_size="100KB")
        assert_same_tensors(tmp_path / part, source)
        assert (tmp_path / part / "config.json").read_bytes() == (source / "config.json").read_bytes()
        assert verify(tmp_path / part, source) == []
        exported = model_class(read_config(source)).from_pretrained(tmp_path / part)
        original = model_class(read_config(source)).from_pretrained(source)
        for name, tensor in original.state_dict().items():
            assert torch.equal(exported.state_dict()[name], tensor), name


def sharded_round_trip(rank, root, out, shapes, replicate):
    from joint_train.distributed.mesh import init_mesh

    writing.PIECE_BYTES = 1000  # so that tensors come in pieces
    put, written = writing._Pen.put, set()
    writing._Pen.put = lambda pen, files, file, *args: (written.add(str(file)), put(pen, files, file, *args))
    for shape in shapes:
        cfg = pair_config(f"{root}/{shape}", dp_replicate=replicate)
        pair = load_pair(cfg, init_mesh(cfg.parallel), "cpu")
        with torch.no_grad():
            pair(input_ids=torch.randint(3, 240, (1, 12)))  # leaves the roots' weights gathered
        for part, model, tokens in (("base", pair.base, None), ("drafter", pair.drafter, 3)):
            export_model(model, f"{root}/{shape}/{part}", f"{out}/{shape}/{part}", "100KB", num_assistant_tokens=tokens)
    return written


@pytest.mark.parametrize(
    ("world", "replicate", "shapes"),
    [(2, 1, ["e2b", "multimodal", "12b_unified"]), (4, 1, ["26b_a4b"]), (4, 2, ["26b_a4b"])],
)
def test_round_trip_of_sharded_weights(pairs, tmp_path, world, replicate, shapes):
    """Folder, sharded load, no step, export: equal bit for bit."""
    of_rank = run_ranks(sharded_round_trip, world, str(pairs), str(tmp_path), shapes, replicate)
    assert all(of_rank) and sum(map(len, of_rank)) == len(set().union(*of_rank))  # a file has one writer
    for shape in shapes:
        for part in PARTS:
            assert_same_tensors(tmp_path / shape / part, pairs / shape / part)
            assert sorted(os.listdir(tmp_path / shape)) == ["base", "drafter"]  # nothing left over
        generation = json.loads((tmp_path / shape / "drafter/generation_config.json").read_text())
        assert generation["num_assistant_tokens"] == 3


def complete(step: Path) -> None:
    """Give what is in a folder the manifest of a checkpoint."""
    files = {
        str(file.relative_to(step)): list(layout.file_checksum(file)) for file in step.rglob("*") if file.is_file()
    }
    layout.write_file(step / "COMPLETE", layout.Manifest(10, 1, "", "", {}, files=files).to_bytes())


def write_checkpoint(rank, root, run):
    from joint_train.distributed.mesh import init_mesh

    cfg = pair_config(root)
    cfg.drafter.num_steps = 3
    pair = load_pair(cfg, init_mesh(cfg.parallel), "cpu")
    step = Path(run) / "checkpoints/step_00000010"
    for part, model in (("base", pair.base), ("drafter", pair.drafter)):
        dcp.save(get_model_state_dict(model), checkpoint_id=step / part / "model")
    if rank == 0:
        (Path(run) / "config.yaml").write_text(to_yaml(cfg))
        complete(step)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("shape", ["multimodal"])
def test_a_checkpoint_is_exported_in_one_process(pairs, tmp_path, capsys, shape):
    run, out = tmp_path / "run", tmp_path / "out"
    run_ranks(write_checkpoint, 2, str(pairs / shape), str(run))
    assert main([str(run / "checkpoints/step_00000010"), str(out), "--verify", "--max-shard-size", "100KB"]) == 0
    assert capsys.readouterr().out.count("names, shapes and dtypes as in") == 2
    for part in PARTS:
        assert_same_tensors(out / part, pairs / shape / part)
    assert json.loads((out / "drafter/generation_config.json").read_text())["num_assistant_tokens"] == 3
    assert len(list((out / "base").glob("*.safetensors"))) > 1


# What is in the folder


def test_changed_weights_are_what_is_written(e2b, tmp_path):
    model = load_model(e2b[0], torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    export_model(model, e2b[0], tmp_path / "out")
    ours, theirs = model.state_dict(), tensors(tmp_path / "out")
    assert theirs and all(torch.equal(ours[name].to(tensor.dtype), tensor) for name, tensor in theirs.items())
    assert torch.equal(type(model).from_pretrained(tmp_path / "out").lm_head.weight, ours["lm_head.weight"].bfloat16())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_names_that_only_the_source_has_stay(e2b, tmp_path, monkeypatch, caplog):
    """Unused k/v of KV-shared layers and a tied head that is written out: an engine may look for them."""
    file = e2b[0] / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    weights["model.language_model.layers.4.self_attn.k_proj.weight"] = torch.randn(32, 64).bfloat16()
    save_file(weights, file, metadata={"format": "pt"})
    model = load_model(e2b[0], torch.float32)
    export_model(model, e2b[0], tmp_path / "out")
    assert_same_tensors(tmp_path / "out", e2b[0])
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with caplog.at_level("INFO"):
        export_checkpoint(tmp_path / "checkpoint", model, e2b[0], tmp_path / "again")
    assert re.search(r"writing \S+again: 0\.\d of 0\.\d GB", caplog.text)
    assert_same_tensors(tmp_path / "again", e2b[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_unused_keys_and_values_are_written_where_the_source_has_none(pairs, tmp_path, caplog):
    source = pairs / "e2b/base"
    text = read_config(source).get_text_config()
    model = load_model(source, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with caplog.at_level("INFO"):
        export_model(model, source, tmp_path / "without")
        assert caplog.text.count("2026, which refuses such a folder, set model.export.kv_shared_weights=true") == 1
        caplog.clear()
        export_model(model, source, tmp_path / "with", kv_shared_weights=True)
        assert "KV-shared" not in caplog.text
    without, ours = tensors(tmp_path / "without"), tensors(tmp_path / "with")
    own = text.num_hidden_layers - text.num_kv_shared_layers
    added = {name: tensor for name, tensor in ours.items() if name not in without}
    expected = {}
    for layer in range(own, text.num_hidden_layers):  # each reuses the last own layer of its type
        reused = max(other for other in range(own) if text.layer_types[other] == text.layer_types[layer])
        for name in ("k_proj", "v_proj", "k_norm"):
            key = "model.language_model.layers.{}.self_attn." + name + ".weight"
            expected[key.format(layer)] = without[key.format(reused)]
    assert added.keys() == expected.keys() and len(added) == 3 * text.num_kv_shared_layers
    assert all(torch.equal(added[key], tensor) for key, tensor in expected.items())
    assert verify(tmp_path / "with", source, kv_shared_weights=True) == []
    assert len(verify(tmp_path / "with", source)) == len(added)
    # Such a folder is as good a source as the other, and a checkpoint's export has them, too.
    again = load_model(tmp_path / "with", torch.bfloat16)
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in without.items())
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    export_checkpoint(tmp_path / "checkpoint", model, source, tmp_path / "from", kv_shared_weights=True)
    assert_same_tensors(tmp_path / "from", tmp_path / "with")


@pytest.mark.parametrize("folder", ["31b/base", "e2b/drafter"])
def test_models_without_shared_keys_and_values_have_none_to_write(pairs, tmp_path, folder, caplog):
    with caplog.at_level("INFO"):
        export_model(load_model(pairs / folder, torch.float32), pairs / folder, tmp_path / "out")
    assert "kv_shared" not in caplog.text
    export_model(load_model(pairs / folder, torch.float32), pairs / folder, tmp_path / "same", kv_shared_weights=True)
    assert_same_tensors(tmp_path / "same", pairs / folder)


def test_other_files_go_along(e2b, tmp_path, caplog):
    source, blobs = tmp_path / "models--a--b/snapshots/1f", tmp_path / "models--a--b/blobs"
    source.parent.mkdir(parents=True)
    e2b[0].rename(source)
    blobs.mkdir()
    for name in ("tokenizer.json", "processor_config.json"):
        (blobs / name).write_text(f"{name}!")
        (source / name).symlink_to(blobs / name)  # as in a snapshot of the hub
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "templates").mkdir()
    (source / "templates/tools.jinja").write_text("{{ tools }}")
    for name in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", ".hidden"):
        (source / name).write_text("weights")
    secret, outside = tmp_path / "secret", tmp_path / "outside"
    secret.write_text("of somebody else")
    outside.mkdir()
    (outside / "key.jinja").write_text("of somebody else")
    (source / "README.md").symlink_to(secret)
    (source / "linked").symlink_to(outside)
    (source / "loop.json").symlink_to("loop.json")
    for name in ("global_step8/zero_pp_rank_0_optim_states.pt", "checkpoint-8/model.safetensors", "run/wandb.json",
                 "optimizer/__0_0.distcp", "optimizer.npz", "trainer_state.json"):  # fmt: skip
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    with caplog.at_level("INFO"):
        export_model(load_model(source, torch.float32), source, tmp_path / "out")
    assert "not copied to the export" in caplog.text and "README.md" in caplog.text and "optimizer.npz" in caplog.text
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "processor_config.json",
        "chat_template.jinja", "templates/tools.jinja", "joint_train_export.json",
    }  # fmt: skip
    assert not (tmp_path / "out/tokenizer.json").is_symlink()
    assert (tmp_path / "out/tokenizer.json").read_text() == "tokenizer.json!"


def test_overridden_settings_are_exported(e2b, tmp_path):
    config = read_config(e2b[0], text_config={"sliding_window": 4})
    model = build_meta(config, torch.float32)
    materialize(model, e2b[0], "cpu")
    export_model(model, e2b[0], tmp_path / "out")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", e2b[0]))
    theirs["text_config"]["sliding_window"] = 4
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_source_of_another_dtype_is_exported_in_bfloat16(e2b, tmp_path, dtype):
    model = load_model(e2b[0], torch.float32)
    model.to(dtype).save_pretrained(tmp_path / "source")
    model = load_model(tmp_path / "source", torch.float32)
    export_model(model, tmp_path / "source", tmp_path / "out")
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "source")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in theirs.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert verify(tmp_path / "out", tmp_path / "source") == []
    name = {torch.float32: "F32", torch.float16: "F16"}[dtype]
    problem = f"dtype of model.language_model.norm.weight: {name}, should be BF16"
    assert problem in verify(tmp_path / "source", tmp_path / "source")


def test_generation_settings_of_a_drafter_without_any(e2b, tmp_path):
    (e2b[1] / "generation_config.json").unlink()
    export_model(load_model(e2b[1], torch.float32), e2b[1], tmp_path / "out", num_assistant_tokens=4)
    drafter = load_model(tmp_path / "out", torch.float32)
    assert drafter.generation_config.num_assistant_tokens == 4


@pytest.mark.parametrize(
    ("size", "bytes_"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2GiB", 2**31), (1000, 1000), ("7", 7)]
)
def test_parse_size(size, bytes_):
    assert parse_size(size) == bytes_


@pytest.mark.parametrize("size", ["", "GB", "5 elephants", "-1GB", "0GB"])
def test_parse_size_refuses(size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(size)


def test_shards_are_full_but_not_too_large():
    layout = {str(i): ((n,), torch.bfloat16) for i, n in enumerate([3, 2, 100, 1, 4, 4])}
    assert plan_shards(layout, 10) == [["0", "1"], ["2"], ["3", "4"], ["5"]]


def test_index_names_every_tensor(e2b, tmp_path):
    export_model(load_model(e2b[0], torch.float32), e2b[0], tmp_path / "out", max_shard_size="50KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    weights = tensors(tmp_path / "out")
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    for file in (tmp_path / "out").glob("*.safetensors"):
        held = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == held.keys()
        assert sum(t.nbytes for t in held.values()) <= 50_000 or len(held) == 1


# When something goes wrong


def test_an_older_export_stays_whole_until_the_new_one_is(e2b, tmp_path, monkeypatch):
    out = tmp_path / "out"
    model = load_model(e2b[0], torch.float32)
    export_model(model, e2b[0], out)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    put, calls = writing._Pen.put, []

    def full_disk(*args):
        calls.append(args)
        assert_same_tensors(out, e2b[0])
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(*args)

    monkeypatch.setattr(writing._Pen, "put", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_model(model, e2b[0], out)
    assert len(calls) == 3  # nothing is written after an error
    assert_same_tensors(out, e2b[0])
    monkeypatch.setattr(writing._Pen, "put", put)
    export_model(model, e2b[0], out)
    assert not torch.equal(
        load_model(out, torch.float32).lm_head.weight, load_model(e2b[0], torch.float32).lm_head.weight
    )
    assert sorted(os.listdir(tmp_path)) == ["out", "pair"]


def fail_on_one_rank(rank, root, out):
    from joint_train.distributed.mesh import init_mesh

    cfg = pair_config(root)
    pair = load_pair(cfg, init_mesh(cfg.parallel), "cpu")
    if rank == 1:
        writing._Pen.put = lambda *args: (_ for _ in ()).throw(OSError("No space left on device"))
    try:
        export_model(pair.base, f"{root}/base", out, "100KB")
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def test_a_failure_on_one_rank_fails_on_all(pairs, tmp_path):
    first, second = run_ranks(fail_on_one_rank, 2, str(pairs / "31b"), str(tmp_path / "out"))
    assert first == "RuntimeError: rank 1: OSError: No space left on device"
    assert second == "OSError: No space left on device"
    assert not (tmp_path / "out").exists()


def test_what_the_file_system_changed_is_found(e2b, tmp_path, monkeypatch):
    put = writing._Pen.put

    def changed(pen, files, file, offset, piece):
        put(pen, files, file, offset, piece)
        if len(pen.written) == 5:
            files[file].seek(offset)
            files[file].write(bytes([piece[0] ^ 1]))

    monkeypatch.setattr(writing._Pen, "put", changed)
    with pytest.raises(WeightsError, match=r"safetensors isn't what was written: bytes \d+ to \d+ differ"):
        export_model(load_model(e2b[0], torch.float32), e2b[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_the_source_is_refused(pairs, tmp_path):
    model = load_model(pairs / "31b/base", torch.float32)
    with pytest.raises(WeightsError, match="don't fit"):
        export_model(model, pairs / "e2b/base", tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_verify_tells_what_differs(e2b, tmp_path):
    out = shutil.copytree(e2b[0], tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    norm = "model.language_model.norm.weight"
    layer = "model.language_model.layers.0.mlp.up_proj.weight"
    weights["extra"] = torch.zeros(1)
    weights[norm] = weights[norm].float()
    weights[layer] = weights[layer].t().contiguous()
    del weights["model.language_model.layers.1.layer_scalar"]
    save_file(weights, out / "model.safetensors")
    (out / "generation_config.json").unlink()
    assert verify(out, e2b[0]) == [
        "missing: model.language_model.layers.1.layer_scalar",
        "not in the source: extra",
        f"shape of {layer}: (64, 96), should be (96, 64)",
        f"dtype of {norm}: F32, should be BF16",
        "file missing: generation_config.json",
    ]


def test_command_line_errors(tmp_path, capsys):
    step = tmp_path / "run/checkpoints/step_00000001"
    step.mkdir(parents=True)
    for message in ("no COMPLETE in it", "no configuration of the run at"):
        assert main([str(step), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("joint_train.export: ") and message in error
        complete(step)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_that_lacks_a_tensor_is_refused(e2b, tmp_path):
    model = load_model(e2b[0], torch.float32)
    state = model.state_dict()
    del state["model.language_model.norm.weight"]
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    meta = build_meta(read_config(e2b[0]), torch.bfloat16)
    with pytest.raises(WeightsError, match="lacks 1 tensors: model.language_model.norm.weight"):
        export_checkpoint(tmp_path / "checkpoint", meta, e2b[0], tmp_path / "out")
    assert not dist.is_initialized()
