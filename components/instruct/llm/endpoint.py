"""The endpoint: one try, what each of its failures means, and trying again until it has answered.

| what comes back | what it means |
|---|---|
| an answer | belongs to the request: stored, never asked again |
| 400, 413, 422 | belongs to the request: stored and counted as rejected; the next run asks again |
| 429, 408, 409, 5xx, no answer in time, a cut connection, half a body | tried again after a pause, with jitter |
| 401, 402, 403, 404, 429 with "insufficient_quota", any other | the run stops; what was answered is kept |

The pause is what Retry-After asks for, else half a second that doubles up to half a minute.

The key is read from a file or the environment in the process that asks. It goes into the client and nowhere else:
texts that come back are shown without it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from components.contract import without_secret
from components.instruct.llm.limits import WINDOW, Gate, Tokens
from components.instruct.llm.prompts import Message, Prompts, load_prompts
from components.instruct.llm.requests import Request
from components.instruct.llm.responses import Response
from components.instruct.settings import InstructSettings
from llava.errors import LlavaError, RefusedInput

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
LONGEST_ASKED_PAUSE = 600.0
CONNECT_SECONDS = 5.0
PROBE_SECONDS = 60.0
TRIAL = "This only tries the connection: answer with the word yes and nothing else."
_OF_THE_REQUEST = (400, 413, 422)
_PASSING = (408, 409, 425, 429)
_QUOTA = "insufficient_quota"
LOOK_AT = "look at instruct.limit_field, instruct.temperature, instruct.max_tokens and how long a prompt may be there"


class Fault(Exception):
    """A try that brought no answer, for a reason that may pass; `pause`: seconds that the endpoint asks for."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


