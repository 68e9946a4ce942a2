"""A training stage as a component's work: measure the data, run the Ray Train job, read what came out."""

import contextlib
import tempfile
import threading
import time
import uuid
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from components.contract import Artifact, Component, Job, Workspace, refusals
from components.ray_cluster.connection import require_unless_made
from components.training import auto, data, train_fn
from components.training.board import ProgressClient, start_progress_actor
from components.training.data import INDEX, MODEL, extra_sources, measure
from components.training.progress import Watcher
from components.training.record import CHECKPOINTS, HISTORY, MetricLog
from components.training.settings import TrainSettings
from components.training.task import Task
from llava.data.jsonl import from_jsonl
from llava.data.plan import Coverage, SampleIndex
from llava.errors import BudgetReached, LlavaError, Preempted, RefusedInput, Terminated
from llava.sizes import llava_sizes

_ERRORS = {kind.exit_status: kind for kind in (RefusedInput, BudgetReached, Preempted)}


class TrainingStage(Component):
    """Trains `trains` of the input `model` on `view` of the input `dataset`; the result is `model/` in the artifact.

    Settings may add parts to `trains`.
    A stage is a subclass that says which parts learn, from which view of a dataset, with which settings.
    """

    Settings: ClassVar[type[TrainSettings]] = TrainSettings
    gives: ClassVar[tuple[str, ...]] = ("model",)
    view: ClassVar[str]
    """A key of `llava.data.samples.VIEWS`, which is also the kind of dataset that the stage takes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.takes = MappingProxyType({"model": "model", "dataset": cls.view})

    def preflight(self, settings: Any, workspace: Workspace) -> list[str]:
        """Further datasets that cannot be read, and workers that this machine cannot hold."""
        return refusals(
            lambda: data.check_extra(self.name, settings.extra, self.view),
            lambda: require_unless_made(
                workspace,
                self.name,
                settings.min_workers or settings.workers,
                settings.cpus_per_worker,
                settings.gpu,
            ),
        )

    def check(self, settings: Any, inputs: dict[str, Artifact]) -> None:
        """Refuse further datasets that cannot be read, and a held-out loss without held-out samples."""
        data.check(self.name, settings, inputs["dataset"], self.view)

    def check_input(self, settings: Any, name: str, artifact: Artifact) -> None:
        """Refuse, before training, what `check` refuses of the data, and a model that reads samples of `max_length`
        otherwise than training does or has no place for LoRA, before data is made."""
        if name == "dataset":
            data.check_heldout(self.name, settings, artifact)
        if name == "model" and artifact.folder.stat(f"{MODEL}/config.json") is not None:
            with tempfile.TemporaryDirectory() as folder:
                artifact.folder.download(f"{MODEL}/config.json", Path(folder) / "config.json")
                config = _check_length(Path(folder), settings.max_length)
            if settings.lora:
                _lora_share(self.name, config, settings)

    def external(self, settings: Any) -> dict[str, str]:
        """The further datasets."""
        return data.external(self.name, settings.extra)

    def takes_over(self, key: str) -> bool:
        """All but checkpoints, which are large and are read where they lie."""
        return not key.startswith(f"{CHECKPOINTS}/")

    def run(self, job: Job[Any]) -> None:
        """Measure, choose what is `auto`, train, tell."""
        coverage = measure(job, self.view)
        job.notes["coverage"] = coverage.as_json()
        parts = job.settings.parts(self.trains)
        _choose(job, coverage, parts)
        _run(job, parts, self.view)
        _tell(job)


def _choose(job: Job[Any], coverage: Coverage, parts: tuple[str, ...]) -> None:
    """Settings without `auto`; what was chosen is told and noted."""
    config = _check_length(job.inputs["model"].local(MODEL), job.settings.max_length)
    try:
        sizes = llava_sizes(config.to_dict())
    except RefusedInput:
        sizes = None
    if job.settings.lora:
        _note_reach(job, _lora_share(job.component, config, job.settings))
    images = int(SampleIndex.load(job.scratch / INDEX).images.sum())
    job.settings, told = auto.choose(job.component, job.settings, parts, sizes, coverage, images)
    if told:
        job.notes["chosen"] = told
        job.say(told)


def _lora_share(stage: str, config: Any, settings: TrainSettings) -> float:
    """The share of the weights of the language model's layers that gets adapters; refuses where none can be put."""
    from llava import lora, quantized

    found = lora.check(config.text_config, settings.adapters(), f"{stage}.")
    if settings.lora_bits == 4:
        quantized.refuse_experts(config.text_config.model_type, found.fused, f"{stage}.")
    return found.share


def _note_reach(job: Job[Any], share: float) -> None:
    job.notes["lora"] = {"adapted_share": share}
    job.say(f"LoRA adapts {100 * share:.1f} % of the language model's layer weights")


def _check_length(folder: Path, max_length: int) -> Any:
    """The config of the model in `folder`; refuses one that is trained otherwise than it reads such lengths."""
    from llava import faithful
    from llava import model as models

    config = models.load_config(folder)
    models.check_packing(config, max_length)
    faithful.check_length(config.text_config, max_length)
    return config


