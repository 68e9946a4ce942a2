"""Where components run: one root, one MLflow experiment, one console."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from components.contract import outages
from components.contract.console import Console
from components.contract.lease import TTL
from components.contract.store import Store
from components.contract.tracked_run import TrackedRun
from components.contract.tracking import Tracking
from llava.errors import RefusedInput


@dataclass
class Workspace:
    """Where components run: a store, an MLflow experiment, a parent run."""

    store: Store
    tracking: Tracking
    parent: TrackedRun | None = None
    wait: bool = True
    """Wait for another holder of the same artifact; False raises AlreadyRunning."""
    console: Console = field(default_factory=Console)
    lease_ttl: float = TTL
    """Seconds after which a holder on another host counts as dead."""
    cluster: Callable[[], None] = lambda: None
    """Connects to Ray; called only before a component that needs it makes something."""

    def check(self) -> None:
        """Fail within seconds where the store or MLflow cannot be used, or not together."""
        if self.store.local_path is not None and self.tracking.is_server:
            raise RefusedInput(
                f"root {self.store.uri} is a folder and MLflow is a server ({self.tracking.uri}), which "
                "refuses to register models from local folders: give an s3:// root or a database (sqlite:///mlflow.db)"
            )
        outages.seconds()
        self.store.probe()
        self.tracking.check()
