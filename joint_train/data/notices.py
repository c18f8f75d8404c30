"""What is worth knowing about a source that can be trained on: counted over rows, reported once for the source.

A kind that is about a particular token or column has its name after a colon.
"""

UNTHOUGHT, UNSHOWN_THOUGHTS, EMPTY_THOUGHT, UNASKED, TAGS = (
    "reasoning that is not trained",
    "reasoning that the template can't show",
    "empty thoughts",
    "answers without thinking",
    "reasoning in tags of another model",
)
OTHER_PROMPT, ENDLESS, UNSHOWN_TOOLS, UNDECLARED, UNROLLED = (
    "answers after another prompt",
    "answers without an end",
    "tools that are not shown",
    "calls of tools that are not declared",
    "conversations in several documents",
)
CONTROL, TEMPLATED, UNUSED, NUMBERS, OTHER_FIELD, LEFT_OUT, PICTURES_FIRST, UNSHOWN_FIELD, UNCALLED = (
    "control token in the text",
    "texts in a chat format",
    "unused column of content",
    "numbers taken as text",
    "empty content beside another field",
    "rows that say that they are not trained",
    "pictures without a marker",
    "field of a message that is not shown",
    "tool results without a call",
)

MEANING = {
    UNTHOUGHT: "{count} answers are trained without the reasoning of their rows, because thinking is off. To train "
    "it, set chat_template_kwargs: {{enable_thinking: true}} for the source or for all data",
    UNSHOWN_THOUGHTS: "{count} answers are trained without the reasoning of their rows, because the chat template has "
    "no place for it. To train it, take another template",
    EMPTY_THOUGHT: "{count} answers have no reasoning although thinking is on. They are trained with the empty "
    "thought that the template writes",
    UNASKED: "{count} answers have no reasoning although thinking is on, and the template writes no empty thought. "
    "The model learns to answer without thinking",
    TAGS: "{count} answers have reasoning in tags that the chat template doesn't know (such as <think>). They are "
    "trained as plain text",
    OTHER_PROMPT: "{count} answers follow other text than what the chat template puts before an answer when a model is "
    "served. They are trained after that text; see docs/data.md#training-is-serving",
    ENDLESS: "{count} answers end without a token that closes the turn, because the chat template writes none there. "
    "The model doesn't learn to stop after them",
    UNSHOWN_TOOLS: "the tools of {count} rows don't appear in the text, because the chat template doesn't show tools",
    UNDECLARED: "{count} tool calls are of tools that their rows don't declare",
    UNROLLED: "{count} conversations are split into one training document for each answer, because the chat template "
    "renders earlier turns differently from how it prompts for them; see docs/data.md#training-is-serving",
    CONTROL: "{count} messages contain {what}, which is a control token of a chat format. It is trained as part of "
    "the text",
    TEMPLATED: "{count} texts are written in a chat format. They are trained whole, the questions too; use the format "
    "messages to train the answers only",
    UNUSED: "{count} rows have a column {what!r} that isn't used, although its name says that it is content. If that "
    "is meant, name it in the source's ignore",
    NUMBERS: "{count} fields hold a number, which is taken as text",
    OTHER_FIELD: "{count} messages have an empty content, and their text is taken from another field ('value' or "
    "'refusal')",
    LEFT_OUT: "{count} rows are left out, because they say that they are not trained (such as weight: 0)",
    UNSHOWN_FIELD: "{count} messages have a field {what!r} that the chat template doesn't show, although its name says "
    "that it is content. If that is meant, name it in the source's ignore",
    UNCALLED: "{count} results of tools have neither a call before them nor a name. Gemma's chat templates write "
    "'unknown' for the tool",
    PICTURES_FIRST: "the pictures of {count} rows have no marker <image>. They are put before the first question",
}
# Kinds that only report what is done: there is nothing to change.
AS_IT_SHOULD = {UNROLLED, EMPTY_THOUGHT, PICTURES_FIRST, LEFT_OUT}


def about(kind: str, what: str) -> str:
    """The kind for a particular token or column."""
    return f"{kind}: {what}"


def sentence(kind: str, count: int) -> str:
    """The sentence that reports a kind of notice."""
    name, _, what = kind.partition(": ")
    return MEANING[name].format(count=f"{count:,}", what=what)
