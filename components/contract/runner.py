"""Running a component: find the finished artifact, or hold its lease, make it and commit it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contract import lease as leases
from components.contract.attempts import attempt_of, earlier, files_of, next_token, remove_rest, take_over
from components.contract.component import Component, Job, Settings, recipe, run_part
from components.contract.digest import artifact_digest
from components.contract.manifest import (
    MANIFEST,
    RUN,
    Artifact,
    FileEntry,
    Manifest,
    attempt_folder,
    read_artifact,
    verify,
)
from components.contract.outages import hurried
from components.contract.provenance import code_revision, versions
from components.contract.store import Folder, StoreError
from components.contract.tracking import PARENT_TAG, TrackedRun, TrackingError
from components.contract.workspace import Workspace
from llava.data.jsonl import from_json
from llava.errors import BudgetReached, LlavaError, Preempted, RefusedInput, Terminated

CHECKPOINTS = "checkpoints"
_NAME = re.compile("[a-z_]{1,64}")
_STOPPED = (Preempted, BudgetReached, Terminated, KeyboardInterrupt, SystemExit)


@dataclass(frozen=True)
class Outcome:
    """What `run_component` gives back; `seconds` is wall time."""

    artifact: Artifact
    reused: bool
    seconds: float


def run_component(
    component: Component, settings: Settings, inputs: dict[str, Artifact], workspace: Workspace
) -> Outcome:
    """The artifact of `component` for these settings and inputs, made now unless it is finished already.

    Raises RefusedInput (also for a finished artifact whose files changed), AlreadyRunning, LeaseLost, and
    whatever the component raises; after any of them the same call goes on from what is there.
    """
    started = time.monotonic()
    plan = _Target(component, settings, inputs, workspace)
    artifact = plan.find()
    reused = artifact is not None
    if artifact is None:
        with _held(plan) as lease:
            # Somebody may have finished it while this process waited for the lease.
            artifact = plan.find()
            reused = artifact is not None
            if artifact is None:
                artifact = _make(plan, lease)
    if reused:
        component.check_found(settings, artifact)
        plan.link(artifact)
    return Outcome(artifact, reused, time.monotonic() - started)


class _Target:
    """One artifact to be: its digest, its folder and everything that the digest is made of."""

    def __init__(
        self, component: Component, settings: Settings, inputs: dict[str, Artifact], workspace: Workspace
    ) -> None:
        if not _NAME.fullmatch(component.name):
            raise TypeError(f"component {component.name!r}: its name must be lower-case letters and _")
        self.component, self.settings, self.inputs, self.workspace = component, settings, inputs, workspace
        self.recipe = recipe(settings)
        self.lineage = {name: artifact.digest for name, artifact in inputs.items()}
        self.external = component.external(settings)
        self.digest = artifact_digest(
            component.name, component.version, self.recipe, self.lineage, self.external
        )
        self.address: Folder = workspace.store.sub(f"{component.name}/{self.digest[:16]}")

    def say(self, text: str) -> None:
        self.workspace.console.say(text, self.component.name)

    def needed(self) -> set[str]:
        """Digests of all that it is made from."""
        return {*self.lineage.values(), *self.external.values()}

    def find(self) -> Artifact | None:
        """The finished artifact, verified; None if it is not finished or no longer stands."""
        artifact = self.standing()
        if artifact is None:
            return None
        verify(artifact, self.say)
        return artifact if self.component.still_stands(artifact, self.workspace) else None

    def standing(self) -> Artifact | None:
        """The artifact as its manifest tells it, whether or not it still counts."""
        artifact = read_artifact(self.address)
        if artifact is not None and artifact.digest != self.digest:
            raise RefusedInput(
                f"{self.address.uri}/{MANIFEST} has digest {artifact.digest}, expected {self.digest}: the "
                f"folder was copied or edited; delete {self.address.uri} and run again"
            )
        return artifact

    def least_token(self) -> int:
        """Over that of a manifest which lies there and counts no more: no two attempts share a place."""
        artifact = self.standing()
        return next_token(artifact.manifest if artifact else None)

    def link(self, artifact: Artifact) -> None:
        """Tell the parent run which finished artifact was used, and close a run that a crash left open."""
        self.say(f"finished already: {artifact.uri}")
        run_id = artifact.manifest.mlflow_run_id
        if self.address.stat(RUN) is not None and run_id is not None:
            remove_rest(self.address, artifact.manifest)
            with contextlib.suppress(LookupError):
                _close(self, self.workspace.tracking.resume(run_id), artifact.manifest)
        if self.workspace.parent is not None:
            self.workspace.parent.tags(
                {
                    f"reused.{self.component.name}": f"{run_id} {self.digest}",
                    f"digest.{self.component.name}": self.digest,
                }
            )


@contextlib.contextmanager
def _held(plan: _Target) -> Iterator[leases.Lease]:
    """The lease on the artifact; it leaves no file behind once the artifact is finished."""
    workspace = plan.workspace
    lease = leases.acquire(
        plan.address, wait=workspace.wait, ttl=workspace.lease_ttl, say=plan.say, least=plan.least_token
    )
    finished = False
    try:
        yield lease
        finished = True
    finally:
        # Whatever happened inside matters more than a lease that could not be returned: it expires by itself.
        with contextlib.suppress(LlavaError, OSError), contextlib.nullcontext() if finished else hurried():
            lease.release(forget=finished)


def _make(plan: _Target, lease: leases.Lease) -> Artifact:
    component = plan.component
    component.check(plan.settings, plan.inputs)
    if component.on_ray:
        plan.workspace.cluster()
    # A manifest that lies here is one that no longer stands: it stays until the new one takes its place.
    before = plan.address.fetch(MANIFEST)
    attempt = attempt_of(lease)
    take_over(plan.address, attempt, component.takes_over, lease.check_if_lost)
    run = _tracked_run(plan, lease)
    try:
        _describe(plan, run)
        with tempfile.TemporaryDirectory(prefix=f"llava-{component.name}-") as scratch:
            job = Job(
                settings=plan.settings,
                inputs=plan.inputs,
                folder=attempt_folder(plan.address, attempt),
                earlier=tuple(attempt_folder(plan.address, name) for name in earlier(plan.address, attempt)),
                scratch=Path(scratch),
                run=run,
                lease=lease,
                workspace=plan.workspace,
                component=component.name,
            )
            component.run(job)
        artifact = _commit(plan, job, attempt, before[1] if before else None)
    except BaseException as error:
        stopped = isinstance(error, _STOPPED)
        with contextlib.suppress(TrackingError), hurried() if stopped else contextlib.nullcontext():
            run.tags({"error": f"{type(error).__name__}: {error}"[:500]})
            run.finish("KILLED" if stopped else "FAILED")
        raise
    _close(plan, run, artifact.manifest)
    return artifact


def _tracked_run(plan: _Target, lease: leases.Lease) -> TrackedRun:
    """The MLflow run of this artifact: the one that an earlier try began, or a new one."""
    tracking, parent = plan.workspace.tracking, plan.workspace.parent
    if found := plan.address.fetch(RUN):
        with contextlib.suppress(LookupError, TypeError, ValueError):
            run = tracking.resume(from_json(found[0])["mlflow_run_id"])
            plan.say(f"going on with {plan.address.uri}")
            return run
    run = tracking.start(plan.component.name, parent)
    told = {"mlflow_run_id": run.id, "tracking_uri": tracking.uri, "made_from": sorted(plan.needed())}
    record = json.dumps(told).encode()
    if not (plan.address.swap(RUN, record, found[1]) if found else plan.address.create(RUN, record)):
        lease.check()
        raise StoreError(f"{plan.address.uri}/{RUN}: changed while it was written: run again")
    return run


def _describe(plan: _Target, run: TrackedRun) -> None:
    """Tags, params and inputs of the run; the parent run is told the digest."""
    name, parent = plan.component.name, plan.workspace.parent
    tags = {
        "component": name,
        "component_version": plan.component.version,
        "digest": plan.digest,
        "artifact_uri": plan.address.uri,
        "code": code_revision(),
    }
    if parent is not None:
        # A resumed run moves under the workflow run that finishes it.
        tags[PARENT_TAG] = parent.id
        parent.tags({f"digest.{name}": plan.digest})
    run.tags(tags)
    run.params({name: plan.settings.model_dump(mode="json")})
    for title, artifact in plan.inputs.items():
        run.dataset(f"{title} ({artifact.manifest.component})", artifact.digest, artifact.uri)


def _commit(plan: _Target, job: Job[Any], attempt: str, before: str | None) -> Artifact:
    """Write the manifest, last, while the lease is certainly ours.

    Create-only, or in the place of the manifest of version `before`, which no longer stands.
    """
    job.lease.check()
    files = _files(plan, job, attempt)
    manifest = Manifest(
        component=plan.component.name,
        version=plan.component.version,
        digest=plan.digest,
        recipe=plan.recipe,
        run=run_part(plan.settings),
        inputs=plan.lineage,
        external=plan.external,
        files=files,
        metrics={name: value for name, value in job.metrics.items() if math.isfinite(value)},
        notes=job.notes,
        mlflow_run_id=job.run.id,
        code=code_revision(),
        versions=versions(),
        attempt=attempt,
    )
    # Hashing may have taken longer than the lease lasts.
    job.lease.check()
    data = manifest.to_bytes()
    written = (
        plan.address.create(MANIFEST, data) if before is None else plan.address.swap(MANIFEST, data, before)
    )
    if not written:
        raise leases.LeaseLost(
            f"{plan.address.uri}: another run finished this artifact first; run again to use it"
        )
    # Only now: until the manifest stood, a crash would have had to go on from them.
    remove_rest(plan.address, manifest)
    return Artifact(plan.address, manifest)


def _files(plan: _Target, job: Job[Any], attempt: str) -> list[FileEntry]:
    found = {
        entry.key: entry.size
        for entry in files_of(plan.address, attempt)
        if not entry.key.startswith(f"{CHECKPOINTS}/")
    }
    for key, (size, _) in job.declared.items():
        if found.get(key) != size:
            raise LlavaError(
                f"{job.folder.uri}: {key} was written with {size:,} bytes, found "
                f"{'nothing' if key not in found else f'{found[key]:,}'}: run again"
            )
    return [
        FileEntry(
            path=key,
            size=size,
            sha256=job.declared[key][1] if key in job.declared else job.folder.sha256(key),
        )
        for key, size in found.items()
    ]


def _close(plan: _Target, run: TrackedRun, manifest: Manifest) -> None:
    """Final metrics and the end of the MLflow run. The artifact is finished: a failure here only waits."""
    try:
        run.metrics(manifest.metrics)
        run.finish()
    except TrackingError as error:
        plan.say(
            f"warning: the artifact is finished, its MLflow run is not closed ({error}); "
            "the next use of the artifact tries again"
        )
        return
    plan.address.delete(RUN)
