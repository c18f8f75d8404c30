"""Clients of running vLLM, SGLang and llama.cpp servers: completions of token ids, and what the engine counted
meanwhile. A prompt with pictures goes to vLLM as a chat, whose rendered tokens are compared with the prompt's.

vLLM and llama.cpp count verifications and accepted drafts in Prometheus counters of the whole server (``/metrics``); a
phase of a measurement is the difference of two readings, which must account for exactly the tokens that the phase
received.
SGLang's Prometheus metrics hold only a windowed mean, but every answer of its own API (``/generate``) has the
request's counts.
"""

import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from joint_train.data.engine_chat import chat_body, check_prompt
from joint_train.data.engine_client import BUSY, address, ask, connect
from joint_train.errors import JointTrainError
from joint_train.evaluate.prompts import Prompt

log = logging.getLogger(__name__)

ATTEMPTS = 4  # at a request while the server is busy
COUNTED_WITHIN = 10.0  # seconds after the last answer in which the counters must have its tokens


class EngineError(JointTrainError, ValueError):
    """A server can't be measured: the message says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """One completion: ``tokens`` new tokens with the end token, if any; ``seconds`` from request to answer."""

    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Phase:
    """Requests that were made together.

    Attributes:
        answers: in the order of the prompts.
        seconds: from the first request to the last answer.
        verifications: forwards of the base that had drafts to verify, over all requests.
        accepted: for each draft position, how many verifications accepted that draft and all before it.
    """

    answers: list[Answer]
    seconds: float
    verifications: int
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def settled(self) -> int:
        """Tokens that verifications settled: all but the first of each answer, which the prompt's forward gives."""
        return self.tokens - sum(answer.tokens > 0 for answer in self.answers)


@dataclass(frozen=True)
class Request:
    """How every prompt is completed."""

    max_new_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = False
    seed: int = 0


class Engine:
    """A running server.

    Args:
        url: its address; ``/v1`` at the end is left out.
        timeout: seconds that a request may take.

    ``OPENAI_API_KEY``, if set, is sent as the bearer token.

    Raises:
        EngineError: if the server can't be reached or isn't one of this engine with a drafter.
    """

    name = ""
    takes_pictures = False
    num_steps: int  # K, drafts for a verification, as the server says
    tokenizer: Any = None  # of the prompts, for those with pictures

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        self.url, self.client, self.timeout = address(url), connect(url, timeout), timeout
        with self._understood():
            served = self.call("GET", "/v1/models").json()["data"][0]
            self.model: str = served["id"]  # the name that requests have to give
            self.folder: str = served.get("root") or served["id"]

    def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = ask(self.client, method, path, attempts=ATTEMPTS, waiting=self._say_waiting, **kwargs)
        except httpx.ReadTimeout:
            raise EngineError(f"{method} {self.url}{path}: no answer within --timeout={self.timeout:g} s.") from None
        except httpx.HTTPError as e:
            raise EngineError(f"{method} {self.url}{path}: {type(e).__name__}: {e}. Is the server running?") from e
        if response.is_error:
            times = f" ({ATTEMPTS} times)" if response.status_code in BUSY else ""
            said = " ".join(response.text.split())[:300]
            raise EngineError(f"{method} {self.url}{path}: HTTP {response.status_code}{times}: {said}")
        return response

    def _say_waiting(self, response: httpx.Response | None, seconds: float) -> None:
        status = "no answer" if response is None else f"HTTP {response.status_code}"
        log.warning("%s: %s; asked again in %.0f s, which the measured times include", self.url, status, seconds)

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """An answer that lacks what is read of it is an error of the server's."""
        try:
            yield
        except JointTrainError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as e:
            raise EngineError(
                f"{self.url} answers otherwise than {self.name} does ({type(e).__name__}: {e}): is it another engine, "
                "or is something in between, which leaves parts of the answers out?"
            ) from e

    def run(self, prompts: Sequence[Prompt], request: Request, concurrency: int) -> Phase:
        """Complete prompts, ``concurrency`` of them at a time."""
        raise NotImplementedError

    def _complete_concurrently(self, complete, prompts: Sequence[Prompt], request: Request, concurrency: int) -> tuple:
        """What ``complete(prompt, request)`` returns for each prompt, and the seconds that all of them took."""
        started = time.perf_counter()
        with self._understood(), ThreadPoolExecutor(concurrency) as pool:
            done = list(pool.map(complete, prompts, itertools.repeat(request)))
        return done, time.perf_counter() - started


