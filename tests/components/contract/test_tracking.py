"""Tracking against a real MLflow database and a real MLflow server."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from PIL import Image

from components.contract import TrackedRun, Tracking
from components.contract.tracked_run import BACKLOG, TABLES_TAG, flatten
from llava.errors import RefusedInput


def _run(run: TrackedRun):  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=run.uri).get_run(run.id)


def _history(run: TrackedRun, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=run.uri).get_metric_history(run.id, name)
    return sorted((metric.step, metric.value) for metric in found)


@pytest.fixture
def tracking(mlflow_db: str) -> Tracking:
    tracking = Tracking(mlflow_db, f"test-{uuid4().hex[:8]}")
    tracking.check()
    return tracking


def test_run_keeps_params_tags_metrics_parent_and_status(tracking: Tracking) -> None:
    parent = tracking.start("workflow")
    run = tracking.start(
        "shard", parent, {"digest": "abc"}, {"shard": {"rows": 3, "kinds": ["a"], "x": None}}
    )
    run.metrics({"train/loss": 0.5}, step=7)
    run.tags({"long": "x" * 20_000})
    run.finish()
    found = _run(run)
    assert found.data.params == {"shard.rows": "3", "shard.kinds": '["a"]', "shard.x": "null"}
    assert found.data.tags["mlflow.parentRunId"] == parent.id and found.data.tags["digest"] == "abc"
    assert _history(run, "train/loss") == [(7, 0.5)]
    assert found.info.status == "FINISHED"


def test_metric_rows_beyond_one_batch_all_arrive(tracking: Tracking) -> None:
    run = tracking.start("train")
    run.metric_rows([("train/loss", 1 / (step + 1), step, 1_000 + step) for step in range(1_500)])
    assert len(_history(run, "train/loss")) == 1_500


def test_more_params_than_one_batch(tracking: Tracking) -> None:
    run = tracking.start("many", params={f"key{number}": number for number in range(230)})
    assert len(_run(run).data.params) == 230


def test_changed_param_of_a_resumed_run_becomes_a_tag(tracking: Tracking) -> None:
    run = tracking.start("train", params={"workers": 1, "rate": 0.1})
    run.finish("FAILED")
    again = tracking.resume(run.id)
    again.params({"workers": 2, "rate": 0.1})
    found = _run(again)
    assert found.info.status == "RUNNING"
    assert found.data.params["workers"] == "1" and found.data.tags["changed.workers"] == "2"
    assert "changed.rate" not in found.data.tags


def test_resume_of_an_unknown_run_is_a_lookup_error(tracking: Tracking) -> None:
    with pytest.raises(LookupError):
        tracking.resume(uuid4().hex)


def test_inputs_are_logged_with_their_digest(tracking: Tracking) -> None:
    run = tracking.start("train")
    run.dataset("data (shard)", "d" * 64, "s3://bucket/shard/dd")
    (logged,) = _run(run).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("data (shard)", "d" * 36)


def test_flatten_cuts_at_mlflows_limits() -> None:
    flat = flatten({"a": {"b": 1, "c": {"d": True}}, "k" * 300: "v" * 9_000})
    assert flat == {"a.b": "1", "a.c.d": "true", "k" * 250: "v" * 6_000}


def test_server_keeps_files_of_every_kind_on_s3(mlflow_uri: str, s3_env: object, tmp_path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

    tracking = Tracking(mlflow_uri, f"test-{uuid4().hex[:8]}")
    tracking.check()
    run = tracking.start("evaluate")
    (tmp_path / "file.txt").write_text("text")
    run.artifact(tmp_path / "file.txt", "sub")
    run.figure(Figure(), "eval/figure.png")
    run.table({"question": ["how many?"], "answer": ["2"]}, "eval/answers.json")
    run.image(Image.new("RGB", (4, 4)), "eval/sample.png")
    run.text("words", "eval/words.txt")
    client = MlflowClient(tracking_uri=mlflow_uri)
    files = {file.path for folder in ("eval", "sub") for file in client.list_artifacts(run.id, folder)}
    assert files == {
        "sub/file.txt", "eval/figure.png", "eval/answers.json", "eval/sample.png", "eval/words.txt",
    }  # fmt: skip


def test_a_table_that_is_logged_again_takes_the_place_of_the_first(
    tracking: Tracking, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    run = tracking.start("evaluate")
    for answer in ("2", "3"):
        run.table({"question": ["how many?"], "answer": [answer]}, "eval/answers.json")
    client = MlflowClient(tracking_uri=tracking.uri)
    found = json.loads(
        Path(client.download_artifacts(run.id, "eval/answers.json", str(tmp_path))).read_text()
    )
    assert found == {"columns": ["question", "answer"], "data": [["how many?", "3"]]}
    assert json.loads(_run(run).data.tags[TABLES_TAG]) == [{"path": "eval/answers.json", "type": "table"}]


def test_worker_process_logs_into_the_run_it_attached_to(mlflow_uri: str) -> None:
    tracking = Tracking(mlflow_uri, f"test-{uuid4().hex[:8]}")
    run = tracking.start("train")
    program = (
        "import pickle, sys\n"
        "run = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "assert 'mlflow' not in sys.modules\n"
        "run.metric_rows([('train/loss', 0.25, 3, 1000)])\n"
    )
    subprocess.run([sys.executable, "-c", program, pickle.dumps(run).hex()], check=True, timeout=60)
    assert _history(TrackedRun.attach(run.uri, run.id), "train/loss") == [(3, 0.25)]


@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_check_of_an_absent_server_fails_in_seconds_and_names_it(kind: str, silent_server: str) -> None:
    uri = silent_server if kind == "silent" else "http://127.0.0.1:9"
    started = time.monotonic()
    with pytest.raises(RefusedInput, match=f"{uri}.*start that MLflow server") as refusal:
        Tracking(uri, "x").check()
    assert time.monotonic() - started < 10
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "databricks", ""])
def test_other_tracking_uris_are_refused(uri: str) -> None:
    with pytest.raises(RefusedInput, match="tracking URI"):
        Tracking(uri)


def test_password_in_the_tracking_uri_is_refused() -> None:
    with pytest.raises(RefusedInput) as refusal:
        Tracking("postgresql://user:hunter2@db/mlflow")
    assert "hunter2" not in str(refusal.value)


def test_deleted_experiment_says_how_to_restore_it(tracking: Tracking) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=tracking.uri).delete_experiment(tracking.experiment_id)
    with pytest.raises(RefusedInput, match="mlflow experiments restore"):
        tracking.check()


def test_server_that_is_away_costs_metrics_one_warning_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAVA_OUTAGE_SECONDS", "0")
    run = TrackedRun.attach("http://127.0.0.1:9", uuid4().hex)
    started = time.monotonic()
    for step in range(200):
        run.metrics({"train/loss": 1.0}, step)
    assert time.monotonic() - started < 5, "training must not wait for a server that is away"
    assert capsys.readouterr().err.count("warning: MLflow at http://127.0.0.1:9") == 1
    assert len(run._waiting) == 200 <= BACKLOG


def test_metrics_kept_while_away_arrive_later(tracking: Tracking) -> None:
    real = tracking.start("train")
    run = TrackedRun.attach("http://127.0.0.1:9", real.id)
    run._not_before = time.monotonic() + 60
    run.metrics({"train/loss": 1.0}, 1)
    run.uri = real.uri
    run.finish()
    assert _history(real, "train/loss") == [(1, 1.0)]
