"""`llava submit`: a copy of the cluster's template RayJob, under a name that one minute has once.

The name makes it safe to submit again: a try that was cut off and repeated, or two pods of one scheduled Job, make
one run. Another run of the workflow that has not ended is a reason to leave (status 5): both would work on one root.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.contract import open_store, say
from llava.errors import AlreadyRunning, RefusedInput
from workflows import config as configs
from workflows.config import WorkflowConfig
from workflows.kubernetes import rayjob
from workflows.kubernetes.api import Cluster, RayJob
from workflows.kubernetes.follow import follow
from workflows.kubernetes.pod_memory import give_memory
from workflows.kubernetes.rayjob import Entrypoint
from workflows.retraining.drops import look


@dataclass(frozen=True)
class Request:
    """What the command line says; None and () leave it to the template."""

    command: str | None = None
    preset: str | None = None
    root: str | None = None
    drops: Sequence[str] = ()
    sets: Sequence[str] = ()
    template: str = "llava"
    scheduled: str | None = None
    if_new: bool = False
    allow_parallel: bool = False
    watch: bool = False


def submit(request: Request, cluster: Cluster) -> str | None:
    """Submit a run and return its name; None where `if_new` found nothing new.

    Raises RefusedInput before anything is made, AlreadyRunning where another run of the workflow is on.
    """
    minute = rayjob.minute_of(request.scheduled)
    template = cluster.get(request.template)
    entrypoint = Entrypoint.parse(template["spec"].get("entrypoint", "")).with_overrides(
        request.command, request.preset, request.root, request.drops, request.sets
    )
    name = rayjob.run_name(request.template, entrypoint, minute, request.allow_parallel)
    job = rayjob.copy_of(template, name, entrypoint)
    rayjob.check(job)
    config = _check(entrypoint)
    if request.if_new and not _anything_new(entrypoint):
        return None
    for line in give_memory(job, config) if config else []:
        say(line)
    if _is_submitted(cluster, request, job):
        say(f"{name} was submitted before: {entrypoint}")
    else:
        say(f"{name} submitted: {entrypoint}")
    if request.watch:
        try:
            follow(cluster, name)
        except KeyboardInterrupt:
            say(f"the run goes on: `kubectl -n {cluster.namespace} get rayjob {name} --watch`")
            raise
    return name


def _is_submitted(cluster: Cluster, request: Request, job: RayJob) -> bool:
    """Create `job`; True where that had been done before. Raises AlreadyRunning."""
    name = job["metadata"]["name"]
    runs = {
        each["metadata"]["name"]: each
        for each in cluster.find(f"{rayjob.WORKFLOW}={request.template}")
        if each["metadata"]["name"] != request.template
    }
    others = [
        each for each in runs.values() if each["metadata"]["name"] != name and rayjob.is_unfinished(each)
    ]
    if name not in runs and others and not request.allow_parallel:
        busy = others[0]["metadata"]["name"]
        raise AlreadyRunning(
            f"{busy} is on ({rayjob.state(others[0])}): wait for it, delete it "
            f"(`kubectl -n {cluster.namespace} delete rayjob {busy}`), or give --allow-parallel"
        )
    if name not in runs and cluster.create(job):
        return False
    there = runs.get(name) or cluster.get(name)
    if there["spec"]["entrypoint"] != job["spec"]["entrypoint"]:
        raise AlreadyRunning(
            f"{name} was submitted in the same minute with something else ({there['spec']['entrypoint']}): "
            "submit again in a minute, or give --allow-parallel"
        )
    return True


def _check(entrypoint: Entrypoint) -> WorkflowConfig | None:
    """Refuse what the run itself would refuse once it has a cluster; its config, where that does not lie there."""
    if entrypoint.root is None or not entrypoint.root.startswith("s3://"):
        raise RefusedInput(
            f"--root {entrypoint.root}: a run's pods come and go; give a root that all of them reach: "
            "s3://bucket/prefix"
        )
    if entrypoint.command == "retrain" and not entrypoint.drops:
        raise RefusedInput("retrain needs --drop, the folder or s3:// prefix where new data comes in")
    for uri in (entrypoint.root, *entrypoint.drops):
        open_store(uri)
    preset, known = entrypoint.preset, configs.preset_names()
    if preset in known:
        return configs.load(preset, entrypoint.sets)
    if not preset.startswith("/"):
        raise RefusedInput(
            f"preset {preset!r} is not in the run's pods: take one of {', '.join(known)}, or put your file into the "
            f"ConfigMap llava-presets and name it /etc/llava/presets/{Path(preset).name}"
        )
    return None


def _anything_new(entrypoint: Entrypoint) -> bool:
    assert entrypoint.root is not None
    looked = look(entrypoint.root, entrypoint.drops)
    for uri in looked.waiting:
        say(f"still being written: {uri}")
    for uri in looked.empty:
        say(f"nothing at all lies under {uri}: is it where new data comes in?")
    for drop in looked.new:
        say(f"new: {drop.uri} ({drop.files:,} files, {drop.size / 2**20:,.1f} MiB)")
    if not looked.new:
        say(f"nothing new under {', '.join(entrypoint.drops)}")
    return bool(looked.new)
