"""Small files, written whole or not at all; and the version of the code that writes them."""

import os
import subprocess
from importlib import metadata
from pathlib import Path


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, also through a crash of the machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def code_version() -> dict[str, str]:
    """What ran: the package's version and its commit (with ``+changes`` for an edited tree), torch's, transformers'."""
    versions = {}
    for package in ("joint-train", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository: only a tree that tracks this file counts.
        git("ls-files", "--error-unmatch", "files.py")
        versions["commit"] = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return versions
