"""The texts of a conversation that are trained on, and which of their characters the assistant wrote.

What precedes an answer in training is what an engine is given when the answer is due: the messages before it, rendered
with the *generation prompt*. Where the prompts of a conversation are the beginnings of each other, one text holds all
answers. Some templates render a turn otherwise once others follow it (Gemma 4 drops the thinking of earlier turns, and
the empty thought channel that its prompt ends with); then an answer that isn't where its prompt ends gets a text of its
own.

With thinking on, an answer is the thoughts in the template's form and then the rest, whether or not the template itself
renders the thoughts of this answer (see :mod:`joint_train.data.thinking`). With thinking off, thoughts are no part of
the conversation.

A chat template can mark what the assistant writes (``{% generation %}``); then the marks are used. For the others an
answer starts where its prompt ends, or without a generation prompt with the first character that depends on the
message; and it ends with the last token that the template itself writes to close the turn, because the model has to
write that one too, but without the white space that follows.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from joint_train.data import notices, thinking
from joint_train.data.render import Span, Template, options_of
from joint_train.errors import DataError

# The names under which templates find the thinking of a message.
REASONING = ("reasoning", "reasoning_content", "thinking")
# Two texts that share no character at either end, and that no template treats in a special way.
PROBES = ("\ue000probe\ue001", "\ue002other\ue003")
# What opens or closes something in a template's text: <think>, </think>, <|channel>, <channel|>, [THINK], [/THINK].
TAG = re.compile(r"<\|?/?[\w:]+\|?>|\[/?[A-Z_]+\]")


@dataclass
class Answer:
    """What the assistant wrote in one message.

    Attributes:
        index: of the message.
        start: where its prompt ends.
        spans: what is trained on, [start, end) of each in characters of the text.
    """

    index: int
    start: int
    spans: list[Span]

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.spans[-1][1] if self.spans else self.start


@dataclass
class Text:
    """A text that is trained on.

    Attributes:
        text: the rendered conversation, or the beginning of one.
        messages: how many of the conversation are in it; 0: it is a text without a template.
        answers: in the order of the text.
        earlier: a later text of the same conversation has more of it.
    """

    text: str
    messages: int
    answers: list[Answer] = field(default_factory=list)
    earlier: bool = False


class Conversation:
    """A conversation and the template that renders it.

    Args:
        example: with ``messages`` (see :mod:`joint_train.data.formats`).
        tokenizer: with a chat template.
    """

    def __init__(self, example: dict[str, Any], tokenizer):
        self.options = options_of(example)
        self.template = Template.of(tokenizer, self.options)
        messages = example["messages"]
        self.thinks = thinking.thinks(self.template, messages)
        self.channel = thinking.channel_of(self.template) if self.thinks else None
        if self.channel is not None and "<think>" not in self.template.source:
            messages = [thinking.inline(message) for message in messages]
        self.thoughts = {at: message["reasoning"] for at, message in enumerate(messages) if "reasoning" in message}
        kept = thinking.kept_thoughts(self.template, messages)
        self.unthought = kept is not messages
        self.messages = self.template.prepared(kept)
        context = set(example.get("context", ()))
        said = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        self.trained = [index for index in said if index not in context]
        self.marked, self.special = self.template.marked, self.template.special
        self.render = self.template.render
        self.notices: Counter[str] = Counter()
        self.whole, self.whole_marks = self.template.render_marked(self.messages)

    def texts(self) -> list[Text]:
        """The texts that are trained on: each answer once, after its prompt. The last one holds the last answer.

        Raises:
            DataError: the template renders a message so that what the assistant wrote can't be told.
        """
        texts: list[Text] = []
        for index in self.trained:
            text, answer = self._answer(index)
            if texts and text.startswith(texts[-1].text[: texts[-1].answers[-1].end]):
                texts[-1].text, texts[-1].messages = text, index + 1
                texts[-1].answers.append(answer)
            else:
                if texts:
                    texts[-1].earlier = True
                texts.append(Text(text, index + 1, [answer]))
        if not texts:
            return [Text(self.whole, len(self.messages))]
        last = texts[-1]
        if self.whole.startswith(last.text[: last.answers[-1].end]):
            last.text, last.messages = self.whole, len(self.messages)
        if len(texts) > 1:
            self.notices[notices.UNROLLED] += 1
        return texts

    def _answer(self, index: int) -> tuple[str, Answer]:
        """The text that ends with a message, and what of it the assistant wrote."""
        message, before = self.messages[index], self.messages[:index]
        if message.get("tool_responses") and not self.marked:
            raise DataError(
                f"message {index} is the assistant's and holds tool_responses, which it didn't write: give each in a "
                "message of the role tool, or put {% generation %} marks into the template"
            )
        whole = index == len(self.messages) - 1
        text, marks = (self.whole, self.whole_marks) if whole else self.template.render_marked([*before, message])
        if not (before and self.template.prompts):
            return text, self._without_prompt(index, text, marks)
        prompt = self.render(before, add_generation_prompt=True)
        if self.channel is None:
            return self._answer_after(prompt, index, text, marks)
        return self._with_thought(self.channel, prompt, index, text, marks)

    def _with_thought(
        self, channel: thinking.Channel, prompt: str, index: int, text: str, marks: list[Span]
    ) -> tuple[str, Answer]:
        """The text with the thoughts of its last answer, which the template may leave out, or with an empty one."""
        thought = self.messages[index].get("reasoning")
        if prompt.endswith(channel.opening):
            at = len(prompt) - len(channel.opening)
            if text.startswith(prompt) or not text.startswith(prompt[:at]):
                return self._answer_after(prompt, index, text, marks)
            written = channel.opening + (f"{thought}{channel.closing}" if thought else channel.end)
            return _insert(text, self._answer_to_end(index, text, marks, at), at, written, len(channel.opening))
        text, answer = self._answer_after(prompt, index, text, marks)
        if text.startswith(channel.opening, answer.start) or channel.empty_at_the_end_of(prompt):
            return text, answer
        if thought:
            return _insert(text, answer, answer.start, f"{channel.opening}{thought}{channel.closing}")
        off = thinking.switch_thinking(self.template, False).render(self.messages[:index], add_generation_prompt=True)
        if empty := channel.empty_at_the_end_of(off):
            return _insert(text, answer, answer.start, empty)
        return text, answer

    def _answer_after(self, prompt: str, index: int, text: str, marks: list[Span]) -> tuple[str, Answer]:
        """The text, or the prompt and what follows it there, and what of it the assistant wrote."""
        message, before = self.messages[index], self.messages[:index]
        if text.startswith(prompt):
            if before[-1]["role"] != "user" and prompt == self.render(before):
                # No prompt here, as after a tool's result: what the template may write before the answer isn't trained.
                answer = self._without_prompt(index, text, marks)
                if answer.start > len(prompt):
                    self.notices[notices.OTHER_PROMPT] += 1
                return text, answer
            return text, self._answer_to_end(index, text, marks, len(prompt))
        if any(name in message for name in REASONING):
            # The prompt may have ended the thinking already.
            unthought, unthought_marks = self.template.render_marked([*before, _without_thinking(message)])
            if (joined := self._joined_answer(index, prompt, unthought, unthought_marks)) is not None:
                return joined
        if (joined := self._joined_answer(index, prompt, text, marks)) is not None:
            return joined
        self.notices[notices.OTHER_PROMPT] += 1
        return text, self._without_prompt(index, text, marks)

    def _joined_answer(self, index: int, prompt: str, text: str, marks: list[Span]) -> tuple[str, Answer] | None:
        """The answer of a text after a prompt that the text doesn't begin with, if only an end is missing that the
        template leaves out of the history."""
        if text.startswith(prompt):
            return text, self._answer_to_end(index, text, marks, len(prompt))
        common = common_prefix(text, prompt, self.special)
        missing = prompt[common:]
        tags = TAG.findall(missing)
        closed = tags and len(tags) % 2 == 0 and not TAG.split(missing)[-1].strip()
        if not (closed and self._says(index, text, common)):
            before = self.render(self.messages[:index])
            if prompt == before or not text.startswith(before) or self._content_start(index, text) != common:
                return None
        if not closed:
            raise DataError(
                f"message {index}: the prompt that it answers ends with {missing!r}, and the chat template of "
                f"{self.template.name!r} shows nowhere what has to follow there: take another template"
            )
        shift = len(missing)
        marks = [(start + shift, end + shift) for start, end in marks if end > common]
        text = prompt + text[common:]
        return text, self._answer_to_end(index, text, marks, len(prompt))

    def _answer_to_end(self, index: int, text: str, marks: list[Span], start: int) -> Answer:
        """The answer that starts at a place and ends with the text."""
        if self.marked:
            return Answer(index, start, [(max(start, first), last) for first, last in marks if last > start])
        end = close(text, start, len(text), self.special)
        return Answer(index, start, [(start, end)] if end > start else [])

    def _without_prompt(self, index: int, text: str, marks: list[Span]) -> Answer:
        if not self.marked:
            return self._answer_to_end(index, text, marks, self._content_start(index, text))
        before = self.render(self.messages[:index]) if index else ""
        return self._answer_to_end(index, text, marks, common_prefix(text, before, self.special))

    def _says(self, index: int, text: str, at: int) -> bool:
        """Whether a message's content begins at a place, judged by the text there; what is before it is also in the
        prompt, and so doesn't depend on the message. That spares three renderings."""
        message = self.messages[index]
        content = message.get("content")
        if not isinstance(content, str) or "tool_calls" in message or any(name in message for name in REASONING):
            return False
        return bool(content.strip()) and text.startswith(content.strip(), at)

    def _content_start(self, index: int, text: str) -> int:
        """The first character that depends on the message that the text ends with."""
        return min(common_prefix(text, other, self.special) for other in self._render_probes(index))

    def _render_probes(self, index: int) -> list[str]:
        """The conversation up to a message, rendered with other content in its place."""
        texts = []
        for probe in PROBES:
            other = {"role": self.messages[index]["role"], "content": probe}
            rendered = self.render([*self.messages[:index], other])
            if rendered.count(probe) != 1:
                raise DataError(
                    f"message {index}: the chat template of {self.template.name!r} renders it so that where "
                    "it starts and ends can't be told: put {% generation %} marks into the template"
                )
            texts.append(rendered)
        return texts


