"""One local Ray for every component test of the session, and short cuts to run a component for real."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

from components.contract.component import Component, Settings
from components.contract.manifest import Artifact
from components.contract.runner import Outcome, Workspace, run_component
from components.contract.store import open_store
from components.contract.tracking import Tracking

if TYPE_CHECKING:
    from tests.conftest import S3Server

PHOTOS = Path(__file__).parents[2] / ".." / "shared" / "data" / "coco"


@pytest.fixture(scope="session")
def ray_local(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ray on two CPUs, whose workers can reach the S3 server; gives its address."""
    settings = {
        **s3_server.env,
        "LLAVA_CACHE": str(tmp_path_factory.mktemp("cache")),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        context = ray.init(
            num_cpus=2,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
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
        pytest.skip("real photos are not here: ../shared/data/coco")
    return PHOTOS


class Lines:
    """Keeps what a component says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str, prefix: str = "") -> None:
        """Keep one line."""
        self.said.append(text)


@pytest.fixture
def lines() -> Lines:
    """What the components of the test said."""
    return Lines()


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def run_at(ray_local: str, mlflow_db: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run_at(root, component, settings, inputs, console)`: through the real runner, MLflow and Ray."""
    files = tmp_path_factory.mktemp("mlflow-files")

    def run(
        root: str | Path,
        component: Component,
        settings: Settings,
        inputs: dict[str, Artifact] | None = None,
        console: Any = None,
    ) -> Outcome:
        tracking = Tracking(mlflow_db, "components", str(files))
        workspace = Workspace(open_store(root), tracking, console=console or Lines())
        return run_component(component, settings, inputs or {}, workspace)

    return run


@pytest.fixture
def run_in(run_at: Run, tmp_path: Path, lines: Lines) -> Run:
    """`run_in(component, settings, inputs, root=...)`: `run_at` in the test's own root, what it says kept."""

    def run(
        component: Component,
        settings: Settings,
        inputs: dict[str, Artifact] | None = None,
        root: str | Path = tmp_path / "root",
    ) -> Outcome:
        return run_at(root, component, settings, inputs, lines)

    return run
