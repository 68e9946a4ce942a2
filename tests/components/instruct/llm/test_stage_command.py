"""`llava instruct` with a language model as the teacher, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.contract import artifact_folders, open_store
from components.instruct import try_endpoint
from components.instruct.llm.responses import Response, Writer
from llava.errors import RefusedInput
from tests.support.repository import REPOSITORY
from tests.support.teacher_server import KEY, MODEL, Manners, TeacherServer, teacher_server
from workflows import config as configs
from workflows import train

LLAVA = [sys.executable, "-m", "workflows.cli", "instruct", "tiny"]
SCENES = ["shard.scenes=200", "instruct.heldout_questions=10", "instruct.max_rejected=1"]


def environment() -> dict[str, str]:
    """Of a command that finds no cluster and no server but those of the test; it knows the key."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **kept,
        "PYTHONPATH": path,
        "OPENAI_API_KEY": KEY,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONWARNINGS": "ignore",
    }


def settings(server: TeacherServer, *more: str) -> list[str]:
    own = ["instruct.teacher=llm", f"instruct.model={MODEL}", f"instruct.base_url={server.url}"]
    return [part for each in [*SCENES, *own, *more] for part in ("--set", each)]


def test_a_dry_run_without_a_teacher_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [*LLAVA, "--dry-run"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "set instruct.teacher=llm" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_endpoint_that_cannot_be_used_is_told_before_anything_is_made(tmp_path: Path) -> None:
    """The command itself with a wrong key; the other cases in this process, on the same fresh root."""
    (tmp_path / "wrong").write_text("sk-wrong")
    with teacher_server() as server:
        wrong = run(tmp_path, *settings(server, f"instruct.key_file={tmp_path / 'wrong'}"))
        assert wrong.returncode == 2, wrong.stderr
        assert re.fullmatch(r"error: .* answers with status 401: the key from .*\n", wrong.stderr)

        root = str(tmp_path / "runs")
        (tmp_path / "key").write_text(KEY)
        for change, told in (
            ("instruct.model=writer-2", "status 404: there is no model 'writer-2' there"),
            ("instruct.base_url=http://127.0.0.1:9/v1", "no connection"),
        ):
            more = settings(server, f"instruct.key_file={tmp_path / 'key'}", change)[1::2]
            config = configs.load("tiny", more)
            workspace = train.open_workspace(config.name, root)
            began = time.monotonic()
            with pytest.raises(RefusedInput, match=told):
                train.run(config, workspace)
            assert time.monotonic() - began < 10
        assert not server.seen
    assert not artifact_folders(open_store(root))

    # What is answered may be all that is wanted: a root with answers does without the endpoint.
    asked = config.instruct
    with pytest.raises(RefusedInput, match="no connection"):
        try_endpoint(asked, workspace)
    answer = Response("00" * 32, "p", "detail", 0, 200, "", 1, 1, 0.1)
    Writer(workspace.store.sub("instruct/0123"), lambda: None)._store([answer])
    try_endpoint(asked, workspace)


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*LLAVA, *arguments]
    return subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.drill
def test_killed_in_the_middle_and_run_again_over_its_budget_and_with_a_wrong_key(tmp_path: Path) -> None:
    """One root all along: a dry run, kill -9 of the command, a budget (status 3), a wrong key (status 2), the end."""
    with teacher_server(Manners(seconds=0.2)) as server:
        shown = run(tmp_path, *settings(server), "--dry-run")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.count("=== photo") >= 3
        assert "requests" in shown.stdout
        assert not server.seen

        everything = [*LLAVA, *settings(server, "instruct.concurrency=8")]
        with (tmp_path / "killed").open("wb") as log:
            driver = subprocess.Popen(everything, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        while len(server.answered()) < 60:
            assert driver.poll() is None, (tmp_path / "killed").read_text()
            time.sleep(0.02)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(30)

        poor = run(tmp_path, *settings(server, "instruct.concurrency=8", "instruct.budget_tokens=150000"))
        assert poor.returncode == 3, poor.stderr
        assert "requests are answered and kept" in poor.stderr
        seen = len(server.seen)

        Path(tmp_path / "wrong").write_text("sk-wrong")
        wrong = run(tmp_path, *settings(server, f"instruct.key_file={tmp_path / 'wrong'}"))
        assert wrong.returncode == 2, wrong.stderr
        assert wrong.stderr.strip().splitlines()[-1].startswith("error: ")
        assert len(server.seen) == seen

        done = run(tmp_path, *settings(server), "--json")
        assert done.returncode == 0, done.stderr
        assert "answers are stored already" in done.stdout + done.stderr
        artifact = Path(json.loads(done.stdout.strip().splitlines()[-1])["artifacts"]["instruct"])
        answers = json.loads((tmp_path / artifact / "manifest.json").read_text())["notes"]["teacher"][
            "answers"
        ]
        again = server.answered().total() - sum(answers.values())
        print(
            f"{sum(answers.values())} requests, {again} of them answered twice: those under way at the kill"
        )
        assert again <= 8
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or KEY.encode() not in file.read_bytes()
