"""MLflow: one experiment on one store, in which runs are started and resumed.

Everything goes through MLflow's client, never through its process-wide "current run".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from components.contract.database import check_writable, checked, database_path, database_uri, is_new
from components.contract.mlflow_client import TrackingError, client, errors, made_once
from components.contract.outages import hurried
from components.contract.secrets import refuse_secrets
from components.contract.tracked_run import TAG_LENGTH, TrackedRun
from llava.errors import RefusedInput

PARENT_TAG = "mlflow.parentRunId"
CALL_TAG = "llava_start"
"""Names one call of `Tracking.start`, by which its run is found where MLflow's answer was lost."""
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")


class Tracking:
    """One experiment on one MLflow store."""

    def __init__(self, uri: str, experiment: str = "llava", artifact_location: str | None = None) -> None:
        """`uri`: http(s)://host:port or a database such as sqlite:///mlflow.db.

        `artifact_location`: where a new experiment keeps its files, a folder or s3:// URI (default: the
        server's choice; beside an SQLite file).
        """
        self.uri = _tracking_uri(uri)
        self.experiment = experiment
        if artifact_location is None and (database := database_path(self.uri)) is not None:
            artifact_location = str(database.parent / "mlartifacts")
        self.artifact_location = artifact_location and refuse_secrets(artifact_location, "artifact location")
        self._experiment_id: str | None = None

    @property
    def is_server(self) -> bool:
        """Whether a server, and not a database, is spoken to."""
        return self.uri.startswith("http")

    def check(self) -> None:
        """Reach MLflow and find or make the experiment, within seconds; RefusedInput if that fails.

        A database that is not there yet is only tried for whether it can be made: the first run makes it.
        """
        before = os.environ.get(_TIMEOUT)
        check_writable(self.uri)
        if is_new(self.uri):
            return
        os.environ[_TIMEOUT] = "5"
        try:
            self._experiment_id = None
            with hurried():
                _ = self.experiment_id
        except TrackingError as error:
            raise RefusedInput(
                f"{error}: start that MLflow server or correct the tracking URI (a local one: sqlite:///mlflow.db)"
            ) from None
        finally:
            os.environ.pop(_TIMEOUT) if before is None else os.environ.update({_TIMEOUT: before})

    @property
    def experiment_id(self) -> str:
        """The experiment's id; the experiment is made if it does not exist."""
        if self._experiment_id is None:
            if (database := database_path(self.uri)) is not None:
                database.parent.mkdir(parents=True, exist_ok=True)
            with errors(self.uri):
                self._experiment_id = self._find_or_make()
        return self._experiment_id

    def start(
        self,
        name: str,
        parent: TrackedRun | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> TrackedRun:
        """A new run, under `parent` if given."""
        first = {key: str(value)[:TAG_LENGTH] for key, value in (tags or {}).items()}
        if parent is not None:
            first[PARENT_TAG] = parent.id
        with errors(self.uri):
            run = TrackedRun(self.uri, self._start(name, first))
        if params:
            run.params(params)
        return run

    def resume(self, run_id: str) -> TrackedRun:
        """The run `run_id`, running again; LookupError if this store does not have it."""
        from mlflow.exceptions import MlflowException

        found = None
        with errors(self.uri):
            try:
                found = client(self.uri).get_run(run_id)
            except MlflowException as error:
                if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                    raise
        if found is None or found.info.lifecycle_stage != "active":
            raise LookupError(f"MLflow at {self.uri} has no run {run_id}, or it was deleted")
        with errors(self.uri):
            client(self.uri).update_run(run_id, status="RUNNING")
        return TrackedRun(self.uri, run_id)

    def _start(self, name: str, tags: dict[str, str]) -> str:
        """The id of a new run: one, even where MLflow's answer is lost."""
        experiment, call = self.experiment_id, uuid4().hex

        def make(mlflow: Any) -> str:
            run_id: str = mlflow.create_run(
                experiment, run_name=name, tags=tags | {CALL_TAG: call}
            ).info.run_id
            return run_id

        def find(mlflow: Any) -> list[str]:
            found = mlflow.search_runs([experiment], f"tags.`{CALL_TAG}` = '{call}'")
            return sorted(run.info.run_id for run in found)

        return made_once(self.uri, make, find, lambda mlflow, run_id: mlflow.delete_run(run_id))

    def _find_or_make(self) -> str:
        from mlflow.exceptions import MlflowException

        mlflow = client(self.uri)
        found = mlflow.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                made: str = mlflow.create_experiment(
                    self.experiment, artifact_location=self.artifact_location
                )
                return made
            except MlflowException:  # another process was faster
                found = mlflow.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise RefusedInput(
                f"MLflow experiment {self.experiment!r} at {self.uri} is deleted: restore it "
                f"(mlflow experiments restore -x {found.experiment_id}) or choose another name"
            )
        found_id: str = found.experiment_id
        return found_id


def _tracking_uri(uri: str) -> str:
    checked(refuse_secrets(uri, "the tracking URI"))
    if uri.startswith(("http://", "https://")):
        return uri.rstrip("/")
    if (database := database_path(uri)) is not None:
        # Relative to this process's folder, which Ray's workers do not share.
        return database_uri(database)
    if uri.startswith(_DATABASES):
        return uri
    raise RefusedInput(
        f"tracking URI {uri!r}: give an MLflow server (http://host:5000) or a database "
        "(sqlite:///mlflow.db); MLflow's file store is not supported"
    )


__all__ = ["PARENT_TAG", "TrackedRun", "Tracking", "TrackingError"]
