"""Checks that rendering loses nothing: each message's content is in the text, or the row is bad."""

import json
import re
from collections.abc import Iterator
from typing import Any

from joint_train.data import fields as names
from joint_train.data import notices, thinking
from joint_train.data.answers import REASONING, Conversation, Text, ends_special
from joint_train.errors import DataError

# Thinking that stands in the content itself.
THOUGHT = re.compile(r"<think>(.*?)</think>|<\|channel>thought\n(.*?)<channel\|>", re.DOTALL)
# Reasoning in tags that some data sets use; of <think>, models that are prompted with the opening one write the other.
TAGGED = re.compile(
    r"<(think|thinking|thought|reasoning|scratchpad|reflection)>.*?</\1>|\A\s*<(think)>|</(think)>", re.DOTALL
)
# What turns are made of in the chat formats of other models. "</s>" is HTML, too, if it doesn't end a text.
FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|end_of_text|begin_of_text|eot_id|eom_id|start_header_id|end_header_id|python_tag|"
    r"user|assistant|system|observation|end|start|message|channel|return|call|endofprompt|eot|turn|tool_call)\|?>|"
    r"<(?:turn|channel|tool_call)\|>|<(?:start|end)_of_turn>|<bos>|<eos>|</?s>\s*\Z|\A\s*<s>|\[/?INST\]|<</?SYS>>|"
    r"<｜[^｜\n]{1,40}｜>|^(?:Assistant|ASSISTANT):|^### (?:Instruction|Response|Human|Assistant|User|Input):",
    re.MULTILINE,
)
# Without one of these a text has nothing of that: looking for them takes a twentieth of the time.
HINTS = ("<", "INST]", "Assistant:", "ASSISTANT:", "###")
PLAIN = ("system", "user", "assistant")
# Fields of a message that are looked for elsewhere.
SHOWN = ("role", "content", "tool_calls", *REASONING)


def check(conversation: Conversation, texts: list[Text]) -> None:
    """Raise an error for what the template leaves out, and count in ``conversation.notices`` what is worth knowing.

    Raises:
        DataError: a message's content, a call, or the thinking of a row that is about thinking isn't rendered.
    """
    messages, whole = conversation.messages, conversation.whole
    in_order = _in_order(messages, whole)
    for index, message in enumerate(messages):
        if isinstance(message.get("content"), list) and str(message["content"]) in whole:
            raise DataError(
                f"message {index} ({message['role']}): the chat template of {conversation.template.name!r} writes the "
                "parts of its content as a list, braces and all: make one text of them"
            )
        for piece in () if in_order else _pieces(message):
            if not _found(piece, whole):
                raise _left_out(conversation, index, "what it says", piece)
        for piece in _of_calls(message):
            if not _found(piece, whole):
                raise _left_out(conversation, index, "a part of its tool call", piece)
    if not in_order or any(message["role"] not in PLAIN or "tool_calls" in message for message in messages):
        _check_by_probes(conversation)
    for index in range(len(messages)):
        _check_fields(conversation, index)
    for tool in conversation.options.get("tools") or ():
        if not _found(tool["function"]["name"], whole):
            conversation.notices[notices.UNSHOWN_TOOLS] += 1
            break
    declared = {tool["function"]["name"] for tool in conversation.options.get("tools") or ()}
    for message in messages:
        for call in message.get("tool_calls", ()):
            conversation.notices[notices.UNDECLARED] += call["function"]["name"] not in declared
        for token in set().union(*(control_tokens(text, conversation.template.control) for text in _texts(message))):
            conversation.notices[notices.about(notices.CONTROL, token)] += 1
    for text in texts:
        _check_answers(conversation, text)
    conversation.notices = +conversation.notices  # without those that are 0


def control_tokens(text: str, of_tokenizer: re.Pattern) -> set[str]:
    """The control tokens of chat formats in a text: those of the tokenizer, and those of other models."""
    found = set(of_tokenizer.findall(text)) if "<" in text or "[" in text else set()
    if any(hint in text for hint in HINTS):
        found.update(match.group().strip() for match in FOREIGN.finditer(text))
    return found


def _left_out(conversation: Conversation, index: int, what: str, piece: str) -> DataError:
    name, role = conversation.template.name, conversation.messages[index]["role"]
    shown = piece if len(piece) <= 40 else f"{piece[:40]}…"
    return DataError(f"message {index} ({role}): the chat template of {name!r} leaves out {what}: {shown!r}")


