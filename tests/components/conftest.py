"""Short cuts to run a component for real."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.contract.component import Component, Settings
from components.contract.manifest import Artifact
from components.contract.runner import Outcome, Workspace, run_component
from components.contract.store import open_store
from components.contract.tracking import Tracking
from tests.support.judge_endpoint import Endpoint


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


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A judge that the test tells what to say."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()
