"""An export is as sure as a checkpoint: from verified contents, both halves or none, and known again when loaded."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from pairs import make_pair
from ranks import CONTEXT
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from joint_train.checkpoint import layout
from joint_train.errors import ConfigError, WeightsError, WriteError
from joint_train.export import main
from joint_train.weights import placing, shards
from joint_train.weights.composite import Gemma4WithDrafter
from joint_train.weights.folders import resolve
from joint_train.weights.loading import check_weights, load_model
from joint_train.weights.placing import MANIFEST, MARK

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint whose weights are not the source's, and the pair that it began with."""
    import torch.distributed.checkpoint as dcp

    root = tmp_path_factory.mktemp("run")
    make_pair(root / "pair", "e2b")
    pair = Gemma4WithDrafter.from_pretrained(str(root / "pair/base"), str(root / "pair/drafter"), drafter_num_steps=3)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.5)
    step = root / "run/checkpoints/step_00000010"
    for part, model in (("base", pair.base), ("drafter", pair.drafter)):
        dcp.save(get_model_state_dict(model), checkpoint_id=step / part / "model", no_dist=True)
    model = {"base": f"{root}/pair/base", "drafter": f"{root}/pair/drafter", "revision": None, "drafter_revision": None}
    model |= {"cache_dir": None, "text_config": {}, "export": {"max_shard_size": "5GB", "kv_shared_weights": False}}
    (step / "config.json").write_text(json.dumps({"model": model, "drafter": {"num_steps": 3}, "lora": {"r": 0}}))
    complete(step)
    return root


def complete(step):
    found = [file for file in step.rglob("*") if file.is_file() and file.name != layout.MANIFEST]
    files = {str(file.relative_to(step)): list(layout.file_checksum(file)) for file in found}
    layout.write_file(step / layout.MANIFEST, layout.Manifest(10, 1, "", "", {}, files=files).to_bytes())


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x40
    path.write_bytes(data)


def step_of(run, tmp_path):
    """A copy of the run's checkpoint, to be damaged."""
    return shutil.copytree(run / "run", tmp_path / "run") / "checkpoints/step_00000010"


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path, capsys):
    step = step_of(run, tmp_path)
    out = tmp_path / "out"
    with open(step / "base/model/__0_0.distcp", "r+b") as file:  # as the disk might: the size stays
        file.seek(30_000)
        file.write(os.urandom(4000))
    assert main([str(step), str(out), "--verify"]) == 2
    assert "base/model/__0_0.distcp has checksum" in capsys.readouterr().err and not out.exists()
    (step / "drafter/model/__0_0.distcp").unlink()
    assert main([str(step), str(out)]) == 2
    assert "drafter/model/__0_0.distcp is missing" in capsys.readouterr().err and not out.exists()
    os.truncate(step / layout.MANIFEST, 50)
    assert main([str(step), str(out)]) == 2
    assert "COMPLETE is damaged" in capsys.readouterr().err and not out.exists()


