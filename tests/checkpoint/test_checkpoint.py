"""Saving and resuming: exact, on any number of ranks, refusing what doesn't fit."""

import json
import logging
import random
import threading

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_run import TIMEOUT, build, config, everything, seed_all, train, train_step
from pairs import SHAPES, base_config, build_pair, drafter_config
from ranks import run_ranks

from joint_train.checkpoint import Checkpointer, CheckpointError, compat, layout, load_model
from joint_train.checkpoint import checkpointer as module
from joint_train.checkpoint.reader import stored_tensors
from joint_train.checkpoint.state import new_optimizer_state, random_state, set_random_state
from joint_train.train.optim import build_optimizer


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    assert not different, different


def open_run(folder, **overrides):
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    cfg = config(overrides)
    return cfg, Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT, lock_wait_seconds=0)


def save_step(folder, step=1, train_steps=1, pair=None, **overrides):
    """A checkpoint from one process without ranks; returns (its path, everything in it)."""
    cfg, checkpointer = open_run(folder, **overrides)
    model, optimizer = build(cfg, **(pair or {}))
    for _ in range(train_steps):
        train_step(model, optimizer)
    checkpointer.save(step, model, optimizer, {"step": step}, config=cfg, metrics={"loss": 1.0 / step})
    checkpointer.close()
    return checkpointer.folder / layout.folder_name(step), everything(model, optimizer)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_ranks(train, 2, tmp_path_factory.mktemp("whole"), {}, 6)


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, uninterrupted, background):
    overrides = {"checkpoint.background": background}
    run_ranks(train, 2, tmp_path, overrides, 4)
    resumed = run_ranks(train, 2, tmp_path, overrides, 6)
    for (losses, end), (losses_resumed, end_resumed) in zip(uninterrupted, resumed, strict=True):
        assert losses_resumed == {step: losses[step] for step in (5, 6)}
        same(end, end_resumed)


def save_sharded(rank, folder, overrides, shape):
    """Two steps (every parameter has moments), one checkpoint."""
    cfg = config(overrides)
    seed_all(rank)
    model, optimizer = build(cfg, shape)
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT)
    train_step(model, optimizer)
    train_step(model, optimizer)
    checkpointer.save(2, model, optimizer, {"step": 2}, config=cfg)
    checkpointer.close()
    return everything(model, optimizer)


def load_sharded(rank, folder, overrides, path, shape):
    """Into a pair with other weights, under another sharding."""
    cfg = config(overrides)
    model, optimizer = build(cfg, shape, seed=7)
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT)
    state = checkpointer.load(checkpointer.find_resume(str(path)), model, optimizer, config=cfg)
    checkpointer.close()
    placements = {str(p.placements) for p in model.parameters() if hasattr(p, "placements")}
    return state, placements, everything(model, optimizer)


HSDP = {"parallel.dp_replicate": 2}


@pytest.mark.parametrize(
    ("saved_on", "saved_as", "loads", "shape"),
    [
        (2, {}, [(1, {}), (4, {}), (4, HSDP)], "e2b"),
        (4, HSDP, [(2, {})], "e2b"),
        (2, {}, [(1, {}), (4, {})], "26b_a4b"),  # three experts: cut along another dimension, or not at all
    ],
    ids=["2 FSDP", "4 HSDP", "experts"],
)
def test_resharding_is_exact(tmp_path, saved_on, saved_as, loads, shape):
    saved = run_ranks(save_sharded, saved_on, tmp_path / "saved", saved_as, shape)[0]
    assert sum(name.endswith("/exp_avg_sq") for name in saved) > 50
    path = tmp_path / "saved/checkpoints/step_00000002"
    for i, (ranks, sharding) in enumerate(loads):
        results = run_ranks(load_sharded, ranks, tmp_path / f"run{i}", sharding, path, shape)
        for state, placements, loaded in results:
            assert state == {"step": 2}
            assert any("Replicate" in p for p in placements) == bool(sharding)
            assert any("dim=1" in p for p in placements) == (shape == "26b_a4b" and ranks > 1), placements
            same(saved, loaded)


