"""Activations that are rounded as a quantised folder's engines round them: against transformers and plain loops."""

import json
import shutil

import pytest
import torch
from configs import compose
from pairs import make_pair
from quantised_folders import CONFIGS, FP8_FP8, exponents, quantise, with_activations
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from joint_train.errors import ConfigError
from joint_train.weights import composite
from joint_train.weights.activations import OfLayer, Rounding
from joint_train.weights.unpack import E2M1


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), "e2b")


def loaded(base, drafter, **more):
    settings = {"model.base": str(base), "model.drafter": str(drafter), "model.quantization": "as_saved"}
    settings |= {"model.quantization_activations": "as_saved", "freeze.base": True}
    return composite.load_pair(compose(settings | more), None, "cpu")


def changed(folder, out, how, config=None, scales=()):
    """A quantised copy of a base, with another configuration and scales of activations."""
    shutil.copytree(folder, out)
    quantise(out, how)
    if config is not None:
        read = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(read | {"quantization_config": config}))
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        for ending, value in scales:
            if name.endswith(ending):
                tensors[name] = torch.tensor(value)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


IDS = torch.randint(3, 240, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("how", "config", "scales"),
    [
        ("fp8", FP8_FP8, ()),
        ("gemma", None, ((".input_activation_scale", 0.03), ("v_proj.output_activation_scale", 0.02))),
    ],
)
@torch.no_grad()
def test_the_base_is_that_of_transformers(pair, tmp_path, how, config, scales):
    base = changed(pair[0], tmp_path / "base", how, config, scales)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs(IDS)  # compressed-tensors unpacks in the first forward
    expected = theirs(IDS).logits
    without = loaded(base, pair[1], **{"model.quantization_activations": "none"}).base(IDS).logits
    found = loaded(base, pair[1]).base(IDS).logits
    far = (without - expected).norm() / expected.norm()
    near = (found - expected).norm() / expected.norm()
    print(how, float(far), float(near))
    assert near < 0.02 * far and far > 0.002, (near, far)


def test_integers_and_fp4_are_rounded_to_the_nearest():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for row, found in zip(x.tolist(), Rounding("int")(x).tolist(), strict=True):
        scale = max(map(abs, row)) / 127
        for number, rounded in zip(row, found, strict=True):
            assert rounded == pytest.approx(round(number / scale) * scale, abs=1e-6)
    whole = 0.002
    found = Rounding("fp4", 4, 16, whole)(x)
    for row, rounded in zip(
        x.unflatten(1, (-1, 16)).flatten(0, 1), found.unflatten(1, (-1, 16)).flatten(0, 1), strict=True
    ):
        scale = float((row.abs().max() / 6 / whole).to(torch.float8_e4m3fn)) * whole
        nearest = [min(E2M1, key=lambda level, n=n: abs(level * scale - n)) * scale for n in row.tolist()]
        torch.testing.assert_close(rounded, torch.tensor(nearest))


def test_the_gradient_is_straight_through_and_adapters_see_what_is_not_rounded(pair, tmp_path):
    layer = torch.nn.Linear(8, 4, bias=False)
    of_layer = OfLayer(Rounding("int", 4))
    layer.register_forward_pre_hook(of_layer.before)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 8))
    base = changed(pair[0], tmp_path / "base", "fp8", FP8_FP8)
    model = loaded(base, pair[1], **{"freeze.base": False, "lora.r": 2})
    hooked = {name for name, module in model.base.named_modules() if module._forward_pre_hooks}
    assert len(hooked) >= 20 and all(name.endswith("_proj.base_layer") for name in hooked)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_folders_that_say_nothing_are_refused(pair, tmp_path):
    base = changed(pair[0], tmp_path / "base", "int4")
    with pytest.raises(ConfigError, match="round no activations of any linear layer"):
        loaded(base, pair[1])
    for how in ("mxfp4", "mxfp8"):
        config = with_activations(CONFIGS[how], dynamic=True, **exponents(8))
        base = changed(pair[0], tmp_path / how, how, config)
        with pytest.raises(ConfigError, match=r"_proj rounds .*unsupported way .MXFP8.*Set .*_activations=none"):
            loaded(base, pair[1])
    with pytest.raises(ConfigError, match="model.quantization=as_saved and give such a folder"):
        loaded(base, pair[1], **{"model.quantization": "none"})
