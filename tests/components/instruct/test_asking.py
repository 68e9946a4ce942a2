"""Asking a real server over real sockets: faults, limits, budgets, kills. One process asks, as a Ray actor would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from components.contract import Folder, open_store
from components.instruct.llm.endpoint import probe
from components.instruct.llm.responses import responses_of, stored
from llava.errors import LlavaError, RefusedInput
from tests.components.instruct.conftest import ask_now, llm, requests_about
from tests.components.instruct.teacher_server import KEY, TeacherServer


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


def test_a_misbehaving_endpoint_leaves_the_same_responses(
    teacher: TeacherServer, key_file: str, tmp_path: Path
) -> None:
    settings = llm(teacher, key_file, concurrency=24, timeout=1.0, requests_per_minute=3000)
    requests = list(requests_about(settings, 60))
    ask_now(settings, tmp_path / "calm", requests)
    teacher.seen.clear()
    manners = teacher.manners
    manners.too_many, manners.broken, manners.hang, manners.cut, manners.half = 0.3, 0.05, 0.04, 0.04, 0.04
    tally = ask_now(settings, tmp_path / "storm", requests)
    calm, storm = (
        {digest: one.body for digest, one in responses_of(open_store(tmp_path / name), 0).items()}
        for name in ("calm", "storm")
    )
    assert storm == calm
    assert set(teacher.answered().values()) == {1}
    outcomes = Counter(one.outcome for one in teacher.seen)
    assert all(outcomes[name] > 0 for name in ("too_many", "broken", "hang", "cut", "half"))
    assert tally.faults == {
        "status 429": outcomes["too_many"],
        "status 500": outcomes["broken"],
        "time-out": outcomes["hang"],
        "cut connection": outcomes["cut"],
        "half an answer": outcomes["half"],
    }
    assert teacher.most_within(60) <= 3000


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
    code = "import sys; from tests.components.instruct.test_asking import ask_in_a_process as run; run(*sys.argv[1:])"
    command = [sys.executable, "-c", code, root, teacher.url, key_file]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
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
