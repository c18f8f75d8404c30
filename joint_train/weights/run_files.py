"""What a run adds to its export beside the weights: tokenizer, chat template, processor, end tokens and model card.

A served model must be given the tokens that it was trained on, and must end where training taught it to end. So both
folders get the run's own tokenizer, template and processor, over the source's where these differ, and their generation
configuration ends with every token that ended an answer in training.
"""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

log = logging.getLogger(__name__)

TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(vocab|merges)\.txt|tokenizer\.model|"
    r".+\.tiktoken|chat_template\.(jinja|json)"
)
TEMPLATE_FOLDERS = ("additional_chat_templates",)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
CARD = "README.md"


@dataclass(frozen=True)
class RunFiles:
    """What a run adds to a folder of its export.

    Attributes:
        tokenizer: that the run was trained with; None leaves the source's files.
        end_token_ids: tokens that ended an answer or a text in training, added to those of the source.
        card: the text of README.md, which replaces the source's; None leaves that one.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    end_token_ids: Sequence[int] = ()
    card: str | None = None


NOTHING = RunFiles()


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokens depend on: vocabulary and rules, special tokens, and chat template, in plain types."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else dict(tokenizer.get_vocab())
    for volatile in ("truncation", "padding"):  # set by the last call, not part of what it does with a text
        state.pop(volatile, None)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return {"tokenizer": state, "special tokens": special, "chat template": tokenizer.chat_template}


def of_tokenizer(file: str) -> bool:
    """Whether a file of a model's folder, by its path in there, belongs to the tokenizer."""
    return bool(TOKENIZER_FILE.fullmatch(file)) or file.split("/")[0] in TEMPLATE_FOLDERS


def write_run_files(files: RunFiles, config: PreTrainedConfig, source: Path, folder: Path) -> None:
    """Complete a folder that has the source's files and configurations already.

    Args:
        config: of the model.
        source: where the folder's files were copied from, for the log.
    """
    if files.tokenizer is not None:
        _write_tokenizer(files.tokenizer, source, folder)
        _write_processor(files.tokenizer.name_or_path, source, folder)
    if files.end_token_ids:
        _write_end_tokens(files, config, source, folder)
    if files.card is not None:
        (folder / CARD).write_text(files.card, encoding="utf-8")


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> None:
    """Replace the folder's tokenizer where it isn't the run's."""
    wanted = tokenizer_parts(tokenizer)
    try:
        found = tokenizer_parts(AutoTokenizer.from_pretrained(folder))
    except Exception:  # none, or none that can be read: transformers raises errors of many kinds
        found = {}
    differing = [what for what, value in wanted.items() if found.get(what) != value]
    if not differing:
        return
    for path in folder.iterdir():
        if of_tokenizer(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tokenizer.save_pretrained(folder)
    what = " and ".join(differing) if found else "tokenizer and chat template"
    others = f"those of {source} differ" if found else f"{source} has none"
    log.info("export: %s are those of the run, from %s; %s", what, tokenizer.name_or_path or "memory", others)


def _write_processor(name: str, source: Path, folder: Path) -> None:
    """Copy the configuration of the processor that training prepared its images with, if there is one."""
    replaced = []
    for file in PROCESSOR_FILES:
        if (found := _find(name, file)) is None:
            continue
        contents, ours = found.read_bytes(), folder / file
        if not ours.exists() or ours.read_bytes() != contents:
            ours.write_bytes(contents)
            replaced.append(file)
    if replaced:
        log.info("export: %s are those of the run, from %s, not of %s", " and ".join(replaced), name, source)


def _find(name: str, file: str) -> Path | None:
    """A file of a folder, or of a hub repository in the cache."""
    if not name or Path(name).is_dir():
        return path if name and (path := Path(name) / file).is_file() else None
    try:
        found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except OSError:  # neither, or not in the cache
        return None
    return None if found is None else Path(found)


def _write_end_tokens(files: RunFiles, config: PreTrainedConfig, source: Path, folder: Path) -> None:
    """Have generation end with the run's end tokens, too."""
    path = folder / "generation_config.json"
    if not path.exists():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    generation, model = json.loads(path.read_text()), json.loads((folder / "config.json").read_text())
    if added := add_end_tokens(generation, files.end_token_ids):
        path.write_text(json.dumps(generation, indent=2) + "\n")
        tokenizer = files.tokenizer
        names = [str(token if tokenizer is None else tokenizer.convert_ids_to_tokens(token)) for token in added]
        log.info(
            "export: generation also ends with %s, as answers did in training; the generation configuration of %s "
            "doesn't have it", ", ".join(names), source,
        )  # fmt: skip
    if "eos_token_id" in model and add_end_tokens(model, files.end_token_ids):  # some engines read this one
        (folder / "config.json").write_text(json.dumps(model, indent=2) + "\n")


def add_end_tokens(generation: dict[str, Any], end_token_ids: Sequence[int]) -> list[int]:
    """Add end tokens to a generation configuration's ``eos_token_id``; returns those that it didn't have."""
    known = list_of_ids(generation.get("eos_token_id"))
    added = [token for token in end_token_ids if token not in known]
    if added:
        generation["eos_token_id"] = [*known, *added]
    return added


def end_generation_with(model: PreTrainedModel, end_token_ids: Sequence[int]) -> list[int]:
    """Have a model's generation end with further tokens; returns those that it didn't end with."""
    generation = {"eos_token_id": model.generation_config.eos_token_id}
    if added := add_end_tokens(generation, end_token_ids):
        model.generation_config.eos_token_id = generation["eos_token_id"]
    return added


def list_of_ids(value: int | Sequence[int] | None) -> list[int]:
    """The value of ``eos_token_id``, which may be one token or several, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)
