"""The connection to a running engine, for those who have it answer and those who measure it."""

import os
import time
from collections.abc import Callable
from typing import Any

import httpx

BUSY = (408, 409, 425, 429, 500, 502, 503, 504)  # a later request may get through
LONGEST_WAIT = 30.0


def address(url: str) -> str:
    """An engine's address, which may be given with the ``/v1`` of its API."""
    return url.rstrip("/").removesuffix("/v1")


def connect(url: str, timeout: float) -> httpx.Client:
    """A client for the engine at this address, with ``OPENAI_API_KEY``, if it is set, as the bearer token.

    Args:
        timeout: seconds that a request may take.
    """
    key = os.environ.get("OPENAI_API_KEY")
    return httpx.Client(
        base_url=address(url),
        timeout=httpx.Timeout(timeout, connect=min(10.0, timeout)),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=None),
    )


def ask(
    client: httpx.Client,
    method: str,
    path: str,
    *,
    attempts: int,
    errors: tuple[type[httpx.HTTPError], ...] = (),
    waiting: Callable[[httpx.Response | None, float], None] = lambda response, seconds: None,
    **request: Any,
) -> httpx.Response:
    """The response to a request, which is made again after a pause where the engine is busy: 1, 2, 4, … seconds, or
    what its ``Retry-After`` says, at most :data:`LONGEST_WAIT`.

    Args:
        attempts: of them all; the last one's response or error is the answer.
        errors: after which it is made again as well.
        waiting: is called before each pause, with the response, None after an error, and the seconds.
    """
    for attempt in range(attempts):
        last, response, pause = attempt == attempts - 1, None, min(2.0**attempt, LONGEST_WAIT)
        try:
            response = client.request(method, path, **request)
        except errors:
            if last:
                raise
        else:
            if last or response.status_code not in BUSY:
                return response
            after = response.headers.get("Retry-After", "")
            pause = min(float(after), LONGEST_WAIT) if after.isdecimal() else pause
        waiting(response, pause)
        time.sleep(pause)
    raise AssertionError("at least one attempt")
