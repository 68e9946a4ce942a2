"""The RayJob of a run: the template with a name, labels and an entrypoint of its own, and what the CRD lets pass.

KubeRay's schema takes any word as a submission mode and waits for ever on a wrong one, takes names that no pod can
have, and rules about suspending that its controller refuses later: all of that is refused here, before anything starts.
"""

import copy
import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from llava.errors import RefusedInput

WORKFLOW = "llava-workflow/workflow"
"""Label of a template's copies; its value is the template's name."""
ROLE = "llava-workflow/role"
QUEUE, PRIORITY = "llava-workflow/queue-name", "llava-workflow/priority-class"
"""Annotations of a template for Kueue, which becomes labels on the copies only: Kueue would start a template."""
IMAGES = "llava-workflow/images"
"""Annotation: with the value `digest`, an image that a tag names is refused."""

COMMANDS = ("train", "retrain")
MODES = ("K8sJobMode", "HTTPMode")
NAME_LIMIT = 47
FINISHED = ("Complete", "Failed", "ValidationFailed")

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# From 2023 on: a day (20261123) at the end of a name is no minute.
_JOB_OF_A_MINUTE = re.compile(r"job/.*-((?:2[89]|[3-9]\d)\d{6})")
_DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
_PLACEHOLDER = re.compile(r"replace-me|@sha256:0{64}")
# An entrypoint is read by the shell of the submitter and again by that of the head, which drop quotes on the way.
_PLAIN = re.compile(r"[\w./:=,@%+\[\] -]*", re.ASCII)


@dataclass(frozen=True)
class Entrypoint:
    """`llava COMMAND PRESET --root URI [--drop URI]... [--set KEY=VALUE]... [others]`."""

    command: str
    preset: str
    root: str | None = None
    drops: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Entrypoint":
        """Read a template's entrypoint; RefusedInput where it is not of that form."""
        program, command, preset, *rest = [*shlex.split(text), "", "", ""]
        if program != "llava" or command not in COMMANDS or not preset or preset.startswith("-"):
            raise RefusedInput(
                f"the template's entrypoint {text!r}: write llava {'|'.join(COMMANDS)} PRESET --root URI ..."
            )
        found: dict[str, list[str]] = {"--root": [], "--drop": [], "--set": []}
        others: list[str] = []
        words = iter(word for word in rest if word)
        for word in words:
            name, equals, value = word.partition("=")
            if name in found:
                found[name].append(value if equals else next(words, ""))
            else:
                others.append(word)
        root = found["--root"][-1] if found["--root"] else None
        return cls(command, preset, root, tuple(found["--drop"]), tuple(found["--set"]), tuple(others))

    def with_overrides(
        self,
        command: str | None = None,
        preset: str | None = None,
        root: str | None = None,
        drops: Sequence[str] = (),
        sets: Sequence[str] = (),
    ) -> "Entrypoint":
        """What is given replaces what the template says; `sets` come after the template's, and so win."""
        changed = replace(
            self,
            command=command or self.command,
            preset=preset or self.preset,
            root=root or self.root,
            drops=tuple(drops) or self.drops,
            sets=(*self.sets, *sets),
        )
        return changed if changed.command == "retrain" else replace(changed, drops=())

    def __str__(self) -> str:
        words = ["llava", self.command, self.preset]
        words += ["--root", self.root] if self.root else []
        for option, values in (("--drop", self.drops), ("--set", self.sets)):
            for value in values:
                words += [option, value]
        words += self.others
        for word in words:
            if not _PLAIN.fullmatch(word):
                raise RefusedInput(
                    f"{word!r}: the entrypoint passes two shells, which would read quotes, $ and the like: use "
                    "letters, digits and _./:=,@%+-[], or put it into a preset file of the ConfigMap llava-presets"
                )
        return shlex.join(words)


def run_name(template: str, entrypoint: Entrypoint, minute: datetime, parallel: bool) -> str:
    """`TEMPLATE-COMMAND-YYYYMMDDHHMM` (UTC); with `parallel` also a digest, so that runs of one minute differ."""
    name = f"{template}-{entrypoint.command}-{minute.astimezone(UTC):%Y%m%d%H%M}"
    return f"{name}-{hashlib.sha256(str(entrypoint).encode()).hexdigest()[:6]}" if parallel else name


