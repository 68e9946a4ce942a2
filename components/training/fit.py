"""A training stage as a component's work: measure the data, run the Ray Train job, read what came out."""

import json
import uuid

import numpy as np

from components.contract import Job
from components.training.progress import Board, Watcher
from components.training.settings import TrainSettings
from components.training.worker import HISTORY, INDEX, MODEL, Task, environment, open_rows, work
from llava import model as models
from llava.conversation import Encoder
from llava.data.plan import Coverage, scan
from llava.errors import BudgetReached, LlavaError, Preempted, RefusedInput

_ERRORS = {kind.exit_status: kind for kind in (RefusedInput, BudgetReached, Preempted)}


def train_stage(job: Job, parts: tuple[str, ...], view: str) -> None:
    """Train `parts` of the input `model` on `view` of the input `dataset`; the result is `model/` in the artifact."""
    coverage = measure(job, view)
    job.notes["coverage"] = coverage.as_json()
    _run(job, parts, view)
    _tell(job)


def measure(job: Job, view: str) -> Coverage:
    """Every sample's length, kept in the artifact; fails where too many samples are lost."""
    settings: TrainSettings = job.settings
    source = job.inputs["model"].local(MODEL)
    processor = models.load_processor(source)
    tokens = models.load_config(source).image_seq_length
    encoder = Encoder(processor.tokenizer, settings.template, tokens, settings.max_length)
    index, coverage = scan(open_rows(job.inputs["dataset"], view), view, encoder)
    if not coverage.samples or coverage.lost > settings.max_lost:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in coverage.refused.most_common())
        examples = "; ".join(found[0] for found in coverage.examples.values())
        raise RefusedInput(
            f"dataset {job.inputs['dataset'].uri}: {coverage.lost:.1%} of the samples cannot be trained on "
            f"({reasons or 'it holds no samples for this stage'}; {examples}); "
            f"the limit is {job.prefix}.max_lost={settings.max_lost:.1%}"
        )
    path = job.scratch / INDEX
    index.save(path)
    job.folder.upload(path, INDEX)
    job.say(
        f"{coverage.samples:,} samples, {coverage.tokens:,} tokens, {coverage.supervised:,} supervised; "
        f"{coverage.truncated} truncated, {coverage.refused.total()} refused"
    )
    return coverage


def _run(job: Job, parts: tuple[str, ...], view: str) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings: TrainSettings = job.settings
    board = ray.remote(num_cpus=0)(Board).remote()
    task = Task(
        settings=settings,
        parts=parts,
        view=view,
        model=job.inputs["model"],
        dataset=job.inputs["dataset"],
        folder=job.folder,
        guard=job.lease.guard,
        tracking_uri=job.workspace.tracking.uri,
        mlflow_run_id=job.run.id,
        board=board,
    )
    filesystem, base = job.folder.arrow()
    trainer = TorchTrainer(
        work,
        train_loop_config=task,
        torch_config=TorchConfig(backend="nccl" if settings.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.gpu else {})},
        ),
        run_config=RunConfig(
            # A name that was used by a completed run would silently resume it.
            name=f"{job.prefix}-{uuid.uuid4().hex[:12]}",
            storage_path=f"{base}/checkpoints/ray",
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.max_restarts),
            worker_runtime_env={"env_vars": environment(settings.cpus_per_worker)},
        ),
    )
    try:
        with Watcher(board, job):
            trainer.fit()
    except LlavaError:
        raise
    except Exception as error:
        _raise_told(ray.get(board.failure.remote()))
        raise LlavaError(f"{job.prefix}: the training workers failed for good: {error}") from error
    _raise_told(ray.get(board.failure.remote()))


def _raise_told(failure: tuple[str, int] | None) -> None:
    if failure:
        message, status = failure
        raise _ERRORS.get(status, LlavaError)(message)


def _tell(job: Job) -> None:
    """Metrics, the plot of the curve and one line."""
    history = [json.loads(line) for line in job.folder.read(HISTORY).decode().splitlines()]
    losses = np.array([entry["train/loss"] for entry in history])
    edge = max(1, len(losses) // 20)
    job.metrics["train/loss_first"] = float(losses[:edge].mean())
    job.metrics["train/loss_last"] = float(losses[-edge:].mean())
    job.metrics["train/steps"] = float(len(losses))
    for name in ("train/samples_per_second", "train/tokens_per_second", "train/fill", "train/data_wait"):
        job.metrics[f"{name}_median"] = float(np.median([entry[name] for entry in history]))
    job.run.figure(_curve(history, job.prefix), "training_curve.png")
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