class Endpoint:
    """One client of one process; use it as `async with`, within one event loop."""

    def __init__(self, settings: InstructSettings) -> None:
        from openai import AsyncOpenAI

        # The client logs addresses at INFO, which Ray would carry to the user a thousand times.
        for name in ("httpx", "httpx2", "openai"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._settings = settings
        self._key, self._from = read_key(settings)
        try:
            self._client = AsyncOpenAI(
                api_key=self._key or "none",
                base_url=settings.base_url,
                max_retries=0,
                timeout=_timeouts(settings.timeout),
            )
        except Exception as error:  # whatever the client's HTTP library raises for such an address
            raise RefusedInput(f"instruct.base_url={settings.base_url}: is no address ({error})") from None
        self._fixed: dict[str, Any] = {"model": settings.model, settings.limit_field: settings.max_tokens}
        if settings.temperature is not None:
            self._fixed["temperature"] = settings.temperature
        self.faults: Counter[str] = Counter()

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def answer(self, request: Request, gate: Gate, asker: int, stop: asyncio.Event) -> Response | None:
        """The response to `request`, however many tries it takes; None if the budget is used up or `stop` is set.

        Raises LlavaError where trying again has no sense, or has had none for `patience` seconds of tries and
        pauses; the time that a request waits at our own gate is not the endpoint's.
        """
        most = Tokens(request.most_prompt_tokens, self._settings.max_tokens)
        tries, in_vain = 0, 0.0
        while not stop.is_set() and (ticket := await gate.admit(asker, most)) is not None:
            used: Tokens | None = None
            began = time.monotonic()
            try:
                status, body, used = await self._try(request.messages, self._settings.timeout)
                seconds = time.monotonic() - began
                return Response(
                    request.digest, request.photo, request.kind, request.shard, status, body, *used, seconds
                )
            except Fault as fault:
                self.faults[fault.reason] += 1
                in_vain += time.monotonic() - began
                if in_vain > self._settings.patience:
                    raise LlavaError(
                        f"{self._settings.base_url} has not answered one request ({request.kind} of "
                        f"{request.photo}) in {self._settings.patience:g} s, the last time: {fault.reason}. What was "
                        "answered is kept; run again when it is better, or raise instruct.patience"
                    ) from None
                pause = _pause(tries, fault.pause)
                tries += fault.pause is None
                in_vain += pause
            finally:
                await gate.settle(ticket, used)
            await _sleep(pause, stop)
        return None

    async def probe(self, messages: list[Message]) -> None:
        """One request with the real settings; RefusedInput, one line, where it cannot be answered."""
        url = self._settings.base_url
        ends = time.monotonic() + PROBE_SECONDS
        for tries in range(100):
            left = min(self._settings.timeout, max(1.0, ends - time.monotonic()))
            try:
                status, body, _ = await self._try(messages, left)
            except Fault as fault:
                pause = _pause(tries, fault.pause)
                if fault.reason == "no connection" or time.monotonic() + pause > ends:
                    raise RefusedInput(
                        f"instruct.base_url={url}: {fault.reason}. Is the endpoint up, and is that its address (most "
                        "end in /v1)?"
                    ) from None
                await asyncio.sleep(pause)
                continue
            except LlavaError as error:
                raise RefusedInput(str(error)) from None
            if status != 200:
                raise RefusedInput(
                    f"instruct.base_url={url}: refuses requests of this form (status {status}: {told(body)}); "
                    f"{LOOK_AT}"
                )
            return

    async def _try(self, messages: list[Message], seconds: float) -> tuple[int, str, Tokens]:
        """(status, body, tokens) of what belongs to the request; raises Fault or LlavaError for the rest."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            # The client's own time-outs are between two pieces of an answer: one that trickles would never end.
            async with asyncio.timeout(seconds):
                # The client's typed method looks at every message twice, which costs more than sending them.
                body = await self._client.post(
                    "/chat/completions", cast_to=str, body={**self._fixed, "messages": messages}
                )
        except TimeoutError:
            raise Fault("time-out") from None
        except APIStatusError as error:
            return self._failed(error.status_code, error.response.text, error.response.headers)
        except APIConnectionError as error:
            if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):
                raise Fault("no connection") from None
            raise Fault("time-out" if isinstance(error, APITimeoutError) else "cut connection") from None
        except UnicodeDecodeError:
            raise Fault("half an answer") from None
        # An endpoint that echoes its request would have the key stored.
        body = without_secret(body, self._key)
        return 200, body, _tokens(body, messages)

    def _failed(self, status: int, body: str, headers: Any) -> tuple[int, str, Tokens]:
        body = without_secret(body, self._key)
        if status in _OF_THE_REQUEST:
            return status, body, Tokens()
        if status >= 500 or (status in _PASSING and _QUOTA not in body):
            raise Fault(f"status {status}", _retry_after(headers))
        url, model = self._settings.base_url, self._settings.model
        known = {
            401: f"the key from {self._from} is refused"
            if self._key
            else f"it wants a key: {self._from} holds none",
            402: "it wants to be paid",
            403: f"the key from {self._from} may not use {model}",
            404: f"there is no model {model!r} there, or no chat completions (most addresses end in /v1)",
            429: "the account's quota is used up",
        }
        raise LlavaError(
            f"{url} answers with status {status}: {known.get(status, 'a status that makes no sense here')} "
            f"({told(body)}). Look at instruct.base_url, instruct.model, instruct.key_env and instruct.key_file"
        ) from None


def read_key(settings: InstructSettings) -> tuple[str, str]:
    """(the key or "", where it was looked for). RefusedInput for a file that cannot be read, or what is no key."""
    place = settings.key_file or f"${settings.key_env}"
    try:
        if settings.key_file is None:
            key = os.environ.get(settings.key_env, "").strip()
        else:
            key = Path(settings.key_file).read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput(
            f"instruct.key_file={settings.key_file}: cannot be read ({type(error).__name__}) on this machine"
        ) from None
    if not (key.isascii() and key.isprintable()):
        raise RefusedInput(
            f"the key from {place} has several lines, or characters that no key has: copy it anew"
        )
    return key, place


def probe(settings: InstructSettings) -> None:
    """Send a request of the form and size that all will have; RefusedInput where it is not answered. Takes seconds.

    What has just passed is not tried again: a try counts among the requests of its minute, and at most one does.
    """
    this = settings, read_key(settings)[0]
    if time.monotonic() - _passed.get(this, -WINDOW) < WINDOW:
        return

    async def once() -> None:
        async with Endpoint(settings) as endpoint:
            await endpoint.probe(_trial(settings, load_prompts(settings.prompts)))

    asyncio.run(once())
    _passed[this] = time.monotonic()


_passed: dict[tuple[InstructSettings, str], float] = {}


def _trial(settings: InstructSettings, prompts: Prompts) -> list[Message]:
    """The longest prompt with the longest of its contexts: as large as a usual request, before any data is there."""
    openings = [prompts.opening(kind) for kind, share in settings.shares.items() if share > 0]
    opening = max(openings, key=_length)
    contexts = [message["content"] for message in opening if message["role"] == "user"]
    return [*opening, {"role": "user", "content": f"{TRIAL}\n\n{max(contexts, key=len, default='')}"}]


def _length(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].encode()) for message in messages)


def _timeouts(seconds: float) -> Any:
    from openai import Timeout

    return Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))


def _tokens(body: str, messages: list[Message]) -> Tokens:
    """Tokens as the endpoint counted them, or by length where it does not say; Fault for what is no answer."""
    try:
        value = json.loads(body)
        content = value["choices"][0]["message"].get("content") or ""
        usage = value.get("usage") or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if prompt is None or completion is None:
            prompt = _length(messages) // 4
            completion = len(content.encode()) // 4
        return Tokens(int(prompt), int(completion))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Fault("half an answer") from None


def told(body: str) -> str:
    """What an error's body tells a person, in one line."""
    try:
        error = json.loads(body).get("error")
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = body
    return " ".join(str(text or "no reason given").split())[:300]


def _retry_after(headers: Any) -> float | None:
    """Seconds of the header Retry-After: a number, or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None


def _pause(tries: int, asked: float | None) -> float:
    """Seconds until the next try: what the endpoint asks for and up to a quarter more, else doubling."""
    if asked is not None:
        asked = min(asked, LONGEST_ASKED_PAUSE)
        return asked + random.uniform(0, 0.1 + asked / 4)
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(tries, 10)) * random.uniform(0.5, 1)


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
