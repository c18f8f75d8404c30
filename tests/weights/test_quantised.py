"""Quantised folders: each format is read as its own package or transformers dequantises it, whole and in any slice."""

import itertools
import json
import shutil

import pytest
import torch
from configs import compose
from pairs import make_pair
from quantised_folders import CONFIGS, quantise, quantise_weight
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from joint_train.errors import ConfigError, WeightsError
from joint_train.weights import composite, unpack
from joint_train.weights.activations import round_activations
from joint_train.weights.folders import read_config, read_configs
from joint_train.weights.identity import frozen_base
from joint_train.weights.loading import load_model, stored_tensors
from joint_train.weights.to_generate import load_to_generate


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folders of two shapes in bfloat16: ``pairs / shape / "base"``."""
    root = tmp_path_factory.mktemp("pairs")
    for shape in ("e2b", "26b_a4b"):
        make_pair(root / shape, shape)
    return root


@pytest.fixture(scope="module")
def folders(pairs, tmp_path_factory):
    """``folders(how)``: (a folder that is quantised so, what its weights are), made once."""
    made, root = {}, tmp_path_factory.mktemp("quantised")

    def make(how, shape="e2b", experts="each"):
        if (how, shape, experts) not in made:
            folder = root / f"{how}-{shape}-{experts}"
            shutil.copytree(pairs / shape / "base", folder)
            made[how, shape, experts] = folder, quantise(folder, how, experts)
        return made[how, shape, experts]

    return make


Q_PROJ = "model.language_model.layers.1.self_attn.q_proj.weight"


def values(folder):
    return {name: entry.slices()[...] for name, entry in stored_tensors(folder).items() if entry.shape}


@pytest.mark.parametrize("how", CONFIGS)
def test_each_format_is_what_it_says(folders, how):
    folder, reference = folders(how)
    found = values(folder)
    assert found.keys() == {name for name, tensor in reference.items() if tensor.ndim}
    changed = 0
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), reference[name]), name
        changed += stored_tensors(folder)[name].weight is not None
    assert changed >= 20


@pytest.mark.parametrize("how", ["int4", "nvfp4", "modelopt", "modelopt_fp8", "gptq_order", "awq"])
def test_experts_that_have_a_layer_each_become_one_tensor(folders, how):
    folder, reference = folders(how, "26b_a4b")
    found = values(folder)
    assert found.keys() == {name for name, tensor in reference.items() if tensor.ndim}
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), reference[name]), name
    name = next(name for name in found if name.endswith("experts.gate_up_proj"))
    part = (slice(1, 3), slice(20, 50), slice(3, 40))  # of the second half of one matrix and the first of the next
    assert torch.equal(stored_tensors(folder)[name].slices()[part], reference[name][part])


@pytest.mark.parametrize(("how", "experts"), [("int4", "none"), ("fp8_block", "none"), ("fp8_block", "one")])
def test_experts_that_are_one_tensor_stay_one(folders, how, experts):
    """Not quantised, as tools leave what isn't a linear layer; or with names as transformers' FP8 experts have them."""
    folder, reference = folders(how, "26b_a4b", experts)
    found = values(folder)
    assert found.keys() == {name for name, tensor in reference.items() if tensor.ndim}
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), reference[name]), name


@pytest.mark.parametrize("how", ["int8", "fp8_block"])
def test_no_expert_generates_at_random(folders, how, caplog):
    """transformers doesn't find experts that have a layer each, and goes on."""
    folder, ids = folders(how, "26b_a4b")[0], torch.arange(10, 30)[None]
    for dtype in (torch.bfloat16, torch.float32):
        model, expected = load_to_generate(folder, dtype, "cpu"), load_model(folder, dtype)
        assert round_activations(expected, folder) == sum(bool(m._forward_pre_hooks) for m in model.modules())
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert "transformers doesn't find" in caplog.text and "the base is dequantised here instead" in caplog.text


@pytest.mark.parametrize(("how", "rounded"), [("fp8_block", 20), ("mxfp4", 0), ("mxfp8", 0), ("modelopt_fp8", 20)])
def test_bases_that_transformers_cannot_compute_with_generate_as_they_are_served(folders, how, rounded):
    """In float32: transformers' products of these are in bfloat16, or it doesn't read them. Activations are rounded."""
    folder, ids = folders(how)[0], torch.arange(10, 30)[None]
    model, without = load_to_generate(folder, torch.float32, "cpu"), load_model(folder, torch.float32)
    assert sum(bool(module._forward_pre_hooks) for module in model.modules()) >= rounded
    assert torch.equal(model(input_ids=ids).logits, without(input_ids=ids).logits) == (not rounded)


