"""Real servers for the tests, each started once and only if a test asks for it: SeaweedFS (S3) and MLflow.

`s3_root` and `folder_root` give a fresh root, `root` runs a test on both; `mlflow_uri` is a server, `mlflow_db` a
database without one. Everything listens on 127.0.0.1, lies in a temporary folder and is stopped by its pid.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen
from uuid import uuid4

import psutil
import pytest
import ray

from components.ray_cluster.connection import PATIENT
from tests.support.command import SETTINGS_OF_OTHERS
from tests.support.repository import REPOSITORY, SHARED

# Tests run side by side: more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the machine of a CI or of its owner sets for `llava` is not what a test is about.
for setting in SETTINGS_OF_OTHERS:
    os.environ.pop(setting, None)

BUCKET = "llava-tests"
PHOTOS = SHARED / "data" / "coco"
WAIT = 90.0  # seconds: a busy machine starts slowly
LONGEST = (
    "workflows/test_train.py",
    "workflows/kubernetes/test_rayjob_submitted.py",
    "components/training/test_stage.py",
    # Waits for the run that `test_train.py` makes, if that is not done yet.
    "drills/test_kills.py",
    # A process that is down to its last test gets another module: this one waits for the drill, which is one test.
    "components/backbones/test_given.py",
    "components/instruct/llm/test_stage.py",
    "components/contract/test_tracking.py",
    "components/evaluate/test_evaluation.py",
    "components/training/test_deepspeed_engine.py",
    "components/datasets/test_tasks.py",
)
"""Modules that run first, each in one process, so that no process is left alone with one of them at the end."""


SERVICES = frozenset(
    ("s3_server", "own_s3", "ray_local", "s3_env", "s3_root", "root", "mlflow_db", "mlflow_uri")
)
"""Fixtures that start something. (`mlflow_db` starts no server, but MLflow makes and migrates a database.)"""

COMMANDS = (
    "drills",
    "recipes",
    "components/backbones/test_given.py",
    "components/contract/test_tracking.py",
    "components/instruct/llm/test_asking.py",
    "components/instruct/llm/test_stage_command.py",
    "workflows/kubernetes/test_rayjob_submitted.py",
    "workflows/retraining",
    "workflows/scores/test_models.py",
    "workflows/test_cli.py",
    "workflows/test_plan.py",
    "workflows/test_prune.py",
    "workflows/test_promote.py",
    "workflows/test_train.py",
    "workflows/test_train_filter.py",
)
"""Modules and folders whose tests start commands that start services."""
SLOW = (
    "benchmarks",
    "components/backbones/test_component.py",
    "components/backbones/test_tiny.py",
    "components/training/test_auto.py",
    "components/training/test_deepspeed_engine.py",
    "components/training/test_deepspeed_engine_mixed_batches.py",
    "llava/test_estimate.py",
    "llava/test_generate.py",
    "llava/test_lora.py",
    "llava/test_model_vision_tower.py",
    "llava/test_quantized.py",
    "house/test_pointers.py",
    "llava/training",
)
"""Modules and folders that train or build models for seconds, in processes of their own or not."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; else as collected (a loadfile run hands them out in this order).

    What asks for a service is marked so, and left out of the fast lane (`make check`).
    """
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root)
        if SERVICES & set(getattr(item, "fixturenames", ())) or any(map(path.is_relative_to, COMMANDS)):
            item.add_marker(pytest.mark.services)
        if any(map(path.is_relative_to, SLOW)):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("drill"):
            item.add_marker(pytest.mark.timeout(0))
    places = {root / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """How a process of the run ended that did not end by itself: pytest-xdist tells its name alone."""
    if error is not None:
        status: object = "unknown"
        with suppress(subprocess.TimeoutExpired, AttributeError):
            status = node.gateway._io.popen.wait(30)
        print(f"\n{node.gateway.id} ended with status {status} (below 0: a signal)", flush=True)


@pytest.fixture(autouse=True)
def no_services(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked `services` starts neither Ray nor MLflow: the fast lane stays fast."""
    if request.node.get_closest_marker("services") or request.node.get_closest_marker("drill"):
        return

    def started(*_: object, **__: object) -> None:
        pytest.fail("this test starts Ray or MLflow: mark it with pytest.mark.services")

    monkeypatch.setattr(ray, "init", started)
    if "mlflow" in sys.modules:
        monkeypatch.setattr("mlflow.MlflowClient.__init__", started)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server and what a client needs to use it."""

    endpoint: str
    access_key: str
    secret_key: str
    pid: int

    @property
    def env(self) -> dict[str, str]:
        """The environment that points every AWS client at this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class SeaweedFS:
    """SeaweedFS on free ports with data of its own; it may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._access_key, self._secret_key = f"test-{uuid4().hex[:12]}", uuid4().hex
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self._access_key, "secretKey": self._secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()
        master, volume, filer, s3, admin = (str(port) for port in _free_ports(5, also_plus=10_000))
        self._endpoint = f"http://127.0.0.1:{s3}"
        self._command = [
            str(Path(sys.executable).parent / "weed"), "mini", f"-dir={folder / 'data'}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}",
            f"-filer.port={filer}", f"-s3.port={s3}", f"-admin.port={admin}", "-admin.ui=false", "-webdav=false",
            f"-s3.config={config}", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-master.telemetry=false",
        ]  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[S3Server]:
        """Started, and killed at the end; what was acknowledged is there when it starts again."""
        log = self._folder / "log"
        with _server(self._command, log, {}) as pid:
            server = S3Server(self._endpoint, self._access_key, self._secret_key, pid)
            _wait_for(lambda: _bucket_takes_writes(server), pid, log)
            yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS on free ports with one pair of credentials and one bucket."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")).running() as server:
        yield server


@pytest.fixture
def own_s3(tmp_path: Path) -> SeaweedFS:
    """A server of the test's own, to be started and stopped by it."""
    (tmp_path / "seaweedfs").mkdir()
    return SeaweedFS(tmp_path / "seaweedfs")


