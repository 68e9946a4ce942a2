"""Asking a real server over real sockets: faults, limits, budgets, kills. One process asks, as a Ray actor would."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.contract import Folder, open_store
from components.instruct.llm.asking import FIRST, ArtifactLimits, Tally, ask
from components.instruct.llm.endpoint import Endpoint, probe
from components.instruct.llm.limits import Tokens
from components.instruct.llm.requests import Request
from components.instruct.llm.responses import Response, Writer, adopt, responses_of, stored
from llava.errors import LlavaError, RefusedInput
from tests.components.instruct.conftest import ask_now, llm, requests_about
from tests.support.repository import REPOSITORY
from tests.support.teacher_server import KEY, Seen, TeacherServer


def test_every_request_is_asked_once_and_stored(
    teacher: TeacherServer, key_file: str, tmp_path: Path
) -> None:
    teacher.manners.seconds = 0.1
    settings = llm(teacher, key_file, concurrency=8)
    tally = ask_now(settings, tmp_path, requests_about(settings, 60))
    requests = list(requests_about(settings, 60))
    assert set(teacher.answered().values()) == {1}
    assert tally.answered == len(requests) == len(teacher.seen)
    assert set(responses_of(open_store(tmp_path), 0)) == {request.digest for request in requests}
    assert stored(open_store(tmp_path)).tokens == tally.tokens
    assert tally.tokens.all == sum(one.tokens for one in teacher.seen)
    assert 4 < teacher.most_under_way <= 8


def a_minute_lasts(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits hold for so many seconds instead of a minute, with a quarter of them to spare for late arrivals."""
    for module in ("limits", "endpoint"):
        monkeypatch.setattr(f"components.instruct.llm.{module}.WINDOW", seconds)


