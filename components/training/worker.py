"""One worker's life: build the model, find the newest checkpoint, train, write the model."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from components.contract import Artifact, Folder, Guard, StoreError, TrackedRun
from components.training import checkpoints
from components.training.deepspeed_engine import DeepSpeedEngine, prepare_environment
from components.training.progress import Standing, as_dict
from components.training.settings import TrainSettings
from llava import model as models
from llava.conversation import Encoder
from llava.data.collate import Collator
from llava.data.plan import Plan, SampleIndex
from llava.data.reader import ParquetRows
from llava.data.samples import VIEWS
from llava.errors import LlavaError
from llava.pixels import Pixels
from llava.training import checkpoint as files
from llava.training.engine import AdamW, Engine, PlainEngine
from llava.training.loop import Schedule, StepReport, train

HISTORY = "history.jsonl"
INDEX = "index.npz"
MODEL = "model"


@dataclass(frozen=True)
class Task:
    """What a worker is told; everything in it can be pickled."""

    settings: TrainSettings
    parts: tuple[str, ...]
    """What trains: "projector", "language_model"."""
    view: str
    model: Artifact
    dataset: Artifact
    folder: Folder
    guard: Guard
    tracking_uri: str
    mlflow_run_id: str
    board: Any
    """The `Board` actor."""


def work(task: Task) -> None:
    """The train function of Ray Train: all workers run it together, from the start after each loss of one."""
    import ray

    if ray.get(task.board.failure.remote()):
        return
    try:
        _work(task)
    except StoreError:
        # A store that is away for a moment: starting again may help.
        raise
    except LlavaError as error:
        ray.get(task.board.fail.remote(str(error), error.exit_status))
        raise


def _work(task: Task) -> None:
    settings = task.settings
    with tempfile.TemporaryDirectory(prefix="llava-worker-") as scratch:
        setting_out = _Setup(task, Path(scratch))
        engine, collator, plan = setting_out.engine, setting_out.collator, setting_out.plan
        run = _Run(task, engine, plan, Path(scratch), setting_out.identity)
        first = run.resume()
        schedule = Schedule(plan.steps, settings.learning_rate, settings.warmup_ratio)
        train(engine, collator, schedule, first, run.after_step)
        run.finish(setting_out.source)


class _Setup:
    """The pieces that training needs, built from the task."""

    def __init__(self, task: Task, scratch: Path):
        settings = task.settings
        cuda = settings.gpu and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        prepare_environment(device.type)
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.source = task.model.local(MODEL)
        stock = models.load(self.source, dtype).to(device)
        processor = models.load_processor(self.source)
        models.set_trainable(stock, list(task.parts))
        pixels = Pixels(processor.image_processor)
        encoder = Encoder(
            processor.tokenizer, settings.template, models.image_tokens(stock.config), settings.max_length
        )
        task.folder.download(INDEX, scratch / INDEX)
        index = SampleIndex.load(scratch / INDEX)
        self.plan = Plan(index, settings.seed, settings.epochs, settings.global_batch)
        self.collator = Collator(
            open_rows(task.dataset, task.view), task.view, encoder, pixels, self.plan, settings.tokens_per_row
        )
        module = models.LlavaForTraining(stock, pixels)
        adamw = AdamW(weight_decay=settings.weight_decay)
        self.engine: Engine = (
            PlainEngine(module, adamw, settings.gradient_clipping)
            if settings.zero_stage == 0
            else DeepSpeedEngine(
                module,
                adamw,
                settings.zero_stage,
                settings.gradient_clipping,
                settings.precision == "bf16",
                self.collator.blank_row(),
            )
        )
        self.identity = {
            "model": task.model.digest,
            "dataset": task.dataset.digest,
            "samples": len(index),
            "steps": self.plan.steps,
            "global_batch": settings.global_batch,
            "seed": settings.seed,
            "parts": list(task.parts),
        }


def open_rows(dataset: Artifact, view: str, split: str = "train") -> ParquetRows:
    """The rows of one split of a dataset artifact."""
    filesystem, base = dataset.folder.arrow()
    paths = sorted(
        f"{base}/{file.path}"
        for file in dataset.manifest.files
        if file.path.startswith(f"{split}/") and file.path.endswith(".parquet")
    )
    return ParquetRows(filesystem, paths, VIEWS[view][1])


@dataclass
class _Run:
    """Rank 0 keeps the history, the checkpoints and the metrics; the others only take part."""

    task: Task
    engine: Engine
    plan: Plan
    scratch: Path
    identity: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)
    logged: int = 0
    last_flush: float = 0.0
    last_seen: float = 0.0

    @property
    def chief(self) -> bool:
        return self.engine.rank == 0

    def resume(self) -> int:
        """Continue from the newest committed checkpoint; returns the steps done."""
        name = self._agree(lambda: checkpoints.newest(self.task.folder))
        if name is None:
            return 0
        local = checkpoints.fetch(self.task.folder, name, self.scratch)
        state, position = files.read(local, self.identity)
        self.engine.restore(state)
        self.history = [json.loads(line) for line in (local / HISTORY).read_text().splitlines()]
        self.logged = len(self.history)
        if self.chief:
            self.task.board.note.remote(f"resuming after step {position.step} of {self.plan.steps}")
        return position.step

    def after_step(self, report: StepReport) -> bool:
        """Record the step; save where it is due."""
        self.history.append(
            {
                "step": report.step,
                "train/loss": report.loss,
                "train/learning_rate": report.learning_rate,
                "train/grad_norm": report.grad_norm,
                "train/samples_per_second": report.samples / report.seconds,
                "train/tokens_per_second": report.tokens / report.seconds,
                "train/supervised_tokens": report.supervised,
                "train/fill": report.fill,
                "train/data_wait": report.data_wait / report.seconds,
                "at": time.time(),
            }
        )
        if self.chief and time.monotonic() - self.last_seen > 0.5:
            self._show(report)
        if report.step % self.task.settings.checkpoint_every == 0 and report.step < self.plan.steps:
            self._save(report.step)
        return False

    def finish(self, source: Path) -> None:
        """Write the model, the history and the rest of the metrics."""
        state = self.engine.state()
        if not self.chief or state is None:
            return
        stock = models.load(source, torch.float32)
        own = dict(stock.named_parameters())
        with torch.no_grad():
            for name, weight in state.weights.items():
                own[name].copy_(weight)
        if self.task.settings.precision == "bf16":
            stock = stock.to(torch.bfloat16)
        target = self.scratch / MODEL
        models.save(stock, models.load_processor(source), target, self.task.settings.template)
        self.task.guard.check()
        for path in sorted(target.iterdir()):
            self.task.folder.upload(path, f"{MODEL}/{path.name}")
        self._flush()
        self.task.folder.write(HISTORY, _lines(self.history))

    def _save(self, step: int) -> None:
        state = self.engine.state()
        if not self.chief or state is None:
            return
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            files.write(Path(folder), state, files.Position(step, self.identity))
            (Path(folder) / HISTORY).write_bytes(_lines(self.history))
            settings = self.task.settings
            checkpoints.save(self.task.folder, self.task.guard, step, Path(folder), settings.keep_checkpoints)
        # Metrics go out with the checkpoint, so that a resumed run logs no step twice.
        self._flush()

    def _flush(self) -> None:
        fresh = self.history[self.logged :]
        rows = [
            (name, float(value), int(entry["step"]), int(entry["at"] * 1000))
            for entry in fresh
            for name, value in entry.items()
            if name not in ("step", "at")
        ]
        run = TrackedRun.attach(self.task.tracking_uri, self.task.mlflow_run_id)
        run.metric_rows(rows)
        self.logged = len(self.history)

    def _show(self, report: StepReport) -> None:
        recent = self.history[-20:]
        self.last_seen = time.monotonic()
        standing = Standing(
            step=report.step,
            steps=self.plan.steps,
            loss=sum(entry["train/loss"] for entry in recent) / len(recent),
            samples_per_second=sum(entry["train/samples_per_second"] for entry in recent) / len(recent),
            tokens_per_second=sum(entry["train/tokens_per_second"] for entry in recent) / len(recent),
        )
        self.task.board.put.remote(as_dict(standing))

    def _agree(self, choose: Callable[[], str | None]) -> str | None:
        """What rank 0 finds, on every rank: a listing may change between two looks."""
        if self.engine.world == 1:
            return choose()
        box = [choose() if self.chief else None]
        distributed.broadcast_object_list(box, src=0)
        return box[0]


def _lines(history: list[dict[str, float]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in history).encode()


def environment(threads: int) -> dict[str, str]:
    """Environment of every worker process, set before it starts."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    return {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **({"TORCH_EXTENSIONS_DIR": extensions} if extensions else {}),
    }
