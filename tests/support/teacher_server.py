"""A chat-completions server on a real socket: it writes about the context it is sent, and can misbehave in every way.

It runs in a thread with an event loop of its own and remembers what was asked, when, and what it answered. Whether a
request is refused or answered badly depends on its contents; whether the transport fails depends on the try as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from components.instruct.llm.endpoint import TRIAL

KEY = "sk-of-the-tests-Zq7"
MODEL = "writer-1"


@dataclass
class Manners:
    """Shares of the tries that fail in a way, and of the requests that are answered in a way."""

    too_many: float = 0.0
    retry_after: str = "1"
    broken: float = 0.0
    hang: float = 0.0
    cut: float = 0.0
    half: float = 0.0
    refuse: float = 0.0
    malform: float = 0.0
    unfit: float = 0.0
    """Of the requests, those that get status 400."""
    context: int | None = None
    """Tokens of prompt and answer over which a request gets status 400."""
    failing: int = 0
    """Tries of each request that are answered with status 500 before any other."""
    seconds: float = 0.0
    says: Callable[[str], str] | None = None
    """Writes the answer to a context instead of the server."""
    usage: bool | dict[str, Any] = True
    """Whether tokens are counted, or what is said instead of the count."""


@dataclass(frozen=True)
class Seen:
    """One request as it arrived: when (monotonic seconds), the digest of its body, how it was answered."""

    at: float
    digest: str
    outcome: str
    tokens: int
    body: dict[str, Any]


@dataclass
class TeacherServer:
    """The running server; `manners` may be changed while it runs."""

    port: int
    manners: Manners
    seen: list[Seen] = field(default_factory=list)
    most_under_way: int = 0
    under_way: int = 0
    tries: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answered(self) -> Counter[str]:
        """How often each request was answered, by the digest of its body."""
        return Counter(one.digest for one in self.seen if one.outcome == "answered")

    def given_up(self, faults: Mapping[str, int]) -> int:
        """Time-outs of the client that were not the server's hanging: it answered, but too late for this machine."""
        return faults.get("time-out", 0) - sum(one.outcome == "hang" for one in self.seen)

    def most_within(self, seconds: float, amount: Callable[[Seen], int] = lambda one: 1) -> int:
        """The most of `amount` that arrived within any stretch of so many seconds."""
        times, most, start, total = self.seen, 0, 0, 0
        for one in times:
            total += amount(one)
            while one.at - times[start].at >= seconds:
                total -= amount(times[start])
                start += 1
            most = max(most, total)
        return most


