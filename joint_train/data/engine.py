"""Answers from an engine that serves the base: vLLM or SGLang, by their OpenAI API.

A prompt goes to ``/v1/completions`` as the token ids that training and the base in this process would have, so neither
the engine's chat template nor its parsers of thoughts and tool calls matter. One with pictures has to go to
``/v1/chat/completions``, whose prompt the engine renders itself; where it says which tokens these were (vLLM does),
they are compared with training's.

An answer comes back as token ids from vLLM, as text with its special tokens from SGLang.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from joint_train.data.engine_chat import chat_body, check_prompt
from joint_train.data.engine_client import BUSY, address, ask, connect
from joint_train.data.regenerate import Answered, Sampling, message_of
from joint_train.data.render import options_of
from joint_train.data.thinking import prompt_ids
from joint_train.errors import DataError

ATTEMPTS = 7  # at a request that a later one may get through: about a minute, with the waits between them
NOT_THE_PROMPTS_FAULT = (401, 403, 404, 405)
ENDED = ("stop", "tool_calls", "function_call")


class EngineStopped(DataError):
    """The engine can't be asked any more."""


class Engine:
    """A running engine as an :class:`joint_train.data.regenerate.Answerer`.

    Args:
        url: its address; ``/v1`` at the end is left out.
        tokenizer: the base's, with a chat template.
        name: of the base, as for the base in this process.
        ends: tokens that end an answer.
        suppressed: tokens that the base's generation configuration never lets it write: an answer with one is counted
            as refused, where the engine says which tokens it wrote.
        model: the name that requests give, where the engine serves several models.
        concurrency: requests at a time.
        timeout: seconds that a request may take.

    ``OPENAI_API_KEY``, if set, is sent as the bearer token.

    Attributes:
        served: what the engine calls the model, and where it has it from.

    Raises:
        DataError: it can't be reached, or serves several models and none was named.
    """

    def __init__(
        self,
        url: str,
        tokenizer,
        sampling: Sampling,
        *,
        name: str,
        ends: Sequence[int],
        suppressed: Sequence[int] = (),
        model: str | None = None,
        concurrency: int = 64,
        timeout: float = 1800.0,
    ) -> None:
        self.url, self.name = address(url), name
        self.tokenizer, self.sampling = tokenizer, sampling
        self.ends, self.suppressed, self.concurrency = list(ends), frozenset(suppressed), concurrency
        self.client = connect(url, timeout)
        served = self._models()
        found = served[0] if model is None and len(served) == 1 else {m["id"]: m for m in served}.get(model)
        if found is None:
            names = ", ".join(m["id"] for m in served)
            raise DataError(f"{self.url} serves {names}: name the one that is to answer with --model")
        self.model: str = found["id"]
        root = found.get("root")
        self.served = self.model if root in (None, self.model) else f"{self.model} (from {root})"
        self.most: int | None = found.get("max_model_len")

    def _models(self) -> list[dict]:
        try:
            response = self.client.get("/v1/models")
        except httpx.HTTPError as error:
            raise EngineStopped(f"{self.url} can't be reached: {_said(error)}. Is the engine running?") from error
        if response.is_error:
            raise EngineStopped(f"GET {self.url}/v1/models: {_reason(response)}")
        try:
            return [{**model, "id": model["id"]} for model in response.json()["data"]]
        except (LookupError, TypeError, ValueError):
            said = response.text[:200]
            raise EngineStopped(
                f"GET {self.url}/v1/models answers no list of models: {said!r}. Is it the engine's address?"
            ) from None

    def answers(self, asked: Sequence[tuple[int, dict]]) -> Iterator[list[tuple[int, Answered]]]:
        """Answers as they come, ``concurrency`` prompts at a time.

        Raises:
            DataError: a prompt that can't be rendered, or an engine that is gone; what was answered stays.
        """
        left, running = iter(asked), dict[Future, int]()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            while True:
                for index, example in left:  # rendered in this thread: the limits of templates need the main one
                    prompt = prompt_ids(self.tokenizer, example["messages"], **options_of(example))
                    chat = chat_body(example, self.tokenizer) if "images" in example else None
                    running[pool.submit(self._answer, index, prompt, chat)] = index
                    if len(running) >= 2 * self.concurrency:
                        break
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                yield [(running.pop(future), future.result()) for future in list(done) if not future.exception()]
                for future in done:
                    future.result()  # an error is raised once the others' answers are kept
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, index: int, prompt: list[int], chat: dict[str, Any] | None) -> Answered:
        sampling = self.sampling
        most = sampling.max_new_tokens if self.most is None else min(sampling.max_new_tokens, self.most - len(prompt))
        if most < 1:
            return Answered(None, refused=f"the prompt doesn't fit the engine's {self.most} positions")
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": sampling.seed + index,
            "stop_token_ids": self.ends,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "no_stop_trim": True,  # SGLang, where it has the text only
        }
        if chat is None:
            answer = self._post("/v1/completions", {**body, "prompt": prompt, "max_tokens": most})
        else:
            answer = self._post("/v1/chat/completions", {**body, **chat, "max_completion_tokens": most})
        if isinstance(answer, str):
            return Answered(None, refused=answer)
        choice = answer["choices"][0]
        if chat is not None:
            check_prompt(self.url, f"prompt {index}", self.tokenizer, prompt, answer)
        return self._read(choice, answer.get("usage") or {})

    def _read(self, choice: dict, usage: dict) -> Answered:
        tokens, reason = choice.get("token_ids"), choice.get("finish_reason")
        count = len(tokens) if tokens is not None else usage.get("completion_tokens", 0)
        if reason == "length":
            return Answered(None, count)
        if reason not in ENDED:
            return Answered(None, count, f"finish_reason {reason}")
        ends = {*self.ends, *[x for x in (choice.get("stop_reason"), choice.get("matched_stop")) if isinstance(x, int)]}
        if tokens is not None:
            if written := self.suppressed.intersection(tokens):  # a bias is refused by engines that draft
                names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(written)))
                return Answered(None, count, f"the answer has {names}, which suppress_tokens of the base rules out")
            end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
            return Answered(message_of(self.tokenizer.decode(tokens[:end])), count)
        text = choice["message"].get("content") or "" if "message" in choice else choice["text"]
        for end in ends:
            written = self.tokenizer.decode([end])
            special = end in self.tokenizer.all_special_ids or end in self.tokenizer.added_tokens_decoder
            text = text.split(written, 1)[0] if special and written else text.removesuffix(written)
        return Answered(message_of(text), count)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | str:
        """The engine's answer, or why it refuses the prompt.

        Raises:
            EngineStopped: it can't be reached any more, or refuses everybody.
        """
        try:
            response = ask(self.client, "POST", path, attempts=ATTEMPTS, errors=(httpx.HTTPError,), json=body)
        except httpx.HTTPError as error:
            said = _said(error)
        else:
            said = _reason(response)
            if response.is_success:
                answer = _object(response)
                return answer if answer.get("choices") else said
            if response.status_code in NOT_THE_PROMPTS_FAULT:
                raise EngineStopped(f"POST {self.url}{path}: {said}")
            if response.status_code not in BUSY:
                return said
        try:
            self._models()
        except EngineStopped as error:
            raise EngineStopped(
                f"{error} The last request ended with: {said}. The answers so far are kept: the same command goes on."
            ) from None
        return f"{said} ({ATTEMPTS} times)"  # others get answers, so it is this prompt


def _object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a response, or an empty one."""
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _reason(response: httpx.Response) -> str:
    body = _object(response)
    error = body.get("error")
    message = body.get("message") or (error.get("message") if isinstance(error, dict) else error) or response.text
    return f"HTTP {response.status_code}: {' '.join(str(message).split())[:200]}"


def _said(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