class Counting(Engine):
    """A server with Prometheus counters.

    Attributes:
        prefix: of its counters.
        generated: its counter of generated tokens.
        without_counters, without_drafter: what to do where there are none.
    """

    prefix = ""
    generated = ""
    without_counters = ""
    without_drafter = ""

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        super().__init__(url, timeout)
        self.num_steps = len(self._positions(self.counters()))

    def run(self, prompts: Sequence[Prompt], request: Request, concurrency: int) -> Phase:
        before = self.counters()
        answers, seconds = self._complete_concurrently(self._complete, prompts, request, concurrency)
        expected, deadline = sum(answer.tokens for answer in answers), time.monotonic() + COUNTED_WITHIN
        while True:
            counted = self.counters()
            counted.subtract(before)
            if counted[self.generated] >= expected or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if counted[self.generated] != expected:
            raise EngineError(
                f"{self.url} counted {counted[self.generated]} generated tokens while {expected} were received: "
                "something else is using the server, so its counters say nothing about this measurement. Measure a "
                "server that nobody else uses."
            )
        return Phase(answers, seconds, self._verifications(answers, counted), self._positions(counted))

    def _verifications(self, answers: Sequence[Answer], counted: Counter) -> int:
        return counted["spec_decode_num_drafts"]

    def counters(self) -> Counter:
        """The server's counters of generated tokens, verifications and accepted drafts, summed over its engines."""
        from prometheus_client.parser import text_string_to_metric_families

        found: Counter = Counter()
        for family in text_string_to_metric_families(self.call("GET", "/metrics").text):
            for sample in family.samples:
                name: str | int = sample.name.removeprefix(self.prefix).removesuffix("_total")
                if name == "spec_decode_num_accepted_tokens_per_pos":
                    name = int(sample.labels["position"])
                elif name not in (self.generated, "spec_decode_num_drafts"):
                    continue
                found[name] += int(sample.value)
        if self.generated not in found:
            raise EngineError(f"{self.url}/metrics has no {self.prefix}{self.generated}: {self.without_counters}")
        if "spec_decode_num_drafts" not in found:
            raise EngineError(
                f"{self.url} serves {self.model} without a drafter (no {self.prefix}spec_decode_num_drafts in "
                f"/metrics): start it with {self.without_drafter}; without --url this command prints how."
            )
        return found

    @staticmethod
    def _positions(counters: Counter) -> list[int]:
        return [counters[position] for position in sorted(key for key in counters if isinstance(key, int))]

    def _complete(self, prompt: Prompt, request: Request) -> Answer:
        raise NotImplementedError


class VLLM(Counting):
    """A ``vllm serve``."""

    name = "vllm"
    takes_pictures = True
    prefix = "vllm:"
    generated = "generation_tokens"
    without_counters = (
        "it isn't a vLLM server, or one with --disable-log-stats. For SGLang give --engine sglang, for llama.cpp "
        "--engine llamacpp."
    )
    without_drafter = "--speculative-config"

    def _complete(self, prompt: Prompt, request: Request) -> Answer:
        started = time.perf_counter()
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": request.temperature,
            "top_p": 1.0,
            "ignore_eos": request.ignore_eos,
            "seed": request.seed,
        }
        if prompt.chat is None:
            body |= {"prompt": prompt.ids, "max_tokens": request.max_new_tokens}
            answer = self.call("POST", "/v1/completions", json=body).json()
            text = answer["choices"][0]["text"]
        else:
            body |= chat_body(prompt.chat, self.tokenizer)
            body |= {"max_completion_tokens": request.max_new_tokens, "return_token_ids": True}
            answer = self.call("POST", "/v1/chat/completions", json=body).json()
            check_prompt(self.url, f"the prompt {prompt.text[:40]!r}", self.tokenizer, prompt.ids, answer)
            message = answer["choices"][0]["message"]
            text = "".join(message.get(part) or "" for part in ("reasoning", "content"))
        return Answer(text, answer["usage"]["completion_tokens"], time.perf_counter() - started)


