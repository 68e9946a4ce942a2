"""Shard tasks under fire: drivers, workers and the store killed in the middle, nothing lost and nothing done twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.contract.manifest import Artifact, open_artifact
from components.contract.store import open_store
from components.shard import Shard, ShardSettings
from tests.support.repository import REPOSITORY


def contents(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifact.manifest.files}


@contextmanager
def driver(
    ray_local: str, mlflow_db: str, root: str | Path, tmp_path: Path, settings: ShardSettings, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """`shard` in a process of its own, on the test's Ray."""
    arguments = [ray_local, str(root), mlflow_db, str(tmp_path / "mlflow"), settings.model_dump_json()]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.shard_driver", *arguments],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **env},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def killed_after(
    ready: Callable[[Path], bool], ray_local: str, mlflow_db: str, run_in: Any, tmp_path: Path, lines: Any
) -> int:
    """Kill the driver once `ready(root)`, run again, compare with an undisturbed run; the shards found finished."""
    root = tmp_path / "root"
    settings = ShardSettings(scenes=800, rows_per_shard=20, quality=False)
    slowly = settings.model_copy(update={"workers": 1})
    with driver(ray_local, mlflow_db, root, tmp_path, slowly) as process:
        wait_for(lambda: ready(root), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1)  # the cluster notices the driver's death, a task in flight may still end
    records = sorted(root.glob("shard/*/**/checkpoints/shards/*.json"))
    written = [
        (file["path"], record.parents[2] / file["path"])
        for record in records
        for file in json.loads(record.read_text())["files"]
    ]
    before = {name: (path.stat().st_mtime_ns, path.stat().st_ino) for name, path in written}
    resumed = run_in(Shard(), settings, root=root)
    assert not resumed.reused
    if records:
        assert f"800 samples in 40 shards, {len(records)} found finished" in lines.said
    # The very files: a second owner takes them over by hard links.
    after = {name: (Path(resumed.artifact.folder.uri) / name).stat() for name, _ in written}
    assert {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in after.items()} == before
    whole = run_in(Shard(), settings, root=tmp_path / "whole")
    assert contents(resumed.artifact) == contents(whole.artifact)
    assert resumed.artifact.manifest.notes == whole.artifact.manifest.notes
    return len(records)


def test_a_killed_driver_leaves_finished_shards_that_the_next_run_does_not_redo(
    ray_local: str, mlflow_db: str, run_in: Any, tmp_path: Path, lines: Any
) -> None:
    def three(root: Path) -> bool:
        return len(list(root.glob("shard/*/**/checkpoints/shards/*.json"))) >= 3

    assert killed_after(three, ray_local, mlflow_db, run_in, tmp_path, lines) >= 3
    assert any("found finished" in line for line in lines.said)


@pytest.mark.drill
@pytest.mark.parametrize("round_", range(10))
def test_a_driver_killed_at_a_random_moment_costs_no_finished_shard(
    ray_local: str, mlflow_db: str, run_in: Any, tmp_path: Path, lines: Any, round_: int
) -> None:
    shards, pause, reached = random.randrange(36), random.uniform(0, 0.3), list[float]()

    def then(root: Path) -> bool:
        if not reached and len(list(root.glob("shard/*/**/checkpoints/shards/*.json"))) >= shards:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] > pause

    found = killed_after(then, ray_local, mlflow_db, run_in, tmp_path, lines)
    print(f"round {round_}: killed {pause:.2f} s after shard {shards} of 40; {found} found finished")
    assert shards <= found <= 40


@pytest.mark.drill
@pytest.mark.parametrize("seconds", [4.0, 20.0])
def test_a_store_that_stays_away_ends_the_run_resumably_and_one_that_comes_back_only_delays_it(
    ray_local: str, mlflow_db: str, run_in: Any, own_s3: Any, tmp_path: Path, seconds: float
) -> None:
    settings = ShardSettings(scenes=500, rows_per_shard=20, workers=1, quality=False)
    root = "s3://llava-tests/outage"

    def finished() -> int:
        return sum("/checkpoints/shards/" in entry.key for entry in open_store(root).list("shard/"))

    with pytest.MonkeyPatch.context() as environment:

        @contextmanager
        def server() -> Iterator[None]:
            with own_s3.running() as started:
                for name, value in started.env.items():
                    environment.setenv(name, value)
                yield

        run = partial(driver, ray_local, mlflow_db, root, tmp_path, settings)
        with contextlib.ExitStack() as stack:
            with server():
                process = stack.enter_context(run(LLAVA_OUTAGE_SECONDS="1"))
                wait_for(lambda: finished() > 3, process)
            _, error = process.communicate(timeout=120)
            assert process.returncode == 1
            assert "no answer from AWS_ENDPOINT_URL=" in error.splitlines()[-1]
            with server():
                before = finished()
                process = stack.enter_context(run())
                wait_for(lambda: finished() > before, process)
            time.sleep(seconds)
            assert process.poll() is None
            stack.enter_context(server())
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            assert f"500 samples in 25 shards, {before} found finished" in error
            (folder,) = {entry.key.split("/")[1] for entry in open_store(root).list("shard/")}
            survived = open_artifact(f"{root}/shard/{folder}")
    assert contents(survived) == contents(run_in(Shard(), settings).artifact)


def test_a_worker_that_is_killed_costs_a_retry_and_nothing_else(run_in: Any, tmp_path: Path) -> None:
    settings = ShardSettings(scenes=1200, rows_per_shard=300)
    whole = run_in(Shard(), settings, root=tmp_path / "whole").artifact
    killed: list[int] = []
    watcher = threading.Thread(target=_kill_one_shard_worker, args=(killed,))
    watcher.start()
    disturbed = run_in(Shard(), settings, root=tmp_path / "disturbed").artifact
    watcher.join()
    assert len(killed) == 1
    assert contents(disturbed) == contents(whole)


def _kill_one_shard_worker(killed: list[int]) -> None:
    deadline = time.monotonic() + 30
    while not killed and time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                if process.cmdline()[0].startswith("ray::_run_here"):
                    process.kill()
                    killed.append(process.pid)
                    return
        time.sleep(0.01)