def test_tied_weights_are_stored_once_and_buffers_are_there(tmp_path):
    path, _ = save_step(tmp_path, pair={"shape": "text"})
    base, drafter = stored_tensors(path / "base/model"), stored_tensors(path / "drafter/model")
    assert "model.embed_tokens.weight" in base and "lm_head.weight" not in base
    assert any(name.endswith("layer_scalar") for name in base)
    assert "masked_embedding.token_ordering" in drafter
    assert not any("inv_freq" in name or "embed_scale" in name for name in (*base, *drafter))


def test_load_model_reads_one_half_alone(tmp_path):
    path, saved = save_step(tmp_path)
    base, _ = build_pair("e2b", seed=9)
    load_model(tmp_path, base, "base")
    for name, tensor in base.state_dict().items():
        if f"base/model:{name}" in saved:
            assert np.array_equal(tensor.numpy(), saved[f"base/model:{name}"])
    with pytest.raises(CheckpointError, match="doesn't fit"):
        load_model(path, build_pair("31b")[0], "base")


def test_names_are_those_of_the_model_without_its_wrappers(tmp_path):
    cfg, checkpointer = open_run(tmp_path)
    model, optimizer = build(cfg)
    plain = {name for part in module.state.pair_tensors(model).values() for name in part}
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.base.model.language_model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1] = torch.compile(layers[1])
    assert {name for part in module.state.pair_tensors(model).values() for name in part} == plain
    checkpointer.close()


def test_random_states_of_every_generator(tmp_path):
    seed_all(3)
    np.random.standard_normal()  # leaves half a pair behind, part of NumPy's state
    state = random_state()
    torch.save(state, tmp_path / "state")

    def draw():
        return random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    set_random_state(torch.load(tmp_path / "state"))
    assert draw() == first


def test_another_number_of_ranks_derives_random_states(tmp_path, caplog):
    run_ranks(save_sharded, 2, tmp_path, {}, "e2b")
    cfg, checkpointer = open_run(tmp_path)
    model, optimizer = build(cfg)
    draws = []
    for seed in (1, 2):
        seed_all(seed)
        checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    checkpointer.close()
    assert draws[0] == draws[1]
    assert "is of 2 ranks, now 1: new random states" in caplog.text


def test_a_frozen_parameter_that_is_trained_now_starts_with_new_state(tmp_path, caplog):
    """K = 1 freezes post_projection; a resume with K = 4 trains it, and loses nothing of the rest."""
    _, saved = save_step(tmp_path, drafter__num_steps=1)
    assert not any("post_projection" in name for name in saved if name.startswith("optimizer"))
    cfg, checkpointer = open_run(tmp_path, drafter__num_steps=4)
    model, optimizer = build(cfg, seed=5)
    checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
    same(saved, everything(model, optimizer))
    assert "step_00000001 has no optimizer state for drafter.post_projection.weight: they start" in caplog.text
    assert "drafter.num_steps was 1 and is now 4" in caplog.text
    train_step(model, optimizer)
    checkpointer.save(2, model, optimizer, {"step": 2}, config=cfg)
    checkpointer.close()
    stored = stored_tensors(tmp_path / "checkpoints/step_00000002/optimizer")
    assert "drafter.post_projection.weight/exp_avg" in stored


def test_state_of_a_parameter_that_is_frozen_now_is_dropped(tmp_path, caplog):
    save_step(tmp_path)
    cfg, checkpointer = open_run(tmp_path, freeze__base=True)
    model, optimizer = build(cfg)
    checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
    checkpointer.close()
    assert "is dropped: they are not trained now" in caplog.text
    assert optimizer.state and all(p.requires_grad for p in optimizer.state)
    train_step(model, optimizer)


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path):
    path, saved = save_step(tmp_path, train_steps=0)
    assert not any(name.startswith("optimizer") for name in saved) and stored_tensors(path / "optimizer") == {}
    cfg, checkpointer = open_run(tmp_path)
    model, optimizer = build(cfg, seed=5)
    checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
    checkpointer.close()
    same(saved, everything(model, optimizer))


