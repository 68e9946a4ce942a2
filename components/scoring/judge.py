"""A judge behind an OpenAI-compatible endpoint: a benchmark makes its tasks and reads its replies.

Every reply is stored as it came, one line per question, at once. A reply that cannot be parsed is asked for again; what
was said before stays in `failed_tries`. A line whose last try failed is judged again by the next run.

The key comes from OPENAI_API_KEY only, and what the endpoint says of a failure is told without it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import Field, field_validator

from components.chat import Chat, Fault, denied, parsed, pause_before, told
from components.contract import Settings, refuse_secrets, run_field
from components.scoring.base import Record, by_id, read_rows
from llava.data.jsonl import to_jsonl
from llava.errors import RefusedInput

ROLE = "You compare answers to questions about pictures. You are fair and exact, and you follow the wanted format."
KEEP_SECONDS = 2.0
"""How often what was judged is carried to where it is kept: so much work is lost at most."""
KEY = "OPENAI_API_KEY"
OK = 200
_NEVER = (401, 402, 403, 404, 429)  # of 429 those that say that the quota is used up
_LONGEST = 300


class JudgeSettings(Settings):
    """Which model judges, and how patiently it is asked."""

    model: str = Field(description="The judge's name at the endpoint")
    url: str | None = Field(
        None, description="The endpoint, ending in /v1; null: OPENAI_BASE_URL or OpenAI's own"
    )
    temperature: float = Field(0.2, ge=0, description="Sampling temperature of the judge")
    max_tokens: int = Field(1024, ge=1, description="Tokens after which a review is cut")
    tries: int = Field(3, ge=1, description="How often a question is asked until its reply can be parsed")
    seconds: float = run_field(60.0, gt=0, description="Time after which a reply counts as failed")
    pause: float = run_field(2.0, ge=0, description="Seconds to wait after an error of the endpoint; doubles")
    concurrency: int = run_field(8, ge=1, description="Questions that are judged at once")

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, url: str | None) -> str | None:
        return url and refuse_secrets(url, "the judge's URL")


@dataclass(frozen=True)
class JudgeTask:
    """One question for the judge."""

    row: Record
    """The line that is stored, without what the judge says; holds `question_id`."""
    text: str


@dataclass(frozen=True)
class Tally:
    """What a run of the judge came to."""

    kept: int
    """Lines that were there already."""
    judged: int
    failed: int
    """Lines without a parsable reply after all tries."""
    retried: int
    """Replies that were asked for again."""


Parse = Callable[[str | None], Any]


class Ask(Protocol):
    """Has tasks judged into the file `path`, which may hold some replies already."""

    def __call__(
        self, tasks: Sequence[JudgeTask], path: Path, parse: Parse, field: str | None = None
    ) -> None: ...


def judge(
    settings: JudgeSettings,
    tasks: Sequence[JudgeTask],
    path: Path,
    parse: Parse,
    field: str | None = None,
    keep: Callable[[], None] = lambda: None,
) -> Tally:
    """Ask for every task that `path` holds no parsable reply to; the parsed reply is stored under `field` too.

    `keep` is called every KEEP_SECONDS until all is judged; nothing writes to `path` meanwhile. Refuses a file with
    lines of other questions. Raises `RefusedInput` where the endpoint refuses the key or model.
    """
    wanted = {str(task.row["question_id"]): task for task in tasks}
    there = by_id(read_rows(path), path) if path.exists() else {}
    foreign = [id_ for id_ in there if id_ not in wanted]
    if foreign:
        raise RefusedInput(f"{path}: {len(foreign):,} reviews are of other questions (first: {foreign[0]}); "
                           "name a file that does not exist yet")  # fmt: skip
    good = {id_: row for id_, row in there.items() if parse(row.get("content")) is not None}
    if len(good) < len(there):
        _replace(path, good.values())
    open_ = [id_ for id_ in wanted if id_ not in good]
    if not open_:
        return Tally(len(good), 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = _Work(settings, [wanted[id_] for id_ in open_], there, path, parse, field, keep)
    asyncio.run(work.run())
    return Tally(len(good), len(open_), work.failed, work.retried)


@dataclass
class _Work:
    """What one run of the judge has to do, and how far it is."""

    settings: JudgeSettings
    tasks: Sequence[JudgeTask]
    there: Mapping[str, Record]
    """Lines of earlier runs by id, those without a parsable reply among them."""
    path: Path
    parse: Parse
    field: str | None
    keep: Callable[[], None]
    failed: int = 0
    retried: int = 0
    _writing: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Judge all. After a refusal nothing new is asked, and what is under way is stored."""
        left, failures = deque(self.tasks), list[Exception]()

        async def until_failure(step: Callable[[], Awaitable[None]]) -> None:
            try:
                while left and not failures:
                    await step()
            except Exception as failure:
                failures.append(failure)

        async with _Judge(self.settings) as judge_:
            keeping = asyncio.create_task(until_failure(self._keep_soon))
            await asyncio.gather(
                *(
                    until_failure(lambda: self._one(judge_, left.popleft()))
                    for _ in range(self.settings.concurrency)
                )
            )
            keeping.cancel()
        if failures:
            raise failures[0]

    async def _one(self, judge_: _Judge, task: JudgeTask) -> None:
        earlier = self.there.get(str(task.row["question_id"]), {})
        tries = [*earlier.get("failed_tries", []), *([_try(earlier)] if earlier else [])]
        before, turns = len(tries), self.settings.tries
        for turn in range(turns):
            reply, error = await judge_.ask(task.text)
            if self.parse(reply) is not None:
                break
            if turn < turns - 1:
                tries.append(_try({"content": reply, "error": error}))
                await asyncio.sleep(pause_before(turn, first=self.settings.pause) if error else 0)
        found = self.parse(reply)
        row = task.row | {"content": reply} | ({self.field: found} if self.field else {})
        row |= ({"error": error} if error else {}) | ({"failed_tries": tries} if tries else {})
        async with self._writing:
            with self.path.open("ab") as file:
                file.write(to_jsonl([row]))
        self.failed += found is None
        self.retried += len(tries) - before

    async def _keep_soon(self) -> None:
        await asyncio.sleep(KEEP_SECONDS)
        async with self._writing:
            await asyncio.to_thread(self.keep)