@pytest.mark.parametrize("how", CONFIGS)
def test_any_slice_equals_that_of_the_whole(folders, how):
    """Of 1, 2 and 3 shards of rows and of columns, none of them at the borders of words or groups."""
    folder, reference = folders(how)
    stored = stored_tensors(folder)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.language_model.layers.1.{name}.weight"
        view, whole = stored[name].slices(), reference[name]
        for shards, dim in itertools.product((1, 2, 3), (0, 1)):
            size = -(-whole.shape[dim] // shards)
            parts = []
            for start in range(0, whole.shape[dim], size):
                part = [slice(0, n) for n in whole.shape]
                part[dim] = slice(start, min(start + size, whole.shape[dim]))
                parts.append(view[tuple(part)])
            assert torch.equal(torch.cat(parts, dim), whole), (name, shards, dim)
        assert torch.equal(view[slice(5, 18), slice(3, 21)], whole[5:18, 3:21])


@pytest.mark.parametrize("how", ["int4", "int8", "fp8", "fp8_blocks", "mxfp4", "mxfp8", "fp8_block", "gemma"])
def test_transformers_has_the_same_weights(folders, how):
    folder, _ = folders(how)
    dtype = torch.bfloat16 if "mxfp" in how else torch.float32  # the package has MX formats in bfloat16, exactly
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        ours = load_model(folder, dtype)
        tokens = torch.arange(12)[None]
        if CONFIGS[how]["quant_method"] == "compressed-tensors":
            theirs(tokens)  # the package unpacks in the first forward
        layers = dict(theirs.named_modules())
        for name, weight in ours.named_parameters():
            layer = layers[name.rpartition(".")[0]]
            if how == "gemma" and hasattr(layer, "num_bits"):
                table = hasattr(layer, "embedding_quantized")
                args = (layer.embedding_quantized, layer.embedding_scale) if table else (torch.float32,)
                assert torch.equal(layer._dequantize_weights(*args), weight), name
                continue
            other = getattr(layer, name.rpartition(".")[2])
            if other.dtype == torch.bfloat16:  # the package's products, in the dtype of the scales; ours are exact
                weight = weight.bfloat16()
            assert torch.equal(other, weight), name


def settings(folder, drafter, **more):
    return compose(
        {
            "model.base": str(folder),
            "model.drafter": str(drafter),
            "model.quantization": "as_saved",
            "freeze.base": True,
        }
        | more
    )


def load_on_ranks(rank, cases):
    """On each rank: that its shards are the parts of the references."""
    from joint_train.distributed.mesh import init_mesh

    for folder, drafter in cases:
        reference = load_file(folder / "reference.tensors")
        cfg = settings(folder, drafter)
        pair = composite.load_pair(cfg, init_mesh(cfg.parallel), "cpu")
        sharded = 0
        for name, parameter in pair.base.named_parameters():
            sharded += isinstance(parameter, DTensor)
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            assert torch.equal(whole, reference[name]), name
        assert sharded >= 20


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_reads_its_share(pairs, folders, world):
    cases = []
    for how, shape in (("int4_asymmetric", "e2b"), ("gptq_order", "26b_a4b"), ("fp8_block", "e2b")):
        folder, reference = folders(how, shape)
        save_file(reference, folder / "reference.tensors")
        cases.append((folder, pairs / shape / "drafter"))
    run_ranks(load_on_ranks, world, cases)


def swap_nibbles(monkeypatch):
    read = unpack.Bits.__getitem__
    monkeypatch.setattr(
        unpack.Bits, "__getitem__", lambda self, part: read(self, part).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    )


def round_scales(monkeypatch):
    read = unpack.Grid.__getitem__
    monkeypatch.setattr(unpack.Grid, "__getitem__", lambda self, part: read(self, part).bfloat16().float())


def take_own_groups(monkeypatch):
    """A shard whose groups begin where it begins."""
    read = unpack.Grid.__getitem__

    def wrong(self, part):
        *lead, columns = part
        return read(self, (*lead, slice(0, columns.stop - columns.start)))

    monkeypatch.setattr(unpack.Grid, "__getitem__", wrong)


@pytest.mark.parametrize(
    ("fault", "how", "part"),
    [
        (swap_nibbles, "int4", (slice(0, 64), slice(0, 64))),
        (round_scales, "gptq", (slice(0, 64), slice(0, 64))),
        (take_own_groups, "int4", (slice(0, 64), slice(32, 64))),
    ],
)
def test_the_comparisons_see_a_planted_fault(folders, monkeypatch, fault, how, part):
    folder, reference = folders(how)
    assert torch.equal(stored_tensors(folder)[Q_PROJ].slices()[part], reference[Q_PROJ][part])
    fault(monkeypatch)
    assert not torch.equal(stored_tensors(folder)[Q_PROJ].slices()[part], reference[Q_PROJ][part])


def test_gguf(tmp_path):
    """Against the gguf package's own arrays: all types that it writes, and blocks of the others."""
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize, quantize

    for shape in ("e2b", "26b_a4b"):
        base, _ = make_pair(tmp_path / shape, shape)
        tensors = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        layers = json.loads((base / "config.json").read_text())["text_config"]["num_hidden_layers"]
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)
        writer, reference = gguf.GGUFWriter(base / "model.gguf", "gemma4"), {}
        kinds = [gguf.GGMLQuantizationType[kind] for kind in ("Q8_0", "Q4_0", "BF16", "F16")]
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            if not name.startswith("model.language_model."):
                continue  # the towers
            name = name.replace("model.language_model.", "model.")
            special = {
                "router.scale": ("router.proj", ".scale"),
                "router.per_expert_scale": ("experts.down_proj", ".scale"),
            }
            there, ending = name, ".weight"
            for last, (other, suffix) in special.items():
                if name.endswith(last):
                    there, ending = name.replace(last, other), suffix
            data = tensor.float().numpy()
            fits = tensor.ndim > 1 and tensor.shape[-1] % 32 == 0
            kind = kinds[number % 4] if fits else gguf.GGMLQuantizationType.F32
            blocks = quantize(data, kind) if fits else data
            there = names.get_name(there.removesuffix(".weight"))
            writer.add_tensor(there + ending, blocks, raw_dtype=kind)
            reference[name] = torch.from_numpy(dequantize(blocks, kind).copy()).reshape(tensor.shape)
        writer.add_tensor("rope_freqs.weight", tensors["model.language_model.norm.weight"].float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model = load_model(base, torch.float32)
        assert type(model).__name__ == "Gemma4ForCausalLM"
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, reference[name]), name
        for name, entry in stored_tensors(base).items():
            if len(entry.shape) > 1:
                part = (slice(0, 2),) * (len(entry.shape) - 1) + (slice(3, 7),)
                assert torch.equal(entry.slices()[part], reference[name][part]), name
        assert frozen_base(base)["hash"] == frozen_base(base)["hash"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_K", "Q3_K", "MXFP4", "IQ4_XS"])
def test_blocks_of_gguf(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    from joint_train.weights.gguf_file import stored_in_gguf

    kind = gguf.GGMLQuantizationType[kind]
    size, octets = GGML_QUANT_SIZES[kind]
    blocks = torch.randint(
        0, 60, (5, 3 * octets), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).numpy()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma4")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = stored_in_gguf([tmp_path / "model.gguf"])["model.embed_tokens.weight"]
    whole = torch.from_numpy(dequantize(blocks, kind).copy())
    assert entry.shape == (5, 3 * size) and torch.equal(entry.slices()[...], whole)
    for columns in (slice(0, size), slice(size - 3, size + 5), slice(2 * size + 1, 3 * size)):
        assert torch.equal(entry.slices()[slice(1, 4), columns], whole[1:4, columns])


def test_gguf_in_several_files(tmp_path):
    """As gguf-split makes them: only the first part says of which model it is."""
    gguf = pytest.importorskip("gguf")
    from joint_train.weights.gguf_file import stored_in_gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma4", split_max_tensors=2)
    tensors = {f"blk.{layer}.attn_q.weight": torch.randn(4, 32).numpy() for layer in range(5)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    found = stored_in_gguf(files)
    assert len(found) == 5
    for name, tensor in tensors.items():
        read = found[name.replace("blk", "model.layers").replace("attn_q", "self_attn.q_proj")].slices()[...]
        assert torch.equal(read, torch.from_numpy(tensor))
    shutil.copy(files[0], other := tmp_path / "other.gguf")
    for those in (files[:1], files[1:], files[:2], [*files, other], [other, other]):
        with pytest.raises(WeightsError, match="one model in GGUF, and all of its parts; it has"):
            stored_in_gguf(those)


def with_config(folder, out, **changes):
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("how", "changes", "said"),
    [
        ("int4", {"quant_method": "bitsandbytes"}, "quant_method=bitsandbytes, which isn't read"),
        ("int4", {"quant_method": "mxfp4"}, "quant_method=mxfp4, which isn't read"),
        ("int4", {"format": "marlin-24", "config_groups": {}}, "its format marlin-24"),
        ("int4", {"format": "mxfp6-pack-quantized", "config_groups": {}}, "its format mxfp6-pack-quantized"),
        ("int4", {"transform_config": {"config_groups": {"u": {}}}}, "rotations"),
        ("int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        ("awq", {"version": "gemv"}, "version gemv"),
        ("modelopt", {"quant_algo": "W4A8_AWQ"}, "quant_algo W4A8_AWQ"),
        ("modelopt", {"quant_algo": "MXFP8"}, "quant_algo MXFP8"),
    ],
)  # fmt: skip
def test_formats_that_are_not_known_are_refused_by_name(folders, tmp_path, how, changes, said):
    folder = with_config(folders(how)[0], tmp_path / "base", **changes)
    with pytest.raises(ConfigError, match=said):
        read_config(folder, quantized=True)


def test_layers_that_are_not_what_the_format_says_are_refused_by_name(folders, tmp_path):
    folder = shutil.copytree(folders("int4")[0], tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    layer = "model.language_model.layers.0.self_attn.q_proj"
    for change, said in (
        (lambda t: t.pop(f"{layer}.weight_scale"), f"{layer}: it has no weight_scale"),
        (lambda t: t.pop(f"{layer}.weight_packed"), f"{layer} has weight_scale, weight_shape and no codes"),
        (lambda t: t.update({f"{layer}.pre_quant_scale": torch.ones(2)}), f"{layer} has pre_quant_scale"),
        (lambda t: t.update({f"{layer}.weight_scale": torch.ones(64, 3)}), f"{layer}: its .64, 3. scales don't cover"),
        (lambda t: t.update({f"{layer}.weight_shape": torch.tensor([64, 96])}), f"{layer}: its weight_packed"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsError, match=said):
            stored_tensors(folder)


def test_a_head_that_is_quantised_apart_from_its_table_is_no_tied_one(folders, tmp_path):
    folder, reference = shutil.copytree(folders("int4")[0], tmp_path / "a"), folders("int4")[1]
    table, generator = reference["model.language_model.embed_tokens.weight"], torch.Generator()
    head, expected = quantise_weight("lm_head", table, "int4", generator)
    tensors = load_file(folder / "model.safetensors") | {f"lm_head.{leaf}": tensor for leaf, tensor in head.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lm_head.weight and .*embed_tokens.weight.* are one tensor of Gemma4"):
        load_model(folder, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, torch.float32)
    assert torch.equal(model.get_input_embeddings().weight, table) and not torch.equal(expected, table)
    assert torch.equal(model.get_output_embeddings().weight, expected)


def test_what_the_configuration_has_to_say(pairs, folders):
    folder, drafter = folders("int4")[0], pairs / "e2b/drafter"
    with pytest.raises(ConfigError, match="compressed-tensors .pack-quantized.*set model.quantization=as_saved"):
        read_configs(folder, drafter)
    with pytest.raises(ConfigError, match="holds no quantised weights"):
        read_configs(pairs / "e2b/base", drafter, quantized=True)
    for more, said in (
        ({"freeze.base": False}, "quantised weights can't be trained"),
        ({"freeze.towers": False}, "freeze.towers=true"),
        ({"model.adapter": "x"}, "isn't exported"),
        ({"model.resize_vocabulary": True}, "can't grow"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings(folder, drafter, **more)
    assert frozen_base(folder)["hash"] != frozen_base(folders("int8")[0])["hash"]


def test_sizes_of_groups_and_blocks_that_are_said_otherwise(folders, tmp_path):
    """A layer of GPTQ may have groups of its own; and compressed-tensors wrote blocks as a text."""
    other = with_config(folders("gptq")[0], tmp_path / "gptq", group_size=16)
    assert torch.equal(values(other)[Q_PROJ], values(folders("gptq")[0])[Q_PROJ])
    weights = CONFIGS["fp8_blocks"]["config_groups"]["group_0"]["weights"] | {"block_structure": "16x8"}
    group = CONFIGS["fp8_blocks"]["config_groups"]["group_0"] | {"weights": weights}
    other = with_config(folders("fp8_blocks")[0], tmp_path / "fp8", config_groups={"group_0": group})
    assert torch.equal(values(other)[Q_PROJ], folders("fp8_blocks")[1][Q_PROJ])


def test_the_same_codes_read_in_another_way_are_another_base(folders, tmp_path):
    folder = folders("gptq")[0]
    other = with_config(folder, tmp_path / "base", checkpoint_format="gptq_v2")  # zero points are as they are stored
    assert not torch.equal(values(folder)[Q_PROJ], values(other)[Q_PROJ])
    assert frozen_base(folder)["hash"] != frozen_base(other)["hash"]