def test_the_step_counter_goes_where_the_kernel_reads_it(tmp_path):
    path, _ = save_step(tmp_path)
    cfg = config()
    model = build(cfg)[0].to("meta")
    optimizer = build_optimizer(model, cfg.optim)
    for fused, device in ((False, "cpu"), (True, "meta")):
        for group in optimizer.param_groups:
            group["fused"] = fused
        state = new_optimizer_state(model, optimizer, stored_tensors(path / "optimizer"))
        assert {entries["step"].device.type for entries in state.values()} == {device}


def test_what_may_change_is_said(tmp_path, caplog):
    save_step(tmp_path)
    cfg, checkpointer = open_run(tmp_path, optim__lr=5e-4, data__mixture="epoch", resume="auto", output_dir="elsewhere")
    model, optimizer = build(cfg)
    checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
    checkpointer.close()
    said = [record.getMessage() for record in caplog.records if "changed since" in record.getMessage()]
    assert said == [
        "the configuration changed since step_00000001: data.mixture was endless and is now epoch",
        "the configuration changed since step_00000001: optim.lr was 0.001 and is now 0.0005",
    ]
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 1e-3}  # the base's new one, the drafter's


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ({"vocab_size": 300}, r"base text_config.vocab_size was 256, is 300.*embed_tokens.weight was \[256, 64\], is"),
        ({"intermediate_size": 128}, "base text_config.intermediate_size was 96, is 128"),
        ({"drafter_overrides": {"use_ordered_embeddings": False}}, "drafter use_ordered_embeddings was True, is False"),
        ({"global_head_dim": 64}, "base text_config.per_layer_config.1.head_dim was 32, is 64"),
        ({"shape": "31b"}, "base text_config.attention_k_eq_v was False, is True.*and [0-9]+ more"),
    ],
)
def test_what_may_not_change_is_an_error_that_names_it(tmp_path, pair, words):
    save_step(tmp_path)
    cfg, checkpointer = open_run(tmp_path, model__base="another")
    model, optimizer = build(cfg, **pair)
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=f"(?s)from other models than model.base give now.*{words}"):
        checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
    checkpointer.close()
    same(before, everything(model, optimizer))


def test_the_fixed_keys_are_keys_of_the_models():
    """A misspelt one would guard nothing."""
    keys = set()
    for shape in SHAPES:
        base = base_config(shape)
        for cfg in (base, drafter_config(base)):
            keys |= {key.rpartition(".")[2] for key in compat.differences({}, json.loads(cfg.to_json_string(False)))}
    assert keys >= compat.FIXED


def test_what_auto_resumes_from(tmp_path, caplog):
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_run(tmp_path / "fresh")[1].find_resume(str(tmp_path / "nowhere"))
    cfg, checkpointer = open_run(tmp_path)
    assert checkpointer.find_resume("auto") is None
    model, optimizer = build(cfg)
    for step in (1, 2, 3):
        checkpointer.save(step, model, optimizer, {"step": step}, config=cfg)
    checkpointer.close()
    path = checkpointer.folder / "step_00000003"
    (path / layout.MANIFEST).unlink()
    victim = next((checkpointer.folder / "step_00000002/base/model").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)

    cfg, checkpointer = open_run(tmp_path)
    assert checkpointer.find_resume("auto").name == "step_00000001"
    assert "step_00000003 is incomplete" in caplog.text and "step_00000002 is damaged" in caplog.text
    assert caplog.text.count("left untouched and an older one is tried") == 2
    assert len(layout.list_steps(checkpointer.folder)) == 3
    # The run comes by step 2 again: the damaged one is set aside, neither lost nor in the way.
    checkpointer.load(checkpointer.folder / "step_00000001", model, optimizer, config=cfg)
    checkpointer.save(2, model, optimizer, {"step": 2}, config=cfg)
    assert "set aside as step_00000002.damaged-" in caplog.text
    layout.verify(checkpointer.folder / "step_00000002")
    checkpointer.close()


