"""One try at a real socket: what is an answer, what may pass, and what is never taken in whole."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from components import chat
from components.chat import Chat, Fault, counted, denied, parsed, pause_before, told
from llava.errors import RefusedInput

pytest.importorskip("openai")
KEY = "not-a-real-key-4711"
ANSWER = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
Answer = Callable[[BaseHTTPRequestHandler], None]


def plain(body: bytes, status: int = 200, **headers: str) -> Answer:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def endless(status: int, part: bytes, seconds: float = 0.0) -> Answer:
    """A body without a length, in parts with a pause after each, for as long as somebody reads."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(part)
            time.sleep(seconds)

    return send


@pytest.fixture
def ask() -> Iterator[Callable[..., tuple[int, str]]]:
    """`ask(answer, seconds)`: one try at a server that sends `answer`."""
    servers = []

    def once(answer: Answer, seconds: float = 10.0) -> tuple[int, str]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with suppress(BrokenPipeError, ConnectionResetError):
                    answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"

        async def go() -> tuple[int, str]:
            async with Chat(url, KEY, seconds, f"url={url}") as client:
                return await client.ask({"model": "m", "messages": []}, seconds)

        return asyncio.run(go())

    yield once
    for server in servers:
        server.shutdown()
        server.server_close()


Ask = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("status", [200, 400, 401, 404, 413, 422])
def test_a_final_answer_is_given_without_the_key(ask: Ask, status: int) -> None:
    assert ask(plain(f"you said {KEY}".encode(), status)) == (status, "you said ***")


@pytest.mark.parametrize(
    ("answer", "reason", "pause"),
    [
        (plain(b"", 500), "status 500", None),
        (plain(b"", 503, Retry_After="7"), "status 503", 7.0),
        (plain(b"", 429, Retry_After="-7"), "status 429", 0.0),
        (plain(b"", 429, Retry_After="nan"), "status 429", None),
        (plain(b"", 429, Retry_After="soon"), "status 429", None),
        (plain(b"", 429, Retry_After="Fri, 01 Jan 2021 00:00:00 GMT"), "status 429", 0.0),
        (plain(ANSWER, 200, Content_Length="9999"), "cut connection", None),
    ],
)
def test_what_may_pass_is_a_fault(ask: Ask, answer: Answer, reason: str, pause: float | None) -> None:
    with pytest.raises(Fault) as fault:
        ask(answer)
    assert (fault.value.reason, fault.value.pause) == (reason, pause)


def test_a_used_up_quota_is_final(ask: Ask) -> None:
    status, body = ask(plain(b'{"error": {"code": "insufficient_quota", "message": "pay"}}', 429))
    assert (status, told(body)) == (429, "pay")
    assert denied(status, "m", "$KEY", True) == "the account's quota is used up"


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_body_without_end_is_left(ask: Ask, status: int) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    with pytest.raises(Fault, match=r"over 16 MiB|status 500"):
        ask(endless(status, b"x" * 2**20), 60)
    assert process.memory_info().rss - before < 12 * chat.MOST_BYTES


def test_a_body_that_trickles_ends_at_the_time_that_it_has(ask: Ask) -> None:
    began = time.monotonic()
    with pytest.raises(Fault, match="time-out"):
        ask(endless(200, b" ", 0.05), 1.0)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("status", [200, 400])
def test_a_compressed_body_is_not_unpacked(ask: Ask, status: int) -> None:
    bomb = gzip.compress(b" " * (64 * 2**20))
    with pytest.raises(Fault, match=r"compressed \(gzip\)"):
        ask(plain(bomb, status, Content_Encoding="gzip"))


def test_nobody_there_is_no_connection() -> None:
    async def go() -> None:
        async with Chat("http://127.0.0.1:9/v1", "", 5.0, "x") as client:
            await client.ask({}, 5.0)

    with pytest.raises(Fault, match="no connection"):
        asyncio.run(go())


@pytest.mark.parametrize("url", ["http://localhost:80O0/v1", "http://[::1"])
def test_what_is_no_address_is_refused_by_the_users_name_for_it(url: str) -> None:
    with pytest.raises(RefusedInput, match=r"^judge\.url: is no address"):
        Chat(url, KEY, 1.0, "judge.url")


@pytest.mark.parametrize(
    "number", [-1, math.inf, -math.inf, math.nan, 10**30, 1e300, "7", None, True, [7], {"n": 7}]
)
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
def test_a_count_that_cannot_be_is_none(name: str, number: Any) -> None:
    assert counted({"prompt_tokens": 3, "completion_tokens": 4, name: number}) is None


@pytest.mark.parametrize("usage", [None, [], "7", 7, {}, {"prompt_tokens": 3}])
def test_what_does_not_say_both_counts_is_none(usage: Any) -> None:
    assert counted(usage) is None


def test_counts() -> None:
    assert counted({"prompt_tokens": 3, "completion_tokens": 4.0, "total_tokens": -9}) == (3, 4)


def test_json_that_is_too_deep_is_no_json() -> None:
    with pytest.raises(ValueError, match="too deeply"):
        parsed("[" * 200_000)


def test_pauses_double_up_to_half_a_minute_and_longer_ones_are_asked_for() -> None:
    assert 0.25 <= pause_before(0) <= 0.5 and 15 <= pause_before(50) <= 30
    assert 7 <= pause_before(0, 7.0) <= 9 and pause_before(0, math.inf) < 751
    assert 60 <= pause_before(3, first=120.0) <= 120