@contextmanager
def teacher_server(manners: Manners | None = None) -> Iterator[TeacherServer]:
    """A server on a free port of 127.0.0.1 until the end of the block."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    server = TeacherServer(0, manners or Manners())
    stop = asyncio.Event()

    async def serve() -> None:
        listening = await asyncio.start_server(lambda r, w: _connection(server, r, w), "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        listening.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


async def _connection(
    server: TeacherServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = re.search(r"content-length: *(\d+)", head, re.I)
            body = await reader.readexactly(int(length[1])) if length else b""
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            try:
                if not await _respond(server, head, body, writer):
                    return
            finally:
                server.under_way -= 1
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        return
    finally:
        writer.close()


async def _respond(server: TeacherServer, head: str, raw: bytes, writer: asyncio.StreamWriter) -> bool:
    """Answer one request; False ends the connection."""
    manners, at = server.manners, time.monotonic()
    if f"bearer {KEY}".lower() not in head.lower():
        given = re.search(r"authorization: *bearer *(\S+)", head, re.I)
        told = f"Incorrect key provided: {given[1] if given else 'none'}"
        return await _send(writer, 401, {"error": {"message": told, "code": "invalid_api_key"}})
    body = json.loads(raw)
    if not head.startswith("POST /v1/chat/completions ") or body["model"] != MODEL:
        return await _send(writer, 404, {"error": {"message": f"The model {body['model']} does not exist"}})
    digest = hashlib.sha256(raw).hexdigest()
    server.tries[digest] += 1
    rng = random.Random(f"{digest} {server.tries[digest]}")
    shares = {name: getattr(manners, name) for name in ("too_many", "broken", "hang", "cut", "half")}
    outcome = rng.choices([*shares, "answered"], [*shares.values(), 1 - sum(shares.values())])[0]
    answer = _answer(body, digest, manners)
    tokens = answer["usage"]["total_tokens"]
    if server.tries[digest] <= manners.failing:
        outcome = "broken"
    room = manners.context is None or answer["usage"]["prompt_tokens"] + body["max_tokens"] <= manners.context
    probe = body["messages"][-1]["content"].startswith(TRIAL)
    if not room or (not probe and random.Random(f"unfit {digest}").random() < manners.unfit):
        outcome = "unfit"
    elif probe:
        outcome = "probe"
    if not manners.usage:
        del answer["usage"]
    elif isinstance(manners.usage, dict):
        answer["usage"] |= manners.usage
    server.seen.append(Seen(at, digest, outcome, tokens, body))
    return await _carry_out(outcome, answer, manners, writer)


async def _carry_out(
    outcome: str, answer: dict[str, Any], manners: Manners, writer: asyncio.StreamWriter
) -> bool:
    if outcome == "too_many":
        headers = {"Retry-After": manners.retry_after}
        return await _send(writer, 429, {"error": {"message": "Slow down"}}, headers)
    if outcome == "broken":
        return await _send(writer, 500, {"error": {"message": "Something broke"}})
    if outcome == "unfit":
        return await _send(
            writer, 400, {"error": {"message": f"maximum context length is {manners.context}"}}
        )
    await asyncio.sleep(3600 if outcome == "hang" else manners.seconds)
    data = json.dumps(answer).encode()
    if outcome == "cut":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + data[:20])
        await writer.drain()
        return False
    return await _send(writer, 200, data[: len(data) // 2] if outcome == "half" else data)


async def _send(
    writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str] | None = None
) -> bool:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    await writer.drain()
    return True


def _answer(body: dict[str, Any], digest: str, manners: Manners) -> dict[str, Any]:
    context = body["messages"][-1]["content"]
    share = random.Random(digest).random()
    if share < manners.refuse:
        text = "I'm sorry, but I can't help with that."
    elif share < manners.refuse + manners.malform:
        text = "Here you are!\n===\nQuestion: What is it?\n===\nIt is a thing.\n===\nQuestion:"
    elif manners.says is not None:
        text = manners.says(context)
    else:
        text = write(kind_of(body["messages"]), context)
    prompt = sum(len(message["content"]) for message in body["messages"]) // 4
    completion = len(text) // 4
    return {
        "id": digest[:12],
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


def kind_of(messages: list[dict[str, str]]) -> str:
    """The type that is asked for, as the examples show it."""
    shown = next((message["content"] for message in messages if message["role"] == "assistant"), "")
    return {0: "detail", 1: "reasoning"}.get(shown.count("Question:"), "conversation")


def write(kind: str, context: str) -> str:
    """What an honest teacher might write about a context: nothing that is not in it."""
    captions = [line[2:] for line in context.splitlines() if line.startswith("- ")]
    told = [f"{caption.rstrip('. ').capitalize()}." for caption in captions]
    words = sorted(
        set(re.findall(r"[a-z]{4,}", " ".join(captions).lower())), key=lambda word: (-len(word), word)
    )
    first = words[0] if words else "thing"
    if kind == "detail":
        return " ".join(told)
    if kind == "reasoning":
        return blocks(
            (
                f"Why could somebody remember the {first} for long?",
                f"To begin with what can be seen: {' '.join(told[:2])}",
            )
        )
    return blocks(
        (f"What is going on around the {first}?", told[0]),
        (f"Could you say more about the {words[-1] if words else first}?", told[-1]),
    )


def blocks(*pairs: tuple[str, str]) -> str:
    """Pairs in the form that is asked for."""
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs)