class LlamaCpp(Counting):
    """A ``llama-server --metrics``.

    Its counters leave out forwards without drafts, such as the last one before the limit; with one request at a time
    they are found from the tokens that nothing else accounts for. Like vLLM's they count accepted drafts behind an end
    token, which can hide such a forward where several requests are served at a time.
    """

    name = "llamacpp"
    prefix = "llamacpp:"
    generated = "tokens_predicted"
    without_counters = "it isn't a llama.cpp server. For vLLM give --engine vllm, for SGLang --engine sglang."
    without_drafter = "-md and --spec-type draft-mtp"

    def counters(self) -> Counter:
        try:
            found = super().counters()
        except EngineError as error:
            if "HTTP 501" in str(error):
                raise EngineError(f"{self.url} shows no counters: start it with --metrics.") from None
            raise
        if not self._positions(found) and not found[self.generated]:  # they appear with the first draft
            self.call("POST", "/completion", json={"prompt": "a", "n_predict": 8, "ignore_eos": True})
            found = super().counters()
        if not self._positions(found):
            raise EngineError(f"{self.url} has drafted nothing: start it with {self.without_drafter}.")
        return found

    def _verifications(self, answers: Sequence[Answer], counted: Counter) -> int:
        drafted, accepted = counted["spec_decode_num_drafts"], sum(self._positions(counted))
        settled = sum(answer.tokens for answer in answers) - sum(answer.tokens > 0 for answer in answers)
        return drafted + max(0, settled - accepted - drafted)

    def _complete(self, prompt: Prompt, request: Request) -> Answer:
        started = time.perf_counter()
        body = {
            "prompt": prompt.ids,
            "n_predict": request.max_new_tokens,
            "temperature": request.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "ignore_eos": request.ignore_eos,
            "seed": request.seed,
            "cache_prompt": False,
        }
        answer = self.call("POST", "/completion", json=body).json()
        return Answer(answer["content"], answer["tokens_predicted"], time.perf_counter() - started)


class SGLang(Engine):
    """A ``sglang serve``."""

    name = "sglang"

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        super().__init__(url, timeout)
        self.num_steps = int(self.call("GET", "/server_info").json().get("speculative_num_steps") or 0)
        if not self.num_steps:
            raise EngineError(
                f"{self.url} serves {self.model} without a drafter (no speculative_num_steps in /server_info): start "
                "it with --speculative-draft-model-path; without --url this command prints how."
            )

    def run(self, prompts: Sequence[Prompt], request: Request, concurrency: int) -> Phase:
        done, seconds = self._complete_concurrently(self._complete, prompts, request, concurrency)
        verifications, accepted = 0, [0] * self.num_steps
        for _, info in done:
            verifications += info.get("spec_verify_ct", 0)
            # How many verifications accepted 0, 1, 2, … drafts.
            histogram = info.get("spec_accept_histogram", info.get("spec_correct_drafts_histogram", []))
            for k in range(self.num_steps):
                accepted[k] += sum(histogram[k + 1 :])
        return Phase([answer for answer, _ in done], seconds, verifications, accepted)

    def _complete(self, prompt: Prompt, request: Request) -> tuple[Answer, dict[str, Any]]:
        started = time.perf_counter()
        sampling = {
            "max_new_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "ignore_eos": request.ignore_eos,
            "sampling_seed": request.seed,
        }
        answer = self.call("POST", "/generate", json={"input_ids": prompt.ids, "sampling_params": sampling}).json()
        seconds, info = time.perf_counter() - started, answer["meta_info"]
        if info["completion_tokens"] > 1 and "spec_verify_ct" not in info:
            raise EngineError(f"{self.url} answers without spec_verify_ct in its meta_info: it drafted nothing.")
        return Answer(answer["text"], info["completion_tokens"], seconds), info


ENGINES = {engine.name: engine for engine in (VLLM, SGLang, LlamaCpp)}
