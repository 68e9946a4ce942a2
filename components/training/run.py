"""One training run on one rank: go on from the newest checkpoint, keep the record, save, stop when asked to.

Rank 0 keeps the history, the checkpoints and the metrics; the others only take part.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray.train import get_context
from torch import distributed

from components.contract import TrackedRun
from components.training import checkpoints
from components.training.board import Progress, ProgressClient
from components.training.profiling import Trace
from components.training.record import HISTORY, SAMPLES, Entry, MetricSender, lines, parse
from components.training.task import Task
from components.training.utilisation import Utilisation
from llava import lora
from llava import model as models
from llava.data.plan import BatchPlan
from llava.training import checkpoint as files
from llava.training.engine import Engine
from llava.training.guards import SpikeGuard
from llava.training.loop import StepReport, gathered

MODEL = "model"
TRACE = "profile/trace.json.gz"
HELDOUT_LOSS = "eval/heldout/loss"
ASK, STOP = 1, 2
"""Words (a bit each) of rank 0 to all: ask Ray whether a node is about to be taken away; save and leave."""
_BETWEEN_ASKING, _BETWEEN_METRICS, _BETWEEN_SHOWING = 5.0, 5.0, 0.5


class Run:
    """What the loop calls between steps, and what happens before the first and after the last of them."""

    def __init__(
        self,
        task: Task,
        engine: Engine,
        plan: BatchPlan,
        scratch: Path,
        identity: dict[str, Any],
        utilisation: Utilisation | None,
        heldout: Callable[[], float] | None = None,
    ):
        """`identity`: what a checkpoint must agree with to be gone on from; `scratch`: an empty local folder;
        `heldout`: computes the loss on held-out samples, on all ranks together."""
        self.task, self.engine, self.plan, self.scratch = task, engine, plan, scratch
        self.identity, self.utilisation, self.heldout = identity, utilisation, heldout
        self.settings, self.chief = task.settings, engine.rank == 0
        self.history: list[Entry] = []
        self.samples: list[dict[str, Any]] = []
        self.stopped = False
        self._own: list[list[str]] = []
        """This rank's samples of each step since the last save."""
        self._guard = SpikeGuard(self.settings.spike_factor)
        self._client = ProgressClient(task.progress_actor)
        self._last = dict.fromkeys(("asked", "sent", "shown"), 0.0)
        self._saver = checkpoints.Saver(task.folder, task.guard, self.settings.keep_checkpoints, scratch)
        self._sender = MetricSender(TrackedRun.attach(task.tracking_uri, task.mlflow_run_id))
        self._trace = Trace(scratch / "trace.json.gz") if self.chief and self.settings.profile else None
        self._orders = StopListener(self._client) if self.chief else None

    def resume(self) -> int:
        """Continue from the newest committed checkpoint; returns the steps done."""
        name = self._agree(lambda: checkpoints.newest(self.task.folder))
        if name is None:
            return 0
        first = get_context().get_local_rank() == 0
        with checkpoints.fetched(self.task.folder, name, first, self._barrier) as local:
            state, position = files.read(local, self.identity)
            self.engine.restore(state)
            self.history = parse((local / HISTORY).read_bytes())
            self.samples = parse((local / SAMPLES).read_bytes())
        self._guard = SpikeGuard(self.settings.spike_factor, [entry["train/loss"] for entry in self.history])
        if self.chief:
            self._client.note(f"resuming after step {position.step} of {self.plan.steps}")
        return position.step

    def say(self) -> int:
        """What this rank tells the others in the step that is under way."""
        if self._orders is None:
            return 0
        if self._orders.stop.is_set():
            return STOP
        return ASK if self._due("asked", _BETWEEN_ASKING) else 0

    def after_step(self, report: StepReport) -> bool:
        """Record the step, save where it is due; True to leave early, on all ranks alike."""
        self._record(report)
        self._look_at_heldout(report.step)
        if self.chief and self._due("shown", _BETWEEN_SHOWING):
            self._show(report)
        if self.chief and self._due("sent", _BETWEEN_METRICS):
            self._sender.send(self.history)
        if self._trace is not None:
            self._trace.step()
        if report.step == self.plan.steps:
            return False
        self.stopped = self._asked_to_stop(report.word)
        if self.stopped or report.step % self.settings.checkpoint_every == 0:
            self._save(report.step)
        if self.stopped and self.chief:
            self._saver.wait()
            self._client.stopped(report.step)
        return self.stopped

    def finish(self, source: Path) -> None:
        """Write the model and the record. `source`: the folder of the model that training began with."""
        if self.chief:
            # First, so that no more than one state lies in memory.
            self._saver.wait()
        self._collect_samples()
        state = self.engine.state()
        if not self.chief or state is None:
            return
        weights = state.weights
        del state
        settings = self.settings
        stock = models.load(source, torch.float32)
        if settings.lora:
            lora.inject(stock, settings.adapters(), settings.seed)
        own = dict(stock.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
        if settings.lora:
            lora.merge(stock)
        if settings.precision == "bf16":
            stock = stock.to(torch.bfloat16)
        target = self.scratch / MODEL
        models.save(stock, models.load_processor(source, settings.image_fit), target, settings.template)
        self.task.guard.check()
        for path in sorted(target.iterdir()):
            self.task.folder.upload(path, f"{MODEL}/{path.name}")
        if self._trace is not None and (trace := self._trace.close()):
            self.task.folder.upload(trace, TRACE)
        self.task.folder.write(SAMPLES, lines(self.samples))
        self.task.folder.write(HISTORY, lines(self.history))

    def close(self) -> None:
        """However the run ends: let go of its threads; a checkpoint that is under way arrives."""
        self._saver.close()
        self._sender.close()
        if self._orders is not None:
            self._orders.close()

    def _record(self, report: StepReport) -> None:
        devices, seconds = self.engine.world, report.seconds
        entry: Entry = {
            "step": report.step,
            "train/loss": report.loss,
            "train/learning_rate": report.learning_rate,
            "train/grad_norm": report.grad_norm,
            "train/samples_per_second": report.samples / seconds,
            "train/tokens_per_second": report.tokens / seconds,
            "train/supervised_tokens": report.supervised,
            "train/fill": report.fill,
            "train/data_wait": report.data_wait / seconds,
            "at": time.time(),
        }
        if self.utilisation is not None:
            entry["train/mfu"] = self.utilisation.mfu(report.tokens, report.supervised, seconds, devices)
        if self.engine.device.type == "cuda":
            entry["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.engine.device) / 2**30
        self._own.append(report.ids)
        self.history.append(entry)
        if (median := self._guard.median(report.loss)) is not None:
            self._name_samples(report, entry, median)

    def _look_at_heldout(self, step: int) -> None:
        """The held-out loss where it is due, and after the last step."""
        if self.heldout is None or (step % self.settings.eval_every and step != self.plan.steps):
            return
        loss = self.heldout()
        self.history[-1][HELDOUT_LOSS] = loss
        if self.chief:
            self._client.note(f"step {step}: held-out loss {loss:.3f}")

    def _name_samples(self, report: StepReport, entry: Entry, median: float) -> None:
        ids = [name for each in gathered(self.engine, report.ids) for name in each]
        entry["spike"] = {"median": median, "samples": ids}
        if self.chief:
            told = f"loss {report.loss:.3f}, the median is {median:.3f}; samples {', '.join(ids)}"
            self._client.note(f"step {report.step}: {told}")
            self._sender.tag({f"spike.step_{report.step}": told})

    def _asked_to_stop(self, word: int) -> bool:
        if word & STOP or not word & ASK:
            return bool(word & STOP)
        from ray import train

        # A barrier: all ranks are here, because they all heard the word.
        info = train.get_preemption_info()
        if info is not None and self.chief:
            self._client.note(f"nodes are being taken away: {', '.join(info.preempted_node_ids)}")
        return info is not None

    def _save(self, step: int) -> None:
        if self.chief:
            # First, so that no more than one state lies in memory.
            self._saver.wait()
        state = self.engine.state()
        self._collect_samples()
        if not self.chief or state is None:
            return
        position = files.Position(step, self.identity)
        record = {HISTORY: lines(self.history), SAMPLES: lines(self.samples)}

        def write(folder: Path) -> None:
            files.write(folder, state, position)
            for name, data in record.items():
                (folder / name).write_bytes(data)

        self._saver.save(step, write)

    def _collect_samples(self) -> None:
        first = len(self.history) - len(self._own) + 1
        for number, per_rank in enumerate(zip(*gathered(self.engine, self._own), strict=True)):
            self.samples.append({"step": first + number, "ids": [name for ids in per_rank for name in ids]})
        self._own = []

    def _show(self, report: StepReport) -> None:
        recent = self.history[-20:]

        def mean(name: str) -> float:
            return sum(entry[name] for entry in recent) / len(recent)

        last = self.history[-1]
        self._client.put(
            Progress(
                step=report.step,
                steps=self.plan.steps,
                loss=mean("train/loss"),
                samples_per_second=mean("train/samples_per_second"),
                tokens_per_second=mean("train/tokens_per_second"),
                mfu=mean("train/mfu") if "train/mfu" in last else None,
                gpu_memory_gib=last.get("train/gpu_memory_gib"),
            )
        )

    def _due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._last[what] < seconds:
            return False
        self._last[what] = now
        return True

    def _barrier(self) -> None:
        if self.engine.world > 1:
            distributed.barrier()

    def _agree(self, choose: Callable[[], str | None]) -> str | None:
        """What rank 0 finds, on every rank: a listing may change between two looks."""
        if self.engine.world == 1:
            return choose()
        box = [choose() if self.chief else None]
        distributed.broadcast_object_list(box, src=0)
        return box[0]


class StopListener:
    """Hears from the driver, in a thread of rank 0, that the run shall save and leave."""

    def __init__(self, client: ProgressClient, every: float = 0.5):
        self.stop = threading.Event()
        self._client, self._every = client, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="orders", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._over.set()
        self._thread.join(timeout=10)

    def _listen(self) -> None:
        while not self._over.wait(self._every):
            if self._client.stopping():
                self.stop.set()
                return
