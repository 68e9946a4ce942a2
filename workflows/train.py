"""The workflow: photos in, a registered LLaVA out. Each line of `run` is one box of the design."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components import cluster
from components.backbones.component import Backbones
from components.contract import (
    Artifact,
    Component,
    Settings,
    Tracking,
    TrackingError,
    Workspace,
    open_store,
    run_component,
)
from components.evaluate import Evaluate
from components.finetune import Finetune
from components.instruct import Instruct
from components.models import tracking_uri
from components.pretrain import Pretrain
from components.register import Register, champion_model
from components.shard import Shard
from llava.errors import Preempted
from workflows import config as configs
from workflows.config import WorkflowConfig

STAGES = ("backbones", "shard", "instruct", "pretrain", "finetune", "evaluate", "register")


@dataclass
class Summary:
    """What a run made; `as_json` is the last line of `--json`."""

    artifacts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    model: dict[str, str] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def open_workspace(name: str, root: str, wait: bool = False) -> Workspace:
    """Store and MLflow for `root`, both tried before any work; `MLFLOW_TRACKING_URI` names a server."""
    store = open_store(root)
    uri = tracking_uri(root)
    # An S3 root keeps MLflow's files too; a server has its own place for them.
    files = f"{store.uri}/mlflow" if store.local_path is None and not uri.startswith("http") else None
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(store, Tracking(uri, name, files), wait=wait, cluster=cluster.connect)
    workspace.check()
    return workspace


def run(config: WorkflowConfig, workspace: Workspace, until: str = "register") -> Summary:
    """Run the workflow up to the stage `until`; what is finished already is found again."""
    workspace.parent = workspace.tracking.start(
        f"{config.name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
        params=configs.flat(config),
        tags={"workflow": "train"},
    )
    summary = Summary()
    try:
        with cluster.disconnecting():
            _stages(config, workspace, until, summary)
    except BaseException as error:
        stopped = isinstance(error, Preempted | KeyboardInterrupt | SystemExit)
        with contextlib.suppress(TrackingError):
            workspace.parent.finish("KILLED" if stopped else "FAILED")
        raise
    workspace.parent.metrics(summary.scores)
    workspace.parent.finish("FINISHED")
    return summary


class _Done(Exception):
    """The stage that was asked for is finished."""


def _stages(config: WorkflowConfig, workspace: Workspace, until: str, summary: Summary) -> None:
    def stage(component: Component, settings: Settings, **inputs: Artifact) -> Artifact:
        outcome = run_component(component, settings, inputs, workspace)
        summary.artifacts[component.name] = outcome.artifact.uri
        summary.seconds[component.name] = round(outcome.seconds, 3)
        if outcome.reused:
            summary.reused.append(component.name)
        summary.scores |= {
            name: value
            for name, value in outcome.artifact.manifest.metrics.items()
            if name.startswith("eval/")
        }
        if component.name == "register":
            summary.model = outcome.artifact.manifest.notes["model"]
        if component.name == until:
            raise _Done
        return outcome.artifact

    with contextlib.suppress(_Done):
        _order(config, workspace, summary, stage)


def _order(
    config: WorkflowConfig, workspace: Workspace, summary: Summary, stage: Callable[..., Artifact]
) -> None:
    model = stage(Backbones(), config.backbones)
    dataset = stage(Shard(), config.shard)
    instructions = stage(Instruct(), config.instruct, dataset=dataset)
    if config.pretrain.enabled:
        model = stage(Pretrain(), config.pretrain, model=model, dataset=dataset)
    model = stage(Finetune(), config.finetune, model=model, dataset=instructions)
    evaluation = stage(Evaluate(), config.evaluate, model=model, questions=instructions)
    inputs = {"model": model, "evaluation": evaluation}
    if champion := champion_model(config.register_, workspace, evaluation):
        # The same questions for both, or the comparison means nothing.
        inputs["champion_evaluation"] = run_component(
            Evaluate(), config.evaluate, {"model": champion, "questions": instructions}, workspace
        ).artifact
    stage(Register(), config.register_, **inputs)
