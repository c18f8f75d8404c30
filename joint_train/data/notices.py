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
    UNTHOUGHT: "answers that the template renders without their thinking, and that are trained so: {count}. To "
    "train it set chat_template_kwargs (for Gemma 4 {{enable_thinking: true}}) for the source or for all data",
    UNASKED: "answers without thinking, though it is turned on: {count}. The model learns to answer without it",
    OTHER_PROMPT: "answers after a text that isn't the template's generation prompt: {count}",
    ENDLESS: "answers that end without a token that closes the turn, since the template writes none: {count}. The "
    "model isn't taught to stop",
    UNSHOWN_TOOLS: "examples whose tools the template doesn't show: {count}",
    UNROLLED: "conversations that are a document for each answer, since the template renders earlier turns otherwise "
    "than it prompts for them: {count}",
}
# Those that say what is done, and nothing that had better be changed.
AS_IT_SHOULD = {UNROLLED}
