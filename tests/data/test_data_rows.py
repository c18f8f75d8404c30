"""Rows as public data sets have them, and what is trained of each, counted or refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import make_tokenizer
from gemma4_templates import VARIANTS, template

from joint_train.config import SourceConfig
from joint_train.data import DataError, notices
from joint_train.data.json_files import Record
from joint_train.data.readers import read_records
from joint_train.data.template import ASSISTANT
from joint_train.data.tokenise import encode_record, sources

FOLDER = Path(__file__).parent / "rows"
TOKENIZER = make_tokenizer(template(VARIANTS["spring, large"]))
TURN = "<|turn>model\n<|channel>thought\n<channel|>"


def asked(question: str, system: str = "") -> str:
    """The prompt of a question, with thinking off."""
    return f"<bos>{system}<|turn>user\n{question}<turn|>\n{TURN}"


def trained(*pairs: tuple[str, str], **counts: int) -> tuple[list, dict]:
    """What is expected: (prompt, answer) of each, and the counts of what is worth knowing."""
    return list(pairs), {getattr(notices, kind): count for kind, count in counts.items()}


CALLED = '<|tool_call>call:get_tide{port:<|"|>Zadar<|"|>}<tool_call|>'
DECLARED = "<|turn>system\n{}<|tool>declaration:get_tide{{}}<tool|><turn|>\n"
TOLD = f'{CALLED}<|tool_response>response:get_tide{{value:<|"|>3 m<|"|>}}<tool_response|>'
SECOND = (asked("Q2"), "good<turn|>")
# An error is a part of its text; what is trained is what `trained` gives.
EXPECTED: dict[str, list] = {
    "question_context": [
        trained((asked("How many ports?\nCREATE TABLE port (name text)"), "SELECT COUNT(*) FROM port<turn|>")),
        trained((asked("How many?\nCREATE TABLE t (a int)"), "SELECT COUNT(*) FROM t<turn|>")),
        trained((asked("Translate.\ngood morning"), "bonjour<turn|>")),
    ],
    "reasoning_column": [trained((asked("2+2?"), "4<turn|>"), UNTHOUGHT=1)] * 4,
    "query_history": [
        trained(
            (asked("Today?"), "Sun.<turn|>"),
            (
                f"<bos><|turn>user\nToday?<turn|>\n<|turn>model\nSun.<turn|>\n{asked('And tomorrow?')[5:]}",
                "Rain.<turn|>",
            ),
            UNROLLED=1,
        )
    ],  # fmt: skip
    "text_with_bos": [
        trained(("", "<bos><|turn>user\nQ<turn|>\n<|turn>model\nA<turn|>\n<eos>"), TEMPLATED=1),
        trained(("", "<bos>A tide is a wave.<eos>")),
    ],
    "calls_without_tools": [
        trained(
            (asked("Tide?", DECLARED.format("")), f"{CALLED}<|tool_response>"),
            (asked("Tide?", DECLARED.format("")).removesuffix("<|channel>thought\n<channel|>") + TOLD, "3 m.<turn|>"),
            UNROLLED=1,
        ),
        trained((asked("Tide?", DECLARED.format("Help.")), f"{CALLED}<|tool_response>")),
    ],
    "message_mask_fields": [
        trained((f"<bos><|turn>user\nQ<turn|>\n<|turn>model\nbad<turn|>\n{asked('Q2')[5:]}", "good<turn|>")),
        trained((f"<bos><|turn>user\nQ<turn|>\n<|turn>model\nbad<turn|>\n{asked('Q2')[5:]}", "good<turn|>")),
        "message 1: training_detail says what is trained on, but not in a way that is understood here: use train",
    ],
    "reasoning_part_value": [trained((asked("2+2?"), "4<turn|>"), UNTHOUGHT=1)],
    "image_part_value": ["1 images, and the tokenizer 'tiny' declares no tokens for them"],
    "img_tag": ["message 0 has <img>a.png</img>, a marker of another model family: write <image>"],
    "prompt_text": ["both prompt and a text: set the source's format to text, or"],
    "number_answer": [
        trained((asked("2+2?"), "4<turn|>"), NUMBERS=1),
        trained((asked("2+2?"), "4.0<turn|>"), NUMBERS=1),
    ],
    "answer_endoftext": [
        (trained((asked("Q"), "A<|endoftext|><turn|>"))[0], {"control token in the text: <|endoftext|>": 1}),
        (trained((asked("Q"), "A</s><turn|>"))[0], {"control token in the text: </s>": 1}),
    ],
    "content_and_value": [trained((asked("Q"), "A<turn|>"), OTHER_FIELD=2)],
    "response_list": [
        "response is a list of 2 texts: alternatives can't be trained on as one conversation; keep one",
        trained((asked("Q"), "A<turn|>")),
        "answer is an object with answer_start, text, not a text",
    ],
    "refusal": [trained((asked("Q"), "I can't.<turn|>"), OTHER_FIELD=1), "message 1 has audio: audio and video can't"],
    "thinking_off_row": [
        "enable_thinking is the text 'false', which a template takes for true: write false without quotation marks",
        trained(
            (
                "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nQ<turn|>\n<|turn>model\n",
                "<|channel>thought\n<channel|>4<turn|>",
            ),
            EMPTY_THOUGHT=1,
        ),
    ],  # fmt: skip
    "think_in_content": [
        trained(
            (
                "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\n2+2?<turn|>\n<|turn>model\n",
                "<|channel>thought\ntwo and two\n<channel|>4<turn|>",
            ),
        ),
        trained((asked("2+2?"), "<reasoning>two and two</reasoning><answer>4</answer><turn|>"), TAGS=1),
        trained(
            (
                "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\n2+2?<turn|>\n<|turn>model\n",
                "<|channel>thought\ntwo and two\n<channel|>4<turn|>",
            ),
        ),
    ],  # fmt: skip
    "lfs_pointer": ["lfs_pointer.jsonl:1: this is a Git LFS pointer, not the file itself: run git lfs pull"],
    "prompt_is_chat_string": [
        (trained((asked("Human: Q\n\nAssistant:"), "A<turn|>"))[0], {"control token in the text: Assistant:": 1})
    ],
    "thinking_on_off": [trained((asked("2+2?"), "4<turn|>"), UNTHOUGHT=1)],
    "bare_base64_image": ["1 images, and the tokenizer 'tiny' declares no tokens for them"],
    "image_without_marker": ["1 images, and the tokenizer 'tiny' declares no tokens for them"],
}


def outcomes(name: str) -> list:
    """For each row: (prompt, answer) of each target and the counts, or the error."""
    found: list = []
    source = SourceConfig(path=str(FOLDER / f"{name}.jsonl"))
    for record in read_records(source, 1 << 20):
        counts: Counter = Counter()
        try:
            counts.update(sources.understand(record, source).notices)
            documents = encode_record(record, source, TOKENIZER, counts)
        except DataError as error:
            found.append(str(error))
            continue
        pairs = []
        for document, _ in documents:
            at = [int(index) for index in (document.flags & ASSISTANT).nonzero()[0]]
            assert at == list(range(at[0], at[-1] + 1))
            prompt, answer = document.tokens[: at[0]], document.tokens[at[0] : at[-1] + 1]
            pairs.append((TOKENIZER.decode(prompt), TOKENIZER.decode(answer)))
            text = TOKENIZER.decode(document.tokens[: at[-1] + 1])
            assert document.tokens[: at[-1] + 1].tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]
        found.append((pairs, +counts))
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_rows(name):
    found = outcomes(name)
    assert len(found) == len(EXPECTED[name])
    for got, expected in zip(found, EXPECTED[name], strict=True):
        if isinstance(expected, str):
            assert isinstance(got, str) and expected in got
        else:
            assert got == expected


def test_every_file_is_expected():
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)


def test_errors_are_short():
    for name in EXPECTED:
        assert all(len(found) < 600 for found in outcomes(name) if isinstance(found, str))


def test_a_boolean_is_no_answer():
    record = Record("x.jsonl", 1, json.dumps({"question": "Is it?", "answer": True}).encode())
    with pytest.raises(DataError, match="answer is a boolean, not a string"):
        sources.understand(record, SourceConfig(path="x.jsonl"))
