"""A web server that does what the servers of a list of URLs do: answers, hangs, hangs, floods, leads astray."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

LARGE = 2 * 2**20  # bytes of "late", and those after which "drip" drips
_EMPTY = b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class StrangeServer:
    """Listens on `address`; counts requests by path and how many connections were open at once."""

    def __init__(self, picture: bytes, address: str = "127.0.0.2") -> None:
        self.picture, self.address = picture, address
        self.hits: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.hosts: set[str] = set()
        self.open = self.most_open = 0
        self.port = 0
        self.elsewhere = "http://127.0.0.1:1"
        self.pause = 0.0
        self.hangs = False  # whether it hangs whatever it is asked
        self.held = False  # whether bodies of "late" have to wait

    @property
    def url(self) -> str:
        """The address of the server, without a path."""
        return f"http://{self.address}:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[StrangeServer]:
        """Serve from a thread until the block ends."""
        ready = threading.Event()
        stop: list[Callable[[], object]] = []

        async def serve() -> None:
            server = await asyncio.start_server(self._connection, self.address, self.port)
            self.port = server.sockets[0].getsockname()[1]
            ended, loop = asyncio.Event(), asyncio.get_running_loop()
            stop.append(lambda: loop.call_soon_threadsafe(ended.set))
            ready.set()
            await ended.wait()
            server.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            stop[0]()
            thread.join(10)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            path = head.split(" ")[1]
            headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            self.hits[path] += 1
            self.agents.add(headers["User-Agent"])
            self.hosts.add(headers["Host"])
            await asyncio.sleep(self.pause)
            await self._answer(path, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        kind = "hang" if self.hangs else path.strip("/").partition("?")[0].partition("-")[0]
        if kind in ("flaky", "busy") and self.hits[path] > 1:
            kind = "ok"
        goals = {
            "moved": "/ok-moved.jpg",
            "round": path,
            "loopback": f"{self.elsewhere}/secret",
            "name": self.elsewhere.replace("127.0.0.1", "localhost") + "/secret",
            "private": "http://10.1.2.3/secret",
            "metadata": "http://169.254.169.254/latest",
            "six": "http://[::ffff:127.0.0.1]/secret",
            "file": "file:///etc/passwd",
        }
        whole = b"Content-Length: %d\r\n\r\n" % len(self.picture) + self.picture
        bodies = {
            "ok": b"Content-Type: image/jpeg\r\n" + whole,
            "typed": b"Content-Type: text/plain\r\n" + whole,
            "html": b"Content-Type: text/html; charset=utf-8\r\n\r\n<html>" + b"x" * 50_000,
            "junk": b"Content-Type: image/jpeg\r\n\r\nno picture",
            "cut": b"Content-Length: 1000\r\n\r\nshort",
            "announced": b"Content-Length: 10000000000\r\n\r\n",
            "endless": b"\r\n",
            "slow": b"\r\n",
            "late": b"Content-Length: %d\r\n\r\n" % LARGE,
            "drip": b"\r\n" + bytes(LARGE),
        }
        statuses = {
            "flaky": "503 Later",
            "busy": "429 Slow down\r\nRetry-After: 1",
            "closed": "429 Slow down\r\nRetry-After: 3600",
        }
        if kind in bodies:
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + bodies[kind])
        elif kind in goals:
            writer.write(_EMPTY % f"302 Found\r\nLocation: {goals[kind]}".encode())
        elif kind == "garbage":
            writer.write(b"\x00\x01\x02 what is this\r\n\r\n")
        elif kind != "hang":
            writer.write(_EMPTY % statuses.get(kind, f"{kind} No").encode())
        if kind in ("hang", "announced"):
            await asyncio.sleep(60)
        while kind == "late" and self.held:
            await asyncio.sleep(0.01)
        if kind == "late":
            writer.write(bytes(LARGE))
        while kind in ("endless", "slow", "drip"):
            piece = b"\xff" * (65_536 if kind == "endless" else 1)
            writer.write(piece)
            self.sent[path] += len(piece)
            await writer.drain()
            await asyncio.sleep(0 if kind == "endless" else 0.05)
