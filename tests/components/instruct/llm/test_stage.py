"""`instruct` with a language model as the teacher: real photos, a real endpoint, the real runner, MLflow and Ray."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pyarrow.parquet as pq
import pytest

from components.contract import Artifact, Settings
from components.finetune import Finetune, FinetuneSettings
from components.instruct import Instruct, InstructSettings
from components.shard import Shard, ShardSettings
from components.training.data import source_of
from llava.conversation import Encoder
from llava.data.plan import scan
from llava.data.schema import DATASET_SCHEMA, SPLITS
from llava.errors import BudgetReached, LlavaError, RefusedInput
from llava.model import image_tokens, load_config, load_processor
from tests.components.instruct.conftest import llm
from tests.components.training.test_stage import GivenModel
from tests.support.teacher_server import KEY, Manners, TeacherServer, teacher_server
from tests.support.tiny_llava import tiny_llava


@pytest.fixture(scope="module")
def photos(run_at: Any, tmp_path_factory: pytest.TempPathFactory, coco_folder: Path) -> Artifact:
    """Real photos in three shards, some held out."""
    settings = ShardSettings(source="coco", path=str(coco_folder), heldout=0.1, rows_per_shard=40)
    artifact: Artifact = run_at(tmp_path_factory.mktemp("photos"), Shard(), settings).artifact
    return artifact


@dataclass
class Told:
    """An artifact that took three runs: over the budget, over the share of rejects, and finished."""

    artifact: Artifact
    server: TeacherServer
    over_budget: BudgetReached
    answered_by_then: int
    over_rejects: LlavaError
    seen_by_then: int


@pytest.fixture(scope="module")
def told(run_at: Any, tmp_path_factory: pytest.TempPathFactory, photos: Artifact) -> Iterator[Told]:
    """Refusals and malformed answers belong to their request, so that they come back in any other run."""
    root = tmp_path_factory.mktemp("told")
    (root / "key").write_text(KEY)
    with teacher_server(Manners(refuse=0.06, malform=0.06)) as server:
        settings = llm(server, str(root / "key"), price_prompt=2.0, price_completion=8.0)

        def run(**changed: Any) -> Artifact:
            artifact: Artifact = run_at(
                root / "root", Instruct(), settings.model_copy(update=changed), {"dataset": photos}
            ).artifact
            return artifact

        with pytest.raises(BudgetReached) as over_budget:
            run(budget_tokens=60_000)
        answered = len(server.answered())
        with pytest.raises(LlavaError) as over_rejects:
            run(max_rejected=0.02)
        seen = len(server.seen)
        yield Told(run(), server, over_budget.value, answered, over_rejects.value, seen)


def rows_of(artifact: Artifact, split: str = "train") -> list[dict[str, Any]]:
    files = sorted(artifact.local().glob(f"{split}/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def made(artifact: Artifact) -> dict[str, str]:
    """What the samples are stored in, with the hashes."""
    wanted = ("train/", "heldout/", "llava_instruct.json")
    return {file.path: file.sha256 for file in artifact.manifest.files if file.path.startswith(wanted)}


def test_all_three_types_are_written_about_real_photos(told: Told, photos: Artifact) -> None:
    artifact, server = told.artifact, told.server
    rows = rows_of(artifact)
    sources = {row["id"]: row for row in rows_of(photos)}
    types = Counter(row["type"] for row in rows)
    assert set(types) == {"conversation", "detail", "reasoning"}
    assert types["reasoning"] > types["conversation"] > types["detail"]
    for row in rows:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert "".join(turn["value"] for turn in turns).count("<image>") == 1
        assert "<image>" in turns[0]["value"]
        source = sources[row["id"].rpartition("-")[0]]
        assert (row["image"], row["objects"]) == (source["image"], source["objects"])
    assert {row["conversations"][0]["value"].startswith("<image>\n") for row in rows} == {True, False}
    assert len(rows) == len({row["id"] for row in rows})
    assert set(server.answered().values()) == {1}


def test_the_teacher_is_shown_boxes_but_not_in_conversations(told: Told) -> None:
    contexts = {True: 0, False: 0}
    for one in told.server.seen:
        messages = one.body["messages"]
        if one.outcome == "answered":
            conversation = len(messages) == 6 and "Question:" in messages[2]["content"]
            assert ("Objects:" in messages[-1]["content"]) != conversation
            contexts[conversation] += 1
    assert all(contexts.values())


def test_the_ecosystems_file_and_the_report_say_what_was_made(told: Told, mlflow_db: str) -> None:
    artifact, server = told.artifact, told.server
    records = json.loads((artifact.local() / "llava_instruct.json").read_text())
    assert records == [
        {"id": row["id"], "image": row["image"]["path"], "conversations": row["conversations"]}
        for row in rows_of(artifact)
    ]
    client = mlflow.MlflowClient(mlflow_db)
    run = client.get_run(artifact.manifest.mlflow_run_id)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"questions.png", "conversations.png", "teacher.png"} <= files
    notes = artifact.manifest.notes["teacher"]
    asked = [one for one in server.seen if one.outcome == "answered"]
    assert sum(notes["answers"].values()) == len(asked) == run.data.metrics["teacher/answers"]
    assert sum(notes["tokens"].values()) == sum(one.tokens for one in asked)
    expected = (notes["tokens"]["prompt"] * 2 + notes["tokens"]["completion"] * 8) / 1e6
    assert run.data.metrics["teacher/cost"] == notes["cost"] == pytest.approx(expected)
    rejects = [
        json.loads(line) for line in artifact.folder.read("rejected.jsonl").decode().split("\n") if line
    ]
    whole = Counter(one["reason"] for one in rejects if one["pair"] is None)
    assert notes["rejected"]["samples"] == dict(whole)
    assert len(rows_of(artifact)) == len(asked) - whole.total()


def test_the_key_is_nowhere(told: Told, mlflow_db: str) -> None:
    artifact = told.artifact
    for file in artifact.local().rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
    database = Path(mlflow_db.removeprefix("sqlite:///"))
    with sqlite3.connect(database) as connection:
        assert KEY not in "\n".join(connection.iterdump())
    assert artifact.manifest.run["key_file"] is not None


@pytest.mark.drill
def test_a_storm_and_several_askers_leave_the_same_samples(
    run_in: Any, told: Told, photos: Artifact, teacher: TeacherServer, key_file: str
) -> None:
    manners = teacher.manners
    manners.refuse, manners.malform = 0.06, 0.06
    manners.too_many, manners.broken, manners.hang, manners.cut, manners.half = 0.3, 0.05, 0.03, 0.03, 0.03
    settings = llm(teacher, key_file, concurrency=24, timeout=4.0, requests_per_minute=1200, askers=2)
    storm = run_in(Instruct(), settings, {"dataset": photos}).artifact
    assert made(storm) == made(told.artifact)
    answered, notes = teacher.answered(), storm.manifest.notes["teacher"]
    assert set(answered) == set(told.server.answered())
    faults = notes["tries_without_answer_in_the_last_run"]
    assert answered.total() - len(answered) <= teacher.given_up(faults)
    # 20 a second; as everywhere, a request may arrive up to two seconds after it left.
    assert teacher.most_within(3) <= (3 + 2) * 20
    assert teacher.most_under_way <= 24
    assert notes["rejected"] == told.artifact.manifest.notes["teacher"]["rejected"]
    assert notes["rejected"]["samples"]["refusal"] > 0
    assert notes["rejected"]["samples"]["malformed"] > 0
    assert faults["status 429"] > 20


def test_an_asker_that_is_killed_is_started_again_and_repeats_at_most_what_it_had_under_way(
    run_in: Any, told: Told, photos: Artifact, teacher: TeacherServer, key_file: str
) -> None:
    teacher.manners.refuse, teacher.manners.malform, teacher.manners.seconds = 0.06, 0.06, 0.2
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while len(teacher.answered()) < 40 and time.monotonic() < deadline:
            time.sleep(0.02)
        ours = psutil.Process().children(recursive=True)
        asker = next(one for one in ours if one.status() != "zombie" and "ray::Asker" in one.cmdline()[0])
        asker.kill()
        killed.append(asker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    artifact = run_in(
        Instruct(), llm(teacher, key_file, concurrency=8, askers=2), {"dataset": photos}
    ).artifact
    killer.join()
    assert killed
    assert made(artifact) == made(told.artifact)
    again = [digest for digest, count in teacher.answered().items() if count > 1]
    assert 0 < len(again) <= 8 // 2
    assert teacher.answered().total() == len(teacher.answered()) + len(again)


def test_judging_anew_asks_nothing(told: Told, run_at: Any, photos: Artifact, key_file: str) -> None:
    artifact, server = told.artifact, told.server
    before = len(server.seen)
    root = Path(artifact.uri).parents[1]
    other = InstructSettings(
        **{**artifact.manifest.recipe, **artifact.manifest.run, "max_words": 30, "max_rejected": 1}
    )
    assert not run_at(root, Instruct(), other, {"dataset": photos}).reused
    # Not even whether the endpoint is there is asked.
    assert len(server.seen) == before
    assert run_at(root, Instruct(), other, {"dataset": photos}).reused


def test_a_budget_ends_the_run_with_its_own_status_and_a_larger_one_goes_on(told: Told) -> None:
    assert told.over_budget.exit_status == 3
    assert re.search(r"requests are answered and kept .*instruct\.budget_tokens", str(told.over_budget))
    assert 5 < told.answered_by_then < len(told.server.answered())
    assert set(told.server.answered().values()) == {1}


def test_too_many_rejects_fail_the_run_and_a_higher_limit_pays_nothing_again(told: Told) -> None:
    expected = (
        r"answers are rejected, limit instruct\.max_rejected=0\.02: \d+ x (refusal|malformed) \(such as 0"
    )
    assert re.search(expected, str(told.over_rejects))
    assert len(told.server.seen) >= told.seen_by_then == len(told.server.answered()) + 2  # and two probes


def test_an_endpoint_that_cannot_be_used_is_told_before_the_cluster_is_joined(
    photos: Artifact, teacher: TeacherServer, key_file: str, tmp_path: Path, mlflow_db: str
) -> None:
    from components.contract import Tracking, Workspace, open_store, run_component
    from tests.components.conftest import Lines

    def join() -> None:
        raise AssertionError("the cluster was joined")

    tracking = Tracking(mlflow_db, "components", str(tmp_path / "files"))
    workspace = Workspace(open_store(tmp_path / "root"), tracking, console=Lines(), cluster=join)
    Path(key_file).write_text("sk-wrong")
    with pytest.raises(RefusedInput, match="status 401"):
        run_component(Instruct(), llm(teacher, key_file), {"dataset": photos}, workspace)


@pytest.fixture(scope="module")
def datasets(told: Told, run_at: Any, photos: Artifact) -> dict[str, Artifact]:
    """What each of the two teachers made of the same photos."""
    root = Path(told.artifact.uri).parents[1]
    rules = run_at(root, Instruct(), InstructSettings(max_bad=0.2), {"dataset": photos}).artifact
    return {"rules": rules, "llm": told.artifact}


SHORT = FinetuneSettings(
    template="chatml", precision="fp32", global_batch=8, epochs=0.1, workers=1, zero_stage=0, max_length=4096
)


@pytest.mark.parametrize("teacher_of", ["rules", "llm"])
def test_finetune_reads_and_measures_the_dataset_of_either_teacher(
    datasets: dict[str, Artifact], teacher_of: str, tmp_path: Path
) -> None:
    first, *others = (
        pq.read_schema(file)
        for each in datasets.values()
        for file in each.local().glob("*/*.parquet")
        if file.parent.name in SPLITS
    )
    assert all(first.equals(other, check_metadata=True) for other in others)
    assert first.names == DATASET_SCHEMA.names
    dataset, model = datasets[teacher_of], tiny_llava(tmp_path / "model")
    encoder = Encoder(load_processor(model).tokenizer, "chatml", image_tokens(load_config(model)), 4096)
    index, coverage = scan(source_of(dataset).open("conversations"), "conversations", encoder)
    assert len(index) == coverage.samples == len(rows_of(dataset)) > 50
    assert coverage.supervised > 3 * coverage.samples
    assert (coverage.truncated, coverage.lost) == (0, 0)


@pytest.mark.drill
@pytest.mark.parametrize("teacher_of", ["rules", "llm"])
def test_finetune_learns_from_the_dataset_of_either_teacher(
    run_in: Any, datasets: dict[str, Artifact], teacher_of: str
) -> None:
    model = run_in(GivenModel(), Settings()).artifact
    trained = run_in(Finetune(), SHORT, {"model": model, "dataset": datasets[teacher_of]}).artifact
    losses = [
        json.loads(line)["train/loss"] for line in trained.folder.read("history.jsonl").decode().splitlines()
    ]
    assert len(losses) >= 2
    assert all(0 < loss < 20 for loss in losses)
