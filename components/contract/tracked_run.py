"""One MLflow run as components and training workers write to it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from components.contract.console import say
from components.contract.mlflow_client import client, errors, impatient_client
from components.contract.printable import one_line
from components.contract.secrets import redacted

METRICS_AT_ONCE = 1000  # MLflow's limits for one log_batch
PAIRS_AT_ONCE = 100
KEY_LENGTH = 250
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
DATASET_DIGEST_LENGTH = 36
BACKLOG = 100_000  # metric values kept while the server is away
PAUSE = 30.0  # seconds between tries while the server is away, so that training does not wait for it

TABLES_TAG = "mlflow.loggedArtifacts"  # from it MLflow's pages know which files are tables

MetricRow = tuple[str, float, int, int]


class TrackedRun:
    """One MLflow run. Picklable and cheap to attach to from another process.

    Metrics never stop the work: what the server does not take is kept and sent with a later call, and the
    user is told once. Everything else waits while MLflow is away (`outages.py`), and then raises TrackingError.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.id = uri, run_id
        self._waiting: list[MetricRow] = []
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._warned = False

    @classmethod
    def attach(cls, uri: str, run_id: str) -> TrackedRun:
        """The run `run_id` at `uri`, from any process; nothing is contacted."""
        return cls(uri, run_id)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log params, flattened to dotted keys. MLflow keeps a param's first value: a later one becomes a tag
        `changed.<key>`."""
        from mlflow.entities import Param

        mlflow = self._client
        with errors(self.uri):
            known = mlflow.get_run(self.id).data.params
            told = {key: redacted(value) for key, value in flatten(values).items()}
            new = {key: value for key, value in told.items() if known.get(key) != value}
            fresh = [Param(key, value) for key, value in new.items() if key not in known]
            for start in range(0, len(fresh), PAIRS_AT_ONCE):
                mlflow.log_batch(self.id, params=fresh[start : start + PAIRS_AT_ONCE])
        self.tags({f"changed.{key}": value for key, value in new.items() if key in known})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log one value per name, now."""
        now = int(time.time() * 1000)
        self.metric_rows([(name, value, step or 0, now) for name, value in values.items()])

    def metric_rows(self, rows: Iterable[tuple[str, float, int, int]]) -> None:
        """Log (name, value, step, milliseconds since 1970) in as few requests as MLflow allows."""
        with self._lock:
            self._waiting += [(name, float(value), int(step), int(when)) for name, value, step, when in rows]
            if time.monotonic() >= self._not_before:
                self._send(impatient_client)

    def steps(self, name: str) -> set[int]:
        """The steps at which the run holds the metric `name`."""
        with errors(self.uri):
            return {metric.step for metric in self._client.get_metric_history(self.id, name)}

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; values are cut at MLflow's limit."""
        from mlflow.entities import RunTag

        every = [RunTag(key[:KEY_LENGTH], redacted(str(value))[:TAG_LENGTH]) for key, value in values.items()]
        with errors(self.uri):
            for start in range(0, len(every), PAIRS_AT_ONCE):
                self._client.log_batch(self.id, tags=every[start : start + PAIRS_AT_ONCE])

    def artifact(self, path: str | Path, sub: str | None = None) -> None:
        """Upload a local file or folder, into the folder `sub` of the run's files."""
        with errors(self.uri):
            if Path(path).is_dir():
                self._client.log_artifacts(self.id, str(path), sub)
            else:
                self._client.log_artifact(self.id, str(path), sub)

    def figure(self, figure: Any, name: str) -> None:
        """Upload a Matplotlib figure as `name` (such as "eval/by_kind.png")."""
        with errors(self.uri):
            self._client.log_figure(self.id, figure, name)

    def table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        """Upload a table, {column: values}, as `name` (such as "eval/answers.json"), over what stands there.

        MLflow's own `log_table` appends: a table that was logged before a crash would be there twice.
        """
        from pandas import DataFrame

        text = DataFrame(dict(columns)).to_json(orient="split", index=False, date_format="iso")
        mark = {"path": name, "type": "table"}
        with errors(self.uri):
            self._client.log_text(self.id, text, name)
            known = json.loads(self._client.get_run(self.id).data.tags.get(TABLES_TAG, "[]"))
            if mark not in known:
                self._client.set_tag(self.id, TABLES_TAG, json.dumps([*known, mark]))

    def image(self, image: Any, name: str) -> None:
        """Upload a PIL image as `name` (such as "eval/sample.png")."""
        with errors(self.uri):
            self._client.log_image(self.id, image, artifact_file=name)

    def text(self, text: str, name: str) -> None:
        """Upload a text as `name`."""
        with errors(self.uri):
            self._client.log_text(self.id, text, name)

    def dataset(self, name: str, digest: str, uri: str) -> None:
        """Log an input of the run; MLflow keeps the first 36 characters of the digest."""
        from mlflow.entities import Dataset, DatasetInput

        entry = Dataset(
            name=name,
            digest=digest[:DATASET_DIGEST_LENGTH],
            source_type="s3" if uri.startswith("s3://") else "local",
            source=json.dumps({"uri": uri}),
        )
        with errors(self.uri):
            self._client.log_inputs(self.id, datasets=[DatasetInput(entry)])

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED. Metrics that are left are sent; while MLflow is away they wait."""
        with self._lock:
            self._send(client)
            if self._waiting:
                say(f"MLflow at {self.uri} never took {len(self._waiting)} metric values of run {self.id}")
        with errors(self.uri):
            self._client.set_terminated(self.id, status)

    @property
    def _client(self) -> Any:
        return client(self.uri)

    def _send(self, client: Callable[[str], Any]) -> None:
        if not self._waiting:
            return
        from mlflow.entities import Metric

        try:
            while self._waiting:
                batch = self._waiting[:METRICS_AT_ONCE]
                metrics = [Metric(name, value, when, step) for name, value, step, when in batch]
                client(self.uri).log_batch(self.id, metrics=metrics)
                del self._waiting[: len(batch)]
        except Exception as error:
            del self._waiting[:-BACKLOG]
            self._not_before = time.monotonic() + PAUSE
            if not self._warned:
                self._warned = True
                say(
                    f"warning: MLflow at {self.uri} takes no metrics ({one_line(error)}); "
                    "the work goes on, they are sent later"
                )

    def __reduce__(self) -> tuple[type[TrackedRun], tuple[str, str]]:
        return TrackedRun, (self.uri, self.id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with text values, cut at MLflow's limits; lists become JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            text = json.dumps(value) if isinstance(value, list | tuple | bool | None) else str(value)
            flat[name[:KEY_LENGTH]] = text[:PARAM_LENGTH]
    return flat
