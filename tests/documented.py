"""The commands of the documentation, as they stand on its pages."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docker" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = ("torchrun", "python", "joint-train", "make", "pip", "launch/local.sh", ".venv/bin/python")
OTHERS = re.compile(r"python (-|[\w./]+\.py)( |$)")  # a script of another project, or of the page itself


def commands(page: Path) -> Iterator[str]:
    """The commands of a page: lines of its blocks, and what is set as code in its sentences and tables."""
    text = page.read_text()
    blocks = re.findall(r"^```(\S*)\n(.*?)^```", text, re.M | re.S)
    bodies = [body for language, body in blocks if language in ("", "bash", "sh", "shell", "console")]
    for body in [*bodies, *re.findall(r"(?:^ {4}\S.*\n(?:^ {4}.*\n)*)", text, re.M)]:
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            line = re.sub(r"\s#\s.*$", "", line).strip()
            line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
            if line.split(" ")[0] in OURS and not OTHERS.match(line):
                yield line
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        code = " ".join(code.replace("\\|", "|").split())
        if code.split(" ")[0] in OURS and (" -m " in code or code.split(" ")[0] in ("joint-train", "make", "pip")):
            yield code


def alternatives(words: list[str]) -> Iterator[list[str]]:
    """``ls|verify DIR`` as two commands; what is in brackets may be left out, … stands for more of the same."""
    optional, kept = False, []
    for word in (word.strip("…") for word in words):
        optional = optional or word.startswith("[")
        if word and not optional:
            kept.append(word)
        optional = optional and not word.endswith("]")
    words = kept
    for index, word in enumerate(words):
        if re.fullmatch(r"[a-z]+(\|[a-z]+)+", word):
            for one in word.split("|"):
                yield from alternatives([*words[:index], one, *words[index + 1 :]])
            return
    yield words
