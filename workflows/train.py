"""The workflow: photos in, a registered LLaVA out. Each line of `run` is one box of the design."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.backbones.component import Backbones
from components.backbones.given import start_from
from components.contract import (
    Artifact,
    Component,
    Settings,
    TrackedRun,
    Tracking,
    TrackingError,
    Workspace,
    open_store,
    run_component,
)
from components.contract.manifest import MANIFEST
from components.contract.runner import Outcome
from components.evaluate import Evaluate, check_questions
from components.filter import Filter
from components.finetune import Finetune
from components.instruct import Instruct, try_endpoint
from components.pretrain import Pretrain
from components.ray_cluster import connection
from components.register import Register, champion_model
from components.registry import tracking_uri
from components.shard import Shard
from components.training.data import check_extra
from components.training.record import curves
from llava.errors import Preempted, RefusedInput, Terminated
from workflows import config as configs
from workflows.config import WorkflowConfig

STAGES = ("backbones", "shard", "instruct", "filter", "pretrain", "finetune", "evaluate", "register")


@dataclass
class Summary:
    """What a run made; `as_json` is the last line of `--json`."""

    artifacts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    model: dict[str, str] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def add(self, name: str, outcome: Outcome) -> None:
        """What the component `name` made or found."""
        self.artifacts[name] = outcome.artifact.uri
        self.seconds[name] = round(outcome.seconds, 3)
        if outcome.reused:
            self.reused.append(name)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


Stage = Callable[..., Artifact]
"""Runs a component with its settings and inputs, and tells the summary."""
Order = Callable[[WorkflowConfig, Workspace, Summary, Stage], None]
"""Which stages run, on what."""


def open_workspace(name: str, root: str, wait: bool = False) -> Workspace:
    """Store and MLflow for `root`, both tried before any work; `MLFLOW_TRACKING_URI` names a server."""
    store = open_store(root)
    uri = tracking_uri(root)
    # An S3 root keeps MLflow's files too; a server has its own place for them.
    files = f"{store.uri}/mlflow" if store.local_path is None and not uri.startswith("http") else None
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(store, Tracking(uri, name, files), wait=wait, cluster=connection.connect)
    workspace.check()
    return workspace


def run(
    config: WorkflowConfig, workspace: Workspace, until: str = "register", order: Order | None = None
) -> Summary:
    """Run the workflow up to the stage `until`; what is finished already is found again.

    `order`: another order of stages than that of a training, given by the workflow that it belongs to.
    """
    if config.finetune.from_ is not None and until in ("backbones", "filter", "pretrain"):
        raise RefusedInput(
            f"finetune.from={config.finetune.from_} replaces backbones and pretrain: run finetune or train"
        )
    if config.filter.enabled:
        Filter().external(config.filter)  # refuses a spaCy pipeline that is not installed
    if until == "filter" and not (config.filter.enabled and config.pretrain.enabled):
        raise RefusedInput(
            "filter: set filter.enabled=true; it serves stage 1, so pretrain.enabled must be true"
        )
    _check_room(config, workspace, until)
    check_extra("pretrain", config.pretrain.extra, "captions")
    check_extra("finetune", config.finetune.extra, "conversations")
    Evaluate().external(config.evaluate)  # refuses benchmarks whose files are not there
    if STAGES.index(until) >= STAGES.index("instruct"):
        try_endpoint(config.instruct, workspace)
    parent = workspace.parent = workspace.tracking.start(
        f"{config.name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
        params=configs.flat(config),
        tags={"workflow": "retrain" if order else "train"},
    )
    summary = Summary()
    try:
        with connection.disconnecting():
            _stages(config, workspace, parent, until, summary, order or _order)
    except BaseException as error:
        stopped = isinstance(error, Preempted | Terminated | KeyboardInterrupt | SystemExit)
        with contextlib.suppress(TrackingError):
            parent.finish("KILLED" if stopped else "FAILED")
        raise
    parent.metrics(summary.scores)
    parent.finish("FINISHED")
    return summary


def _check_room(config: WorkflowConfig, workspace: Workspace, until: str) -> None:
    """Refuse what this machine cannot hold, unless the root has a finished one, which may be the one that is meant."""
    asked = {
        name: (settings.min_workers or settings.workers, settings.cpus_per_worker, settings.gpu)
        for name, settings in (("pretrain", config.pretrain), ("finetune", config.finetune))
    }
    asked["evaluate"] = (1, 1, config.evaluate.gpu)
    if config.finetune.from_ is not None or not config.pretrain.enabled:
        del asked["pretrain"]
    for name, (workers, cpus, gpu) in asked.items():
        finished = any(entry.key.endswith(MANIFEST) for entry in workspace.store.list(f"{name}/"))
        if STAGES.index(name) <= STAGES.index(until) and not finished:
            connection.require(name, workers, cpus, gpu)


class _Done(Exception):
    """The stage that was asked for is finished."""


def _stages(
    config: WorkflowConfig,
    workspace: Workspace,
    parent: TrackedRun,
    until: str,
    summary: Summary,
    order: Order,
) -> None:
    goal = STAGES.index(until)

    def stage(
        component: Component, settings: Settings, as_name: str | None = None, **inputs: Artifact
    ) -> Artifact:
        outcome = run_component(component, settings, inputs, workspace)
        summary.add(as_name or component.name, outcome)
        parent.metric_rows(curves(as_name or component.name, outcome.artifact))
        summary.scores |= {
            name: value
            for name, value in outcome.artifact.manifest.metrics.items()
            if name.startswith("eval/")
        }
        if component.name == "instruct" and order is _order and goal >= STAGES.index("evaluate"):
            check_questions(config.evaluate, outcome.artifact)  # before hours of training
        if component.name == "register":
            summary.model = outcome.artifact.manifest.notes["model"]
        if (as_name or component.name) == until:
            raise _Done
        return outcome.artifact

    with contextlib.suppress(_Done):
        order(config, workspace, summary, stage)


def _order(config: WorkflowConfig, workspace: Workspace, summary: Summary, stage: Stage) -> None:
    model, instructions = until_finetune(config, workspace, summary, stage)
    model = stage(Finetune(), config.finetune, model=model, dataset=instructions)
    evaluate_and_register(config, workspace, stage, model, instructions)


def until_finetune(
    config: WorkflowConfig, workspace: Workspace, summary: Summary, stage: Stage
) -> tuple[Artifact, Artifact]:
    """The model that stage 2 starts from, and its data."""
    given = config.finetune.from_
    if given is not None:
        template = config.finetune.template if "template" in config.finetune.model_fields_set else None
        outcome = start_from(given, template, workspace)
        summary.add("backbones", outcome)
        model = outcome.artifact
    else:
        model = stage(Backbones(), config.backbones)
    dataset = stage(Shard(), config.shard)
    instructions = stage(Instruct(), config.instruct, dataset=dataset)
    if given is None and config.pretrain.enabled:
        captions = dataset
        if config.shard_captions is not None:
            captions = stage(Shard(), config.shard_captions, "shard_captions")
        if config.filter.enabled:
            captions = stage(Filter(), config.filter, dataset=captions)
        model = stage(Pretrain(), config.pretrain, model=model, dataset=captions)
    return model, instructions


def evaluate_and_register(
    config: WorkflowConfig, workspace: Workspace, stage: Stage, model: Artifact, questions: Artifact
) -> None:
    """Evaluate the model and the champion on the same questions, and register it as one or the other."""
    evaluation = stage(Evaluate(), config.evaluate, model=model, questions=questions)
    inputs = {"model": model, "evaluation": evaluation}
    if champion := champion_model(config.register_, workspace, evaluation):
        # The same questions for both, or the comparison means nothing.
        inputs["champion_evaluation"] = run_component(
            Evaluate(), config.evaluate, {"model": champion, "questions": questions}, workspace
        ).artifact
    stage(Register(), config.register_, **inputs)
