"""The starter pair: what is in the folder, and that it is one whole or none."""

import ast
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from joint_train import starter
from joint_train.errors import JointTrainError


@pytest.fixture
def pair(starter_dir):
    return starter_dir


@pytest.fixture
def tokenizer(pair):
    return AutoTokenizer.from_pretrained(pair / "base")


def chats(path: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_examples_are_the_documented_names_of_the_standard_library(pair):
    train, val = chats(pair / "train.jsonl"), chats(pair / "val.jsonl")
    assert len(val) == starter.VAL_EXAMPLES and len(train) > 3000
    answers = {}
    for question, answer in train + val:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert len(answer["content"]) >= starter.MIN_CHARS
        answers[question["content"]] = answer["content"]
    assert answers["What does `json.loads` do?"] == json.loads.__doc__.replace("\n    ", "\n").strip()
    distinct = {" ".join(answer["content"].split()) for _, answer in train + val}
    assert len(distinct) == len(train) + len(val)


def test_files_are_read_and_never_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "a.py").write_text(f'"""Text."""\nopen({str(trace)!r}, "w")\n')
    assert list(starter.docstrings(tmp_path)) == [("a", "Text.")]
    assert not trace.exists()


def test_names_follow_nesting_and_broken_files_are_passed_over(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text('"""Package."""')
    (tmp_path / "pkg" / "a.py").write_text('class C:\n    async def f(self):\n        """Inner.\n\n        More."""\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Skipped."""')
    assert list(starter.docstrings(tmp_path)) == [("pkg", "Package."), ("pkg.a.C.f", "Inner.\n\nMore.")]


def test_the_same_seed_gives_the_same_files_and_another_one_other_weights(pair, tokenizer, tmp_path):
    starter.build(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(pair)
    base, drafter = starter.build_pair(tokenizer, seed=1)
    for model, part in ((base, "base"), (drafter, "drafter")):
        saved = type(model).from_pretrained(pair / part).get_input_embeddings().weight
        assert not torch.equal(model.get_input_embeddings().weight, saved)


def test_rerun_changes_nothing_and_another_seed_is_refused(pair, capsys):
    before = digests(pair)
    starter.main([str(pair)])
    assert digests(pair) == before
    assert starter.main([str(pair), "--seed", "1"]) == 2
    assert "seed 0, not 1" in capsys.readouterr().err


def test_a_folder_with_something_else_is_refused_and_left(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert starter.main([str(tmp_path / "mine")]) == 2
    assert "no COMPLETE in it" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_one_sentence(capsys):
    assert starter.main(["/proc/x"]) == 2
    assert capsys.readouterr().err == (
        "joint_train.starter: /proc/x can't be made (No such file or directory): name a folder elsewhere\n"
    )


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(chats):
        assert len(list(tmp_path.glob(".pair.*/train.jsonl"))) == 1  # it was on its way
        raise RuntimeError("out of luck")

    monkeypatch.setattr(starter, "examples", lambda root: ([{"messages": []}], []))
    monkeypatch.setattr(starter, "build_tokenizer", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        starter.build(tmp_path / "pair")
    assert os.listdir(tmp_path) == []


def test_a_library_without_sources_is_an_error_that_says_so(tmp_path):
    with pytest.raises(JointTrainError, match="documented names"):
        starter.examples(tmp_path)


def test_template_is_gemma_4s(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello \n"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHello<turn|>\n<|turn>model\nHi.<turn|>\n"
        "<|turn>user\nBye<turn|>\n<|turn>model\n"
    )


def test_marks_cover_every_assistant_turn_and_its_end(tokenizer):
    chat = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second."},
    ]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "First answer.<turn|>Second.<turn|>"


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="'critic' is not one of"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "Meh."}])


def test_tokenizer_gives_any_text_back(tokenizer):
    assert len(tokenizer) == starter.VOCAB_SIZE
    text = "def f(x):\n    return 'naïve 漢字 🦆'  # tab\t\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    for mark in (starter.PAD, starter.TURN_START, starter.TURN_END):
        assert tokenizer(mark, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(mark)]


def test_the_tokenizer_is_of_gemmas_kind(tokenizer):
    """Blanks are ▁ and rare characters their bytes: engines' converters tell the kind by that."""
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a  b 漢", add_special_tokens=False)["input_ids"])
    assert "".join(pieces).startswith("a▁▁b▁") and pieces[-3:] == ["<0xE6>", "<0xBC>", "<0xA2>"]
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert model["type"] == "BPE" and model["byte_fallback"] and model["fuse_unk"]
    assert all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    literal = tokenizer("<0x41>", add_special_tokens=False)["input_ids"]  # text that looks like a byte's token
    assert tokenizer.decode(literal) == "<0x41>" and len(literal) > 1


def test_pair_fits_together_and_generates(pair, tokenizer):
    base = Gemma4ForCausalLM.from_pretrained(pair / "base", dtype=torch.float32)
    drafter = Gemma4AssistantForCausalLM.from_pretrained(pair / "drafter", dtype=torch.float32)
    assert Gemma4ForCausalLM.from_pretrained(pair / "base").dtype == torch.bfloat16
    text = base.config
    assert text.num_kv_shared_layers and text.hidden_size_per_layer_input
    assert base.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids(starter.TURN_END)
    assert base.lm_head.weight is base.get_input_embeddings().weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    plain = base.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(base.generate(**prompt, max_new_tokens=12, do_sample=False, assistant_model=drafter), plain)


def test_random_weights_start_near_a_uniform_prediction(pair, tokenizer):
    base = Gemma4ForCausalLM.from_pretrained(pair / "base", dtype=torch.float32)
    ids = tokenizer(ast.literal_eval.__doc__, return_tensors="pt")["input_ids"]
    loss = base(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(torch.tensor(len(tokenizer)).log().item(), abs=1.5)
