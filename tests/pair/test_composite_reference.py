"""The documented composite model, promise by promise.

``PROMISES`` has every class, argument and behaviour of the reference documentation of the composite (NeMo AutoModel's
``gemma4_drafter.composite``) that this project implements, in its order, and the test that shows it.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from configs import compose
from pairs import build_pair, make_pair
from ranks import run_ranks
from transformers import AutoModelForCausalLM, Gemma4AssistantForCausalLM, Gemma4ForConditionalGeneration

from joint_train import Gemma4JointOutput, Gemma4WithDrafter

HERE = "pair/test_composite_reference.py"
MODEL = "pair/test_model.py"
PROMISES = {
    # module
    "the base runs with its shared KV states and its hidden states": f"{MODEL}::test_same_token_logits_equal_the_published_formula",
    "the drafter's input is the scaled embedding beside the final hidden state": f"{MODEL}::test_same_token_logits_equal_the_published_formula",
    "the drafter runs on the captured KV states": f"{MODEL}::test_training_equals_serving",
    "L = L_base + drafter_loss_weight * sum_k L_drafter_k": f"{MODEL}::test_loss_is_the_weighted_sum_of_means_over_targets",
    "both models are trainable": f"{MODEL}::test_every_trained_parameter_gets_a_gradient",
    "gradients reach the store layers, the embedding and the final hidden state": f"{MODEL}::test_the_drafters_loss_reaches_the_base_by_three_ways",
    # Gemma4JointOutput
    "the output has base logits and a list of K drafter logits": f"{HERE}::test_output_fields",
    "the output has drafter_loss_weight, hidden_states and loss": f"{HERE}::test_output_fields",
    # Gemma4WithDrafter
    "base and drafter are loaded independently": f"{HERE}::test_from_pretrained_equals_transformers",
    "drafter_loss_weight multiplies the drafter's loss": f"{MODEL}::test_loss_is_the_weighted_sum_of_means_over_targets",
    "drafter_num_steps: K rounds; each reads the last one's post-projected state and a shifted token": f"{MODEL}::test_same_token_logits_equal_the_published_formula",
    "KV states are captured once and reused in every round": f"{HERE}::test_the_base_runs_once",
    "further inputs go to the base and never to the drafter": f"{HERE}::test_multimodal_inputs_go_to_the_base_alone",
    # from_pretrained
    "base_path, drafter_path": f"{HERE}::test_from_pretrained_equals_transformers",
    "pretrained_model_name_or_path is another name of base_path": f"{HERE}::test_from_pretrained_takes_the_other_name_of_the_base",
    "freeze_base_for_drafter": f"{HERE}::test_freeze_base_for_drafter",
    "share_embedding_with_base: copied once, then independent; the head follows": f"{HERE}::test_share_embedding_with_base",
    "base_activation_checkpointing": f"{HERE}::test_base_activation_checkpointing_recomputes_the_base",
    "torch_dtype must be bfloat16": f"{HERE}::test_torch_dtype",
    "attn_implementation, text_config: forwarded": f"{HERE}::test_loading_options_reach_the_models",
    "use_liger_kernel: forwarded, or the package is missing": f"{HERE}::test_liger_without_its_package_is_an_error",
    "pipeline_config, moe_mesh: refused with the reason": f"{HERE}::test_refused_arguments",
    "peft_config: adapters on the base": "distributed/test_lora.py::test_the_api_takes_pefts_own_configuration",
    "use_sdpa_patching: False as NeMo's recipes set it": f"{HERE}::test_nothing_is_patched",
    "device_mesh: pp, cp and tp of size 1": f"{HERE}::test_a_mesh_that_splits_the_pair_is_refused",
    "device_mesh, distributed_config: both models sharded on one mesh": f"{HERE}::test_from_pretrained_on_a_mesh",
    "distributed_setup: pp_size and cp_size must be 1": f"{HERE}::test_distributed_setup",
    "freeze_config: for the base only": f"{HERE}::test_freeze_config_is_the_bases",
    "cache_dir: the hub cache": "weights/test_loading.py",
    "kwargs: forwarded to both loads": f"{HERE}::test_kwargs_go_to_both_loads",
    # saving
    "save_pretrained: base/ and drafter/, each for from_pretrained alone": f"{HERE}::test_save_and_load",
    "load_pretrained: what save_pretrained wrote": f"{HERE}::test_save_and_load",
    "load_pretrained: base/model and drafter/model of a checkpoint": f"{HERE}::test_load_pretrained_reads_a_checkpoint",
    "load_pretrained: anything else is an error": f"{HERE}::test_load_pretrained_of_another_folder_is_an_error",
}  # fmt: skip


def test_every_promise_names_a_test_that_exists():
    for promise, place in PROMISES.items():
        file, _, name = place.partition("::")
        text = (Path(__file__).parents[1] / file).read_text()
        assert f"def {name}(" in text or not name, f"{promise}: no {place}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), "e2b")


def ids() -> torch.Tensor:
    return torch.randint(3, 240, (2, 16), generator=torch.Generator().manual_seed(0))


def test_output_fields():
    base, drafter = build_pair("e2b")
    out = Gemma4WithDrafter(base, drafter, drafter_num_steps=3, drafter_loss_weight=0.3)(input_ids=ids())
    assert isinstance(out, Gemma4JointOutput)
    assert out.logits.shape == (2, 16, 256)
    assert [x.shape for x in out.drafter_logits] == [(2, 16, 256)] * 3
    assert out.drafter_loss_weight == 0.3 and out.loss is None
    assert out.hidden_states[-1].shape == (2, 16, 64)


def test_the_base_runs_once():
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=3)
    calls = []
    base.model.register_forward_hook(lambda *args: calls.append("base"))
    drafter.model.layers[0].register_forward_hook(lambda *args: calls.append("drafter"))
    model(input_ids=ids())
    assert calls == ["base"] + ["drafter"] * 3


def test_multimodal_inputs_go_to_the_base_alone():
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter)
    seen = {}
    base.model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    drafter.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update({f"drafter {name}": x for name, x in kwargs.items()}), with_kwargs=True
    )
    types = torch.zeros(2, 16, dtype=torch.long)
    model(input_ids=ids(), mm_token_type_ids=types)
    assert seen["mm_token_type_ids"] is types
    assert not any("mm_token" in name for name in seen if name.startswith("drafter"))


def test_from_pretrained_equals_transformers(folders):
    model = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=2)
    theirs = (
        Gemma4ForConditionalGeneration.from_pretrained(folders[0]),
        Gemma4AssistantForCausalLM.from_pretrained(folders[1]),
    )
    for ours, other in zip((model.base, model.drafter), theirs, strict=True):
        assert type(ours) is type(other)
        expected = other.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_from_pretrained_takes_the_other_name_of_the_base(folders):
    model = Gemma4WithDrafter.from_pretrained(
        pretrained_model_name_or_path=folders[0], drafter_path=folders[1], drafter_loss_weight=0.5, drafter_num_steps=3
    )
    assert (model.drafter_loss_weight, model.drafter_num_steps) == (0.5, 3)
    with pytest.raises(ValueError, match="base_path"):
        Gemma4WithDrafter.from_pretrained(drafter_path=folders[1])
    with pytest.raises(ValueError, match="drafter_path"):
        Gemma4WithDrafter.from_pretrained(folders[0])


def test_freeze_base_for_drafter(folders):
    model = Gemma4WithDrafter.from_pretrained(*folders, freeze_base_for_drafter=True, drafter_num_steps=2)
    assert not any(p.requires_grad for p in model.base.parameters())
    assert any(p.requires_grad for p in model.drafter.parameters())


def test_share_embedding_with_base(tmp_path):
    pair = make_pair(tmp_path, "e2b", hidden_size=32)
    model = Gemma4WithDrafter.from_pretrained(*pair, share_embedding_with_base=True)
    table, copy = model.base.get_input_embeddings().weight, model.drafter.get_input_embeddings().weight
    assert torch.equal(table, copy) and table is not copy
    assert model.drafter.lm_head.weight is copy
    with torch.no_grad():
        table.zero_()
    assert copy.abs().sum() > 0
    # In memory as well.
    base, drafter = build_pair("e2b", hidden_size=32)
    Gemma4WithDrafter(base, drafter, share_embedding_with_base=True)
    assert torch.equal(drafter.lm_head.weight, base.lm_head.weight)


def test_base_activation_checkpointing_recomputes_the_base(folders):
    calls = []
    for checkpointing, expected in ((False, 1), (True, 2)):
        model = Gemma4WithDrafter.from_pretrained(*folders, base_activation_checkpointing=checkpointing).train()
        calls.clear()
        model.base.model.language_model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(1))
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert len(calls) == expected


def test_drafter_activation_checkpointing_recomputes_the_rounds(folders):
    calls = []
    for checkpointing, expected in ((False, 3), (True, 6)):
        model = Gemma4WithDrafter.from_pretrained(
            *folders, drafter_num_steps=3, drafter_activation_checkpointing=checkpointing
        ).train()
        calls.clear()
        model.drafter.model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(1))
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert len(calls) == expected


def test_torch_dtype(folders):
    assert Gemma4WithDrafter.from_pretrained(*folders).base.dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        model = Gemma4WithDrafter.from_pretrained(*folders, torch_dtype=dtype)
        assert model.base.dtype == model.drafter.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="bfloat16-only"):
        Gemma4WithDrafter.from_pretrained(*folders, torch_dtype=torch.float16)


def test_loading_options_reach_the_models(folders):
    model = Gemma4WithDrafter.from_pretrained(
        *folders, attn_implementation="eager", text_config={"final_logit_softcapping": 7.0}
    )
    for config in (model.base.config, model.drafter.config):
        assert config.get_text_config()._attn_implementation == "eager"
    assert model.base.config.get_text_config().final_logit_softcapping == 7.0


def test_liger_without_its_package_is_an_error(folders):
    with pytest.raises(ValueError, match="model.use_liger_kernel"):
        Gemma4WithDrafter.from_pretrained(*folders, use_liger_kernel=True)


@pytest.mark.parametrize("name", ["pipeline_config", "moe_mesh"])
def test_refused_arguments(folders, name):
    with pytest.raises(ValueError, match=f"{name} must be None: ."):
        Gemma4WithDrafter.from_pretrained(*folders, **{name: object()})


def test_nothing_is_patched(folders):
    Gemma4WithDrafter.from_pretrained(*folders, use_sdpa_patching=False)
    with pytest.raises(ValueError, match="attn_implementation"):
        Gemma4WithDrafter.from_pretrained(*folders, use_sdpa_patching=True)


def meshes(rank: int, folders) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    said = []
    both = ("dp_replicate", "dp_shard")
    for names in ((*both, "cp"), (*both, "tp"), ("dp",), ("dp_shard", "pp"), (*both, "ep"), None):
        shape = (1,) * (len(names or "x") - 1) + (2,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        try:
            Gemma4WithDrafter.from_pretrained(*folders, device_mesh=mesh)
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_mesh_that_splits_the_pair_is_refused(folders):
    for cp, tp, other, pp, ep, unnamed in run_ranks(meshes, 2, folders):
        assert "cp of size 2" in cp and "tp of size 2" in tp and "pp of size 2" in pp and "dimensions dp;" in other
        assert "unknown dimension ep" in ep and "(without names)" in unnamed


def test_kwargs_go_to_both_loads(folders, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options.get("token"), options.get("local_files_only")))
        return folders[name == "some/drafter"]

    monkeypatch.setattr("joint_train.weights.folders.snapshot_download", snapshot_download)
    Gemma4WithDrafter.from_pretrained("some/base", "some/drafter", token="secret", local_files_only=True)
    assert [x for x in asked if x[1]] == [("some/base", "secret", True), ("some/drafter", "secret", True)]
    with pytest.raises(TypeError, match="doesn't know drafter_steps: .* force_download, local_files_only, token"):
        Gemma4WithDrafter.from_pretrained(*folders, drafter_steps=2)


def test_distributed_setup(folders):
    one = SimpleNamespace(mesh_context=SimpleNamespace(pp_size=1, cp_size=1, device_mesh=None))
    Gemma4WithDrafter.from_pretrained(*folders, distributed_setup=one)
    for name in ("pp_size", "cp_size"):
        sizes = {"pp_size": 1, "cp_size": 1} | {name: 2}
        for setup in (SimpleNamespace(**sizes), SimpleNamespace(mesh_context=SimpleNamespace(**sizes))):
            with pytest.raises(ValueError, match=f"distributed_setup.{name}=2 must be 1"):
                Gemma4WithDrafter.from_pretrained(*folders, distributed_setup=setup)


def test_freeze_config_is_the_bases(folders):
    model = Gemma4WithDrafter.from_pretrained(*folders, freeze_config={"embeddings": True})
    assert not model.base.get_input_embeddings().weight.requires_grad
    assert model.drafter.get_input_embeddings().weight.requires_grad


def sharded_pair(rank: int, folders, save_to=None):
    from torch.distributed.tensor import DTensor

    from joint_train.config.schema import ParallelConfig
    from joint_train.distributed.mesh import init_mesh

    mesh = init_mesh(ParallelConfig())
    model = Gemma4WithDrafter.from_pretrained(
        *folders, drafter_num_steps=2, device_mesh=mesh, distributed_config={"reshard_after_forward": False}
    )
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert len({p.device_mesh for p in model.parameters()}) == 1
    with torch.no_grad():
        logits = [x for out in [model(input_ids=ids())] for x in (out.logits, *out.drafter_logits)]
    if save_to is not None:
        model.save_pretrained(save_to)
    return logits


def test_from_pretrained_on_a_mesh(folders, tmp_path):
    """Sharded on two ranks: the logits of the whole pair, and an export that loads as the original does."""
    with torch.no_grad():
        out = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=2)(input_ids=ids())
    for logits in run_ranks(sharded_pair, 2, folders, tmp_path):
        for a, b in zip(logits, (out.logits, *out.drafter_logits), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for part, folder in zip(("base", "drafter"), folders, strict=True):
        ours, theirs = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (tmp_path / part, folder))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_save_and_load(folders, tmp_path):
    model = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").dtype == torch.bfloat16
    base = Gemma4ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    drafter = Gemma4AssistantForCausalLM.from_pretrained(tmp_path / "drafter", dtype=torch.float32)
    assert drafter.generation_config.num_assistant_tokens == 2

    again = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=2)
    again.load_pretrained(tmp_path)
    with torch.no_grad():
        out = again(input_ids=ids())
        alone = Gemma4WithDrafter(base, drafter, drafter_num_steps=2)(input_ids=ids())
    assert torch.equal(out.logits, alone.logits)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float()), name

    Gemma4WithDrafter(base, drafter, drafter_num_steps=2).save_pretrained(tmp_path / "constructed")
    for part in ("base", "drafter"):
        constructed, exported = (
            AutoModelForCausalLM.from_pretrained(folder / part).state_dict()
            for folder in (tmp_path / "constructed", tmp_path)
        )
        assert all(torch.equal(constructed[name], exported[name]) for name in exported)
    with pytest.raises(ValueError, match="from_pretrained"):
        Gemma4WithDrafter(*build_pair("e2b")).save_pretrained(tmp_path / "other")


def test_load_pretrained_reads_a_checkpoint(folders, tmp_path):
    from joint_train.checkpoint import Checkpointer
    from joint_train.train.optim import build_optimizer

    cfg = compose()
    model = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    checkpointer = Checkpointer(tmp_path, cfg.checkpoint)
    checkpointer.save(1, model, build_optimizer(model, cfg.optim), {"step": 1}, config={})
    checkpointer.close()

    again = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=2)
    again.load_pretrained(tmp_path / "checkpoints" / "step_00000001")
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_load_pretrained_of_another_folder_is_an_error(folders, tmp_path):
    model = Gemma4WithDrafter.from_pretrained(*folders)
    with pytest.raises(FileNotFoundError, match="neither base/model and drafter/model"):
        model.load_pretrained(tmp_path)
