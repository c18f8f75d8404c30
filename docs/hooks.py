"""What the pages take from the code: a page's line ``{{ configuration }}`` or ``{{ metrics }}`` becomes tables.

mkdocs calls ``on_page_markdown`` for each page.
"""

from joint_train.config import choices, groups, keys
from joint_train.metrics import METRICS


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def configuration() -> str:
    lines = []
    for group, meaning in groups().items():
        lines += ["", f"## {group}", "", f"{meaning[0].upper()}{meaning[1:]}.", "", "| key | default | meaning |"]
        lines += ["| --- | --- | --- |"]
        lines += [f"| `{key}` | `{cell(default)}` | {cell(help)} |" for key, default, help in keys(group)]
    lines += ["", "## Prepared settings", "", "Files of `conf/`, chosen by name on the command line.", ""]
    return "\n".join(
        lines + [f"- `{group}=` " + ", ".join(f"`{name}`" for name in names) for group, names in choices().items()]
    )


def metrics() -> str:
    lines = ["| metric | meaning |", "| --- | --- |"]
    return "\n".join(lines + [f"| `{name}` | {cell(meaning)} |" for name, meaning in METRICS.items()])


def on_page_markdown(markdown: str, **_) -> str:
    for name, made in {"configuration": configuration, "metrics": metrics}.items():
        if f"{{{{ {name} }}}}" in markdown:
            markdown = markdown.replace(f"{{{{ {name} }}}}", made())
    return markdown
