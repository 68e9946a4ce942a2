"""SIGHUP, and kill -9 of Ray's raylet, of its head and of the command, at random moments of a whole `llava train`.

Nothing of it is left running, and the same command goes on: what it makes is compared with a run that nobody ended,
data and weights to the byte.
`LLAVA_DRILL_SEED` and `LLAVA_DRILL_ROUNDS` (10) give the rounds of another run.
"""

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.contract import open_artifact
from tests.drills.test_outages import SMALL, contents
from tests.support.command import LLAVA
from tests.support.signalled import Signalled

SOON = 30.0  # seconds: a busy machine is slow
SEED = int(os.environ.get("LLAVA_DRILL_SEED", random.SystemRandom().randrange(10**6)))
ROUNDS = int(os.environ.get("LLAVA_DRILL_ROUNDS", "10"))
SETS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
WAYS = {"SIGHUP": "", "raylet": "raylet/raylet", "head": "gcs_server", "command": ""}
"""How a command ends, and the title of the process that is killed where it is not its own."""


@dataclass(frozen=True)
class Undisturbed:
    """What the command left that nobody ended, and how long it took."""

    summary: dict[str, Any]
    contents: dict[str, dict[str, str]]
    seconds: float


def start(folder: Path) -> Signalled:
    """The command in `folder`, with everything that it keeps."""
    return Signalled(
        command=[*LLAVA, "train", "tiny", *SETS, "--json"], cwd=folder, LLAVA_CACHE=str(folder / "cache")
    )


def summary_of(running: Signalled) -> dict[str, Any]:
    assert running.wait() == 0, running.err
    found: dict[str, Any] = json.loads(running.out.strip().splitlines()[-1])
    return found


def made(folder: Path, summary: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The sha256 of every file of data and weights, each read again."""
    found = {}
    for stage, uri in summary["artifacts"].items():
        artifact = open_artifact(str(folder / uri))
        for file in artifact.manifest.files:
            assert artifact.folder.sha256(file.path) == file.sha256, file.path
        if stage in ("shard", "instruct", "pretrain", "finetune"):
            found[stage] = contents(artifact)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    with start(folder) as running:
        summary = summary_of(running)
    seconds = time.monotonic() - began
    return Undisturbed(summary, made(folder, summary), seconds)


@pytest.mark.drill
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_whatever_ends_the_command_nothing_runs_on_and_the_same_command_finishes(
    undisturbed: Undisturbed, tmp_path: Path, round_: int
) -> None:
    dice = random.Random(f"{SEED} {round_}")
    way, moment = list(WAYS)[round_ % len(WAYS)], dice.uniform(0, 0.9 * undisturbed.seconds)
    print(f"seed {SEED}, round {round_}: {way}, {moment:.1f} s after the start", flush=True)
    with start(tmp_path) as running:
        told = ended(running, way, moment)
        status, began = running.wait(), time.monotonic()
        left = running.left_after(SOON)
        print(
            f"  status {status}, quiet after {time.monotonic() - began:.1f} s; said: {told(running)}",
            flush=True,
        )
        assert status == {"SIGHUP": 4, "command": -signal.SIGKILL}.get(way, status) != 0
        assert left == []
        assert running.folders() == []
        # Ray ends the command at once where it loses its raylet or its head: its watchdog says so in its place.
        # A command that is killed before it has a cluster has no watchdog.
        assert len(told(running)) == 1 or (way == "command" and not told(running)), running.err
    began = time.monotonic()
    with start(tmp_path) as again:
        summary = summary_of(again)
    print(f"  the same command took {time.monotonic() - began:.0f} s, found {summary['reused']}", flush=True)
    assert made(tmp_path, summary) == undisturbed.contents
    assert summary["scores"] == undisturbed.summary["scores"]
    assert_nothing_twice(tmp_path, summary)


def ended(running: Signalled, way: str, moment: float) -> Any:
    """End it so, at that moment or as soon after it as there is something to kill."""
    time.sleep(moment)
    assert running.process.poll() is None, f"over before its moment: {running.err}"
    if WAYS[way]:
        running.until_there(WAYS[way]).kill()
    else:
        running.process.send_signal(signal.SIGHUP if way == "SIGHUP" else signal.SIGKILL)
    return lambda one: [line for line in one.err.splitlines() if line.startswith("error: ")]


def assert_nothing_twice(folder: Path, summary: dict[str, Any]) -> None:
    """One version, and every step's loss once."""
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    (version,) = client.search_model_versions("name = 'llava-tiny'")
    assert client.get_model_version_by_alias("llava-tiny", "champion").version == version.version
    assert str(version.version) == "1"
    for stage in ("pretrain", "finetune"):
        artifact = open_artifact(str(folder / summary["artifacts"][stage]))
        steps = [json.loads(line)["step"] for line in artifact.folder.read("history.jsonl").splitlines()]
        run = artifact.manifest.mlflow_run_id
        assert run is not None
        assert sorted(point.step for point in client.get_metric_history(run, "train/loss")) == steps
