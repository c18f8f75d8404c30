"""Chat templates, rendered: for training, for the prompts of `regenerate` and of `evaluate`, by the same call.

Templates come with models, and so from strangers. They run in jinja's sandbox, as transformers has it, not longer than
LIMIT_SECONDS, and with no more than LIMIT_BYTES of further memory.
"""

import os
import re
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import jinja2
import tokenizers
from transformers.utils import chat_template_utils

from joint_train.errors import DataError

LIMIT_SECONDS = 10.0
"""Processor time for one rendering; the usual is less than a millisecond."""
LIMIT_BYTES = 2**30
"""Memory that one rendering may take beyond what the process has; the usual is a few copies of the text."""
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]


class _TooLong(Exception):
    pass


def options_of(example: dict[str, Any]) -> dict[str, Any]:
    """What an example gives its template besides the messages."""
    return {"tools": example.get("tools"), **example.get("chat_template_kwargs", {})}


def prompt_ids(tokenizer, messages: list[dict], **options) -> list[int]:
    """The tokens that an engine is given when the assistant has to go on after these messages.

    Args:
        tokenizer: with a chat template.
        messages: as :mod:`joint_train.data.messages` describes them.
        options: for the template, and ``tools``.

    Raises:
        DataError: the template refuses them.
    """
    template = Template(tokenizer, options)
    text = template.render(template.prepared(messages), add_generation_prompt=True)
    return encoding(tokenizer, text).ids


def encoding(tokenizer, text: str) -> tokenizers.Encoding:
    """The tokens of a rendered text and their places: what calling the tokenizer gives, in half the time.

    Args:
        tokenizer: a fast one.
    """
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None or backend.truncation is not None:  # as the last call left them
        backend.no_padding()
        backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend.encode(text, add_special_tokens=False)


class Template:
    """A tokenizer's chat template with its options.

    transformers' own functions do the rendering, but its `apply_chat_template` copies the whole conversation each time,
    and here each is rendered several times. (They are private ones of the version that is required.)

    Attributes:
        marked: it marks what the assistant writes.
        prompts: it can end with a generation prompt.
        special: matches the tokens that the tokenizer has besides its vocabulary.

    Raises:
        DataError: the tokenizer has no template, or one that takes powers: no time limit interrupts those.
    """

    def __init__(self, tokenizer, options: dict[str, Any]):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template: set data.tokenizer to one that has "
                "(for example that of the instruction-tuned model of the same family)"
            )
        self.name, self.options = tokenizer.name_or_path, options
        self._source = tokenizer.get_chat_template(tools=options.get("tools"))
        self.marked, self.prompts = _properties(self._source)
        self.special = special_pattern(tokenizer)
        given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **options}
        self._variables: dict[str, Any] = chat_template_utils._plain_template_data(given)

    def prepared(self, messages: list[dict]) -> list[dict]:
        """The messages as templates see them: of plain values only, with each name that there is for thinking."""
        return chat_template_utils._alias_reasoning_fields(chat_template_utils._plain_template_data(messages))

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The text of prepared messages.

        Raises:
            DataError: the template refuses them, or takes too long.
        """
        with self._explained():
            compiled = chat_template_utils._compile_jinja_template(self._source)
            return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._variables)

    def render_marked(self, messages: list[dict]) -> tuple[str, list[Span]]:
        """The text of prepared messages, and the places [start, end) in it that are marked as the assistant's.

        Raises:
            DataError: the template refuses them, or takes too long.
        """
        if not self.marked:
            return self.render(messages), []
        with self._explained():
            compiled = chat_template_utils._compile_jinja_template(self._source)
            return chat_template_utils._render_with_assistant_indices(
                compiled, messages=messages, add_generation_prompt=False, **self._variables
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        # Signals are handled in the main thread, which is where each process renders; timers count this process's own
        # time, however busy the machine is.
        timed = threading.current_thread() is threading.main_thread()
        if timed:
            _handle_signals(os.getpid())
            signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_SECONDS)
        try:
            with _limited_memory() if timed else nullcontext():
                yield
        except MemoryError:
            raise DataError(
                f"the chat template of {self.name!r} takes more than {LIMIT_BYTES // 2**20} MiB of memory for one "
                "conversation"
            ) from None
        except _TooLong:
            raise DataError(
                f"the chat template of {self.name!r} takes more than {LIMIT_SECONDS:.0f} s: it may never end"
            ) from None
        except Exception as error:  # a template may raise anything
            raise DataError(f"the chat template of {self.name!r} refuses it: {type(error).__name__}: {error}") from None
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process's address space grow by LIMIT_BYTES at most, where the system tells how large it is."""
    try:
        with open("/proc/self/statm", "rb") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (size + LIMIT_BYTES, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(*_: Any) -> None:
    raise _TooLong


@lru_cache(maxsize=1)
def _handle_signals(process: int) -> None:
    signal.signal(signal.SIGVTALRM, _stop)


@lru_cache(maxsize=64)
def _properties(source: str) -> tuple[bool, bool]:
    try:
        powers = any(value == "**" for _, kind, value in jinja2.Environment().lex(source) if kind == "operator")
    except jinja2.TemplateSyntaxError:
        powers = False  # said when it is rendered
    if powers:
        raise DataError("the chat template takes powers (**), which no conversation needs and which may never end")
    return bool(MARKS.search(source)), "add_generation_prompt" in source


_PATTERNS: WeakKeyDictionary[Any, tuple[int, re.Pattern]] = WeakKeyDictionary()


def special_pattern(tokenizer) -> re.Pattern:
    """Of the tokens that a tokenizer has besides its vocabulary."""
    size, pattern = _PATTERNS.get(tokenizer, (-1, re.compile("")))
    if size != len(tokenizer):  # tokens were added
        added = (str(token) for token in tokenizer.added_tokens_decoder.values())
        tokens = sorted({token for token in added if token.strip()}, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        _PATTERNS[tokenizer] = (len(tokenizer), pattern)
    return pattern
