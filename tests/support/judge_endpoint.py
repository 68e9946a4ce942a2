"""A judge over a real socket: an OpenAI-compatible endpoint that says what a test wants it to say."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, float]
"""HTTP status (0: a cut connection), content (a dict is the whole message, bytes the whole body), seconds before."""


def said(*contents: Any) -> list[Reply]:
    return [(200, content, 0.0) for content in contents]


class Endpoint:
    """Answers each question, found by the word `[name]` in its text, with the next of its replies, then the last."""

    def __init__(self) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.asked: Counter[str] = Counter()
        self.texts: list[str] = []
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with endpoint.lock:
                    name = next(name for name in endpoint.replies if f"[{name}]" in text)
                    turn = endpoint.asked[name]
                    endpoint.asked[name] += 1
                    endpoint.texts.append(text)
                replies = endpoint.replies[name]
                status, content, seconds = replies[min(turn, len(replies) - 1)]
                time.sleep(seconds)
                message = content if isinstance(content, dict) else {"role": "assistant", "content": content}
                choices = [{"index": 0, "finish_reason": "stop", "message": message}]
                made = {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "j",
                    "choices": choices,
                }
                error = {"error": {"message": content or "no"}}
                whole = isinstance(content, bytes)
                data = content if whole else json.dumps(made if status == 200 else error).encode()
                if status == 0:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + data[:20])
                    self.close_connection = True
                    return
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except BrokenPipeError:
                    pass

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