def read_key() -> str:
    """The judge's key from the environment; RefusedInput where there is none."""
    key = os.environ.get(KEY, "").strip()
    if not key or not key.isascii():
        raise RefusedInput(
            f"a live judge needs a key: set {KEY} (any ASCII text, where the endpoint asks for none)"
        )
    return key


class _Judge:
    """The judge's endpoint; use it as `async with`."""

    def __init__(self, settings: JudgeSettings) -> None:
        key = read_key()
        self._settings = settings
        self._address = settings.url or "$OPENAI_BASE_URL"  # which may hold a password
        self._chat = Chat(settings.url, key, settings.seconds, f"the judge's URL {self._address}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._chat.close()

    async def ask(self, text: str) -> tuple[str | None, str | None]:
        """(reply, None), or (None, why there is none). RefusedInput where it never will be one."""
        settings = self._settings
        body = {
            "model": settings.model,
            "messages": [{"role": "system", "content": ROLE}, {"role": "user", "content": text}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        try:
            status, answer = await self._chat.ask(body, settings.seconds)
        except Fault as fault:
            return None, fault.reason
        if status in _NEVER:
            raise RefusedInput(
                f"the judge {settings.model} at {self._address} refuses: status {status}: "
                f"{denied(status, settings.model, f'${KEY}', True)} ({told(answer)})"
            )
        return _said(answer) if status == OK else (None, f"status {status}: {told(answer)}")


def _said(body: str) -> tuple[str | None, str | None]:
    """(what the judge says, None) from an answer's body, or (None, why it says nothing)."""
    try:
        message = parsed(body)["choices"][0]["message"]
        said, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, f"malformed reply: {body}"[:_LONGEST]
    if isinstance(said, str):
        return said, None
    if said is not None:
        return None, f"malformed reply: {said}"[:_LONGEST]
    return None, f"refusal: {refusal}"[:_LONGEST] if refusal else "empty reply"


def _replace(path: Path, rows: Iterable[Record]) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(to_jsonl(rows))
    beside.replace(path)


def _try(row: Mapping[str, Any]) -> Record:
    return {key: row[key] for key in ("content", "error") if row.get(key) is not None}


def sections(parts: Mapping[str, str]) -> str:
    """A task's parts under headings."""
    return "\n\n".join(f"## {title}\n{text}" for title, text in parts.items())
