"""Retraining drills on one root: real Ray, a real MLflow server, real S3, `tiny` made small.

The tests are one story in their order: a champion stands, drops come in, each retraining builds on the one before.
"""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from components.contract import Store, open_artifact, open_store
from components.registry import Registry
from llava.errors import AlreadyRunning, RefusedInput
from tests.conftest import BUCKET, S3Server
from tests.support.command import LLAVA, environment
from tests.support.drops_of_shapes import arrive, records
from workflows import config as configs
from workflows import train
from workflows.retraining.drops import READY, RECORDS
from workflows.retraining.retrain import PLAN, Retrained, retrain

pytestmark = pytest.mark.drill
SETTINGS = [
    "shard.scenes=240", "instruct.heldout_questions=60", "instruct.per_photo=1", "pretrain.epochs=0.5",
    "finetune.epochs=1", "finetune.checkpoint_every=5", "evaluate.workers=1", "pretrain.workers=1",
    "finetune.workers=1", "retrain.settle=0", "register.confidence=0.8",
]  # fmt: skip
NAME = "llava-tiny-drops"


@dataclass
class Story:
    """A root with a champion, its drop prefix, and what looks into MLflow."""

    root: str
    incoming: Store
    registry: Registry
    mlflow: MlflowClient
    env: dict[str, str]
    """Of a command that works on it, in the same Ray cluster."""

    def config(self, *more: str) -> configs.WorkflowConfig:
        return configs.load("tiny", [*SETTINGS, f"name={NAME}", f"register.name={NAME}", *more])

    def retrain(self, *more: str) -> Retrained:
        return retrain(self.config(*more), self.root, [self.incoming.uri])

    def aliases(self) -> dict[str, str]:
        found = {alias: self.registry.by_alias(NAME, alias) for alias in ("champion", "challenger")}
        return {alias: version.version for alias, version in found.items() if version}

    def versions(self) -> int:
        return len([one for one in self.registry.versions() if one.name == NAME])

    def runs(self) -> list[Any]:
        experiment = self.mlflow.get_experiment_by_name(NAME)
        return list(
            self.mlflow.search_runs([experiment.experiment_id], "tags.workflow = 'retrain'", max_results=100)
        )