def test_without_checksums_only_sizes_are_looked_at(tmp_path):
    path, _ = save_step(tmp_path)
    victim = next((path / "optimizer").glob("*.distcp"))
    victim.write_bytes(bytes(victim.stat().st_size))
    checkpointer = open_run(tmp_path, checkpoint__checksums=False)[1]
    assert checkpointer.find_resume() == path
    checkpointer.close()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is usable \(1 damaged\)"):
        open_run(tmp_path)[1].find_resume()


def test_never_and_paths_do_not_mix_histories(tmp_path, caplog):
    first, _ = save_step(tmp_path / "a", step=1)
    second, _ = save_step(tmp_path / "a", step=2)
    with pytest.raises(CheckpointError, match="resume=never, but .*step_00000002 is there"):
        open_run(tmp_path / "a")[1].find_resume("never")
    with pytest.raises(CheckpointError, match="step_00000002 of the same run is newer"):
        open_run(tmp_path / "a")[1].find_resume(str(first))
    checkpointer = open_run(tmp_path / "a")[1]
    assert checkpointer.find_resume(str(second)) == second
    checkpointer.close()

    checkpointer = open_run(tmp_path / "b")[1]
    assert checkpointer.find_resume("never") is None
    assert checkpointer.find_resume(str(first)) == first
    assert checkpointer.find_resume(str(tmp_path / "a")) == second
    checkpointer.close()
    own, _ = save_step(tmp_path / "b", step=5)  # the same command after a preemption
    checkpointer = open_run(tmp_path / "b")[1]
    assert checkpointer.find_resume(str(first)) == own
    assert "output_dir has checkpoints of its own" in caplog.text
    checkpointer.close()


def test_a_newer_layout_is_never_passed_over(tmp_path):
    save_step(tmp_path, step=1)
    path, _ = save_step(tmp_path, step=2)
    manifest = layout.read_manifest(path)
    manifest.layout += 1
    layout.write_file(path / layout.MANIFEST, manifest.to_bytes())
    for resume in ("auto", str(path)):
        with pytest.raises(CheckpointError, match="use the newer version"):
            open_run(tmp_path)[1].find_resume(resume)


@pytest.mark.parametrize("state", [{1: 2}, {"a": [{"b": torch.zeros(1)}]}, {"a": {"b": b"x"}}])
def test_a_state_that_json_would_change_is_refused(tmp_path, state):
    cfg, checkpointer = open_run(tmp_path)
    model, optimizer = build(cfg)
    with pytest.raises(CheckpointError, match="state.*(survives JSON|plain JSON)"):
        checkpointer.save(1, model, optimizer, state, config=cfg)
    checkpointer.close()


def test_two_runs_in_one_folder(tmp_path):
    checkpointer = open_run(tmp_path)[1]
    with pytest.raises(AssertionError, match="CheckpointError: another run is writing"):
        # A POSIX lock is a process's own, so it takes another process to see it.
        run_ranks(open_only, 1, tmp_path)
    checkpointer.close()
    run_ranks(open_only, 1, tmp_path)


def open_only(rank, folder):
    Checkpointer(folder, config().checkpoint, timeout_seconds=TIMEOUT, lock_wait_seconds=0).close()


