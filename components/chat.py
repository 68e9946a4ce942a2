"""A client of the chat-completions protocol, for whoever asks a model behind an endpoint: the teacher and the judge.

| what comes back | what the client makes of it |
|---|---|
| any answer that is final | (status, body): 200, or a 4xx that is about the request, the key or the address |
| 429, 408, 409, 425, 5xx | `Fault`, with the pause that Retry-After asks for |
| no answer in time, a cut connection, a body that is too long or compressed | `Fault` |

The client tries once: whether it is worth another try, and how often, its caller knows. The key goes into the client
and nowhere else: bodies are given without it, since an endpoint may echo its request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any, Self, TypeGuard

from components.contract import without_secret
from llava.data.jsonl import from_json
from llava.errors import RefusedInput

CONNECT_SECONDS = 5.0
MOST_BYTES = 16 * 2**20
"""Of a body. The longest answer of today's models is far below a mebibyte."""
MOST_TOKENS = 10**8
"""That one answer can have taken; more is no count."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
LONGEST_ASKED_PAUSE = 600.0
_PASSING = (408, 409, 425, 429)
_QUOTA = "insufficient_quota"
_NO_CONNECTION = ("ConnectError", "ConnectTimeout")


class Fault(Exception):
    """A try that brought no answer, for a reason that may pass; `pause`: seconds that the endpoint asks for."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


class _Refused(Exception):
    """A body that is not read to its end; the text says why."""


def require_openai(named: str = "a judge") -> None:
    """RefusedInput where the OpenAI client is not installed; `named`: what needs it."""
    if find_spec("openai") is None:
        raise RefusedInput(f"{named}: asking a model needs the OpenAI client: pip install openai")


class Chat:
    """One client of one process; use it as `async with`, within one event loop.

    `base_url`: None is OPENAI_BASE_URL, or OpenAI's own; `named`: what the user called it by, for `RefusedInput`.
    """

    def __init__(self, base_url: str | None, key: str, seconds: float, named: str) -> None:
        require_openai(named)
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        # The client logs addresses at INFO, which Ray would carry to the user a thousand times.
        for name in ("httpx", "httpx2", "openai"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._key = key
        timeouts: Any = Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        try:
            self._client = AsyncOpenAI(
                api_key=key or "none",
                base_url=base_url,
                max_retries=0,
                timeout=timeouts,
                default_headers={"Accept-Encoding": "identity"},
                http_client=DefaultAsyncHttpxClient(event_hooks={"response": [_bound]}),
            )
        except Exception as error:  # whatever the client's HTTP library raises for such an address
            raise RefusedInput(f"{named}: is no address ({error}); most look like http://HOST/v1") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(self, body: Mapping[str, Any], seconds: float) -> tuple[int, str]:
        """(status, body) of one try that may last `seconds`. Raises `Fault` for what may pass."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            # The client's own time-outs are between two pieces of an answer: one that trickles would never end.
            async with asyncio.timeout(seconds):
                # The client's typed method looks at every message twice, which costs more than sending them.
                answer = await self._client.post("/chat/completions", cast_to=str, body=dict(body))
        except TimeoutError:
            raise Fault("time-out") from None
        except APIStatusError as error:
            return self._failed(error.status_code, error.response.text, error.response.headers)
        except _Refused as error:
            raise Fault(str(error)) from None
        except APIConnectionError as error:
            if isinstance(error.__cause__, _Refused):
                raise Fault(str(error.__cause__)) from None
            if type(error.__cause__).__name__ in _NO_CONNECTION:
                raise Fault("no connection") from None
            raise Fault("time-out" if isinstance(error, APITimeoutError) else "cut connection") from None
        except UnicodeDecodeError:
            raise Fault("half an answer") from None
        return 200, without_secret(answer, self._key)

    def _failed(self, status: int, body: str, headers: Any) -> tuple[int, str]:
        if status >= 500 or (status in _PASSING and _QUOTA not in body):
            raise Fault(f"status {status}", _retry_after(headers))
        return status, without_secret(body, self._key)


def parsed(body: str) -> Any:
    """The JSON of a body. Raises `ValueError` for what is none, however deep it is."""
    return from_json(body)


def counted(usage: Any) -> tuple[int, int] | None:
    """(tokens of the prompt, of the answer) of a `usage` that says both; None for what no count can be."""
    if not isinstance(usage, dict):
        return None
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (int(prompt), int(answer)) if _is_count(prompt) and _is_count(answer) else None


def _is_count(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and 0 <= value <= MOST_TOKENS


def denied(status: int, model: str, key_from: str, with_key: bool) -> str:
    """What a final status other than 200 means for somebody who asked `model` with the key from `key_from`."""
    known = {
        401: f"the key from {key_from} is refused" if with_key else f"it wants a key: {key_from} holds none",
        402: "it wants to be paid",
        403: f"the key from {key_from} may not use {model}",
        404: f"there is no model {model!r} there, or no chat completions (most addresses end in /v1)",
        429: "the account's quota is used up",
    }
    return known.get(status, "a status that makes no sense here")


def told(body: str) -> str:
    """What an error's body tells a person, in one line."""
    try:
        error = parsed(body).get("error")
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = body
    return " ".join(str(text or "no reason given").split())[:300]


def pause_before(tries: int, asked: float | None = None, first: float = FIRST_PAUSE) -> float:
    """Seconds until the next try: what the endpoint asks for and up to a quarter more, else `first`, doubling."""
    if asked is not None:
        asked = min(asked, LONGEST_ASKED_PAUSE)
        return asked + random.uniform(0, 0.1 + asked / 4)
    return min(max(LONGEST_PAUSE, first), first * 2.0 ** min(tries, 10)) * random.uniform(0.5, 1)


def _retry_after(headers: Any) -> float | None:
    """Seconds of the header Retry-After: a number, or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)


async def _bound(response: Any) -> None:
    """Have a body end with an error where it is compressed (a small one may become a large one), or too long."""
    encoding = response.headers.get("content-encoding", "identity")
    why = "" if encoding.lower() in ("", "identity") else f"an answer that is compressed ({encoding[:20]})"
    response.stream = _bounded(response, why)


def _bounded(response: Any, why: str) -> Any:
    """The response's stream with an end. The HTTP library, which is the client's choice, wants one of its own kind."""
    library: Any = sys.modules[type(response).__module__.partition(".")[0]]
    inner = response.stream

    class Bounded(library.AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            if why:
                raise _Refused(why)
            async for part in inner:
                size += len(part)
                if size > MOST_BYTES:
                    raise _Refused(f"an answer of over {MOST_BYTES // 2**20} MiB")
                yield part

        async def aclose(self) -> None:
            await inner.aclose()

    return Bounded()
