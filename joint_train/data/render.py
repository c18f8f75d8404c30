"""Chat templates, rendered: for training, for the prompts of `regenerate` and of `evaluate`, by the same call.

Templates come with models, and so from strangers. They run in jinja's sandbox, as transformers has it, and not longer
than LIMIT_SECONDS.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from joint_train.errors import DataError

LIMIT_SECONDS = 10.0
"""Processor time for one rendering; the usual is less than a millisecond."""
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _TooLong(Exception):
    pass


def options_of(example: dict[str, Any]) -> dict[str, Any]:
    """What an example gives its template besides the messages."""
    return {"tools": example.get("tools"), **example.get("chat_template_kwargs", {})}


def template_of(tokenizer, options: dict[str, Any]) -> str:
    """The chat template for these options.

    Raises:
        DataError: the tokenizer has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: set data.tokenizer to one that has "
            "(for example that of the instruction-tuned model of the same family)"
        )
    return tokenizer.get_chat_template(tools=options.get("tools"))


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False, **options) -> str:
    """The conversation as text.

    Raises:
        DataError: the template refuses it, or takes too long.
    """
    return _render(tokenizer, messages, options, add_generation_prompt=add_generation_prompt)[0]


def render_marked(tokenizer, messages: list[dict], **options) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the places [start, end) that the template marks as the assistant's.

    Raises:
        DataError: the template refuses it, or takes too long.
    """
    return _render(tokenizer, messages, options, return_assistant_tokens_mask=True)


def prompt_ids(tokenizer, messages: list[dict], **options) -> list[int]:
    """The tokens that an engine is given when the assistant has to go on after these messages.

    Raises:
        DataError: the template refuses them.
    """
    text = render(tokenizer, messages, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(tokenizer, messages: list[dict], options: dict, **how) -> tuple[str, list[tuple[int, int]]]:
    template = template_of(tokenizer, options)
    try:
        with _limited(LIMIT_SECONDS):
            # (declared to return a string)
            rendered: Any = render_jinja_template(
                conversations=[messages], chat_template=template, **how, **{**tokenizer.special_tokens_map, **options}
            )
    except _TooLong:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} takes more than {LIMIT_SECONDS:.0f} s: it may never end"
        ) from None
    except Exception as error:  # a template may raise anything
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} refuses it: {type(error).__name__}: {error}"
        ) from None
    texts, marks = rendered
    return texts[0], marks[0] if marks else []


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooLong in this block after so many seconds of this process's own time; in the main thread only, where
    signals are handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
