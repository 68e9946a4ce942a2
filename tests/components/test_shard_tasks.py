"""Shard tasks under fire: a driver and a worker killed in the middle, nothing lost and nothing done twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from components.contract.manifest import Artifact
from components.shard import Shard, ShardSettings


def contents(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifact.manifest.files}


DRIVER = """
    import logging, sys, ray
    from components.contract.runner import Workspace, run_component
    from components.contract.store import open_store
    from components.contract.tracking import Tracking
    from components.shard import Shard, ShardSettings

    address, root, mlflow = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    workspace = Workspace(open_store(root), Tracking(mlflow, "killed", root + "/mlflow"))
    settings = ShardSettings(scenes=800, rows_per_shard=20, workers=1)
    run_component(Shard(), settings, {}, workspace)
"""


def test_a_killed_driver_leaves_finished_shards_that_the_next_run_does_not_redo(
    ray_local: str, mlflow_db: str, run_in: Any, tmp_path: Path, lines: Any
) -> None:
    root = tmp_path / "root"
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), ray_local, str(root), mlflow_db],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        cwd=Path(__file__).parents[2],
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(root.glob("shard/*/checkpoints/shards/*.json"))) < 3:
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    time.sleep(1)  # the cluster notices the driver's death, a task in flight may still end
    records = list(root.glob("shard/*/checkpoints/shards/*.json"))
    (folder,) = root.glob("shard/*")
    assert len(records) < 40
    written = [file["path"] for path in records for file in json.loads(path.read_text())["files"]]
    before = {path: (folder / path).stat().st_mtime_ns for path in written}
    settings = ShardSettings(scenes=800, rows_per_shard=20)
    resumed = run_in(Shard(), settings, root=root)
    assert not resumed.reused
    assert f"800 samples in 40 shards, {len(records)} found finished" in lines.said
    assert {path: (folder / path).stat().st_mtime_ns for path in written} == before
    whole = run_in(Shard(), settings, root=tmp_path / "whole")
    assert contents(resumed.artifact) == contents(whole.artifact)
    assert resumed.artifact.manifest.notes == whole.artifact.manifest.notes


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