def test_retention_of_a_run(tmp_path, caplog):
    cfg, checkpointer = open_run(
        tmp_path,
        checkpoint__keep_last=2,
        checkpoint__keep_every=4,
        checkpoint__keep_best="val/base_loss",
        data__val="unused.jsonl",
    )
    model, optimizer = build(cfg)
    for step, loss in enumerate([5, 1, 4, 3, 3, 3, 3], start=1):
        checkpointer.save(step, model, optimizer, {"step": step}, config=cfg, metrics={"val/base_loss": loss})
    assert "keep_best" not in caplog.text
    checkpointer.save(8, model, optimizer, {"step": 8}, config=cfg, metrics={"acc": 1})
    assert "checkpoint.keep_best=val/base_loss is not a metric of step_00000008 (those are: acc)" in caplog.text
    checkpointer.close()
    names = sorted(p.name for p in checkpointer.folder.iterdir())
    assert names == [layout.folder_name(step) for step in (2, 4, 7, 8)]


@pytest.fixture
def slow_writes(monkeypatch):
    """Saves that wait for ``go`` in the background, then do ``action``."""
    go, actions, write = threading.Event(), [], module.state.save_tensors

    def slow(*args):
        assert go.wait(20)
        for action in actions:
            action()
        return write(*args)

    monkeypatch.setattr(module.state, "save_tensors", slow)
    yield go, actions
    go.set()


def test_training_goes_on_and_the_copy_is_of_the_step(tmp_path, slow_writes):
    go, _ = slow_writes
    cfg, checkpointer = open_run(tmp_path, checkpoint__background=True)
    model, optimizer = build(cfg)
    train_step(model, optimizer)
    saved = everything(model, optimizer)
    checkpointer.save(1, model, optimizer, {"step": 1}, config=cfg)
    train_step(model, optimizer)
    checkpointer.poll()
    assert layout.list_steps(checkpointer.folder) == []
    threading.Timer(0.5, go.set).start()
    checkpointer.save(2, model, optimizer, {"step": 2}, config=cfg)  # waits for the first
    assert [path.name for path in layout.list_steps(checkpointer.folder)] == ["step_00000001"]
    checkpointer.close()
    assert [path.name for path in layout.list_steps(checkpointer.folder)] == ["step_00000002", "step_00000001"]
    cfg, checkpointer = open_run(tmp_path / "other")
    checkpointer.load(tmp_path / "checkpoints/step_00000001", model, optimizer, config=cfg)
    checkpointer.close()
    same(saved, everything(model, optimizer))