@pytest.fixture(scope="module")
def story(
    s3_server: S3Server, mlflow_uri: str, ray_local: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    """A root on S3 whose champion is trained on few scenes."""
    folder = tmp_path_factory.mktemp("retrain")
    env = {**s3_server.env, "LLAVA_CACHE": str(folder / "cache"), "MLFLOW_TRACKING_URI": mlflow_uri}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        root = f"s3://{BUCKET}/{uuid4().hex[:12]}"
        client = MlflowClient(tracking_uri=mlflow_uri)
        made = Story(root, open_store(f"{root}-in"), Registry(mlflow_uri), client,
                     {**env, "RAY_ADDRESS": ray_local, "RAY_AUTH_MODE": "disabled"})  # fmt: skip
        config = made.config()
        train.run(config, train.open_workspace(config.name, root))
        assert made.aliases() == {"champion": "1"}
        yield made


def test_nothing_new_ends_without_a_run(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    done = story.retrain()
    assert (done.result, done.summary) == ("nothing new", None)
    assert "nothing new" in capsys.readouterr().err
    assert story.runs() == []


def test_a_drop_in_progress_waits(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    arrive(story.incoming.sub("monday"), records(11, 2), ready=False)
    done = story.retrain()
    assert (done.result, done.waiting) == ("nothing new", [story.incoming.sub("monday").uri])
    assert f"{story.incoming.uri}/monday waits: no {READY}" in capsys.readouterr().err
    assert story.runs() == []


BAD: list[Any] = [
    '{"id": "cut short", "conver',
    {"id": "no file", "image": "gone.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                            {"from": "gpt", "value": "a circle"}]},
    {"id": "no picture", "image": "../data.jsonl", "conversations": []},
    {"id": "roles", "image": "0.png", "conversations": [{"from": "gpt", "value": "a circle"}]},
]  # fmt: skip


def test_bad_records_over_the_limit_stop_everything_before_training(story: Story) -> None:
    arrive(story.incoming.sub("monday"), records(11, 4), BAD)
    with pytest.raises(RefusedInput, match=r"monday: 4 of 8 records are bad \(.*limit retrain.max_bad=0.05"):
        story.retrain()
    (run,) = story.runs()
    assert run.info.status == "FAILED"
    assert story.versions() == 1
    assert list(open_store(story.root).list(f"{RECORDS}/")) == []


def test_good_new_data_moves_the_champion_and_bad_records_are_set_aside(story: Story) -> None:
    arrive(story.incoming.sub("monday"), records(11, 900), BAD)
    done = story.retrain()
    uri = story.incoming.sub("monday").uri
    print(done.summary.model if done.summary else None, done.summary.scores if done.summary else None)
    assert (done.result, done.drops) == ("champion", [uri])
    assert story.aliases() == {"champion": "2"}
    assert done.set_aside[uri]["set_aside"] == 4
    assert set(done.set_aside[uri]["reasons"]) >= {"no-json", "roles"}
    run = story.runs()[0]
    path = Path(story.mlflow.download_artifacts(run.info.run_id, "set_aside.json"))
    with path.open() as opened:
        assert json.load(opened) == done.set_aside
    assert "against champion version 1" in story.registry.by_version(NAME, "2").tags["decision"]  # type: ignore[union-attr]
    parts = json.loads(open_store(story.root).read(f"retrain/versions/{(done.data_version or '')[:16]}.json"))
    assert [part["role"] for part in parts["parts"]] == ["base", "new"]
    assert story.retrain().result == "nothing new"


def test_a_drop_that_is_copied_again_is_nothing_new(story: Story) -> None:
    monday, copy = story.incoming.sub("monday"), story.incoming.sub("monday-again")
    for entry in monday.list():
        copy.write(entry.key, monday.read(entry.key))
    copy.write(READY, b"another marker")
    before = len(story.runs())
    assert story.retrain().result == "nothing new"
    assert len(story.runs()) == before


def test_poor_data_keeps_the_champion_though_the_run_is_killed_and_started_twice(story: Story) -> None:
    arrive(story.incoming.sub("tuesday"), records(12, 300, wrong=True))
    sets = [
        part for value in [*SETTINGS, f"name={NAME}", f"register.name={NAME}"] for part in ("--set", value)
    ]
    command = [*LLAVA, "retrain", "tiny", "--root", story.root, "--drop", story.incoming.uri, *sets]
    driver = subprocess.Popen(command, env=environment(**story.env), stderr=subprocess.PIPE)
    try:
        store = open_store(story.root)
        wait_for(lambda: store.stat(PLAN) is not None, driver)
        with pytest.raises(AlreadyRunning, match="retrain is being made by process"):
            story.retrain()
        done = len(list(store.list("finetune/")))
        wait_for(lambda: len(list(store.list("finetune/"))) > done, driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait(30)
    finished = story.retrain()
    assert (finished.result, finished.drops) == ("challenger", [story.incoming.sub("tuesday").uri])
    assert story.aliases() == {"champion": "2", "challenger": "3"}
    assert story.versions() == 3
    decision = story.registry.by_version(NAME, "3").tags["decision"]  # type: ignore[union-attr]
    print(decision)
    assert "against champion version 2" in decision
    assert store.stat(PLAN) is None
    assert story.retrain().result == "nothing new"


def test_the_champion_goes_on_with_new_data_and_a_replay_of_the_old(story: Story) -> None:
    champion = story.registry.by_alias(NAME, "champion")
    assert champion is not None
    arrive(story.incoming.sub("wednesday"), records(13, 200))
    done = story.retrain("retrain.start=champion", "retrain.replay=0.2")
    assert done.summary is not None and done.drops == [story.incoming.sub("wednesday").uri]
    parts = json.loads(
        open_store(story.root).read(f"retrain/versions/{(done.data_version or '')[:16]}.json")
    )["parts"]
    assert [(part["role"], part["weight"]) for part in parts][-1] == ("new", 1.0)
    assert {part["weight"] for part in parts[:-1]} == {0.2}
    tuned = open_artifact(done.summary.artifacts["finetune"])
    assert tuned.manifest.inputs["model"] == champion.tags["artifact_digest"]
    replayed = sum(
        open_artifact(part["uri"]).manifest.notes["rows"]["train"] // 5
        for part in parts
        if part["role"] != "new"
    )
    seen = sum(len(json.loads(line)["ids"]) for line in tuned.folder.read("samples.jsonl").splitlines())
    assert abs(seen - 200 - replayed) <= len(parts)


def wait_for(condition: Any, driver: "subprocess.Popen[bytes]") -> None:
    """Until it holds, while the command is on."""
    deadline = time.monotonic() + 400
    while not condition():
        assert driver.poll() is None, (driver.stderr.read() if driver.stderr else b"").decode()
        assert time.monotonic() < deadline
        time.sleep(0.2)
