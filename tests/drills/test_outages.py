"""S3 or MLflow away for 20 s at a random moment of a whole `llava train`: it finishes, nothing is twice, nothing lost.

A round is `llava train tiny`, made small, on S3 and an MLflow server, with a proxy before each. What it leaves is
compared with a run whose services were always there: data and weights to the byte, scores, MLflow's runs, steps and
versions.
`LLAVA_DRILL_SEED` and `LLAVA_DRILL_ROUNDS` (10) give the rounds of another run.
"""

import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from components.contract import Artifact, open_artifact
from tests.conftest import BUCKET, S3Server
from tests.support.command import LLAVA, environment
from tests.support.faulty_proxy import FaultyProxy

AWAY = 20.0  # seconds
WAIT = 1800.0  # seconds: a busy machine is slow, and that is no fault
SMALL = {
    "shard.scenes": 160,
    "instruct.heldout_questions": 8,
    "instruct.per_photo": 1,
    "pretrain.epochs": 0.5,
    "pretrain.global_batch": 16,
    "pretrain.workers": 1,
    "pretrain.checkpoint_every": 4,
    "finetune.workers": 1,
    "finetune.checkpoint_every": 4,
    "evaluate.workers": 1,
}
SEED = int(os.environ.get("LLAVA_DRILL_SEED", random.SystemRandom().randrange(10**6)))
ROUNDS = int(os.environ.get("LLAVA_DRILL_ROUNDS", "10"))


@dataclass
class Services:
    """Both, each behind its proxy, and MLflow as it is."""

    s3: FaultyProxy
    mlflow: FaultyProxy
    env: dict[str, str]
    truth: MlflowClient


@dataclass
class Trained:
    """What one command left."""

    name: str
    summary: dict[str, Any]
    err: str
    seconds: float
    artifacts: dict[str, Artifact] = field(default_factory=dict)


@pytest.fixture(scope="module")
def services(s3_server: S3Server, mlflow_uri: str) -> Iterator[Services]:
    """Started for the module."""
    with FaultyProxy(s3_server.endpoint).running() as s3, FaultyProxy(mlflow_uri).running() as mlflow:
        env = {**s3_server.env, "AWS_ENDPOINT_URL": s3.url, "MLFLOW_TRACKING_URI": mlflow.url}
        yield Services(s3, mlflow, env, MlflowClient(tracking_uri=mlflow_uri, registry_uri=mlflow_uri))


@pytest.fixture(scope="module")
def undisturbed(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run whose services were always there."""
    return train(services, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.drill
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_service_that_is_away_at_a_random_moment_costs_nothing_but_time(
    services: Services, undisturbed: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, round_: int
) -> None:
    for name, value in services.env.items():
        monkeypatch.setenv(name, value)
    dice = random.Random(f"{SEED} {round_}")
    who, moment = ("s3", "mlflow")[round_ % 2], dice.uniform(0, undisturbed.seconds)
    print(f"seed {SEED}, round {round_}: {who} away {moment:.1f} s after the start", flush=True)
    trained = train(services, tmp_path, who, moment)
    if trained.seconds < moment:  # a machine that others use less now: it was over already
        trained = train(services, tmp_path, who, dice.uniform(0, trained.seconds / 2))
    lines = [line for line in trained.err.splitlines() if "does not answer" in line]
    print(
        f"  took {trained.seconds:.0f} s, undisturbed {undisturbed.seconds:.0f} s; told: {lines}", flush=True
    )
    assert_the_same(trained, undisturbed)
    assert_nothing_twice(services.truth, trained)
    assert len(lines) <= 2, "a line per outage, one more where a finished one was seen by a call that hung"


def train(services: Services, folder: Path, who: str = "", moment: float = 0.0) -> Trained:
    """The command on a root and with names of its own; `who` goes away `moment` seconds after its run began."""
    name = f"drill-{uuid4().hex[:8]}"
    config = folder / "config.yaml"
    tiny = Path(__file__).parents[2] / "workflows/presets/tiny.yaml"
    config.write_text(tiny.read_text().replace("name: tiny", f"name: {name}", 1))
    settings = {**SMALL, "register.name": name}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [*LLAVA, "train", str(config), *sets, "--root", f"s3://{BUCKET}/{name}", "--json"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**services.env, LLAVA_CACHE=str(folder / "cache")),
        stdin=subprocess.DEVNULL,
        stdout=(folder / "out").open("wb"),
        stderr=(folder / "err").open("wb"),
    )
    try:
        began = _begun(services.truth, name, process)
        if who:
            while time.monotonic() - began < moment and process.poll() is None:
                time.sleep(0.1)
            getattr(services, who).away(AWAY).join()
        status = process.wait(WAIT)
        seconds = time.monotonic() - began
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(WAIT)
    err = (folder / "err").read_text()
    assert status == 0, err
    summary = json.loads((folder / "out").read_text().strip().splitlines()[-1])
    trained = Trained(name, summary, err, seconds)
    with pytest.MonkeyPatch.context() as patched:
        for variable, value in services.env.items():
            patched.setenv(variable, value)
        trained.artifacts = {stage: open_artifact(uri) for stage, uri in summary["artifacts"].items()}
    return trained


def _begun(truth: MlflowClient, name: str, process: subprocess.Popen[bytes]) -> float:
    """When the workflow's run appears in MLflow: what comes before is the first check, which waits for nobody."""
    while process.poll() is None:
        found = truth.get_experiment_by_name(name)
        if found and truth.search_runs([found.experiment_id], "tags.workflow = 'train'"):
            break
        time.sleep(0.1)
    return time.monotonic()


def assert_the_same(trained: Trained, undisturbed: Trained) -> None:
    """Every artifact is whole, and the models and answers are those of the run that nobody disturbed."""
    assert trained.artifacts.keys() == undisturbed.artifacts.keys()
    for stage, artifact in trained.artifacts.items():
        for file in artifact.manifest.files:
            assert artifact.folder.sha256(file.path) == file.sha256, file.path
        if stage in ("shard", "instruct", "pretrain", "finetune"):
            assert contents(artifact) == contents(undisturbed.artifacts[stage]), stage
    assert trained.summary["scores"] == undisturbed.summary["scores"]


def contents(artifact: Artifact) -> dict[str, str]:
    """The sha256 of what is data or weights."""
    return {
        file.path: file.sha256
        for file in artifact.manifest.files
        if file.path.endswith((".parquet", ".safetensors"))
    }


def assert_nothing_twice(truth: MlflowClient, trained: Trained) -> None:
    """One version, one finished run for each stage under one of the workflow, and every step's loss once."""
    (version,) = truth.search_model_versions(f"name = '{trained.name}'")
    champion = truth.get_model_version_by_alias(trained.name, "champion")
    assert champion.version == version.version == trained.summary["model"]["version"] == "1"
    experiment = truth.get_experiment_by_name(trained.name)
    assert experiment is not None
    runs = truth.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    stages = Counter(run.data.tags.get("component", run.data.tags.get("workflow")) for run in runs)
    assert stages == Counter(["train", *trained.artifacts])
    for run in runs:
        stage = run.data.tags.get("component")
        if stage in ("pretrain", "finetune"):
            lines = trained.artifacts[stage].folder.read("history.jsonl").splitlines()
            logged = truth.get_metric_history(run.info.run_id, "train/loss")
            assert sorted(point.step for point in logged) == [json.loads(line)["step"] for line in lines]