def test_a_misbehaving_endpoint_leaves_the_same_responses(
    teacher: TeacherServer, key_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = llm(teacher, key_file, concurrency=24, timeout=4.0)
    requests = list(requests_about(settings, 40))
    ask_now(settings, tmp_path / "calm", requests)
    teacher.seen.clear()
    a_minute_lasts(4.0, monkeypatch)
    settings = settings.model_copy(update={"requests_per_minute": 80})
    manners = teacher.manners
    manners.too_many, manners.broken, manners.hang, manners.cut, manners.half = 0.3, 0.05, 0.04, 0.04, 0.04
    tally = ask_now(settings, tmp_path / "storm", requests)
    calm, storm = (
        {digest: one.body for digest, one in responses_of(open_store(tmp_path / name), 0).items()}
        for name in ("calm", "storm")
    )
    assert storm == calm
    assert 0 <= teacher.answered().total() - len(storm) <= teacher.given_up(tally.faults)
    outcomes = Counter(one.outcome for one in teacher.seen)
    assert all(outcomes[name] > 0 for name in ("too_many", "broken", "hang", "cut", "half"))
    assert {reason: tries for reason, tries in tally.faults.items() if reason != "time-out"} == {
        "status 429": outcomes["too_many"],
        "status 500": outcomes["broken"],
        "cut connection": outcomes["cut"],
        "half an answer": outcomes["half"],
    }
    assert teacher.most_within(3) <= 80


@pytest.mark.parametrize(
    ("limit", "amount"),
    [("requests_per_minute", lambda seen: 1), ("tokens_per_minute", lambda seen: seen.tokens)],
)
def test_several_askers_together_keep_to_one_limit_as_the_server_counts(
    teacher: TeacherServer,
    key_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    amount: Callable[[Seen], int],
) -> None:
    """Three askers, each with a client of its own, share a gate; without it all would leave within a second."""
    a_minute_lasts(4.0, monkeypatch)
    most = {"requests_per_minute": 40, "tokens_per_minute": 20_000}[limit]
    settings = llm(teacher, key_file, concurrency=30, max_tokens=200, **{limit: most})
    requests = list(requests_about(settings, 40 if limit == "requests_per_minute" else 16))
    store = open_store(tmp_path)

    async def run() -> None:
        gate = ArtifactLimits(settings, Tokens())

        async def asker(number: int) -> None:
            async with Endpoint(settings) as endpoint, Writer(store, lambda: None) as writer:
                own = iter(requests[number::3])
                await ask(own, endpoint, gate, writer, Tally(), asker=number, concurrency=10)

        await asyncio.gather(*map(asker, range(3)))

    asyncio.run(run())
    assert set(teacher.answered().values()) == {1}
    assert len(teacher.seen) == len(requests)
    total = sum(map(amount, teacher.seen))
    assert most / 4 < teacher.most_within(3, amount) <= most < total
    assert teacher.seen[-1].at - teacher.seen[0].at > 3


def test_waiting_for_our_own_turn_is_not_counted_against_the_endpoint(
    teacher: TeacherServer, key_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_minute_lasts(5.0, monkeypatch)
    teacher.manners.failing = 2
    settings = llm(teacher, key_file, concurrency=5, requests_per_minute=10, patience=1.5)
    requests = list(requests_about(settings, 3))[:5]
    ask_now(settings, tmp_path, requests)
    times: dict[str, list[float]] = {}
    for one in teacher.seen:
        times.setdefault(one.digest, []).append(one.at)
    assert all(len(at) == 3 and at[1] - at[0] > 1.5 for at in times.values())


def test_what_the_endpoint_refused_is_asked_again_by_the_next_run_and_only_that(
    teacher: TeacherServer, key_file: str, tmp_path: Path
) -> None:
    settings = llm(teacher, key_file)
    requests = list(requests_about(settings, 30))
    teacher.manners.unfit = 0.3
    tally = ask_now(settings, tmp_path / "one", requests)
    responses = responses_of(open_store(tmp_path / "one"), 0)
    refused = {digest for digest, one in responses.items() if one.status == 400}
    assert tally.refused == len(refused) > 3
    assert set(responses) == {request.digest for request in requests}
    answered = stored(open_store(tmp_path / "one")).digests
    assert answered == {bytes.fromhex(digest) for digest in set(responses) - refused}
    taken = adopt(
        open_store(tmp_path),
        open_store(tmp_path / "two"),
        dict.fromkeys(map(digest_of, requests), 0),
        no_check,
    )
    assert taken == len(answered)

    # As many as are left, all of them refused: that is no reason to stop, because others were answered.
    assert ask_now(settings, tmp_path / "one", requests).refused == len(refused)
    teacher.manners.unfit = 0.0
    assert ask_now(settings, tmp_path / "one", requests).answered == len(refused)
    assert {one.status for one in responses_of(open_store(tmp_path / "one"), 0).values()} == {200}
    assert ask_now(settings, tmp_path / "one", requests).answered == 0
    assert set(teacher.answered().values()) == {1}


def test_a_run_stops_when_each_of_the_first_requests_is_refused_and_goes_on_once_they_are_not(
    teacher: TeacherServer, key_file: str, tmp_path: Path
) -> None:
    settings = llm(teacher, key_file, concurrency=4)
    requests = list(requests_about(settings, 40))
    teacher.manners.unfit, teacher.manners.context = 1.0, 9999
    with pytest.raises(
        RefusedInput,
        match=rf"refuses each of the first {FIRST} .* \(status 400: maximum context length is 9999\); look",
    ):
        ask_now(settings, tmp_path, requests)
    assert len(teacher.seen) < FIRST + 4
    teacher.manners.unfit = 0.0
    assert ask_now(settings, tmp_path, requests).answered == len(requests)


def test_the_trial_is_as_large_as_what_will_be_asked(teacher: TeacherServer, key_file: str) -> None:
    teacher.manners.context = 2048
    with pytest.raises(RefusedInput, match=r"refuses requests of this form .*context length is 2048"):
        probe(llm(teacher, key_file, max_tokens=1024))
    teacher.manners.context = 8192
    probe(llm(teacher, key_file, max_tokens=1024))
    assert teacher.seen[-1].body["max_tokens"] == 1024
    roles = [message["role"] for message in teacher.seen[-1].body["messages"]]
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2 - 1), "user"]


def test_a_trial_counts_once_a_minute(teacher: TeacherServer, key_file: str) -> None:
    for _ in range(2):
        probe(llm(teacher, key_file))
    assert len(teacher.seen) == 1
    Path(key_file).write_text("sk-other")
    with pytest.raises(RefusedInput, match="401"):
        probe(llm(teacher, key_file))


def test_responses_are_read_while_a_writer_folds_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.instruct.llm.responses.FOLD", 3)
    writer, done = Writer(open_store(tmp_path / "one"), no_check), threading.Event()
    written: list[str] = []

    def write() -> None:
        while not done.is_set():
            digest = hashlib.sha256(str(len(written)).encode()).hexdigest()
            writer._store([Response(digest, "p", "detail", 0, 200, "", 1, 1, 0.1)])
            written.append(digest)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            known = list(written)
            assert len(stored(open_store(tmp_path / "one")).digests) <= len(written) + 1
            responses_of(open_store(tmp_path / "one"), 0)
            wanted = {bytes.fromhex(digest): 0 for digest in known}
            adopt(open_store(tmp_path), open_store(tmp_path / "two"), wanted, no_check)
            for file in (tmp_path / "two").rglob("*.parquet"):
                file.unlink()
    finally:
        done.set()
        thread.join()
    assert stored(open_store(tmp_path / "one")).digests == {bytes.fromhex(digest) for digest in written}