@pytest.mark.parametrize("where", ["poll", "save", "wait", "close"])
def test_a_failure_in_the_background_is_loud(tmp_path, slow_writes, where):
    go, actions = slow_writes
    actions.append(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    cfg, checkpointer = open_run(tmp_path, checkpoint__background=True)
    model, optimizer = build(cfg)

    def save(step):
        checkpointer.save(step, model, optimizer, {"step": step}, config=cfg)

    save(1)
    go.set()
    if where == "poll":
        checkpointer._save.join(20)
    with pytest.raises(CheckpointError, match="(?s)saving step 1 failed: writing .*No space left on device"):
        for _ in range(2):  # a poll's answer comes with the next one
            save(2) if where == "save" else getattr(checkpointer, where)()
    checkpointer.close()
    assert list(checkpointer.folder.iterdir()) == []
    actions.clear()
    checkpointer = open_run(tmp_path, checkpoint__background=True)[1]
    save(1)
    checkpointer.close()
    layout.verify(checkpointer.folder / "step_00000001")


def test_a_save_that_never_ends_is_given_up(tmp_path, slow_writes):
    cfg = config({"checkpoint.background": True})
    checkpointer = Checkpointer(tmp_path, cfg.checkpoint, timeout_seconds=1)
    model, optimizer = build(cfg)
    checkpointer.save(1, model, optimizer, {"step": 1}, config=cfg)
    with pytest.raises(CheckpointError, match="saving step 1 has not finished in time"):
        checkpointer.wait()
    checkpointer.close()


def test_a_step_is_saved_once(tmp_path, caplog):
    path, _ = save_step(tmp_path, step=4)
    before = path.stat().st_ino
    cfg, checkpointer = open_run(tmp_path)
    model, optimizer = build(cfg)
    checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
    checkpointer.save(4, model, optimizer, {"step": 4}, config=cfg)
    checkpointer.close()
    assert path.stat().st_ino == before and len(list(checkpointer.folder.iterdir())) == 1


def test_what_a_person_finds_in_the_folder(tmp_path):
    path, _ = save_step(tmp_path, step=3)
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {layout.MANIFEST}
    manifest = json.loads((path / layout.MANIFEST).read_text())
    assert set(manifest["files"]) == files
    assert manifest["step"] == 3 and manifest["metrics"] == {"loss": 1 / 3} and manifest["world_size"] == 1
    for name in ("config.json", "state.json", "base/config.json", "drafter/config.json"):
        json.loads((path / name).read_text())
    assert json.loads((path / "base/config.json").read_text())["model_type"] == "gemma4"


@pytest.fixture(autouse=True)
def collect_warnings(caplog):
    caplog.set_level(logging.WARNING)


def test_a_plan_is_made_once_and_a_changed_one_is_noticed(tmp_path, monkeypatch):
    """Planning takes minutes at 512 ranks; a tensor that comes, goes or changes its shape must still be saved."""
    made = []
    plan = dcp.DefaultSavePlanner._create_global_plan
    monkeypatch.setattr(
        dcp.DefaultSavePlanner,
        "_create_global_plan",
        lambda *args: (made.append(args[0]._cached_plans_key), plan(*args))[1],
    )
    cfg, checkpointer = open_run(tmp_path)
    model, optimizer = build(cfg)
    for step in (1, 2, 3):
        train_step(model, optimizer)
        checkpointer.save(step, model, optimizer, {"step": step}, config=cfg)
    assert len(made) == len(set(made)) == 3  # one for each part
    for step, frozen in ((4, True), (5, False)):
        states = {p: optimizer.state.pop(p) for p in list(optimizer.state)[::2]} if frozen else {}
        saved = everything(model, optimizer)
        checkpointer.save(step, model, optimizer, {"step": step}, config=cfg)
        stored = stored_tensors(tmp_path / f"checkpoints/{layout.folder_name(step)}/optimizer")
        assert {f"optimizer:{name}" for name in stored} == {name for name in saved if name.startswith("optimizer:")}
        optimizer.state.update(states)
    checkpointer.close()
    cfg, checkpointer = open_run(tmp_path)
    checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
    checkpointer.close()
    same(saved, everything(model, optimizer))


def sockets(rank, folder, background):
    """How many sockets this rank has open besides those of its default group."""
    import os
    import stat

    from joint_train.distributed.mesh import init_mesh
    from joint_train.distributed.preemption import Preemption

    def count():
        kinds = (
            os.stat(f"/proc/self/fd/{fd}").st_mode
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        )
        return sum(map(stat.S_ISSOCK, kinds))

    torch.distributed.barrier()
    before = count()
    cfg = config({"checkpoint.background": background})
    init_mesh(cfg.parallel)
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT)
    with Preemption(60, TIMEOUT) as preemption:
        assert not preemption.should_stop()
        checkpointer.find_resume()
    found = count() - before
    checkpointer.close()
    return found


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_connections_of_a_rank(tmp_path, background):
    """One group for control, and one for background saves where there are any: not one for each that asks."""
    two, four = (max(run_ranks(sockets, ranks, tmp_path / str(ranks), background)) for ranks in (2, 4))
    assert four - two <= 2 * (2 + background)  # for two more peers; each group has one to each, and a listener in all


def test_of_changed_sources_only_what_changed_is_named():
    def changed(old: list, new: list) -> dict:
        return compat.changed_settings({"data": {"train": old}}, {"data": {"train": new}})

    a, b = {"path": "a", "weight": 1.0, "split": "train"}, {"path": "b", "weight": 1.0, "split": "train"}
    assert changed([a], [b]) == {"data.train[0].path": ("a", "b")}
    assert changed([a, b], [a, b | {"weight": 2.0}]) == {"data.train[1].weight": (1.0, 2.0)}
    assert changed([a], [a, b]) == {"data.train": ("a", "a, b")}
