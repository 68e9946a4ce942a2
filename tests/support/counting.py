"""A small real component for the runner's tests: it writes numbers part by part and can be made to stop."""

from __future__ import annotations

import hashlib
import os
import time
from typing import ClassVar

from pydantic import Field

from components.contract import Artifact, Component, Job, Settings, Workspace, run_field
from llava.errors import Preempted, RefusedInput


class CountSettings(Settings):
    parts: int = Field(default=3, description="number of files")
    stop_after: int = run_field(
        -1, description="stop once this many files of this try are written; -1: never"
    )
    stop_by: str = run_field("error", description="how it stops: error, preempted or hang")
    declare: bool = run_field(False, description="declare the hashes of the files")


class Count(Component):
    """Writes `part-N` files, skipping those that an earlier try left."""

    name = "count"
    version = "1"
    Settings = CountSettings

    stands: ClassVar[bool] = True

    def __init__(self) -> None:
        self.runs = 0
        self.written: list[str] = []

    def check(self, settings: CountSettings, inputs: dict[str, Artifact]) -> None:
        if settings.parts < 0:
            raise RefusedInput(f"count.parts is {settings.parts}: give 0 or more")

    def external(self, settings: CountSettings) -> dict[str, str]:
        return {"world": "1"}

    def still_stands(self, artifact: Artifact, workspace: Workspace) -> bool:
        return self.stands

    def run(self, job: Job) -> None:
        self.runs += 1
        self.written = []
        assert list(job.scratch.iterdir()) == []
        for number in range(job.settings.parts):
            key = f"data/part-{number}"
            if job.folder.stat(key) is None:
                if len(self.written) == job.settings.stop_after:
                    self._stop(job.settings.stop_by)
                text = b"part %d\n" % number
                job.folder.write(key, text)
                job.folder.write(f"checkpoints/step-{number}/state", b"kept until commit")
                self.written.append(key)
                if job.settings.declare:
                    job.add_file(key, len(text), hashlib.sha256(text).hexdigest())
        job.metrics["count/parts"] = job.settings.parts
        job.notes["dropped"] = {"too large": ["id-1"]}
        job.say("counted")

    def _stop(self, how: str) -> None:
        if how == "preempted":
            raise Preempted("asked to stop; the same command goes on")
        if how == "hang":
            print(os.getpid(), flush=True)
            time.sleep(120)
        raise RuntimeError("the disk of doom")
