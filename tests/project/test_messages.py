"""Texts for users: all strings of the package that are sentences, without the phrases that reviews found hard to read.

The list of phrases is ``phrases.txt``, which grows with each review."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PHRASES = [
    (re.compile(bad), better)
    for bad, better in (
        line.split(" => ", 1)
        for line in (Path(__file__).parent / "phrases.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
]


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string that may reach a user: of at least two words, and no docstring. What an f-string
    fills in is a …"""
    tree = ast.parse(source)
    skipped = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # docstrings, those of attributes too
            skipped |= {
                id(one.value) for one in body if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
            }
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node) if isinstance(part, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            text = node.value
        else:
            continue
        if len(re.findall(r"[A-Za-z]{2,}", text)) >= 2 and " " in text:
            yield node.lineno, text


def found(source: str) -> list[tuple[int, str, str]]:
    return [(line, text, better) for line, text in texts(source) for bad, better in PHRASES if bad.search(text)]


def test_the_lint_sees_plain_strings_and_f_strings_and_no_docstring():
    source = (
        'def f(x):\n    """It is said here."""\n    raise E("it is said " f"that {x} is bad")\nlog("what bounds it")\n'
    )
    assert sorted((line, text) for line, text, _ in found(source)) == [
        (3, "it is said that … is bad"),
        (4, "what bounds it"),
    ]


def test_no_text_for_users_has_a_phrase_of_the_list():
    files = [file for package in ("joint_train", "launch", "benchmarks") for file in (ROOT / package).rglob("*.py")]
    number = sum(len(list(texts(file.read_text()))) for file in files)
    assert number > 1000
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {text!r}; better: {better}"
        for file in files
        for line, text, better in found(file.read_text())
    ]
    assert not wrong, "\n".join(wrong)