def no_check() -> None:
    """A lease that is always held."""


def digest_of(request: Request) -> bytes:
    return bytes.fromhex(request.digest)


def test_retry_after_is_honoured(teacher: TeacherServer, key_file: str, tmp_path: Path) -> None:
    settings = llm(teacher, key_file, concurrency=4)
    requests = list(requests_about(settings, 1))
    teacher.manners.too_many, teacher.manners.retry_after = 0.999, "1"
    began = time.monotonic()

    def calm_down(context: str) -> str:
        teacher.manners.too_many = 0.0
        return "ok"

    teacher.manners.says = calm_down
    ask_now(settings, tmp_path, requests)
    first = {one.digest: one.at for one in reversed(teacher.seen) if one.outcome == "too_many"}
    then = {one.digest: one.at for one in teacher.seen if one.outcome == "answered"}
    assert first
    assert all(then[digest] - first[digest] >= 1 for digest in first)
    assert time.monotonic() - began < 10


def test_requests_leave_evenly_and_never_faster_than_the_limit(
    teacher: TeacherServer, key_file: str, tmp_path: Path
) -> None:
    settings = llm(teacher, key_file, concurrency=16, requests_per_minute=1200)
    teacher.manners.broken = 0.2
    ask_now(settings, tmp_path, requests_about(settings, 40))
    assert len(teacher.seen) > 80
    # 20 a second leave. A server that shares two cores sees them late at times, and then close together.
    assert teacher.most_within(3) <= 60
    assert teacher.seen[-1].at - teacher.seen[0].at >= (len(teacher.seen) - 1) * 60 / 1200


@pytest.mark.parametrize("money", [False, True])
def test_a_budget_stops_before_it_is_passed_and_a_larger_one_goes_on(
    teacher: TeacherServer, key_file: str, tmp_path: Path, money: bool
) -> None:
    def within(tokens: int) -> Any:
        limit = (
            {"budget_money": tokens / 1e6, "price_prompt": 1, "price_completion": 1}
            if money
            else {"budget_tokens": tokens}
        )
        return llm(teacher, key_file, concurrency=4, max_tokens=200, **limit)

    settings = within(40_000)
    requests = list(requests_about(settings, 30))
    first = ask_now(settings, tmp_path, requests)
    kept = stored(open_store(tmp_path))
    assert first.used_up
    assert 0 < first.answered == len(kept.digests) < len(requests)
    assert 30_000 < kept.tokens.all <= 40_000
    second = ask_now(within(4_000_000), tmp_path, requests)
    assert not second.used_up
    assert first.answered + second.answered == len(requests)
    assert set(teacher.answered().values()) == {1}


def test_tokens_are_counted_by_length_where_the_endpoint_does_not_count(
    teacher: TeacherServer, key_file: str, tmp_path: Path
) -> None:
    teacher.manners.usage = False
    settings = llm(teacher, key_file)
    tally = ask_now(settings, tmp_path, requests_about(settings, 3))
    assert tally.tokens.all == pytest.approx(sum(one.tokens for one in teacher.seen), rel=0.05)


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": -10**9}, {"completion_tokens": float("inf")}, {"prompt_tokens": float("nan")},
     {"completion_tokens": 10**30}, {"prompt_tokens": "many"}],
)  # fmt: skip
def test_a_count_that_cannot_be_is_not_taken_and_is_told(
    teacher: TeacherServer, key_file: str, tmp_path: Path, usage: dict[str, Any]
) -> None:
    teacher.manners.usage = usage
    settings = llm(teacher, key_file, budget_tokens=1_000_000)
    tally = ask_now(settings, tmp_path, requests_about(settings, 3))
    assert tally.tokens.all == pytest.approx(sum(one.tokens for one in teacher.seen), rel=0.05)
    assert tally.uncounted.total() == tally.answered > 0 and not tally.used_up


