"""What is worth knowing about a source that can be trained on: counted for each row, said once for the source."""

UNTHOUGHT, UNASKED, OTHER_PROMPT, ENDLESS, UNSHOWN_TOOLS, UNROLLED = (
    "thinking that is not trained on",
    "answers without thinking",
    "answers after another prompt",
    "answers without an end",
    "tools that are not shown",
    "conversations in several documents",
)

MEANING = {
    UNTHOUGHT: "the template renders {count} answers without their thinking, and so they are trained; to train it, set "
    "chat_template_kwargs (for Gemma 4 {{enable_thinking: true}}) for the source or for all data",
    UNASKED: "{count} answers have no thinking, though it is turned on: the model learns to answer without it",
    OTHER_PROMPT: "the text before {count} answers isn't what the generation prompt of the template would be",
    ENDLESS: "{count} answers end without a token that closes the turn, since the template writes none: the model "
    "isn't taught to stop",
    UNSHOWN_TOOLS: "the template doesn't show the tools of {count} examples",
    UNROLLED: "{count} conversations are several documents each, one for each answer: the template renders earlier "
    "turns otherwise than it prompts for them, and each answer follows its own prompt",
}
# Those that say what is done, and nothing that had better be changed.
AS_IT_SHOULD = {UNROLLED}
