"""One of many ranks of a training without a model: the real loop, plan, collator, observers and checkpoints.

`benchmarks/at_scale/stand_ins.py` has what is replaced.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import distributed

from benchmarks.at_scale.phases import memory_of
from benchmarks.at_scale.stand_ins import (
    WARM,
    Actor,
    Client,
    Halting,
    Lengths,
    StandIn,
    Texts,
    die,
    sender,
)
from benchmarks.at_scale.tally import Tally, primitives, store_keys
from components.contract import acquire, open_store
from components.training import checkpoints
from components.training.checkpoints import CheckpointFolders
from components.training.observers.base import Observer, RunState
from components.training.observers.metrics import Metrics
from components.training.observers.record import Record
from components.training.observers.saving import Saving
from components.training.observers.show import Show
from components.training.observers.spikes import Spikes
from components.training.run import Run
from components.training.settings import TrainSettings
from llava.data.collate import Collator
from llava.data.plan import BatchPlan, SampleIndex
from llava.training.loop import Schedule, StepReport, gathered, train

TOKENS_PER_ROW = 2048


class Timed(Saving):
    """Notes what a save takes of the thread that trains."""

    def __init__(self, state: RunState, identity: dict[str, Any]) -> None:
        super().__init__(state, identity)
        self.saves: list[dict[str, float]] = []

    def _save(self, step: int) -> None:
        began, cpu = time.monotonic(), time.thread_time()
        super()._save(step)
        self.saves.append({"seconds": time.monotonic() - began, "cpu_seconds": time.thread_time() - cpu})


def member(job: dict[str, Any], index: SampleIndex) -> dict[str, Any]:
    """Resume, train as `job` says, and leave; what it took. One that sees the group break says when."""
    joined, rank = time.monotonic(), distributed.get_rank()
    bare, alone = memory_of("self"), primitives(job["primitives"])
    tally, engine, signals = Tally(), StandIn(job), Path(job["signals"])
    keys = store_keys()
    folder = open_store(job["root"])
    lease = acquire(folder, ttl=3600.0) if rank == 0 else None
    guard, start = gathered(engine, (lease.guard, os.urandom(4).hex()) if lease else None)[0]
    plan = BatchPlan(index, 0, 1.0, job["global_batch"])
    planned = _planned(plan)
    settings = TrainSettings(
        template="chatml", global_batch=job["global_batch"], learning_rate=1e-3, checkpoint_every=job["every"]
    )
    actor = Actor(signals)
    task: Any = SimpleNamespace(settings=settings, folder=folder, guard=guard, earlier=(), training="full")
    place = CheckpointFolders(folder, guard, 2)
    state = RunState(task, engine, plan, Path(job["scratch"]), Client(actor), place, start)
    metrics, identity = sender(), {"seed": 0, "samples": len(index)}
    saving = Timed(state, identity)
    observers: list[Observer] = [
        Record(state, None),
        Spikes(state, metrics),
        Show(state),
        Metrics(state, metrics),
        Halting(state),
        saving,
    ]
    if job.get("kill") == "save" and rank == engine.world - 1:
        _die_in_the_save(job)
    run = Run(state, identity, observers)
    texts: Any = Texts(index)
    lengths: Any = Lengths()
    blank: Any = SimpleNamespace(blank=lambda: np.zeros((3, 1, 1), np.uint8))
    collator = Collator(texts, "conversations", lengths, blank, plan, TOKENS_PER_ROW)
    found: dict[str, Any] = {
        "joined": joined,
        "primitives": alone,
        "bare": bare.anonymous if bare else 0,
        "steps": [],
        "measured": job["steps"],
        "slow_steps": job["slow_steps"],
    }
    try:
        tally.phase = "resume"
        began, cpu = time.monotonic(), time.process_time()
        first = run.resume()
        found["resume"] = {
            "step": first,
            "seconds": time.monotonic() - began,
            "cpu_seconds": time.process_time() - cpu,
        }
        tally.phase = "steps"
        watched = _Watched(run, found["steps"], job)
        train(engine, collator, Schedule(plan.steps, 1e-3, 0.03), first, watched.after, watched.word)  # type: ignore[arg-type]
        found["process_cpu_seconds"] = watched.process_cpu()
    except (RuntimeError, AssertionError) as error:
        found["noticed"], found["error"] = time.monotonic(), str(error).splitlines()[0]
    finally:
        run.close()
    found |= {
        "left": time.monotonic(),
        "heard": actor.heard,
        "saves": saving.saves,
        "collectives": tally.found,
        "planned": planned,
        "store_keys": [keys, store_keys() if "error" not in found else None],
        "memory": (memory_of("self") or bare).anonymous,  # type: ignore[union-attr]
        "checkpoint": state.checkpoint.uri if state.checkpoint else None,
    }
    return found


class _Watched:
    """The run as the loop sees it, with the CPU time of the thread that trains beside each step."""

    def __init__(self, run: Run, rows: list[dict[str, float]], job: dict[str, Any]) -> None:
        self._run, self._rows, self._said = run, rows, 0.0
        self._last, self._measured = WARM + job["steps"], job["steps"]
        self._began: float | None = None
        self._used = 0.0

    def word(self) -> int:
        """The run's."""
        cpu = time.thread_time()
        said = self._run.word()
        self._said = time.thread_time() - cpu
        return said

    def after(self, report: StepReport) -> bool:
        """The run's."""
        cpu = time.thread_time()
        leave = self._run.after_step(report)
        self._rows.append(
            {
                "seconds": report.seconds,
                "wait": report.data_wait,
                "cpu_seconds": time.thread_time() - cpu + self._said,
            }
        )
        if len(self._rows) == WARM:
            self._began = time.process_time()
        if len(self._rows) == self._last and self._began is not None:
            self._used = time.process_time() - self._began
        return leave

    def process_cpu(self) -> float:
        """Of all threads of this rank, a measured step."""
        return self._used / self._measured


def _planned(plan: BatchPlan) -> dict[str, float]:
    """Counts calls of `BatchPlan.place` and their CPU time, in whichever thread they are made."""
    found, place = {"calls": 0, "cpu_seconds": 0.0}, plan.place

    def timed(*arguments: Any) -> Any:
        cpu = time.thread_time()
        result = place(*arguments)
        found["calls"] += 1
        found["cpu_seconds"] += time.thread_time() - cpu
        return result

    plan.place = timed  # type: ignore[method-assign]
    return found


def _die_in_the_save(job: dict[str, Any]) -> None:
    """When the tensors of the share are written and nobody has been told."""
    write = checkpoints.files.write_share

    def written(*arguments: Any) -> Any:
        write(*arguments)
        die(job)

    checkpoints.files.write_share = written
