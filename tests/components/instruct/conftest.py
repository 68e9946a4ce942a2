"""A teacher to ask, and a small dataset to ask it about."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from components.contract import Folder, open_store
from components.instruct import InstructSettings
from components.instruct.llm.asking import ArtifactLimits, Tally, ask
from components.instruct.llm.endpoint import Endpoint
from components.instruct.llm.prompts import load_prompts
from components.instruct.llm.requests import Request, Requests
from components.instruct.llm.responses import Writer, stored
from llava.data.schema import to_table
from tests.support.teacher_server import KEY, MODEL, TeacherServer, teacher_server


@pytest.fixture
def teacher() -> Iterator[TeacherServer]:
    """A well-mannered server, until a test changes its manners."""
    with teacher_server() as server:
        yield server


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    """The key as a mounted secret."""
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    return str(path)


def llm(server: TeacherServer, key_file: str, **other: Any) -> InstructSettings:
    """Settings that ask the server."""
    return InstructSettings(teacher="llm", model=MODEL, base_url=server.url, key_file=key_file, **other)


def photo(number: int, **columns: Any) -> Any:
    """The row of a photo with captions and boxes."""
    things = ["dog", "horse", "train", "kite", "boat", "cake"]
    thing = things[number % len(things)]
    row = {
        "id": f"photo{number:05d}",
        "width": 640,
        "height": 480,
        "captions": [
            f"A {thing} stands beside stone {number} in the early morning.",
            f"There is a {thing} close to a fence with number {number} on it.",
            f"Somebody left a {thing} alone on the wide and empty meadow.",
        ],
        "objects": [{"category": thing, "bbox": [64.0, 48.0, 320.0, 240.0]}],
        **columns,
    }
    return to_table([row]).to_pylist()[0]


def requests_about(settings: InstructSettings, photos: int, shard: int = 0) -> Iterator[Request]:
    """Requests about so many photos, made as they are taken."""
    maker = Requests(settings, load_prompts(None))
    return (request for number in range(photos) for request in maker.of_row(photo(number), shard))


def ask_now(
    settings: InstructSettings, folder: Folder | Path, requests: Iterator[Request] | Sequence[Request]
) -> Tally:
    """Ask within this process what the folder has not stored, as an asker does."""
    store = open_store(folder) if isinstance(folder, Path) else folder
    tally = Tally()

    async def run() -> None:
        found = stored(store)
        limits = ArtifactLimits(settings, found.tokens)
        missing = (one for one in requests if bytes.fromhex(one.digest) not in found.digests)
        async with Endpoint(settings) as endpoint, Writer(store, lambda: None) as writer:
            many, proven = settings.concurrency, bool(found.digests)
            await ask(missing, endpoint, limits, writer, tally, concurrency=many, proven=proven)

    asyncio.run(run())
    return tally
