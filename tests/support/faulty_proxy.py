"""A proxy before a real server that refuses, answers errors, loses answers and cuts bodies, as the test tells it."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PASS, CUT, LOST, GONE, LATE = "pass", "cut", "lost", "gone", "late"
"""Forward; forward and send half of the body; forward and send nothing; neither forward nor answer; answer
nothing, and forward right before the next request of that path."""

Manners = Callable[[str, str], "str | int"]
"""By method and path: one of the above, or the status of an error that is answered without forwarding. A negative
status is answered after forwarding: what was asked for is done, and nobody is told."""


class FaultyProxy:
    """Listens on a port of its own; `manners` says what becomes of a request."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.manners: Manners = lambda method, path: PASS
        self.met = 0
        self.late: list[tuple[str, str, Callable[[], object]]] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """The address to give to a client in the place of the server's."""
        return f"http://127.0.0.1:{self._port}"

    def faults(self, these: Sequence[str | int], method: str = "", path: str = "") -> None:
        """The next requests of that method, whose path holds `path`, meet `these`, one each; `met` counts them."""
        left = list(these)
        self.met = 0

        def manners(asked: str, at: str) -> str | int:
            if left and asked.startswith(method) and path in at:
                self.met += 1
                return left.pop(0)
            return PASS

        self.manners = manners

    def start(self) -> None:
        """Listen, again on the same port after `stop`."""
        self._server = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more: connections are refused, and those that are open are cut."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultyProxy]:
        """Started for the block."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def away(self, seconds: float) -> threading.Thread:
        """Stop now, and start again after that time; join the thread that does it."""

        def back() -> None:
            time.sleep(seconds)
            self.start()

        self.stop()
        thread = threading.Thread(target=back)
        thread.start()
        return thread


class _Server(ThreadingHTTPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *args: object) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)  # type: ignore[arg-type]

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is none of the test's concern."""

    def server_close(self) -> None:
        super().server_close()
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _any(self) -> None:
            body, what = self._body(), proxy.manners(self.command, self.path)
            if what == LATE:
                proxy.late.append((self.command, self.path, lambda: self._forward(body)))
            if what in (GONE, LATE):
                return self._hang_up()
            if isinstance(what, int) and what > 0:
                return self._answer(what, {}, b"")
            for held in [one for one in proxy.late if one[:2] == (self.command, self.path)]:
                proxy.late.remove(held)
                held[2]()
            answer, content = self._forward(body)
            if what == LOST:
                return self._hang_up()
            if isinstance(what, int):
                return self._answer(-what, {}, b"")
            headers = {
                name: value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"
            }
            return self._answer(answer.status, headers, content, cut=what == CUT and len(content) > 1)

        def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
            upstream = http.client.HTTPConnection(proxy.upstream, timeout=60)
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in {"transfer-encoding", "connection", "content-length", "expect"}
            }
            if body or self.command in {"PUT", "POST"}:
                headers["Content-Length"] = str(len(body))
            upstream.request(self.command, self.path, body or None, headers)
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            return answer, content

        def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in {"connection", "content-length"}:
                    self.send_header(name, value)
            length = next((v for k, v in headers.items() if k.lower() == "content-length"), str(len(content)))
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.wfile.flush()
                self._hang_up()

        def _hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                if self.command != "GET":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _any

    return Handler
