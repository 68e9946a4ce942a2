"""One Ray task per shard: spread over the nodes, tried again, found finished after a crash, with progress.

A task runs a function that writes rows into a `ShardOutput`. Its Parquet files reach the artifact's folder
whole or not at all; after them comes the record `checkpoints/shards/<name>.json`, which says that the shard is
finished. A later run finds the record and leaves the shard alone. The function must depend on its arguments
only, so that a second try writes the same bytes.

A task may name what its rows are made of. A shard of the same in an earlier artifact of this root is then copied by the
store (a hard link in a folder) instead of being made: a data set that grew costs what was added to it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contract.component import Job
from components.contract.pace import Due, Speed
from components.contract.store import Folder, open_store
from components.datasets.results import Refusals, ShardResult, Span
from components.datasets.reuse import RECORDS, EarlierShards, write_shards_file
from components.ray_cluster.spread import PLACED, in_flight, result_of
from llava.data.schema import SPLITS, DatasetWriter, GroupSize, Row

KEPT = "checkpoints/kept"


@dataclass(frozen=True)
class ShardTask:
    """What one task does: `work(output, arguments)`, a function of a module, for about `samples` samples.

    `name` is the task's own; `part` numbers its files, `train/part-00000.parquet` and so on. `made_of(arguments)`
    is a digest of everything that its files come from, and of nothing else; None: it is made in any case.
    """

    name: str
    part: int
    samples: int
    work: Callable[[ShardOutput, Any], None]
    arguments: Any
    made_of: Callable[[Any], str] | None = None


class ShardOutput:
    """Where a task's function puts its rows, its refusals and its figures."""

    def __init__(self, folder: Folder, part: int, group: GroupSize, scratch: Path, kept: Folder) -> None:
        self.result = ShardResult()
        self.kept = kept
        """For what is costly to get again after a crash; gone once the shard is finished."""
        self._folder, self._part, self._group, self._scratch = folder, part, group, scratch
        self._writers: dict[str, DatasetWriter] = {}
        self._open = ExitStack()

    def write(self, split: str, row: Row) -> None:
        """Add a row to the shard's file of `split`."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        if split not in self._writers:
            writer = DatasetWriter(self._scratch / f"{split}.parquet", self._group)
            self._writers[split] = self._open.enter_context(writer)
        self._writers[split].write(row)

    def refuse(self, name: str, reason: str, detail: str) -> None:
        """Leave out the sample `name`: counted by `reason`, kept with `detail` in the artifact's list."""
        self.result.refused.append({"id": name, "reason": reason, "detail": detail})

    def count(self, name: str, times: int = 1) -> None:
        """Add to a counter."""
        self.result.counts[name] += times

    def measure(self, name: str, value: float) -> None:
        """Add a value to a figure."""
        self.result.spans.setdefault(name, Span()).add(Span(1, value, value, value))

    def commit(self) -> ShardResult:
        """Close the files and bring them into the folder."""
        self._open.close()
        for split, writer in sorted(self._writers.items()):
            path = self._scratch / f"{split}.parquet"
            key = file_of(split, self._part)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self._folder.upload(path, key)
            size = path.stat().st_size
            self.result.files.append(
                {"path": key, "size": size, "sha256": sha256, "rows": writer.rows, "split": split}
            )
        return self.result