def test_a_failure_that_never_passes_stops_the_run_and_keeps_what_was_answered(
    teacher: TeacherServer, key_file: str, tmp_path: Path
) -> None:
    settings = llm(teacher, key_file, concurrency=4, patience=1.0)
    requests = list(requests_about(settings, 20))
    ask_now(settings, tmp_path, requests[:5])
    teacher.manners.broken = 1.0
    with pytest.raises(
        LlavaError, match=r"has not answered one request .* in 1 s, the last time: status 500"
    ):
        ask_now(settings, tmp_path, requests)
    teacher.manners.broken = 0.0
    ask_now(settings, tmp_path, requests)
    assert len(stored(open_store(tmp_path)).digests) == len(requests)
    assert set(teacher.answered().values()) == {1}


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_kill_9_repeats_at_most_what_was_under_way(
    teacher: TeacherServer, key_file: str, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(f"{kind}_root")
    folder: Folder = open_store(root)
    teacher.manners.seconds = 0.02
    settings = llm(teacher, key_file, concurrency=8)
    requests = list(requests_about(settings, 120))
    code = (
        "import sys; from tests.components.instruct.llm.test_asking import ask_in_a_process; "
        "ask_in_a_process(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, root, teacher.url, key_file]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while len(teacher.seen) < 80 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    kept = stored(folder).digests
    assert 50 < len(kept) < len(requests)
    before = Counter(teacher.tries)
    assert len(before) - len(kept) <= 8
    ask_now(settings, folder, requests)
    again = [digest for digest, count in teacher.tries.items() if before[digest] and count > before[digest]]
    assert len(again) == len(before) - len(kept)
    assert len(stored(folder).digests) == len(requests)


def ask_in_a_process(root: str, url: str, key_file: str) -> None:
    """What the killed process does."""
    port = int(url.split(":")[2].partition("/")[0])
    server = TeacherServer(port, None)  # type: ignore[arg-type]
    settings = llm(server, key_file, concurrency=8)
    ask_now(settings, open_store(root), requests_about(settings, 120))


def test_small_files_are_folded_and_nothing_is_lost(
    teacher: TeacherServer, key_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.instruct.llm.responses.FOLD", 5)
    settings = llm(teacher, key_file, concurrency=2)
    requests = list(requests_about(settings, 40))
    ask_now(settings, tmp_path, requests)
    assert len(list(tmp_path.glob("responses/*.parquet"))) < len(requests) / 5
    assert len(stored(open_store(tmp_path)).digests) == len(requests)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"key_file": "wrong"},
            r"status 401: the key from \S+ is refused \(Incorrect key provided: \*\*\*\)",
        ),
        (
            {"key_file": None, "key_env": "NO_SUCH_KEY"},
            r"status 401: it wants a key: \$NO_SUCH_KEY holds none",
        ),
        (
            {"model": "writer-2"},
            r"status 404: there is no model 'writer-2' there.*The model writer-2 does not exist",
        ),
        ({"base_url": "http://127.0.0.1:9/v1"}, r"base_url=http://127\.0\.0\.1:9/v1: no connection"),
        ({"base_url": "http://127.0.0.1:80O0/v1"}, r"80O0/v1: is no address \(Invalid port: '80O0'\)"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_one_clear_line_within_seconds(
    teacher: TeacherServer, key_file: str, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    if change.get("key_file"):
        wrong = tmp_path / "wrong"
        wrong.write_text("sk-wrong-and-secret")
        change = {"key_file": str(wrong)}
    began = time.monotonic()
    settings = llm(teacher, key_file)
    with pytest.raises(RefusedInput, match=told) as caught:
        probe(settings.model_copy(update=change))
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value).replace(str(tmp_path), "")
    assert not teacher.seen


def test_a_key_file_may_begin_with_a_byte_order_mark_and_holds_one_plain_line(
    teacher: TeacherServer, key_file: str
) -> None:
    Path(key_file).write_text(f"\ufeff{KEY}\r\n", encoding="utf-8")
    probe(llm(teacher, key_file))
    for text in ("sk-secret\u201d", "sk-secret\nsk-other"):
        Path(key_file).write_text(text, encoding="utf-8")
        with pytest.raises(RefusedInput, match="has several lines, or characters that no key has") as caught:
            probe(llm(teacher, key_file))
        assert "secret" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up(
    silent_server: str, key_file: str, teacher: TeacherServer
) -> None:
    settings = llm(teacher, key_file, timeout=0.3).model_copy(update={"base_url": f"{silent_server}/v1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.instruct.llm.endpoint.PROBE_SECONDS", 2.0)
        with pytest.raises(RefusedInput, match=r"time-out\. Is the endpoint up"):
            probe(settings)


def test_a_key_that_stops_working_ends_the_run_without_being_shown(
    teacher: TeacherServer, key_file: str, tmp_path: Path
) -> None:
    settings = llm(teacher, key_file, concurrency=2)
    Path(key_file).write_text("sk-revoked-4711")
    with pytest.raises(LlavaError, match=r"status 401.*\*\*\*") as caught:
        ask_now(settings, tmp_path, requests_about(settings, 4))
    assert "sk-revoked-4711" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert KEY not in str(caught.value)
