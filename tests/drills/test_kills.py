"""Kill drills on real processes: whatever dies while a stage trains, the same command ends with the same bits.

A drill is the command `llava finetune tiny`, made small: stage 1 with ZeRO-2, then stage 2 with ZeRO-3 (or the
other way round); for every run of the tests stage 2 alone, as it stands in the run that all tests share. What it
leaves is compared with a run that nobody disturbed: loss curve, weights, the ids that made each step, and what MLflow
holds.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from components.contract import open_artifact
from tests.support.command import LLAVA, environment
from tests.support.whole_run import SHARED, trained

EPOCHS = 2
WAIT = 600.0  # seconds: a busy machine starts slowly
QUICK = environment(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
BEFORE = ("backbones", "shard", "instruct")
BOTH = {"pretrain": 2, "finetune": 3}
"""Stage and its ZeRO stage."""


def arguments(zero: dict[str, int]) -> list[str]:
    """Of the command: few scenes, both stages over `EPOCHS`, a checkpoint every four steps."""
    values: dict[str, Any] = {
        "shard.scenes": 160,
        "instruct.heldout_questions": 8,
        "instruct.per_photo": 1,
        "pretrain.global_batch": 16,
    }
    values["pretrain.enabled"] = "pretrain" in zero
    for stage, number in zero.items():
        values |= {
            f"{stage}.epochs": EPOCHS,
            f"{stage}.checkpoint_every": 2,
            f"{stage}.zero_stage": number,
        }
    return [
        "finetune",
        "tiny",
        *[part for key, value in values.items() for part in ("--set", f"{key}={str(value).lower()}")],
    ]


class Drill:
    """One root, and the commands that work on it."""

    def __init__(self, root: Path, zero: dict[str, int]):
        self.root, self.zero, self.arguments = root, zero, arguments(zero)
        self.log = root.parent / f"{root.name}.log"
        self.driver: subprocess.Popen[bytes] | None = None
        self.environment = QUICK

    def start(self) -> None:
        """The command, in the background."""
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [*LLAVA, *self.arguments, "--root", str(self.root)],
                cwd=self.root.parent,
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                # A process group of its own, as a shell or a scheduler gives.
                start_new_session=True,
                # Started in the background of a script, it would have Ctrl-C ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )

    def wait(self) -> int:
        """Its exit status."""
        assert self.driver is not None
        return self.driver.wait(WAIT)

    def finish(self) -> None:
        """The command, to its end."""
        self.start()
        assert self.wait() == 0, self.log.read_text()

    def committed(self, stage: str) -> set[str]:
        """The checkpoints of a stage that are complete."""
        return {path.parent.name for path in self.root.glob(f"{stage}/*/**/checkpoints/*/COMMITTED")}

    def next_checkpoint(self, stage: str) -> None:
        """Until the running command has committed a checkpoint that was not there before."""
        before, deadline = self.committed(stage), time.monotonic() + WAIT
        while not self.committed(stage) - before:
            assert self.driver is not None
            assert self.driver.poll() is None, f"ended before a checkpoint of {stage}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"no checkpoint of {stage} in {WAIT:.0f} s"
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """All processes of the command but itself: its own cluster, and what runs on it."""
        assert self.driver is not None
        return psutil.Process(self.driver.pid).children(recursive=True)

    def artifact(self, stage: str) -> Any:
        """What the stage made."""
        (manifest,) = self.root.glob(f"{stage}/*/manifest.json")
        return open_artifact(manifest.parent)

    def close(self) -> None:
        """Nothing of it is left running."""
        if self.driver is not None and self.driver.poll() is None:
            for process in [*self.family(), psutil.Process(self.driver.pid)]:
                kill(process)
            self.driver.wait(30)


def kill(process: psutil.Process) -> None:
    """kill -9, by pid."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def title(process: psutil.Process) -> str:
    """What a process calls itself; nothing where it has just ended."""
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def kill_worker(drill: Drill) -> None:
    """One training worker; Ray starts the group again, in the same command."""
    kill(random.choice([one for one in drill.family() if "RayTrainWorker" in title(one)]))


def kill_driver(drill: Drill) -> None:
    """The command itself; its cluster goes with it."""
    assert drill.driver is not None
    family = drill.family()
    drill.driver.kill()
    drill.driver.wait(30)
    _, left = psutil.wait_procs(family, timeout=60)
    for process in left:
        kill(process)


def kill_cluster(drill: Drill) -> None:
    """Every process of the command's own Ray cluster."""
    for process in drill.family():
        kill(process)
    assert drill.wait() != 0


def terminate(drill: Drill) -> None:
    """SIGTERM: the command saves and says so with its status."""
    assert drill.driver is not None
    drill.driver.send_signal(signal.SIGTERM)
    assert drill.wait() == 4, drill.log.read_text()


def terminate_group(drill: Drill) -> None:
    """SIGTERM to every process of the group at once, as `timeout` and batch schedulers send it."""
    assert drill.driver is not None
    os.killpg(drill.driver.pid, signal.SIGTERM)
    assert drill.wait() == 4, drill.log.read_text()