def test_the_checkpoint_has_the_configuration_too(run, tmp_path, capsys):
    """config.yaml isn't there: another machine has the checkpoint alone."""
    assert main([str(run / "run/checkpoints/step_00000010"), str(tmp_path / "out"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "values as in step 10" in said and "base: every file as the export wrote it" in said
    step = step_of(run, tmp_path)
    for raw, words in ((b"\xff\xfe", "can't be read as the configuration"), (b"[1]", "it holds no keys")):
        (tmp_path / "run/config.yaml").write_bytes(raw)
        assert main([str(step), str(tmp_path / "other")]) == 2
        assert words in capsys.readouterr().err


def test_no_model_is_lost_to_an_export(run, tmp_path, capsys):
    """Neither the one that was trained, by whatever path, nor one that no export wrote."""
    step, other = run / "run/checkpoints/step_00000010", tmp_path / "other"
    before = (run / "pair/base/model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(run / "pair")
    (other / "drafter").mkdir(parents=True)
    (other / "drafter/config.json").write_text("{}")
    for out, said in (
        (run / "pair", "base is a model that the run was trained from"),
        (tmp_path / "link", "base is a model that the run was trained from"),
        (other, "drafter is there, and no export wrote it: give another folder"),
    ):
        assert main([str(step), str(out)]) == 2
        assert said in capsys.readouterr().err
    assert (run / "pair/base/model.safetensors").read_bytes() == before and not (other / "base").exists()
    with pytest.raises(ConfigError, match="the export would replace it"):
        placing.refuse_to_replace(run / "pair", [run / "pair/drafter"], others=False)
    placing.refuse_to_replace(other, ["google/gemma-4-E2B-it"], others=False)


def test_verify_compares_values_and_checksums(run, tmp_path, capsys, monkeypatch):
    from joint_train.weights import export

    out, step = tmp_path / "out", run / "run/checkpoints/step_00000010"
    write = export._write_configs

    def changed(model, source, folder, *args):  # what the disk loses between writing and comparing
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("norm.weight"))
        weights[name][0] += 1
        save_file(weights, folder / "model.safetensors")
        write(model, source, folder, *args)

    with monkeypatch.context() as patch:
        patch.setattr(export, "_write_configs", changed)
        assert main([str(step), str(out), "--verify"]) == 1
    assert "values of " in capsys.readouterr().err
    assert main([str(step), str(out)]) == 0
    assert main([str(out), "--verify"]) == 0 and main([str(out / "drafter"), "--verify"]) == 0
    flip(out / "base/config.json")
    assert main([str(out), "--verify"]) == 1
    assert "config.json has checksum" in capsys.readouterr().err
    (out / "base" / MANIFEST).unlink()
    assert main([str(out / "base"), "--verify"]) == 2
    assert "nothing can be compared" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(out)])


def test_a_later_load_compares_the_weights(run, tmp_path):
    out = tmp_path / "out"
    assert main([str(run / "run/checkpoints/step_00000010"), str(out), "--max-shard-size", "100KB"]) == 0
    load_model(out / "base", torch.float32)
    for part in ("base", "drafter"):  # a setting of generation may be changed by hand, weights may not
        (out / part / "generation_config.json").write_text("{}")
    load_model(out / "base", torch.float32)
    victim = sorted((out / "base").glob("*.safetensors"))[1]
    good = victim.read_bytes()
    flip(victim, 0.9)
    with pytest.raises(WeightsError, match=f"{victim.name} has checksum .*delete .*{MANIFEST}"):
        load_model(out / "base", torch.float32)
    with pytest.raises(WeightsError, match="has checksum"):
        Gemma4WithDrafter.from_pretrained(str(out / "base"), str(out / "drafter"))
    os.truncate(victim, 100)
    with pytest.raises(WeightsError, match=f"{victim.name} has 100 bytes instead of"):
        resolve(out / "base")
    victim.unlink()
    with pytest.raises(WeightsError, match=f"{victim.name} can't be read"):
        resolve(out / "base")
    victim.write_bytes(good)
    load_model(out / "base", torch.float32)
    flip(out / "base" / MANIFEST)
    with pytest.raises(WeightsError, match=f"{MANIFEST} is damaged"):
        resolve(out / "base")
    (out / "base" / MANIFEST).unlink()  # as of an export of before, or of another program
    load_model(out / "base", torch.float32)


def export_and_die(arguments, stop):
    """The command in this process, which is killed before its `stop`-th rename or removal while folders are placed."""
    count, put, placing_began = 0, placing.put_in_place, False

    def hook(event, args):
        nonlocal count
        if placing_began and event in ("os.rename", "os.remove", "shutil.rmtree") and "/out/" in str(args[0]):
            count += 1
            if count == stop:
                os.kill(os.getpid(), signal.SIGKILL)

    def putting(outs, *whole):
        nonlocal placing_began
        placing_began = True
        put(outs, *whole)

    placing.put_in_place = putting
    sys.addaudithook(hook)
    torch.set_num_threads(1)
    os._exit(main([str(argument) for argument in arguments]))


def exported(arguments, stop):
    """The exit status of a process that exports."""
    process = CONTEXT.Process(target=export_and_die, args=(arguments, stop))
    process.start()
    process.join(120)
    return process.exitcode


def weight(folder):
    """A number that tells which export a folder is of."""
    weights = load_file(folder / "model.safetensors")
    return float(weights[next(name for name in sorted(weights) if name.endswith("norm.weight"))].float().mean())


@pytest.mark.timeout(900)
def test_killed_at_each_rename_no_new_base_stands_beside_an_old_drafter(run, tmp_path):
    step, start, out = run / "run/checkpoints/step_00000010", tmp_path / "start", tmp_path / "out"
    for part in ("base", "drafter"):
        shutil.copytree(run / "pair" / part, start / part)
    shutil.copytree(run / "pair/base", start / "adapter")
    (start / "adapter/adapter_config.json").write_text("{}")  # of an older export, with adapters
    for part in ("base", "drafter", "adapter"):
        (start / part / MANIFEST).touch()  # an export wrote them
    assert main([str(step), str(tmp_path / "new")]) == 0
    old, new = ({part: weight(where / part) for part in ("base", "drafter")} for where in (start, tmp_path / "new"))
    assert all(old[part] != new[part] for part in old)
    refused, kills = 0, 0
    for stop in range(1, 100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(start, out)
        status = exported([step, out], stop)
        found = {part: weight(out / part) for part in old if (out / part).exists()}
        assert found.items() <= old.items() or found.items() <= new.items(), f"a stale pair, killed at {stop}"
        if (out / MARK).exists():
            refused += 1
            for part in ("base", "drafter", "adapter"):
                if (out / part).exists():
                    with pytest.raises(WeightsError, match="never finished.*Export again"):
                        resolve(out / part)
        else:
            assert found in (old, new) and ((out / "adapter").exists() == (found == old))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert found == new and kills >= 10 and refused >= 5
    print(f"{kills} kills, {refused} of them while the folders were being replaced")
    # The next export to the same folder is whole, whatever was left there.
    shutil.rmtree(out)
    shutil.copytree(start, out)
    assert exported([step, out], 5) == -signal.SIGKILL and (out / MARK).exists()
    assert main([str(step), str(out), "--verify"]) == 0
    assert sorted(os.listdir(out)) == ["base", "drafter"]


def test_folders_that_only_an_older_export_has_go_with_it(tmp_path):
    for name, file in (("adapter", "adapter_config.json"), ("drafter_last", "config.json"), ("mine", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    outs = [tmp_path / "base", tmp_path / "drafter"]
    for out in outs:
        placing.staged(out).mkdir()
    placing.put_in_place(outs, whole=True)
    assert sorted(os.listdir(tmp_path)) == ["base", "drafter", "mine"]


def test_evaluate_and_the_next_run_refuse_half_an_export(run, tmp_path, capsys):
    from joint_train.evaluate.__main__ import main as evaluate

    out = tmp_path / "out"
    assert main([str(run / "run/checkpoints/step_00000010"), str(out)]) == 0
    (out / MARK).write_text(json.dumps({"parts": ["base", "drafter"]}))
    assert evaluate([str(out / "base"), str(out / "drafter"), "--out", str(tmp_path / "evaluation")]) == 2
    assert "never finished" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="never finished"):
        Gemma4WithDrafter.from_pretrained(str(out / "base"), str(out / "drafter"))
    other = shutil.copytree(out / "base", out / "unrelated")  # a folder beside them that the mark doesn't name
    assert resolve(other) == other
    (out / MARK).write_bytes(b"\xff")
    with pytest.raises(WeightsError, match="never finished"):
        resolve(out / "drafter")


def test_every_flipped_bit_of_an_exports_weights_is_found(run, tmp_path):
    out = tmp_path / "out"
    assert main([str(run / "run/checkpoints/step_00000010"), str(out)]) == 0
    damages = 0
    for part in ("base", "drafter"):
        for file in (out / part / "model.safetensors", out / part / MANIFEST):
            good = file.read_bytes()
            for number in range(40):
                flip(file, number / 40)
                with pytest.raises(WeightsError):
                    check_weights(out / part)
                os.truncate(file, max(len(good) - 1 - number * 50, 0))
                with pytest.raises(WeightsError):
                    resolve(out / part)
                file.write_bytes(good)
                damages += 2
        check_weights(out / part)
    print(f"{damages} damages found")
    assert damages == 320


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "../../.ssh/id"])
def test_an_index_names_only_files_of_its_folder(run, tmp_path, name):
    folder = shutil.copytree(run / "pair/base", tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(WeightsError, match="is refused: it names .* not in the folder"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_none_is_a_sentence(run, tmp_path, raw):
    folder = shutil.copytree(run / "pair/base", tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(raw)
    with pytest.raises(WeightsError, match="can't be read as an index of weights"):
        load_model(folder, torch.float32)


def test_a_disk_without_room_is_told_before_a_file_is_made(tmp_path, monkeypatch):
    """A mapped file without blocks would end the process by SIGBUS."""
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 7, 3 * 10**6))
    with pytest.raises(WriteError, match="can't be written: it needs 0.004 GB, and 0.003 are free"):
        shards.write_headers(tmp_path, [["a"]], {"a": ((10**6,), torch.float32)})
    assert not any(tmp_path.iterdir())