def minute_of(scheduled: str | None) -> datetime:
    """The minute of a run: of a Job (`job/NAME`), of an ISO time, or now.

    The schedule's Jobs have it at the end of their name, in minutes since 1970. One that was made by hand has none, and
    means now: a retry of it in a later minute has another name, and finds the run of the first try on (AlreadyRunning).
    """
    if scheduled is None:
        return datetime.now(UTC)
    if found := _JOB_OF_A_MINUTE.fullmatch(scheduled):
        return datetime.fromtimestamp(int(found[1]) * 60, UTC)
    if scheduled.startswith("job/"):
        return datetime.now(UTC)
    try:
        minute = datetime.fromisoformat(scheduled)
    except ValueError:
        raise RefusedInput(
            f"--scheduled {scheduled!r}: write 2026-11-23T02:30, or job/NAME for the Job of a schedule"
        ) from None
    return minute if minute.tzinfo else minute.replace(tzinfo=UTC)


def copy_of(template: dict[str, Any], name: str, entrypoint: Entrypoint) -> dict[str, Any]:
    """The RayJob that runs `entrypoint`: let go at once, or handed to Kueue where the template names a queue."""
    above = template["metadata"]
    annotations = above.get("annotations") or {}
    labels = {**(above.get("labels") or {}), WORKFLOW: above["name"], ROLE: "run"}
    if queue := annotations.get(QUEUE):
        labels["kueue.x-k8s.io/queue-name"] = queue
    if priority := annotations.get(PRIORITY):
        labels["kueue.x-k8s.io/priority-class"] = priority
    spec = copy.deepcopy(template["spec"]) | {"entrypoint": str(entrypoint), "suspend": bool(queue)}
    kept = {key: value for key, value in annotations.items() if key.startswith("llava-workflow/")}
    return {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {"name": name, "namespace": above["namespace"], "labels": labels, "annotations": kept},
        "spec": spec,
    }


def check(job: dict[str, Any]) -> None:
    """Raise RefusedInput for the first thing that KubeRay or Kueue would refuse, or wait on, only later."""
    for mistake in _mistakes(job):
        raise RefusedInput(
            f"RayJob {job['metadata']['name']}: {mistake}; correct it in k8s/ and apply it again"
        )


def is_unfinished(job: dict[str, Any]) -> bool:
    """Whether the run of `job` still is to come, or on."""
    return (job.get("status") or {}).get("jobDeploymentStatus") not in FINISHED


def state(job: dict[str, Any]) -> str:
    """In two words where the run stands: KubeRay's state of the RayJob, and Ray's of the job where there is one."""
    status = job.get("status") or {}
    return ", ".join(filter(None, [status.get("jobDeploymentStatus") or "New", status.get("jobStatus")]))


def _mistakes(job: dict[str, Any]) -> Iterator[str]:
    name, spec, metadata = job["metadata"]["name"], job["spec"], job["metadata"]
    cluster = spec.get("rayClusterSpec") or {}
    if len(name) > NAME_LIMIT or not _NAME.fullmatch(name):
        yield (
            f"a name has at most {NAME_LIMIT} characters (this one {len(name)}), small letters, digits and "
            "hyphens, a letter first: give the template a shorter name"
        )
    if (mode := spec.get("submissionMode", MODES[0])) not in MODES:
        yield f"submissionMode {mode!r} is none of {', '.join(MODES)}: KubeRay would wait for ever"
    if not cluster or spec.get("clusterSelector"):
        yield "a run makes its own cluster: give rayClusterSpec and no clusterSelector"
    ends = spec.get("shutdownAfterJobFinishes", False)
    if not ends and (spec.get("suspend") or "ttlSecondsAfterFinished" in spec):
        yield "suspend and ttlSecondsAfterFinished need shutdownAfterJobFinishes: true"
    if ends and (spec.get("deletionStrategy") or {}).get("deletionRules"):
        yield "shutdownAfterJobFinishes and deletionRules exclude each other: use ttlSecondsAfterFinished"
    for limit, least in (("ttlSecondsAfterFinished", 0), ("backoffLimit", 0), ("activeDeadlineSeconds", 1)):
        if spec.get(limit, least) < least:
            yield f"{limit} is {spec[limit]}, the least is {least}"
    queued = "kueue.x-k8s.io/queue-name" in metadata.get("labels", {})
    if queued and cluster.get("enableInTreeAutoscaling"):
        yield "Kueue takes no autoscaling cluster: set enableInTreeAutoscaling: false and fixed replicas"
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions.mode must be written out as token: without it whoever reaches the dashboard runs code"
    for path, text in _texts(job):
        if _PLACEHOLDER.search(text):
            yield f"{path} is still a placeholder ({text}): put in your own"
        by_digest = metadata.get("annotations", {}).get(IMAGES) == "digest"
        if by_digest and path.endswith(".image") and not _DIGEST.fullmatch(text):
            yield f"{path} is {text}: name it by its digest (NAME@sha256:...)"


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{number}]")