def _run(job: Job[Any], parts: tuple[str, ...], view: str) -> None:
    # An earlier try may have come as far as its history and no further.
    job.folder.delete(HISTORY)
    settings: TrainSettings = job.settings
    progress_actor = start_progress_actor()
    client = ProgressClient(progress_actor)
    task = Task(
        settings=settings,
        parts=parts,
        view=view,
        model=job.inputs["model"],
        dataset=job.inputs["dataset"],
        extra=tuple(extra_sources(job.component, settings.extra)),
        folder=job.folder,
        earlier=job.earlier,
        guard=job.lease.guard,
        tracking_uri=job.workspace.tracking.uri,
        mlflow_run_id=job.run.id,
        progress_actor=progress_actor,
        deepspeed=settings.deepspeed(),
    )
    if settings.zero_stage:
        job.notes["deepspeed"] = task.deepspeed
    try:
        with Watcher(client, job):
            _fit(_trainer(job, task), client, job)
    except LlavaError:
        raise
    except Exception as error:
        _raise_told(client, job)
        _take_away_partial(job)
        raise LlavaError(f"{job.component}: the training workers failed for good: {error}") from error
    _raise_told(client, job)
    if job.folder.stat(HISTORY) is None:
        raise Preempted(
            f"{job.component}: stopped and saved after step {client.stopped_after()}; "
            "the same command goes on from there"
        )


def _take_away_partial(job: Job[Any]) -> None:
    """Delete checkpoints that no rank will finish any more: a full disk has room again at once."""
    from components.training.checkpoints import CheckpointFolders

    with contextlib.suppress(Exception):
        CheckpointFolders(job.folder, job.lease.guard, job.settings.keep_checkpoints, job.earlier).clean()


def _trainer(job: Job[Any], task: Task) -> Any:
    from ray import cloudpickle
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings, workers = task.settings, task.settings.workers
    filesystem, base = job.folder.arrow()
    # mypy sees the classes of Ray Train's first version, which the second one replaces as it is imported.
    scaling: Any = ScalingConfig
    run: Any = RunConfig
    work: Any = train_fn.work
    return TorchTrainer(
        work,
        train_loop_config=cloudpickle.dumps(task),
        torch_config=TorchConfig(backend="nccl" if settings.gpu else "gloo"),
        scaling_config=scaling(
            num_workers=(settings.min_workers, workers) if settings.min_workers else workers,
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.gpu else {})},
        ),
        run_config=run(
            # A name that was used by a completed run would silently resume it.
            name=f"{job.component}-{uuid.uuid4().hex[:12]}",
            storage_path=f"{base}/{CHECKPOINTS}/ray",
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.max_restarts),
            worker_runtime_env={"env_vars": train_fn.environment(settings.cpus_per_worker, settings.gpu)},
        ),
    )


def _fit(trainer: Any, client: ProgressClient, job: Job[Any]) -> None:
    """`fit`, in a thread: in the main one Ray would put its own handler of Ctrl-C in the place of the command's.

    The first SIGTERM or Ctrl-C asks the workers for a checkpoint and waits for it; the second leaves at once.
    """
    done: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=fit, name="fit", daemon=True).start()
    try:
        done.result()
    except Terminated:
        grace = job.settings.stop_grace
        job.say(
            f"stopping: saving a checkpoint first (for {grace:.0f} s at most; once more to leave at once)"
        )
        client.stop()
        step = _saved(done, client, job)
        job.say(
            "no checkpoint in that time; the one before stays" if step is None else f"saved after step {step}"
        )
        raise


def _saved(done: Future[None], client: ProgressClient, job: Job[Any]) -> int | None:
    """The step after which the workers saved, as soon as they tell; None where `fit` or `stop_grace` ends before.

    `fit` itself may never return: where the whole process group was signalled, the local cluster is going down as well.
    """
    end = time.monotonic() + job.settings.stop_grace
    while time.monotonic() < end:
        with contextlib.suppress(NotYet):
            if failure := done.exception(timeout=0.5):
                job.say(f"while stopping: {failure}")
            break
        if (step := client.stopped_after()) is not None:
            return step
    return client.stopped_after()


def _raise_told(client: ProgressClient, job: Job[Any]) -> None:
    if failure := client.failure():
        _take_away_partial(job)
        message, status = failure
        raise _ERRORS.get(status, LlavaError)(message)


def _tell(job: Job[Any]) -> None:
    """Metrics, the plot of the curve and one line."""
    history = from_jsonl(job.folder.read(HISTORY))
    # What the workers could not log before they ended.
    MetricLog(job.run).send(history)
    losses = np.array([entry["train/loss"] for entry in history])
    edge = max(1, len(losses) // 20)
    job.metrics["train/loss_first"] = float(losses[:edge].mean())
    job.metrics["train/loss_last"] = float(losses[-edge:].mean())
    job.metrics["train/steps"] = float(len(losses))
    for name in ("train/samples_per_second", "train/tokens_per_second", "train/fill", "train/data_wait"):
        job.metrics[f"{name}_median"] = float(np.median([entry[name] for entry in history]))
    job.run.figure(_curve(history, job.component), "training_curve.png")
    job.say(
        f"loss {job.metrics['train/loss_first']:.3f} -> {job.metrics['train/loss_last']:.3f} "
        f"in {len(losses)} updates, {job.metrics['train/samples_per_second_median']:.0f} samples/s"
    )


def _curve(history: list[dict[str, float]], title: str) -> object:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    losses = np.array([entry["train/loss"] for entry in history])
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="each update")
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="#1f4e8c", linewidth=1.8, label=f"mean of {width}")
    axes.set(xlabel="update", ylabel="loss per supervised token", title=title)
    axes.legend(frameon=False)
    return figure
