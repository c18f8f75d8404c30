"""Chat templates, rendered: for training, for the prompts of `regenerate` and of `evaluate`, by the same call.

Templates come with models, and so from strangers. They run in jinja's sandbox, as transformers has it, and within the
limits of :mod:`joint_train.data.limits`, each rendering on its own.
"""

import copy
import difflib
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import jinja2
import jinja2.meta
from tokenizers import Encoding, Tokenizer
from transformers.utils import chat_template_utils

from joint_train.data import limits
from joint_train.errors import DataError

MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Result = TypeVar("Result")
PLAIN = (dict, list, str, tuple, int, float, bool)

Span = tuple[int, int]


def options_of(example: dict[str, Any]) -> dict[str, Any]:
    """What an example gives its template besides the messages."""
    return {"tools": example.get("tools"), **example.get("chat_template_kwargs", {})}


def encoding(tokenizer, text: str) -> Encoding:
    """The tokens of a rendered text and their places: what calling the tokenizer gives, in half the time.

    Args:
        tokenizer: a fast one.
    """
    return _backend(tokenizer).encode(text, add_special_tokens=False)


def token_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a rendered text, in two thirds of the time that :func:`encoding` takes.

    Args:
        tokenizer: a fast one.
    """
    return _backend(tokenizer).encode_batch_fast([text], add_special_tokens=False)[0].ids


def _backend(tokenizer) -> Tokenizer:
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None or backend.truncation is not None:  # as the last call left them
        backend.no_padding()
        backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # variables that aren't options


class Template:
    """A tokenizer's chat template with its options.

    transformers' own functions do the rendering, but its `apply_chat_template` copies the whole conversation each time,
    and here each is rendered several times. (They are private ones of the version that is required.)

    Attributes:
        options: what it is given besides the messages.
        source: its text.
        marked: it marks what the assistant writes.
        prompts: it can end with a generation prompt.
        reads: the variables that it reads.
        special: matches the tokens that the tokenizer has besides its vocabulary.
        control: matches those of them that aren't text.

    Raises:
        DataError: the tokenizer has no template, or one that takes powers (no time limit interrupts those), or one that
            never reads an option.
    """

    def __init__(self, tokenizer, options: dict[str, Any]):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template: set data.tokenizer to one that has "
                "(for example that of the instruction-tuned model of the same family)"
            )
        self.name, self.options = tokenizer.name_or_path, options
        self.source: str = tokenizer.get_chat_template(tools=options.get("tools"))
        self.marked, self.prompts = _properties(self.source)
        self.reads = self._variables_of(self.source)
        self._check_options(tokenizer)
        self.special, self.control = _patterns(tokenizer)
        given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **options}
        self._variables: dict[str, Any] = chat_template_utils._plain_template_data(given)

    @classmethod
    def of(cls, tokenizer, options: dict[str, Any]) -> "Template":
        """The template with some options; one without options is kept for the next row."""
        if any(value is not None for value in options.values()):
            return cls(tokenizer, options)
        kept = _WITHOUT_OPTIONS.get(tokenizer)
        written = getattr(tokenizer, "chat_template", None)
        templates = dict(written) if isinstance(written, dict) else written
        state = (templates, options, tokenizer.special_tokens_map, len(tokenizer))
        if kept is None or kept[0] != state:
            kept = _WITHOUT_OPTIONS[tokenizer] = (state, cls(tokenizer, options))
        return kept[1]

    def with_options(self, **options) -> "Template":
        """The same template with other options."""
        other = copy.copy(self)
        other.options = {**self.options, **options}
        other._variables = {**self._variables, **chat_template_utils._plain_template_data(options)}
        return other

    def _variables_of(self, source: str) -> frozenset[str]:
        """Variables that a template reads."""
        return self._explained(_undeclared, source)

    def _check_options(self, tokenizer) -> None:
        """Refuse options that the template would pass over."""
        for name, value in self.options.items():
            if isinstance(value, str) and value.strip().lower() in (*YES, *NO):
                meant = "true" if value.strip().lower() in YES else "false"
                raise DataError(
                    f"chat_template_kwargs: {name} is the text {value!r}, which a template takes for true: write "
                    f"{meant} without quotation marks"
                )
        reads, templates = self.reads, tokenizer.chat_template
        unread = [name for name in self.options if name not in reads and name not in GIVEN]
        if unread and isinstance(templates, dict):  # by name: another one may read it
            reads = reads.union(*(self._variables_of(source) for source in templates.values()))
            unread = [name for name in unread if name not in reads]
        if not unread:
            return
        known = sorted(reads.difference(GIVEN, tokenizer.special_tokens_map))
        close = difflib.get_close_matches(unread[0], known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise DataError(
            f"chat_template_kwargs: the chat template of {self.name!r} never reads {', '.join(unread)}{hint}; it reads "
            f"{', '.join(known) or 'no options'}"
        )

    def prepared(self, messages: list[dict]) -> list[dict]:
        """The messages as templates see them: in plain types, a text that is the only part of its content as a string,
        which each template knows, and thinking under each of its names."""
        messages = [_without_parts(message) for message in messages]
        return chat_template_utils._alias_reasoning_fields(chat_template_utils._plain_template_data(messages))

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The text of prepared messages.

        Raises:
            DataError: the template refuses them, or takes too long.
        """
        return self._explained(_render, self.source, messages, add_generation_prompt, self._variables)

    def render_marked(self, messages: list[dict]) -> tuple[str, list[Span]]:
        """The text of prepared messages, and the places [start, end) in it that are marked as the assistant's.

        Raises:
            DataError: the template refuses them, or takes too long.
        """
        if not self.marked:
            return self.render(messages), []
        return self._explained(_render_marked, self.source, messages, self._variables)

    def _explained(self, work: Callable[..., Result], *args: Any) -> Result:
        try:
            return work(*args)
        except MemoryError:
            _forget_compiled()
            raise DataError(
                f"the chat template of {self.name!r} takes more than {limits.BYTES // 2**20} MiB of memory for one "
                "conversation"
            ) from None
        except limits.TooLong:
            _forget_compiled()
            raise DataError(
                f"the chat template of {self.name!r} takes more than {limits.SECONDS:.0f} s: it may never end"
            ) from None
        except Exception as error:  # a template may raise anything
            raise DataError(f"the chat template of {self.name!r} refuses it: {type(error).__name__}: {error}") from None