@pytest.fixture(scope="session")
def ray_local(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ray on two CPUs, whose workers can reach the S3 server; gives its address."""
    settings = {
        **s3_server.env,
        "LLAVA_CACHE": str(tmp_path_factory.mktemp("cache")),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        # As on the command's own local cluster.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            _system_config=dict(PATIENT),
        )
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def coco_folder() -> Path:
    """Real photos with captions and boxes, read in place."""
    if not PHOTOS.is_dir():
        pytest.skip("no real photos: tests/support/repository.py names the folder")
    return PHOTOS


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The test's environment points at the S3 server; copies from S3 go into the test's own folder."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    return s3_server


@pytest.fixture
def s3_root(s3_env: S3Server) -> str:
    """A fresh `s3://bucket/prefix`, with the environment that reaches it."""
    return f"s3://{BUCKET}/{uuid4().hex[:12]}"


@pytest.fixture
def folder_root(tmp_path: Path) -> str:
    """A fresh folder as a root."""
    return str(tmp_path / "root")


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """A fresh root of each kind, so that the test runs on both."""
    value: str = request.getfixturevalue(f"{request.param}_root")
    return value


@pytest.fixture(scope="session")
def mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow database that every test of the session shares: tests differ in the experiment's name."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow-db')}/mlflow.db"


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[str]:
    """An MLflow server on a free port that keeps its files on the S3 server."""
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = _free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", f"s3://{BUCKET}/mlflow",
    ]  # fmt: skip
    env = {
        "MLFLOW_S3_ENDPOINT_URL": s3_server.endpoint,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **s3_server.env,
    }
    with _server(command, folder / "log", env) as pid:
        _wait_for(lambda: _answers(f"{uri}/health"), pid, folder / "log")
        yield uri


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The URI of a port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def _bucket_takes_writes(server: S3Server) -> bool:
    # Listing answers before the volumes are ready: only a write proves that the server is.
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    try:
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
    except (BotoCoreError, ClientError):
        return False
    return True


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@contextmanager
def _server(command: list[str], log: Path, env: dict[str, str]) -> Iterator[int]:
    """A child process, by its pid; it and its own children are ended by theirs."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=log.parent,
            env={**os.environ, **env},
        )
    try:
        yield process.pid
    finally:
        with suppress(psutil.NoSuchProcess):
            server = psutil.Process(process.pid)
            family = [server, *server.children(recursive=True)]
            # Nothing of theirs is kept, so they need no time to tidy up.
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, timeout=5)
        process.wait()


def _wait_for(ready: Callable[[], bool], pid: int, log: Path) -> None:
    end = time.monotonic() + WAIT
    while not ready():
        stopped = not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        if stopped or time.monotonic() > end:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            pytest.fail(
                f"server {'stopped' if stopped else f'not ready after {WAIT:.0f} s'}; its log ends:\n{tail}"
            )
        time.sleep(0.2)


def _free_ports(count: int, also_plus: int | None = None) -> list[int]:
    """`count` ports that are free on 127.0.0.1, and free at `also_plus` above too (SeaweedFS's gRPC)."""
    with ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            port = random.SystemRandom().randrange(20_000, 30_000)
            try:
                for wanted in (port, port + also_plus) if also_plus else (port,):
                    taken = held.enter_context(closing(socket.socket()))
                    taken.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            found.append(port)
        return found
