"""A Ray cluster of two nodes, one of which dies while stage 2 trains: the run goes on with the other one."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from components.contract import open_artifact
from tests.drills.test_kills import WAIT, arguments, rows
from tests.support.command import LLAVA, environment


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with room for one worker."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 150 * 2**20})
    try:
        yield made
    finally:
        made.shutdown()


def start(root: Path, cluster: Cluster, log: Path, *more: str) -> "subprocess.Popen[bytes]":
    """`llava finetune` on the cluster: two workers, or as many as there is room for."""
    sets = ["--set", "finetune.min_workers=1", "--set", "pretrain.workers=1", *more]
    env = environment(
        RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2"
    )
    with log.open("ab") as output:
        return subprocess.Popen(
            [*LLAVA, *arguments({"pretrain": 2, "finetune": 2}), *sets, "--root", str(root)],
            cwd=root.parent, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
        )  # fmt: skip


@contextmanager
def running(root: Path, cluster: Cluster, log: Path, *more: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`start`, and nothing of it left at the end."""
    run = start(root, cluster, log, *more)
    try:
        yield run
    finally:
        run.kill()


def first_checkpoint(root: Path, run: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until stage 2 has committed one."""
    deadline = time.monotonic() + WAIT
    while not list(root.glob("finetune/*/**/checkpoints/*/COMMITTED")):
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def curve(root: Path) -> list[tuple[list[str], float]]:
    """The samples and the loss of each step."""
    (manifest,) = root.glob("finetune/*/manifest.json")
    artifact = open_artifact(manifest.parent)
    losses = [line["train/loss"] for line in rows(artifact, "history.jsonl")]
    samples = [line["ids"] for line in rows(artifact, "samples.jsonl")]
    return list(zip(samples, losses, strict=True))


@pytest.mark.drill
def test_a_lost_node_costs_no_sample_and_the_run_ends_with_the_same_curve(
    cluster: Cluster, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    other = cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)
    with running(tmp_path / "lost", cluster, log) as lost:
        first_checkpoint(tmp_path / "lost", lost, log)
        cluster.remove_node(other, allow_graceful=False)
        assert lost.wait(WAIT) == 0, log.read_text()
    assert "resuming after step" in log.read_text()
    cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)
    with running(tmp_path / "undisturbed", cluster, log) as undisturbed:
        assert undisturbed.wait(WAIT) == 0, log.read_text()
    ours, theirs = curve(tmp_path / "lost"), curve(tmp_path / "undisturbed")
    assert [sorted(ids) for ids, _ in ours] == [sorted(ids) for ids, _ in theirs]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], abs=1e-4)


@pytest.mark.drill
def test_the_notice_that_a_node_will_be_taken_away_saves_and_ends_with_status_4(
    cluster: Cluster, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    other = cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)
    # Long enough that the notice comes before the end.
    long = ["--set", "finetune.epochs=200", "--set", "finetune.checkpoint_every=20"]
    with running(tmp_path / "warned", cluster, log, *long) as warned:
        first_checkpoint(tmp_path / "warned", warned, log)
        drain = subprocess.run(
            [
                str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address,
                "--node-id", other.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message", "the drill", "--deadline-remaining-seconds", "300",
            ],
            env=environment(RAY_AUTH_MODE="disabled"), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert drain.returncode == 0, drain.stdout + drain.stderr
        assert warned.wait(WAIT) == 4, log.read_text()
    told = log.read_text()
    assert f"nodes are being taken away: {other.node_id}" in told, told
    saved = re.search(r"saved after step (\d+)", told)
    assert saved, told
    names = [path.parent.name for path in tmp_path.glob("warned/finetune/*/**/checkpoints/*/COMMITTED")]
    assert int(saved[1]) in {int(name.partition("-")[0]) for name in names}, names
