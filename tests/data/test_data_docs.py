"""The examples of docs/data.md are what `data show` prints."""

import json
import re
from pathlib import Path

from data_helpers import make_tokenizer
from gemma4_templates import VARIANTS, template

from joint_train.data import __main__ as command

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLE = re.compile(r"```json\n(\{[^\n]*\})\n```\n```\n(.*?)\n```", re.DOTALL)
HEADING = re.compile(r"── document \d+ · .*\.jsonl:(\d+) ─*")


def test_the_examples_are_what_the_command_prints(tmp_path, capsys, monkeypatch):
    found = EXAMPLE.findall(PAGE.read_text())
    assert len(found) == 9
    make_tokenizer(template(VARIANTS["summer, large"])).save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(json.loads(row)) + "\n" for row, _ in found))
    monkeypatch.setenv("COLUMNS", "500")
    options = [f"data.tokenizer={tmp_path}/tokenizer", f"data.cache_dir={tmp_path}/cache", "data.packing=false"]
    options += ["data.max_length=512", "data.num_workers=0", "--rows", "99"]
    assert command.main(["show", str(path), *options]) == 0
    printed: dict[int, list[str]] = {}
    line, last = None, 0
    for text in map(str.rstrip, capsys.readouterr().out.splitlines()):
        if heading := HEADING.fullmatch(text):
            line = int(heading.group(1))
            if line < last:  # the next pass over the file
                break
            last = line
            printed.setdefault(line, [])
        elif text.startswith("──") or not text:
            line = None
        elif line is not None and text:
            printed[line].append(text)
    for number, (row, expected) in enumerate(found, start=1):
        lines = [text for text in expected.splitlines() if text and not text.startswith("──")]
        assert printed[number] == lines, row