def _check_fields(conversation: Conversation, index: int) -> None:
    """Refuse a field of a message that is content by its name and isn't shown; count it if it may be a copy."""
    message = conversation.messages[index]
    for name, value in message.items():
        if name in SHOWN or not isinstance(name, str) or not isinstance(value, (str, list, dict)):
            continue
        if (kind := names.kind_of_content(name)) is None:
            continue
        said = [*names.strings({key: message[key] for key in SHOWN if key in message}), conversation.whole]
        if all(any(_found(text, of) for of in said) for text in names.strings(value)):
            continue
        if kind:
            raise DataError(
                f"message {index} ({message['role']}) has a field {name!r} ({kind}, by its name) that the chat "
                f"template of {conversation.template.name!r} doesn't show: put it into the content, or name it in the "
                "source's ignore if it isn't part of the conversation"
            )
        conversation.notices[notices.about(notices.UNSHOWN_FIELD, name)] += 1


def _texts(message: dict) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if part["type"] == "text":
            yield part["text"]


def _pieces(message: dict) -> Iterator[str]:
    """What of a message's content has to be in the text, as it stands: all but thinking and space around it."""
    for text in _texts(message):
        for piece in THOUGHT.sub("\0", text).split("\0") if "<" in text else (text,):
            if piece := piece.strip():
                yield piece


def _of_calls(message: dict) -> Iterator[str]:
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from _strings(call["function"]["arguments"])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _found(piece: str, text: str) -> bool:
    return piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text


def _in_order(messages: list[dict], text: str) -> bool:
    """Whether the contents stand in the text one after the other, as they do in all but a few conversations."""
    position = 0
    for message in messages:
        for piece in _pieces(message):
            at = text.find(piece, position)
            if at < 0:
                return False
            position = at + len(piece)
    return True


def _check_by_probes(conversation: Conversation) -> None:
    """The same conversation with its contents replaced by words that can't occur in it by chance."""
    replaced: list[dict] = []
    probes: dict[str, tuple[int, str]] = {}
    for index, message in enumerate(conversation.messages):

        def probe(what: str, index: int = index) -> str:
            word = f"\ue000{len(probes)}\ue001"
            probes[word] = (index, what)
            return word

        other = dict(message)
        if isinstance(message.get("content"), str) and message["content"].strip():
            other["content"] = probe("what it says")
        elif isinstance(message.get("content"), list):
            other["content"] = [
                {**part, "text": probe("what it says")} if part["type"] == "text" and part["text"].strip() else part
                for part in message["content"]
            ]
        if "tool_calls" in message:
            other["tool_calls"] = [
                {**call, "function": {"name": probe("a tool call"), "arguments": {"a": probe("a tool call")}}}
                for call in message["tool_calls"]
            ]
        replaced.append(other)
    try:
        text = conversation.render(replaced)
    except DataError:  # a template that looks into the contents
        return
    for word, (index, what) in probes.items():
        if word not in text:
            message = conversation.messages[index]
            piece = next(_pieces(message) if what == "what it says" else _of_calls(message), "")
            raise _left_out(conversation, index, what, piece)


def _check_answers(conversation: Conversation, text: Text) -> None:
    template, channel = conversation.template, conversation.channel
    for answer in text.answers:
        message = conversation.messages[answer.index]
        thoughts = [conversation.thoughts[answer.index]] if answer.index in conversation.thoughts else []
        thoughts += [a or b for said in _texts(message) if "<" in said for a, b in THOUGHT.findall(said)]
        written = text.text[answer.start : answer.end]
        left_out = conversation.unthought and answer.index in conversation.thoughts
        if left_out or not all(_found(thought.strip(), written) for thought in thoughts):
            if not conversation.thinks:
                trainable = thinking.switch_of(template) and thinking.channel_of(template) is not None
                conversation.notices[notices.UNTHOUGHT if trainable else notices.UNSHOWN_THOUGHTS] += 1
            elif channel is not None and channel.empty_at_the_end_of(text.text[: answer.start]):
                raise DataError(
                    f"message {answer.index}: the system prompt turns thinking on with <|think|>, and the prompt of "
                    f"the chat template of {template.name!r} ends with an empty thought, after which no other comes. "
                    f"Take "
                    "<|think|> out of the system prompt and set chat_template_kwargs: {enable_thinking: true}"
                )
            else:
                raise DataError(
                    f"message {answer.index}: thinking is turned on, and the chat template of {template.name!r} has no "
                    "place for it: take another template, or the reasoning out of the row"
                )
        elif conversation.thinks and not any(thought.strip() for thought in thoughts):
            empty = channel is not None and written.startswith((channel.opening, channel.end))
            conversation.notices[notices.EMPTY_THOUGHT if empty else notices.UNASKED] += 1
        source = template.source
        tags = {
            match[match.lastindex or 1] for said in _texts(message) if "<" in said for match in TAGGED.finditer(said)
        }
        if any(f"<{tag}>" not in source for tag in tags):
            conversation.notices[notices.TAGS] += 1
        end = answer.start + len(written.rstrip())
        if answer.spans and not ends_special(text.text, answer.start, end, conversation.special):
            conversation.notices[notices.ENDLESS] += 1
