"""How a chat template writes what the assistant thinks before an answer, learnt from what the template renders.

A model that is served with thinking on writes its thoughts in a form that was trained, whatever the template makes of
them afterwards. The released Gemma 4 templates render the thinking of an answer in some revisions after the last
question, in others only before a tool call, and in others never. So the form is taken from where the template renders
it, and what has to be trained is put together from the served prompt, the thoughts in that form, and the answer.
"""

import re
from dataclasses import dataclass

from joint_train.data.render import Template, encoding
from joint_train.errors import DataError

SWITCHES = ("enable_thinking", "thinking")
"""The options by which templates turn thinking on and off."""
GEMMA4 = ("<|think|>", "<|channel>", "<channel|>")
THOUGHT, ANSWER = "\ue000thought\ue001", "\ue002answer\ue003"
CALL = {"type": "function", "function": {"name": "call", "arguments": {}}}
# A thought that stands in the content itself, before the answer.
INLINE = re.compile(r"\s*(?:<think>(.*?)</think>|<\|channel>thought\n(.*?)<channel\|>)\s*", re.DOTALL)


@dataclass(frozen=True)
class Channel:
    """The form of thinking.

    Attributes:
        opening, closing: what the model writes before and after its thoughts.
    """

    opening: str
    closing: str

    @property
    def end(self) -> str:
        """What closes a channel in which nothing was thought."""
        return self.closing.lstrip("\n")

    def empty_at_the_end_of(self, prompt: str) -> str:
        """The channel without a thought that a prompt ends with, or an empty string."""
        forms = (self.opening + self.closing, self.opening + self.end)
        return next((form for form in forms if prompt.endswith(form)), "")


_CHANNELS: dict[str, Channel | None] = {}
_ON: dict[str, bool] = {}


def switch_of(template: Template) -> str | None:
    """The option that turns the thinking of a template on and off, or None."""
    return next((name for name in SWITCHES if name in template.reads), None)


def switch_thinking(template: Template, on: bool) -> Template:
    """The template with thinking on or off, if it has a switch."""
    switch = switch_of(template)
    return template if switch is None else template.with_options(**{switch: on})


def thinks(template: Template, messages: list[dict]) -> bool:
    """Whether thinking is asked for: by an option, or by Gemma 4's token in the system prompt."""
    if any(template.options.get(name) for name in SWITCHES):
        return True
    first = messages[0]
    return first["role"] in ("system", "developer") and "<|think|>" in str(first["content"])


def is_off(template: Template) -> bool:
    """Whether a template is told not to think, or doesn't think unless it is told to."""
    switch = switch_of(template)
    if switch is None or template.options.get(switch):
        return False
    if switch in template.options:
        return True
    if template.source not in _ON:
        asked = [{"role": "user", "content": ANSWER}]
        try:
            _ON[template.source] = _prompt(template, asked) == _prompt(switch_thinking(template, True), asked)
        except DataError:
            _ON[template.source] = True
    return not _ON[template.source]


def channel_of(template: Template) -> Channel | None:
    """The form of thinking of a template; None if it knows no thinking."""
    if template.source not in _CHANNELS:
        _CHANNELS[template.source] = _learn(switch_thinking(template.with_options(tools=None), True))
    return _CHANNELS[template.source]


def kept_thoughts(template: Template, messages: list[dict]) -> list[dict]:
    """The messages, without their reasoning if thinking is off, where it isn't part of the conversation."""
    if not any("reasoning" in message for message in messages) or thinks(template, messages) or not is_off(template):
        return messages
    return [{key: value for key, value in message.items() if key != "reasoning"} for message in messages]


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
    messages = template.prepared(kept_thoughts(template, messages))
    text = template.render(messages, add_generation_prompt=True)
    return encoding(tokenizer, text).ids


def inline(message: dict) -> dict:
    """An assistant's message with the thought that its content begins with as its reasoning."""
    content = message["content"]
    if message["role"] != "assistant" or message.get("reasoning") or not isinstance(content, str):
        return message
    if (match := INLINE.match(content)) is None:
        return message
    thought = (match.group(1) if match.group(1) is not None else match.group(2)).strip("\n")
    return {**message, "content": content[match.end() :], **({"reasoning": thought} if thought.strip() else {})}


def _learn(template: Template) -> Channel | None:
    asked = [{"role": "user", "content": ANSWER}]
    for message in (
        {"role": "assistant", "content": ANSWER},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ):
        try:
            prompt = _prompt(template, asked)
            without = template.render(template.prepared([*asked, message]))
            text = template.render(template.prepared([*asked, {**message, "reasoning": THOUGHT}]))
        except DataError:  # a template without tools, or one that looks into the contents
            continue
        at = text.find(THOUGHT, len(prompt))
        if at <= len(prompt) or not text.startswith(prompt):
            continue
        after = at + len(THOUGHT)
        rest = text.find(ANSWER, after) if message["content"] else len(text) - (len(without) - len(prompt))
        if rest > after and without.endswith(text[rest:]):
            return Channel(text[len(prompt) : at], text[after:rest])
    if all(token in template.source for token in GEMMA4):
        return Channel("<|channel>thought\n", "\n<channel|>")
    return None


def _prompt(template: Template, messages: list[dict]) -> str:
    return template.render(messages, add_generation_prompt=True)
