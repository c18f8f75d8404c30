"""The connection to a running engine, for those who have it answer and those who measure it."""

import os

import httpx


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
