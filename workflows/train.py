"""The workflow: photos in, a registered LLaVA out. What runs, on what, is a plan made from the table of stages."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from components.contract import Artifact, TrackedRun, Tracking, TrackingError, Workspace, open_store
from components.contract.outages import hurried
from components.contract.runner import Outcome
from components.ray_cluster import connection
from components.registry import tracking_uri
from components.training.record import curves
from llava.errors import Preempted, RefusedInput, Terminated
from workflows import config as configs
from workflows import plan as plans
from workflows.config import WorkflowConfig
from workflows.plan import Step


@dataclass
class Summary:
    """What a run made; `as_json` is the last line of `--json`."""

    artifacts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    model: dict[str, str] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def add(self, name: str, outcome: Outcome) -> None:
        """What the step `name` made or found."""
        manifest = outcome.artifact.manifest
        self.artifacts[name] = outcome.artifact.uri
        self.seconds[name] = round(outcome.seconds, 3)
        if outcome.reused:
            self.reused.append(name)
        self.scores |= {name: value for name, value in manifest.metrics.items() if name.startswith("eval/")}
        self.model = outcome.artifact.note("model", dict[str, str] | None) or self.model

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def open_workspace(name: str, root: str, wait: bool = False) -> Workspace:
    """Store and MLflow for `root`, both tried before any work; `MLFLOW_TRACKING_URI` names a server."""
    store = open_store(root)
    if store.local_path is None and any(mark in root for mark in "?#"):
        raise RefusedInput(f"root {root}: MLflow cuts an s3:// URI at ? and #; give a prefix without them")
    uri = tracking_uri(root)
    # An S3 root keeps MLflow's files too; a server has its own place for them.
    files = f"{store.uri}/mlflow" if store.local_path is None and not uri.startswith("http") else None
    workspace = Workspace(store, Tracking(uri, name, files), wait=wait, cluster=connection.connect)
    workspace.check()
    return workspace


def run(config: WorkflowConfig, workspace: Workspace, until: str = "") -> Summary:
    """Run the workflow up to the stage `until` (default: the last); what is finished already is found again.

    Raises RefusedInput with all that any of the stages would refuse, before the first of them runs.
    """
    steps = plans.make_plan(config, until)
    plans.preflight(steps, workspace)
    with running(config, workspace, "train") as workflow:
        workflow.make(steps)
    return workflow.summary


@contextmanager
def running(config: WorkflowConfig, workspace: Workspace, kind: str) -> Iterator["WorkflowRun"]:
    """One run of a workflow of that kind: a run in MLflow, which ends as the workflow ends."""
    parent = workspace.parent = workspace.tracking.start(
        f"{config.name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
        params=configs.flat(config),
        tags={"workflow": kind},
    )
    workflow = WorkflowRun(workspace, parent)
    try:
        with connection.disconnecting():
            yield workflow
    except BaseException as error:
        stopped = isinstance(error, Preempted | Terminated | KeyboardInterrupt | SystemExit)
        with contextlib.suppress(TrackingError), hurried() if stopped else contextlib.nullcontext():
            parent.finish("KILLED" if stopped else "FAILED")
        raise
    parent.metrics(workflow.summary.scores)
    parent.finish("FINISHED")


class WorkflowRun:
    """Makes the steps of a plan one after the other, and keeps what came of them."""

    def __init__(self, workspace: Workspace, parent: TrackedRun) -> None:
        self.workspace, self.parent = workspace, parent
        self.summary = Summary()
        self.made: dict[str, Artifact] = {}
        """By the step's name."""
        self._steps: dict[str, Step] = {}

    def make(self, steps: Iterable[Step]) -> None:
        """Find or make the artifacts of `steps`, which may take what earlier ones gave."""
        left = list(steps)
        self._steps |= {step.name: step for step in left}
        while left:
            step = left.pop(0)
            inputs = step.artifacts(self._steps, self.made, self.workspace)
            outcome = step.run(inputs, self.workspace)
            self.made[step.name] = outcome.artifact
            self.summary.add(step.name, outcome)
            self.parent.metric_rows(curves(step.name, outcome.artifact))
            _look_ahead(step.name, outcome.artifact, left)


def _look_ahead(name: str, artifact: Artifact, left: Iterable[Step]) -> None:
    """What a later step would refuse of this artifact is refused now, before hours of training."""
    for step in left:
        for key, giver in step.inputs.items():
            if giver == name:
                step.component.check_input(step.settings, key, artifact)
