"""The teacher's endpoint: what an answer to each request means, and trying again until it has answered.

| what comes back (see `components.chat`) | what it means |
|---|---|
| an answer | belongs to the request: stored, never asked again |
| 400, 413, 422 | belongs to the request: stored and counted as rejected; the next run asks again |
| a fault, or half an answer | tried again after a pause |
| 401, 402, 403, 404, 429 with "insufficient_quota", any other | the run stops; what was answered is kept |

The key is read from a file or the environment in the process that asks.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.chat import Chat, Fault, counted, denied, parsed, pause_before, told
from components.instruct.llm.limits import WINDOW, Gate, Tokens
from components.instruct.llm.prompts import Message, Prompts, load_prompts
from components.instruct.llm.requests import Request
from components.instruct.llm.responses import Response
from components.instruct.settings import InstructSettings
from llava.errors import LlavaError, RefusedInput

PROBE_SECONDS = 60.0
TRIAL = "This only tries the connection: answer with the word yes and nothing else."
_OF_THE_REQUEST = (400, 413, 422)
LOOK_AT = "look at instruct.limit_field, instruct.temperature, instruct.max_tokens and how long a prompt may be there"


class Endpoint:
    """One client of one process; use it as `async with`, within one event loop."""

    def __init__(self, settings: InstructSettings) -> None:
        self._settings = settings
        self._key, self._from = read_key(settings)
        self._chat = Chat(
            settings.base_url, self._key, settings.timeout, f"instruct.base_url={settings.base_url}"
        )
        self._fixed: dict[str, Any] = {"model": settings.model, settings.limit_field: settings.max_tokens}
        if settings.temperature is not None:
            self._fixed["temperature"] = settings.temperature
        self.faults: Counter[str] = Counter()
        """Tries without an answer, by reason."""
        self.uncounted: Counter[str] = Counter()
        """Answers whose `usage` cannot be a count, by field: their tokens are taken from their length."""

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._chat.close()

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
                pause = pause_before(tries, fault.pause)
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
                pause = pause_before(tries, fault.pause)
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
        status, body = await self._chat.ask({**self._fixed, "messages": messages}, seconds)
        if status == 200:
            return status, body, self._tokens(body, messages)
        if status in _OF_THE_REQUEST:
            return status, body, Tokens()
        url, model = self._settings.base_url, str(self._settings.model)
        raise LlavaError(
            f"{url} answers with status {status}: {denied(status, model, self._from, bool(self._key))} "
            f"({told(body)}). Look at instruct.base_url, instruct.model, instruct.key_env and instruct.key_file"
        )

    def _tokens(self, body: str, messages: list[Message]) -> Tokens:
        """Tokens as the endpoint counted them, or by length where it does not say; Fault for what is no answer."""
        try:
            value = parsed(body)
            content = value["choices"][0]["message"].get("content") or ""
            by_length = Tokens(_length(messages) // 4, len(content.encode(errors="replace")) // 4)
            usage = value.get("usage")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Fault("half an answer") from None
        found = counted(usage)
        if found is None and usage:
            self.uncounted["usage"] += 1
        return by_length if found is None else Tokens(*found)


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


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
