"""From a dataset's rows to requests: which, their messages, their digest, and how many tokens they may take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from components.contract import Folder, sha256_of
from components.datasets.reading import rows_of
from components.instruct.llm.choice import types_of
from components.instruct.llm.contexts import Facts, context, facts
from components.instruct.llm.prompts import Message, Prompts
from components.instruct.settings import InstructSettings
from llava.data.schema import TEXT_COLUMNS, Row

BYTES_PER_TOKEN = 4.0
"""Of English text, about; estimates use it."""
FEWEST_BYTES_PER_TOKEN = 3.0
"""What is reserved must not fall short: limits and budgets use it until the endpoint has counted."""
TOKENS_PER_MESSAGE = 8
"""What a chat template adds to a message, at most."""


@dataclass(frozen=True)
class Request:
    """One question to the teacher: about which photo of which shard, and what is sent."""

    photo: str
    kind: str
    shard: int
    messages: list[Message]
    digest: str
    prompt_bytes: int

    @property
    def most_prompt_tokens(self) -> int:
        """Tokens that the messages have at most, about."""
        return int(self.prompt_bytes / FEWEST_BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE * len(self.messages)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the messages have, about."""
        return int(self.prompt_bytes / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE // 2 * len(self.messages)


class Requests:
    """Makes the requests of rows; the same row, settings and prompts give the same requests anywhere."""

    def __init__(self, settings: InstructSettings, prompts: Prompts) -> None:
        self._settings = settings
        self._openings = {kind: prompts.opening(kind) for kind, share in settings.shares.items() if share > 0}
        self._bytes = {
            kind: sum(len(message["content"].encode()) for message in opening)
            for kind, opening in self._openings.items()
        }
        self._sampling = {
            "model": settings.model, "max_tokens": settings.max_tokens, "temperature": settings.temperature
        }  # fmt: skip

    def of_row(self, row: Row, shard: int, known: Facts | None = None) -> Iterator[Request]:
        """The requests about one photo; none where conversations are given or nobody wrote a caption."""
        if row["conversations"] or not row["captions"]:
            return
        known = known or facts(row)
        if not known.captions:
            return
        settings = self._settings
        for kind in types_of(row["id"], settings.shares, settings.per_photo, settings.seed):
            text = context(known, with_boxes=kind != "conversation")
            messages = [*self._openings[kind], {"role": "user", "content": text}]
            # The photo is part of it: two photos of which the same is known are two samples.
            digest = sha256_of({"photo": row["id"], "messages": messages, **self._sampling})
            size = self._bytes[kind] + len(text.encode())
            yield Request(row["id"], kind, shard, messages, digest, size)

    def of_files(self, folder: Folder, keys: Sequence[str]) -> Iterator[Request]:
        """The requests of all training shards, in order; a shard's number is its place in `keys`."""
        for shard, key in enumerate(keys):
            for row in text_rows(folder, key):
                yield from self.of_row(row, shard)


def text_rows(folder: Folder, key: str) -> Iterator[Row]:
    """Rows of a shard without the pictures, which the teacher never sees."""
    yield from rows_of(folder, key, TEXT_COLUMNS)
