"""What our side of asking a teacher costs: requests per second from one process, and its memory.

A server in a process of its own answers every chat completion after 50 ms. One process asks as an asker of `llava
instruct` does (`components/instruct/llm`): our own prompts, the real `openai` client, limits, every answer stored as
Parquet before the next request takes its place. Both share the machine's cores.

    python benchmarks/teacher.py --requests 20000 --markdown benchmarks/results/teacher.md
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TARGET = 200.0
FLAT = 16 * 2**20
"""Bytes that the second half of the requests may add to the resident memory."""
ANSWER = """Question:
What is standing in the middle of the meadow?
===
Answer:
A horse stands in the middle of the meadow, right beside a grey stone.
===
Question:
Does anybody keep the horse company?
===
Answer:
No, the horse is alone. Apart from the stone and a wooden fence at the edge there is only grass around it."""


class Server(asyncio.Protocol):
    """Chat completions on keep-alive connections: the same answer to everything, after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        body = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
                ],
                "usage": {"prompt_tokens": 1000, "completion_tokens": 90, "total_tokens": 1090},
            }
        ).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.answer = head.encode() + body
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(self.received) < end + 4 + length:
                return
            self.received = self.received[end + 4 + length :]
            asyncio.get_running_loop().call_later(self.seconds, self.transport.write, self.answer)


async def serve(seconds: float) -> None:
    """Print the port, then answer until killed."""
    server = await asyncio.get_running_loop().create_server(lambda: Server(seconds), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def rows(count: int) -> Iterator[Any]:
    """Photos with five captions and eight boxes, each its own."""
    for number in range(count):
        captions = [
            f"Caption {place} of photo {number}: a horse on a meadow beside a stone." for place in range(5)
        ]
        boxes = [
            {"category": "horse", "bbox": [10.0 * place, 20.0, 60.0 + place, 80.0]} for place in range(8)
        ]
        yield {
            "id": f"{number:09d}",
            "width": 640,
            "height": 480,
            "captions": captions,
            "objects": boxes,
            "conversations": None,
        }


async def measure(
    port: int, folder: Path, requests: int, concurrency: int
) -> tuple[float, float, list[tuple[int, int]]]:
    """(wall seconds, CPU seconds of this process, [(answered, resident bytes)])."""
    import psutil

    from components.contract import open_store
    from components.instruct import InstructSettings
    from components.instruct.llm.asking import ArtifactLimits, Tally, ask
    from components.instruct.llm.endpoint import Endpoint
    from components.instruct.llm.limits import Tokens
    from components.instruct.llm.prompts import load_prompts
    from components.instruct.llm.requests import Requests
    from components.instruct.llm.responses import Writer, stored

    settings = InstructSettings(
        teacher="llm", model="m", base_url=f"http://127.0.0.1:{port}/v1", concurrency=concurrency
    )
    maker = Requests(settings, load_prompts(None))

    def wanted() -> Iterator[Any]:
        made = 0
        for row in rows(requests):
            for request in maker.of_row(row, 0):
                if made == requests:
                    return
                made += 1
                yield request

    tally, memory = Tally(), []
    process = psutil.Process()

    async def watch() -> None:
        while True:
            memory.append((tally.answered, process.memory_info().rss))
            await asyncio.sleep(1.0)

    limits = ArtifactLimits(settings, Tokens())
    watching = asyncio.create_task(watch())
    began, cpu = time.monotonic(), time.process_time()
    async with Endpoint(settings) as endpoint, Writer(open_store(folder), lambda: None) as writer:
        await ask(wanted(), endpoint, limits, writer, tally, concurrency=concurrency)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    watching.cancel()
    memory.append((tally.answered, process.memory_info().rss))
    found = len(stored(open_store(folder)).digests)
    if not found == tally.answered == requests:
        raise SystemExit(f"{requests} requests, {tally.answered} answered, {found} stored")
    return wall, cpu, memory


def main() -> None:
    """Run the server beside the measurement and print what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.05, help="what the server takes to answer")
    parser.add_argument("--markdown", type=Path, help="write the result there")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.seconds))
        return
    command = [sys.executable, __file__, "--serve", "--seconds", str(options.seconds)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            wall, cpu, memory = asyncio.run(
                measure(port, Path(folder), options.requests, options.concurrency)
            )
        finally:
            server.terminate()
    text = report(options, wall, cpu, memory)
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)


def report(options: argparse.Namespace, wall: float, cpu: float, memory: list[tuple[int, int]]) -> str:
    """The result as Markdown."""
    count = options.requests

    def at(share: float) -> int:
        return next(size for answered, size in memory if answered >= share * count)

    pace, grown = count / wall, at(1.0) - at(0.5)
    names = ("openai", "pyarrow")
    versions = ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    )
    resident = ", ".join(f"{at(share) / 2**20:.0f}" for share in (0.1, 0.25, 0.5, 0.75, 1.0))
    table = [
        ("what", "measured", "wanted", ""),
        ("---", "---", "---", "---"),
        ("requests per second", f"{pace:.0f}", f"at least {TARGET:.0f}", _met(pace >= TARGET)),
        ("CPU of the asking process per request", f"{1000 * cpu / count:.2f} ms", "", ""),
        ("resident memory after 10, 25, 50, 75, 100 %", f"{resident} MiB", "", ""),
        (
            "what the second half of the requests adds to it",
            f"{grown / 2**20:+.1f} MiB",
            f"under {FLAT / 2**20:.0f} MiB",
            _met(grown < FLAT),
        ),
    ]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
    return f"""# Asking a teacher: what our side costs

`python benchmarks/teacher.py --requests {count} --concurrency {options.concurrency} --seconds {options.seconds:g}`,
{time.strftime("%Y-%m-%d")}, {os.cpu_count()} cores shared with the server, {versions}.
One process; every answer is stored as Parquet in a folder before the next request takes its place.

{lines}
"""


def _met(target: bool) -> str:
    return "met" if target else "MISSED"


if __name__ == "__main__":
    main()
