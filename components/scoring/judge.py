"""A judge behind an OpenAI-compatible endpoint: a benchmark makes its tasks and reads its replies.

Every reply is stored as it came, one line per question, at once. A reply that cannot be parsed is asked for again; what
was said before stays in `failed_tries`. A line whose last try failed is judged again by the next run.

The key comes from OPENAI_API_KEY only, and what the endpoint says of a failure is told without it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, field_validator

from components.contract import Settings, refuse_secrets, run_field, without_secret
from components.scoring.base import Record, by_id, read_rows
from llava.data.jsonl import to_jsonl
from llava.errors import RefusedInput

ROLE = "You compare answers to questions about pictures. You are fair and exact, and you follow the wanted format."
KEEP_SECONDS = 2.0
"""How often what was judged is carried to where it is kept: so much work is lost at most."""


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
    ask, lock = _client(settings), threading.Lock()
    path.parent.mkdir(parents=True, exist_ok=True)

    def one(id_: str) -> tuple[bool, int]:
        earlier = there.get(id_, {})
        tries = [*earlier.get("failed_tries", []), *([_try(earlier)] if earlier else [])]
        reply, error = None, None
        before = len(tries)
        for turn in range(settings.tries):
            reply, error = ask(wanted[id_].text)
            if parse(reply) is not None:
                break
            if turn < settings.tries - 1:
                tries.append(_try({"content": reply, "error": error}))
                time.sleep(settings.pause * 2**turn if error else 0)
        parsed = parse(reply)
        row = wanted[id_].row | {"content": reply} | ({field: parsed} if field else {})
        row |= ({"error": error} if error else {}) | ({"failed_tries": tries} if tries else {})
        with lock, path.open("ab") as file:
            file.write(to_jsonl([row]))
        return parsed is not None, len(tries) - before

    with ThreadPoolExecutor(settings.concurrency) as pool:
        left = {pool.submit(one, id_) for id_ in open_}
        outcomes = []
        try:
            while left:
                done, left = wait(left, KEEP_SECONDS, "FIRST_EXCEPTION")
                outcomes += [future.result() for future in done]
                if left:
                    with lock:
                        keep()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    failed = sum(not good_ for good_, _ in outcomes)
    return Tally(len(good), len(open_), failed, sum(again for _, again in outcomes))


def _client(settings: JudgeSettings) -> Callable[[str], tuple[str | None, str | None]]:
    """A function from a text to (reply, None) or (None, why there is none)."""
    try:
        import openai
    except ModuleNotFoundError:
        raise RefusedInput("a live judge needs the OpenAI client: pip install openai") from None
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key or not key.isascii():
        raise RefusedInput(
            "a live judge needs a key: set OPENAI_API_KEY (any ASCII text, where the endpoint asks for none)"
        )
    address = settings.url or "$OPENAI_BASE_URL"  # which may hold a password
    try:
        client = openai.OpenAI(api_key=key, base_url=settings.url, timeout=settings.seconds, max_retries=0)
    except Exception as error:  # httpx's, under one of its names
        raise RefusedInput(f"the judge's URL {address}: {error}; such as http://HOST/v1") from None

    def ask(text: str) -> tuple[str | None, str | None]:
        try:
            # As text: the client's own types take half an answer for a whole one.
            body = client.post("/chat/completions", cast_to=str, body={
                "model": settings.model,
                "messages": [{"role": "system", "content": ROLE}, {"role": "user", "content": text}],
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
            })  # fmt: skip
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise RefusedInput(
                f"the judge {settings.model} at {address} refuses: {shown(error.message)}; see the name, the URL and "
                "OPENAI_API_KEY"
            ) from None
        except openai.APIError as error:
            return None, shown(f"{type(error).__name__}: {error.message}")
        said, why = _said(body)
        return said, why and shown(why)

    def shown(text: str) -> str:
        return without_secret(text, key)[:300]

    return ask


def _said(body: str) -> tuple[str | None, str | None]:
    """(what the judge says, None) from an answer's body, or (None, why it says nothing)."""
    try:
        message = json.loads(body)["choices"][0]["message"]
        said, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, f"malformed reply: {body}"
    if isinstance(said, str):
        return said, None
    if said is not None:
        return None, f"malformed reply: {said}"
    return None, f"refusal: {refusal}" if refusal else "empty reply"


def _replace(path: Path, rows: Iterable[Record]) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(to_jsonl(rows))
    beside.replace(path)


def _try(row: Mapping[str, Any]) -> Record:
    return {key: row[key] for key in ("content", "error") if row.get(key) is not None}


def sections(parts: Mapping[str, str]) -> str:
    """A task's parts under headings."""
    return "\n\n".join(f"## {title}\n{text}" for title, text in parts.items())
