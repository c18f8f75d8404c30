"""The starter pair: a small Gemma 4 base, its drafter, a tokenizer and chat data, made from what is on every machine.

The data are the docstrings of Python's own standard library, read from its source files: the user asks what
``module.name`` does, the assistant answers with the docstring. The weights are random, for the joint job to train::

    python -m joint_train.starter DIR      # base/ drafter/ train.jsonl val.jsonl COMPLETE
"""

import ast
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from joint_train.command import Parser, from_zero, start
from joint_train.errors import JointTrainError
from joint_train.files import naming

MIN_CHARS = 60  # a shorter docstring says too little to be worth a question
VAL_EXAMPLES = 200
ALPHABET_SIZE = 120  # characters with a token of their own: the most frequent ones
VOCAB_SIZE = 2048  # small, so that five heads don't outweigh the layers
MAX_DRAFTS = 4  # tokens that the drafter proposes in generation, unless told otherwise

# Tests repeat themselves, and the rest are applications and data rather than the library.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}

PAD, EOS, BOS, UNK, TURN_START, TURN_END = "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"
MEDIA = ["<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"]

# Gemma 4's turns, `<|turn>role\n…<turn|>\n`. A model's turn ends with the token that ends it in generation, so that
# token is trained too; the newline after it is the next turn's business.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content if part['type'] == 'text' -%}
            {{- part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] in ('assistant', 'model') -%}
        {{- '<|turn>model\\n' -}}
        {%- generation -%}
            {{- text(message['content']) + '<turn|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message['role'] in ('system', 'user') -%}
        {{- '<|turn>' + message['role'] + '\\n' + text(message['content']) + '<turn|>\\n' -}}
    {%- else -%}
        {{- raise_exception("role '" + message['role'] + "' is not one of system, user, assistant") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def modules(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield ``(name, text, syntax tree)`` of every source file under ``root``, in a fixed order, importing nothing."""
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            try:
                data = file.read_bytes()
                tree = ast.parse(data)
            except (SyntaxError, ValueError):  # templates and deliberately broken files
                continue
            yield ".".join(parts).removesuffix(".__init__"), data.decode(errors="replace"), tree


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    """Yield ``(name, node)`` of a module, class or function, and of every class and function in it."""
    yield name, node
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from documented(child, f"{name}.{child.name}")


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(module.name, docstring)`` of every source file under ``root``, in a fixed order."""
    for module, _, tree in modules(root):
        for name, node in documented(tree, module):
            if docstring := ast.get_docstring(node):
                yield name, docstring.strip()


def chats(turns: Iterable[tuple[str, str]]) -> tuple[list[dict], list[dict]]:
    """Chat examples of ``(question, answer)``: (training, validation), without short and duplicate answers.

    Which ones are held out depends on the text alone, so a changed library moves few of them.
    """
    found = {}
    for question, answer in turns:
        key = hashlib.sha256(" ".join(answer.split()).encode()).hexdigest()
        if len(answer) >= MIN_CHARS and key not in found:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            found[key] = {"messages": messages}
    held_out = set(sorted(found)[:VAL_EXAMPLES])
    return [chat for key, chat in found.items() if key not in held_out], [found[key] for key in sorted(held_out)]


def examples(root: Path) -> tuple[list[dict], list[dict]]:
    """Chat examples from the docstrings under ``root``, see :func:`chats`."""
    train, val = chats((f"What does `{name}` do?", docstring) for name, docstring in docstrings(root))
    if len(train) + len(val) < 10 * VAL_EXAMPLES:
        raise JointTrainError(
            f"{root} has {len(train) + len(val)} documented names in .py files; at least {10 * VAL_EXAMPLES} are "
            "needed. Use a Python whose standard library is installed as source files."
        )
    return train, val


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """One JSON object a line."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(lines, encoding="utf-8")


def build_tokenizer(texts: list[dict]):
    """A tokenizer of Gemma's kind, with Gemma 4's marks and template, trained on these chats to ``VOCAB_SIZE`` tokens.

    Blanks are ``▁``, and a character that has no token of its own is written as its bytes, ``<0xE2>``: the kind that
    the converters of other engines know as Gemma's.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marks = [PAD, EOS, BOS, UNK, TURN_START, TURN_END, *MEDIA]
    before = [*marks, *(f"<0x{byte:02X}>" for byte in range(256))]
    blanks = normalizers.Replace(" ", "▁")
    learner = Tokenizer(models.BPE())
    learner.normalizer = blanks
    # Tokens are learnt within a word and the blanks before it; in use there is no such split, as in Gemma's.
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("\n+|▁*[^▁\n]+|▁+"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(before), limit_alphabet=ALPHABET_SIZE, show_progress=False
    )
    learner.train_from_iterator((message["content"] for chat in texts for message in chat["messages"]), trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokens = [*before, *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    if len(tokens) != VOCAB_SIZE:
        raise JointTrainError(f"the texts give {len(tokens)} tokens, not {VOCAB_SIZE}: too few texts")
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token=UNK,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = blanks
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(marks)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        additional_special_tokens=[TURN_START, TURN_END, *MEDIA],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_pair(tokenizer, seed: int):
    """A Gemma 4 base and its drafter with random bfloat16 weights: (base, drafter).

    The base has what the E2B and E4B models have: sliding and full layers, KV sharing and per-layer embeddings. The
    drafter's attention layers have queries only, of the head sizes of the base's keys that they read.
    """
    import torch
    from transformers import (
        Gemma4AssistantConfig,
        Gemma4AssistantForCausalLM,
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        GenerationConfig,
    )

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, EOS, BOS, TURN_END, *MEDIA)}
    common = dict(
        vocab_size=VOCAB_SIZE,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        sliding_window=128,
        max_position_embeddings=2048,
        pad_token_id=ids[PAD],
        eos_token_id=[ids[TURN_END], ids[EOS]],
        bos_token_id=ids[BOS],
    )
    base_config = Gemma4TextConfig(
        **common,
        hidden_size=128,
        intermediate_size=384,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=16,
        final_logit_softcapping=30.0,
    )
    drafter_config = Gemma4AssistantConfig(
        text_config=Gemma4TextConfig(
            **common,
            hidden_size=64,
            intermediate_size=192,
            layer_types=["sliding_attention", "full_attention"],
            num_hidden_layers=2,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=0,
            hidden_size_per_layer_input=0,
        ),
        backbone_hidden_size=base_config.hidden_size,
    )
    torch.manual_seed(seed)
    # Without towers: engines build them for Gemma4ForConditionalGeneration, whatever its configuration says.
    base = Gemma4ForCausalLM(base_config).bfloat16()
    drafter = Gemma4AssistantForCausalLM(drafter_config).bfloat16()
    for model in (base, drafter):
        scale_weights(model)
    ends = dict(bos_token_id=ids[BOS], eos_token_id=[ids[TURN_END], ids[EOS]], pad_token_id=ids[PAD])
    base.generation_config = GenerationConfig(**ends)
    drafter.generation_config = GenerationConfig(**ends, num_assistant_tokens=MAX_DRAFTS)
    return base, drafter


def scale_weights(model) -> None:
    """Give random weights sizes that a short training can start from; transformers' own are made to be loaded over.

    Left alone, a token's embedding is a hundredth of what the first layers add to it, attention looks at one random
    position, and hundreds of steps go by in which the pair learns how frequent each token is and nothing else.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens_per_layer" in name:
                parameter.normal_(std=model.config.get_text_config().hidden_size_per_layer_input ** -0.5)
            elif "embed_tokens" in name:  # size 1 once scaled by the square root of its length
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):  # attention logits of size 1
                parameter.fill_(parameter.numel() ** -0.25)
            elif ".layers." in name and ".post_" in name:  # a layer adds less than what is there
                parameter.fill_(0.3)


def write(directory: Path, seed: int) -> dict:
    """Write the pair and its data into an existing empty folder, COMPLETE last, and return what COMPLETE says."""
    train, val = examples(Path(sysconfig.get_paths()["stdlib"]))
    write_jsonl(directory / "train.jsonl", train)
    write_jsonl(directory / "val.jsonl", val)
    tokenizer = build_tokenizer(train)
    base, drafter = build_pair(tokenizer, seed)
    for name, model in (("base", base), ("drafter", drafter)):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    facts = {
        "seed": seed,
        "python": platform.python_version(),
        "train_examples": len(train),
        "val_examples": len(val),
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "drafter_parameters": sum(p.numel() for p in drafter.parameters()),
    }
    (directory / "COMPLETE").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def build(directory: str | Path, seed: int = 0) -> dict:
    """Make the starter pair in ``directory``, whole or not at all. Does nothing if it is there already.

    Raises:
        FileExistsError: the folder holds something else, or a pair made with another seed.
    """
    directory = Path(directory).absolute()
    if (directory / "COMPLETE").exists():
        facts = json.loads((directory / "COMPLETE").read_text())
        if facts.get("seed") != seed:
            raise FileExistsError(f"{directory} is a starter pair of seed {facts.get('seed')}, not {seed}: remove it")
        return facts
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and isn't a starter pair (no COMPLETE in it): name a new folder")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise JointTrainError(f"{directory} can't be made ({error.strerror}): name a folder elsewhere") from None
    try:
        with naming(directory):
            facts = write(work, seed)
        work.chmod(0o755)
        os.rename(work, directory)  # onto nothing or an empty folder: atomic
    except OSError:
        if not (directory / "COMPLETE").exists():  # else another process was faster, and its pair is the same
            raise
        return build(directory, seed)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return facts


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m joint_train.starter", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", metavar="DIR", help="folder to make")
    parser.add_argument("--seed", type=from_zero, default=0, help="of the random weights (default 0)")
    args = parser.parse_args(argv)
    existed = (Path(args.directory) / "COMPLETE").exists()

    def run() -> None:
        facts = build(args.directory, args.seed)
        print(f"{'already there' if existed else 'made'}: {args.directory}")
        print(f"  {facts['train_examples']} training and {facts['val_examples']} validation examples")
        print(f"  base {facts['base_parameters']:,} parameters, drafter {facts['drafter_parameters']:,}")

    return start("joint_train.starter", run)


if __name__ == "__main__":
    sys.exit(main())
