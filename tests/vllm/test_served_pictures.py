"""Prompts with pictures, on a vLLM for CPU that serves a base with a vision tower and its drafter, both trained on
chats with pictures: answers are the base's in this process token for token, and its verifications settle as many of
them as ``python -m joint_train.evaluate --serving engine`` says.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from pairs import make_pair
from PIL import Image
from test_served import load, serving
from trained_pairs import K, job

from joint_train.evaluate.decoding import decode
from joint_train.evaluate.prompts import load_prompts
from joint_train.starter import CHAT_TEMPLATE
from joint_train.starter import build as starter_pair

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOKENS = {
    "boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>",
    "boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>",
}  # fmt: skip
VOCAB = 2048
SIZES = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}  # the fewest that the processor allows
# Nothing to resize: vLLM does it by torchvision, training by Pillow, and their pixels differ by rounding.
WHOLE = ((64, 64), (56, 72), (80, 56), (40, 112), (48, 88))
TOPICS = {
    "house": "a small red house with blue doors stands at the end of our street".split(),
    "birds": "two birds sit on the old tree and sing until it is dark".split(),
    "ship": "this ship has one sail but no wind and no crew to row it".split(),
    "cat": "my cat sleeps in an open box all day and hunts by night".split(),
}
PARTS = """{%- for part in content -%}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] | trim -}}
        {%- endfor -%}"""
PROCESSOR = {
    "processor_class": "Gemma4Processor",
    "image_processor": {"image_processor_type": "Gemma4ImageProcessor", **SIZES},
    "video_processor": {"video_processor_type": "Gemma4VideoProcessor", **SIZES},
    "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "feature_size": 16},
}


def make_tokenizer(folder: Path):
    """The starter's, with a template that has pictures."""
    starter_pair(folder / "starter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "starter/base")
    head, _, rest = CHAT_TEMPLATE.partition("{%- for part in content")
    tokenizer.chat_template = head + PARTS + rest.partition("{%- endfor -%}")[2]
    tokenizer.save_pretrained(folder / "tokenizer")
    file = folder / "tokenizer/tokenizer_config.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | TOKENS | {"model_specific_special_tokens": TOKENS}))
    return transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")


def chats(folder: Path, name: str, count: int, seed: int) -> Path:
    """Chats with one picture, two or none, whose answers are words that each have few successors."""
    generator, choice = np.random.default_rng(seed), random.Random(seed)
    lines = []
    for number in range(count):
        shown = [{"type": "image", "path": f"{name}-{number}-{i}.png"} for i in range(number % 3)]
        for part in shown:
            pixels = generator.integers(0, 256, (*WHOLE[number % len(WHOLE)], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part["path"])
        topic, words = list(TOPICS.items())[number % 4]
        content = [*shown, {"type": "text", "text": f"{topic} " * (4 + number % 8)}]
        answer = " ".join(word for word in words if choice.random() < 0.9)
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder / f"{name}.jsonl"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, Path]:
    """An exported base and drafter, and prompts."""
    folder = tmp_path_factory.mktemp("pictures")
    tokenizer = make_tokenizer(folder)
    sizes = {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "head_dim": 32, "global_head_dim": 64}
    dense = {"use_ordered_embeddings": False}  # vLLM's server can't draft with ordered ones on CPU
    base, drafter = make_pair(folder / "pair", "multimodal", drafter_overrides=dense, **sizes)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    config = json.loads((base / "config.json").read_text())
    config |= ids | {
        "eoa_token_index": ids["eoa_token_id"],
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video|>"),
    }
    config["vision_config"]["default_output_length"] = SIZES["max_soft_tokens"]
    (base / "config.json").write_text(json.dumps(config))
    (base / "processor_config.json").write_text(json.dumps(PROCESSOR))
    shutil.copytree(folder / "tokenizer", base, dirs_exist_ok=True)
    train, val = chats(folder, "train", 192, 0), chats(folder, "val", 8, 1)
    job(
        f"pair={folder}/pair", f"output_dir={folder}/run",
        f"data.train=[{{path: {train}}}]", f"data.val=[{{path: {val}}}]",
        "data.max_length=256", "max_steps=35", "eval.every=35",
    )  # fmt: skip
    return folder / "run/export/base", folder / "run/export/drafter", val


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    with serving(list(map(str, trained[:2])), tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def test_a_running_server_has_evaluates_acceptance_and_text(server, trained, tmp_path):
    from joint_train.evaluate.__main__ import main

    base, drafter, prompts = map(str, trained)
    shared = ["--prompts", prompts, "--max-new-tokens", "48"]
    options = ["--engine", "vllm", "--url", server, "--concurrency", "1,4", "--out", str(tmp_path / "served")]
    assert main([*options, *shared]) == 0
    options = ["--num-steps", str(K), "--serving", "engine", "--dtype", "float32", "--out", str(tmp_path / "offline")]
    assert main([base, drafter, *options, *shared]) == 0
    served, offline = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("served", "offline"))
    one, other = served["speculative"][0], offline["speculative"][0]
    assert (one["tokens"], one["verifications"]) == (other["tokens"], other["verifications"])
    assert one["tokens_per_forward"] == pytest.approx(other["tokens_per_forward"])
    texts = [example["text"] for example in served["examples"]]
    assert texts == [example["text"] for example in offline["examples"]]
    print(f"{one['tokens_per_forward']['value']:.3f} tokens per base forward in {one['verifications']} verifications")
    assert 1.2 < one["tokens_per_forward"]["value"] < 4.9 and len(set(texts)) > 2


def test_its_answers_to_a_dataset_are_the_local_ones(server, trained, tmp_path, capsys):
    from joint_train.data.__main__ import main

    base, out = load(trained[0]), tmp_path / "answers.jsonl"
    words = ["regenerate", str(out), "--url", server, "--max-new-tokens", "60", "--concurrency", "4"]
    words += [f"model.base={trained[0]}", f"model.drafter={trained[1]}", "data.val=[]"]
    assert main([*words, f"data.train=[{{path: {trained[2]}}}]"]) == 0, capsys.readouterr().err
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained[0])
    decoded = [decode(base, None, p.ids, K, 60, inputs=p.inputs) for p in load_prompts(str(trained[2]), tokenizer)]
    expected = [tokenizer.decode(d.ids[:-1]).strip() for d in decoded if d.ended]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == expected and len(expected) > 2
    assert [len(row.get("images", [])) for row in rows] == [i % 3 for i, d in enumerate(decoded) if d.ended]
