"""What the pages take from the code and from measurements.

A page's line ``{{ configuration }}``, ``{{ elsewhere }}``, ``{{ metrics }}`` or ``{{ recipes }}`` becomes tables, and
``{{ results NAME }}`` the table of ``docs/results/NAME.json`` with the command that made it; names of columns behind
NAME choose among them. mkdocs calls ``on_page_markdown`` for each page.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import results
from joint_train.config import choices, groups, keys
from joint_train.config.help import conf_dir, source_keys
from joint_train.config.mistakes import ELSEWHERE
from joint_train.metrics import METRICS


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def configuration() -> str:
    lines = []
    for group, meaning in groups().items():
        lines += ["", f"## {group}", "", f"{meaning[0].upper()}{meaning[1:]}.", "", "| key | default | meaning |"]
        lines += ["| --- | --- | --- |"]
        lines += [f"| `{key}` | `{cell(default)}` | {cell(help)} |" for key, default, help in keys(group)]
        if group == "data":
            lines += ["", "### A source", "", "An entry of `data.train` or `data.val`.", ""]
            lines += ["| key | default | meaning |", "| --- | --- | --- |"]
            lines += [f"| `{key}` | `{cell(default)}` | {cell(help)} |" for key, default, help in source_keys()]
    lines += ["", "## Prepared settings", "", "Files of `conf/`, chosen by name on the command line.", ""]
    for group, names in choices().items():
        listed = ", ".join(f"`{name}`" for name in names)
        lines.append(f"- `{group}=` {listed if group != '+recipe' else 'each of [the recipes](recipes.md)'}")
    return "\n".join(lines)


def elsewhere() -> str:
    lines = ["| elsewhere | here |", "| --- | --- |"]
    return "\n".join(lines + [f"| `{theirs}` | `{ours}` |" for theirs, ours in ELSEWHERE.items() if theirs != ours])


def recipes() -> str:
    """Of each file of ``conf/recipe/`` what its head says."""
    lines = ["| recipe | trains | memory of a GPU, planned | step, planned | 100 million tokens |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name in choices()["+recipe"]:
        what, memory, time = (
            line[2:] for line in (conf_dir() / "recipe" / f"{name}.yaml").read_text().split("\n")[1:4]
        )
        peak = re.search(r"a peak of ([\d.]+ GiB)", memory)[1]
        step, tokens, hours = re.search(r"([\d.]+ s) for a step of ([\d,]+) tokens, ([\d.]+ h)", time).groups()
        what = what.partition(", ")[2].rpartition(", on ")[0]
        lines.append(f"| `{name}` | {what} | {peak} | {step} of {tokens} tokens | {hours} |")
    return "\n".join(lines)


def metrics() -> str:
    lines = ["| metric | meaning |", "| --- | --- |"]
    return "\n".join(lines + [f"| `{name}` | {cell(meaning)} |" for name, meaning in METRICS.items()])


def measured(name: str, columns: list[str]) -> str:
    result = results.read(Path(name))
    if unknown := set(columns) - set(result["columns"]):
        raise ValueError(f"docs/results/{name}.json has no column {', '.join(sorted(unknown))}")
    if columns:
        result["columns"] = {column: result["columns"][column] for column in columns}
    commit = result["versions"]["commit"][:7]
    about = f"`{result['command']}` ({result['date']}, commit {commit}, {result['machine']})"
    return f"{about}\n\n{results.table(result)}"


def on_page_markdown(markdown: str, **_) -> str:
    markdown = re.sub(r"^\{\{ results (\S+)(.*) \}\}$", lambda m: measured(m[1], m[2].split()), markdown, flags=re.M)
    made_of = {"configuration": configuration, "elsewhere": elsewhere, "metrics": metrics, "recipes": recipes}
    for name, made in made_of.items():
        if f"{{{{ {name} }}}}" in markdown:
            markdown = markdown.replace(f"{{{{ {name} }}}}", made())
    return markdown