def interrupt(drill: Drill) -> None:
    """Ctrl-C: as SIGTERM."""
    assert drill.driver is not None
    drill.driver.send_signal(signal.SIGINT)
    assert drill.wait() == 4, drill.log.read_text()


KINDS: dict[str, Callable[[Drill], None]] = {
    "worker": kill_worker,
    "driver": kill_driver,
    "cluster": kill_cluster,
    "SIGTERM": terminate,
    "SIGTERM to the group": terminate_group,
    "Ctrl-C": interrupt,
}


def undisturbed(root: Path, zero: dict[str, int]) -> Drill:
    """A run that nobody disturbs."""
    drill = Drill(root, zero)
    try:
        drill.finish()
    finally:
        drill.close()
    return drill


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return undisturbed(tmp_path_factory.mktemp("reference") / "root", BOTH)


def prepared(
    reference: Drill, root: Path, stages: tuple[str, ...] = BEFORE, zero: dict[str, int] | None = None
) -> Drill:
    """A drill whose root holds what these stages made."""
    for stage in stages:
        shutil.copytree(reference.root / stage, root / stage)
    return Drill(root, zero or reference.zero)


def rows(artifact: Any, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in artifact.folder.read(name).decode().splitlines()]


def assert_nothing_was_lost(drill: Drill, reference: Drill) -> None:
    """Each stage: the very same curve and weights; every sample once per epoch; every step once in MLflow."""
    mlflow = MlflowClient(f"sqlite:///{drill.root}/mlflow.db")
    for stage in drill.zero:
        ours, theirs = drill.artifact(stage), reference.artifact(stage)
        curve = [line["train/loss"] for line in rows(ours, "history.jsonl")]
        assert curve == [line["train/loss"] for line in rows(theirs, "history.jsonl")]
        steps = rows(ours, "samples.jsonl")
        assert [line["step"] for line in steps] == list(range(1, len(curve) + 1))
        epochs = [
            Counter(name for line in steps[first : first + len(steps) // EPOCHS] for name in line["ids"])
            for first in range(0, len(steps), len(steps) // EPOCHS)
        ]
        assert len(epochs) == EPOCHS and epochs[0] == epochs[1]
        assert epochs[0].total() == ours.manifest.notes["coverage"]["samples"]
        assert steps == rows(theirs, "samples.jsonl")
        ours_weights, weights = (
            load_file(one.local("model") / "model.safetensors") for one in (ours, theirs)
        )
        assert all(torch.equal(ours_weights[name], weights[name]) for name in weights)
        for name in ("train/loss", "train/fill"):
            logged = mlflow.get_metric_history(ours.manifest.mlflow_run_id, name)
            assert sorted(metric.step for metric in logged) == list(range(1, len(curve) + 1))


def test_a_worker_a_driver_a_cluster_and_a_sigterm_cost_nothing_but_time(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, _ = trained(tmp_path_factory)
    reference = Drill(folder / "runs", {"finetune": 3})
    drill = prepared(reference, tmp_path / "root", ("backbones", "shard", "instruct", "pretrain"))
    drill.arguments = ["finetune", "tiny", *SHARED, "--set", "finetune.checkpoint_every=2"]
    try:
        drill.start()
        drill.next_checkpoint("finetune")
        kill_worker(drill)
        for kill_it in (kill_driver, kill_cluster, terminate):
            drill.next_checkpoint("finetune")
            kill_it(drill)
            if kill_it is not terminate:
                drill.start()
        assert "saved after step" in drill.log.read_text()
        drill.finish()
    finally:
        drill.close()
    told = drill.log.read_text()
    assert told.count("resuming after step") == 4, told
    assert_nothing_was_lost(drill, reference)


@pytest.mark.drill
@pytest.mark.parametrize("round_", range(10))
def test_a_random_kill_at_a_random_moment(
    reference: Drill, swapped: Drill, tmp_path: Path, round_: int
) -> None:
    # The moment is random; what is killed goes round: all kinds, both stages, each with ZeRO-2 and ZeRO-3.
    kind, stage = list(KINDS)[round_ % 6], list(BOTH)[(round_ + round_ // 6) % 2]
    expected = (reference, swapped)[round_ // 2 % 2]
    moments = random.randint(1, 3)
    drill = prepared(reference, tmp_path / "root", zero=expected.zero)
    try:
        drill.start()
        for _ in range(moments):
            drill.next_checkpoint(stage)
        time.sleep(random.uniform(0, 0.5))
        print(f"round {round_}: {kind} in {stage}, ZeRO-{drill.zero[stage]}, after checkpoint {moments}")
        KINDS[kind](drill)
        if kind == "worker":
            assert drill.wait() == 0, drill.log.read_text()
        else:
            drill.finish()
    finally:
        drill.close()
    assert_nothing_was_lost(drill, expected)


@pytest.fixture(scope="module")
def swapped(reference: Drill, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """The reference with the two ZeRO stages the other way round."""
    root = tmp_path_factory.mktemp("swapped") / "root"
    prepared(reference, root)
    return undisturbed(root, {"pretrain": 3, "finetune": 2})
