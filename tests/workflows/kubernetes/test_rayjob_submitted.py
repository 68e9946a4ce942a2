"""`ray start --head` with a token, S3 and an MLflow server: the workflow as a submitted Ray job."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from components.contract import open_artifact, open_store
from components.registry import Registry
from tests.conftest import S3Server
from tests.support.repository import REPOSITORY
from tests.support.whole_run import SMALL

BIN = Path(sys.executable).parent
PORTS = (
    "--port", "--dashboard-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port",
    "--node-manager-port", "--object-manager-port", "--runtime-env-agent-port", "--metrics-export-port",
    "--ray-client-server-port",
)  # fmt: skip


@dataclass
class Head:
    """A running head node: where its dashboard listens, and the environment that may use it."""

    dashboard: str
    env: dict[str, str]


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, mlflow_uri: str) -> Iterator[Head]:
    """A head node on ports of its own with token authentication; ended by its pid, with all that it started."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    env = {
        **kept,
        **s3_server.env,
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "LLAVA_CACHE": str(folder / "cache"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000",
        "--dashboard-host=127.0.0.1", "--temp-dir", f"/tmp/llava-{secrets.token_hex(4)}", "--disable-usage-stats",
        *(f"{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports['--dashboard-port']}"
        _wait_until_jobs_are_taken(env, process, folder / "log")
        yield Head(env["RAY_API_SERVER_ADDRESS"], env)
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        for each in [psutil.Process(process.pid), *started]:
            each.terminate()
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *started], timeout=15)
        for each in alive:
            each.kill()
        process.wait(15)


def _wait_until_jobs_are_taken(env: dict[str, str], process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(60):
        assert process.poll() is None, log.read_text()
        done = submit(env, "true")
        if done.returncode == 0:
            return
    raise AssertionError(f"no job was taken: {done.stderr}\n{log.read_text()}")


def submit(
    env: dict[str, str], *entrypoint: str, folder: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    uploaded = ["--working-dir", str(folder)] if folder else []
    return subprocess.run(
        [str(BIN / "ray"), "job", "submit", *uploaded, "--", *entrypoint],
        env=env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def test_a_request_without_the_token_is_turned_away(head: Head, tmp_path: Path) -> None:
    nameless = {name: value for name, value in head.env.items() if name != "RAY_AUTH_TOKEN_PATH"}
    done = submit({**nameless, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}, "true")
    assert done.returncode != 0 and "token authentication is enabled" in done.stderr.lower()
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        with pytest.raises(HTTPError) as caught:
            urlopen(Request(f"{head.dashboard}/api/jobs/", headers=headers), timeout=10)
        assert caught.value.code == status


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """A folder with our packages, as `--working-dir .` takes them."""
    for name in ("llava", "components", "workflows"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, tmp_path / "upload" / name, ignore=ignored)
    return tmp_path / "upload"


@pytest.mark.drill
def test_the_uploaded_folder_runs_as_a_job_on_s3_and_an_mlflow_server(
    head: Head, upload: Path, s3_root: str, mlflow_uri: str
) -> None:
    done = submit(head.env, "llava", "train", "tiny", *SMALL, "--root", s3_root, "--json", folder=upload)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    line = next(line for line in log.splitlines() if line.startswith('{"artifacts"'))
    summary = json.loads(line)
    assert all(uri.startswith(s3_root) for uri in summary["artifacts"].values())
    assert "finetune: loss" in log
    model = open_artifact(summary["artifacts"]["finetune"])
    registered = Registry(mlflow_uri).by_alias("llava-tiny", "champion")
    assert registered is not None
    assert registered.source == f"{model.uri}/model"
    assert registered.tags["artifact_digest"] == model.digest


def test_a_refused_job_fails_with_the_workflows_own_status_in_its_log(head: Head) -> None:
    done = submit(head.env, "llava", "train", "tiny", "--set", "finetune.epoch=1")
    assert done.returncode != 0
    assert "finetune.epoch: unknown key" in done.stdout + done.stderr
    assert "exit code 2" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("before", "says"),
    [
        pytest.param((), "is not the installed package", id="driver and workers run the folder"),
        pytest.param(
            ("env", "-u", "PYTHONPATH"),
            "driver and workers run different code",
            id="only workers run the folder",
            marks=pytest.mark.drill,
        ),
    ],
)
def test_an_uploaded_folder_that_differs_from_the_installed_package_stops_the_run(
    head: Head, upload: Path, s3_root: str, before: tuple[str, ...], says: str
) -> None:
    with (upload / "components" / "pretrain.py").open("a") as changed:
        changed.write("# not what is installed\n")
    done = submit(head.env, *before, "llava", "shard", "tiny", "--root", s3_root, folder=upload)
    log = done.stdout + done.stderr
    assert done.returncode != 0
    assert says in log
    assert "exit code 2" in log
    # Nothing was made on the cluster; what the driver makes by itself is no matter of the workers' code.
    assert not [entry for entry in open_store(s3_root).list("shard/") if entry.key.endswith("manifest.json")]