def _without_thinking(message: dict) -> dict:
    return {key: value for key, value in message.items() if key not in REASONING}


def _insert(text: str, answer: Answer, at: int, written: str, given: int = 0) -> tuple[str, Answer]:
    """A text with something that the assistant writes at the start of an answer.

    Args:
        at: where.
        given: how many characters of it the prompt gives.
    """
    size = len(written)
    spans = [(max(start, at) + size, end + size) for start, end in answer.spans if end > at]
    if spans and spans[0][0] == at + size:
        spans[0] = (at + given, spans[0][1])
    else:
        spans.insert(0, (at + given, at + size))
    return text[:at] + written + text[at:], Answer(answer.index, at + given, spans)


def close(text: str, start: int, end: int, special: re.Pattern) -> int:
    """``end`` without the white space after the last special token, which the model doesn't write."""
    stripped = start + len(text[start:end].rstrip())
    return stripped if ends_special(text, start, stripped, special) else end


def ends_special(text: str, start: int, end: int, special: re.Pattern) -> bool:
    """Whether [start, end) of a text ends with a special token."""
    return any(match.end() == end for match in special.finditer(text, start, end))


def common_prefix(a: str, b: str, special: re.Pattern) -> int:
    """Length of the longest common prefix that doesn't end inside a special token of either."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    for text in (a, b):
        for match in special.finditer(text):
            if match.start() >= low:
                break
            if match.end() > low:
                low = match.start()
                break
    return low
