"""Small files, written whole or not at all; and the version of the code that writes them."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from joint_train.errors import WriteError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def naming(path: Path, setting: str | None = None) -> Iterator[None]:
    """Turn a failure to write to a path, or below it, into an error that names it.

    Args:
        setting: the key of the configuration that another folder is set with.

    Raises:
        WriteError: for an OSError.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        if error.errno is None:  # not the system's: a wait that took too long
            raise
        other = f"set {setting} to another folder" if setting else "use another folder"
        if error.errno in FULL:
            advice = f". Free space there, or {other}"
        elif error.errno in REFUSED:
            advice = f". Make it writable for this user, or {other}"
        else:
            advice = ""
        named = WriteError(f"{error.filename or path} can't be written: {error.strerror or error}{advice}")
        named.errno = error.errno
        raise named from error


def check_writable(folder: Path, setting: str) -> None:
    """Raise a WriteError for a folder that surely can't be made or written, before long work that ends in it.

    Args:
        setting: the key of the configuration that it is.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    why = (
        "isn't a folder" if not there.is_dir() else "" if os.access(there, os.W_OK) else "isn't writable for this user"
    )
    if why:
        raise WriteError(f"{setting} {folder} can't be written: {there} {why}. Set another {setting}")


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, also through a crash of the machine.

    Raises:
        WriteError: naming the file, what was wrong and what to do.
    """
    temporary = path.with_name(f".{path.name}.partial")  # a killed process leaves one, which the next one replaces
    with naming(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


LFS = b"version https://git-lfs.github.com/spec/"
LFS_POINTER = "this is a Git LFS pointer, not the file itself: run git lfs pull"


def is_lfs_pointer(file: str | os.PathLike) -> bool:
    """Whether a file is a Git LFS pointer, whose content wasn't fetched."""
    try:
        with open(file, "rb") as stream:
            return stream.read(len(LFS)) == LFS
    except (OSError, ValueError):
        return False


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