def _without_parts(message: dict) -> dict:
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and content[0].get("type") == "text":
        return {**message, "content": content[0]["text"]}
    return message


def _render(source: str, messages: list[dict], add_generation_prompt: bool, variables: dict[str, Any]) -> str:
    given = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
    return limits.limited(_compiled(source).render, given)


def _render_marked(source: str, messages: list[dict], variables: dict[str, Any]) -> tuple[str, list[Span]]:
    given = {**variables, "messages": messages, "add_generation_prompt": False}
    return limits.limited(chat_template_utils._render_with_assistant_indices, _compiled(source), **given)


# Compiling a template computes its constants, so it is limited as a rendering is.


@lru_cache(maxsize=64)
def _undeclared(source: str) -> frozenset[str]:
    try:
        environment = _compiled(source).environment
        return limits.limited(lambda: frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source))))
    except jinja2.TemplateError:  # reported when it is rendered
        return frozenset()


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    """A template whose sandbox remembers what it allows: it takes half of the time of a rendering to find that out."""
    compiled = limits.limited(chat_template_utils._compile_jinja_template, source)
    allowed = compiled.environment.is_safe_attribute

    @lru_cache(maxsize=4096)
    def of_kind(kind: type, name: str) -> bool:
        return allowed(kind(), name, None)

    def is_safe_attribute(thing: Any, name: str, value: Any) -> bool:
        if type(thing) not in PLAIN:
            return allowed(thing, name, value)
        # Of these nothing but their type counts.
        return of_kind(type(thing), name)  # type: ignore[arg-type]  # mypy doesn't know that classes are hashable

    compiled.environment.is_safe_attribute = is_safe_attribute
    return compiled


def _forget_compiled() -> None:
    """Compile templates anew: one that was interrupted may have been anywhere, and in any state."""
    _compiled.cache_clear()
    chat_template_utils._compile_jinja_template.cache_clear()


@lru_cache(maxsize=64)
def _properties(source: str) -> tuple[bool, bool]:
    try:
        powers = any(value == "**" for _, kind, value in jinja2.Environment().lex(source) if kind == "operator")
    except jinja2.TemplateSyntaxError:
        powers = False  # said when it is rendered
    if powers:
        raise DataError("the chat template takes powers (**), which no conversation needs and which may never end")
    return bool(MARKS.search(source)), "add_generation_prompt" in source


_WITHOUT_OPTIONS: WeakKeyDictionary[Any, tuple[tuple, Template]] = WeakKeyDictionary()
_PATTERNS: WeakKeyDictionary[Any, tuple[int, re.Pattern, re.Pattern]] = WeakKeyDictionary()


def control_pattern(tokenizer) -> re.Pattern:
    """Matches the tokens that a tokenizer has besides its vocabulary and that aren't text."""
    return _patterns(tokenizer)[1]


def special_pattern(tokenizer) -> re.Pattern:
    """Matches the tokens that a tokenizer has besides its vocabulary, those that are white space apart."""
    return _patterns(tokenizer)[0]


def _patterns(tokenizer) -> tuple[re.Pattern, re.Pattern]:
    size, special, control = _PATTERNS.get(tokenizer, (-1, re.compile(""), re.compile("")))
    if size != len(tokenizer):  # tokens were added
        added = [token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
        special, control = _any_of(added), _any_of([token for token in added if token.special])
        _PATTERNS[tokenizer] = len(tokenizer), special, control
    return special, control


def _any_of(tokens: list) -> re.Pattern:
    longest_first = sorted({str(token) for token in tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