def run_shards(
    job: Job[Any], tasks: Sequence[ShardTask], *, group: GroupSize, workers: int | None, refusals: Refusals
) -> ShardResult:
    """Run the tasks that are not finished yet, at most `workers` at once (None: every CPU of the cluster).

    Ray must be initialised. Every file is declared to the job. Raises LlavaError when a shard fails for good
    or when too many samples are refused; what is finished by then is found again by the next run.
    """
    import ray

    total, waiting = ShardResult(), []
    reusable = all(task.made_of for task in tasks)
    results = {task.name: _finished(job.folder, task.name) for task in tasks}
    for task in tasks:
        if (found := results[task.name]) is None:
            waiting.append(task)
        else:
            total.add(found)
    progress = _Progress(job, tasks, waiting)
    refusals.check(total)
    run: Any = ray.remote(**PLACED)(_run_here)
    earlier = ray.put(EarlierShards.of(job) if waiting and reusable else None)

    def submit(task: ShardTask) -> Any:
        return run.remote(job.folder.uri, task, group, earlier)

    def look() -> None:
        job.lease.check()
        progress.say_sometimes()

    for task, reference in in_flight(submit, waiting, workers, look):
        result = results[task.name] = result_of(reference, f"shard {task.name}")
        total.add(result)
        progress.finished(task)
        refusals.check(total)
    in_order = [made for task in tasks if (made := results[task.name]) is not None]
    if reusable:
        write_shards_file(job.folder, in_order)
    return _together(job, in_order)


def _run_here(
    folder_uri: str, task: ShardTask, group: GroupSize, earlier: EarlierShards | None = None
) -> ShardResult:
    folder = open_store(folder_uri)
    made_of = task.made_of(task.arguments) if task.made_of else ""
    result = earlier.copied(made_of, folder, lambda split: file_of(split, task.part)) if earlier else None
    if result is None:
        result = _made(folder, task, group)
    result.made_of = made_of
    folder.write(_record(task.name), result.to_json())
    folder.sub(f"{KEPT}/{task.name}").delete_all()
    return result


def _made(folder: Folder, task: ShardTask, group: GroupSize) -> ShardResult:
    with tempfile.TemporaryDirectory(prefix="shard-") as scratch:
        kept = folder.sub(f"{KEPT}/{task.name}")
        output = ShardOutput(folder, task.part, group, Path(scratch), kept)
        task.work(output, task.arguments)
        return output.commit()


def file_of(split: str, part: int) -> str:
    """The name of a shard's file of `split` in its artifact."""
    return f"{split}/part-{part:05d}.parquet"


def _record(name: str) -> str:
    return f"{RECORDS}/{name}.json"


def _finished(folder: Folder, name: str) -> ShardResult | None:
    """The record of a shard whose files all stand at their full size, else None."""
    found = folder.fetch(_record(name))
    if found is None:
        return None
    result = ShardResult.from_json(found[0])
    stats = {file["path"]: folder.stat(file["path"]) for file in result.files}
    whole = all(
        (stat := stats[file["path"]]) is not None and stat.size == file["size"] for file in result.files
    )
    return result if whole else None


def _together(job: Job[Any], results: Sequence[ShardResult]) -> ShardResult:
    """All results, in the order of the tasks, whichever finished first; their files are declared."""
    together = ShardResult()
    for result in results:
        together.add(result)
    for file in together.files:
        job.add_file(file["path"], file["size"], file["sha256"])
    return together


class _Progress:
    """Plain lines, seconds apart, with the time that is left at the pace so far."""

    def __init__(self, job: Job[Any], tasks: Sequence[ShardTask], waiting: Sequence[ShardTask]) -> None:
        self._job, self._shards = job, len(tasks)
        self._all = sum(task.samples for task in tasks)
        self._left = sum(task.samples for task in waiting)
        self._done_shards = self._shards - len(waiting)
        self._speed, self._due = Speed(self._all - self._left), Due(at_once=False)
        found = f", {self._done_shards:,} found finished" if self._done_shards else ""
        job.say(f"{self._all:,} samples in {self._shards:,} shards{found}")

    def finished(self, task: ShardTask) -> None:
        self._done_shards += 1
        self._left -= task.samples

    def say_sometimes(self) -> None:
        if not self._left or not self._due():
            return
        done = self._all - self._left
        text = f"{done:,} of {self._all:,} samples, {self._done_shards} of {self._shards} shards"
        if left := self._speed.left(done, self._all):
            text += f", {self._speed.per_second(done):,.0f} a second, about {left} left"
        self._job.say(text)
