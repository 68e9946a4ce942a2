"""The users of a real MLflow server: what the runs' user may do, and what only the administrator may."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from llava.errors import RefusedInput
from tests.conftest import _free_ports
from workflows.kubernetes import mlflow_users

pytest.importorskip("flask_wtf")
pytestmark = pytest.mark.services
ADMIN, RUNS = ("admin", "an-administrators-word"), ("llava", "the-word-of-the-runs")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Made as the pod makes it: the users first, then the server."""
    folder = tmp_path_factory.mktemp("mlflow")
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\n"
    )
    env = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "sessions",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **dict(zip(mlflow_users.ADMIN, ADMIN, strict=True)),
        **dict(zip(mlflow_users.RUNS, RUNS, strict=True)),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        for _ in range(2):  # a pod that starts again
            mlflow_users.make(mlflow_users.database(), mlflow_users.users())
        (port,) = _free_ports(1)
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1",
                   "--app-name=basic-auth", f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
                   f"--artifacts-destination={folder}/files"]  # fmt: skip
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _is_up(uri):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield uri
    finally:
        process.terminate()
        process.wait(30)


def _is_up(uri: str) -> bool:
    try:
        return requests.get(f"{uri}/health", timeout=2).ok
    except requests.RequestException:
        return False


def _status(uri: str, who: tuple[str, str], path: str, method: str = "GET", **body: object) -> int:
    return requests.request(
        method, f"{uri}/api/2.0/mlflow/{path}", json=body or None, auth=who, timeout=30
    ).status_code


def test_the_runs_user_does_what_a_run_does(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(mlflow_users.RUNS, RUNS, strict=True):
        monkeypatch.setenv(name, value)
    client = MlflowClient(server, server)
    run = client.create_run(client.create_experiment("runs"))
    client.log_metric(run.info.run_id, "loss", 1.0)
    client.create_registered_model("model")
    version = client.create_model_version("model", "s3://bucket/model", run.info.run_id).version
    client.set_registered_model_alias("model", "champion", version)
    assert client.get_model_version_by_alias("model", "champion").version == version


def test_it_can_neither_make_users_nor_change_what_others_made(server: str) -> None:
    assert _status(server, ADMIN, "experiments/create", "POST", name="of the administrator") == 200
    found = requests.get(
        f"{server}/api/2.0/mlflow/experiments/get-by-name",
        params={"experiment_name": "of the administrator"}, auth=ADMIN, timeout=30,
    ).json()["experiment"]["experiment_id"]  # fmt: skip
    assert _status(server, RUNS, "experiments/delete", "POST", experiment_id=found) == 403
    new = {"username": "friend", "password": "of-an-attacker-12"}
    assert _status(server, RUNS, "users/create", "POST", **new) == 403
    assert _status(server, RUNS, "users/update-admin", "PATCH", username="llava", is_admin=True) == 403
    assert _status(server, ADMIN, "users/create", "POST", **new) == 200
    assert _status(server, ("llava", "another word"), "experiments/search?max_results=1") == 401


def test_an_administrator_of_before_is_none_any_more(tmp_path: Path) -> None:
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    uri = f"sqlite:///{tmp_path}/users.db"
    mlflow_users.make(uri, (mlflow_users.User(*RUNS, True),))
    mlflow_users.make(uri, (mlflow_users.User("llava", "a-new-password-1", False),))
    store = SqlAlchemyStore()
    store.init_db(uri)
    assert not store.get_user("llava").is_admin
    assert store.authenticate_user("llava", "a-new-password-1")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": ""}, "MLFLOW_TRACKING_PASSWORD: not set"),
        ({"MLFLOW_TRACKING_USERNAME": "admin"}, "must not log in as the administrator"),
        ({"MLFLOW_AUTH_CONFIG_PATH": "/nope.ini"}, "no file with a database_uri"),
    ],
)
def test_what_is_missing_is_one_line(
    spoil: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "auth.ini").write_text(f"[mlflow]\ndatabase_uri = sqlite:///{tmp_path}/users.db\n")
    given = dict(zip(mlflow_users.ADMIN, ADMIN, strict=True)) | dict(
        zip(mlflow_users.RUNS, RUNS, strict=True)
    )
    for name, value in ({"MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini")} | given | spoil).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RefusedInput, match=message):
        mlflow_users.make(mlflow_users.database(), mlflow_users.users())
