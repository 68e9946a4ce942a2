"""Retraining: finished drops become shards, stage 2 runs on old and new data, the gate decides.

`ROOT/drops/` keeps one record per drop that was taken: where its shards lie, and what became of the model. They are
the old data of the next time; of several drops at one place the latest counts. `ROOT/retrain/` holds the lease, the
versions of the dataset, and while a run is on its plan: which drops it takes and from which model it starts. A run that
was killed goes on with its plan, whatever else came in or became champion meanwhile, so that one model comes of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from components.contract import (
    Artifact,
    Lease,
    Refusal,
    Store,
    acquire,
    open_artifact,
    open_store,
    printable,
    say,
    sha256_of,
)
from components.datasets.results import RefusedNote
from components.registry import CHAMPION, MODEL_DIGEST, MODEL_URI, Registry, artifact_named, tracking_uri
from components.shard import Shard, ShardSettings
from components.shard.sources import llava as llava_source
from components.training.data import source_of
from components.training.settings import Extra
from llava.errors import AlreadyRunning, RefusedInput
from workflows import plan as plans
from workflows import train
from workflows.config import WorkflowConfig
from workflows.plan import Step
from workflows.retraining.drops import READY, RECORDS, Drop, Looked, look, open_drop, take
from workflows.retraining.records import PLACE, PLAN, VERSIONS, RetrainPlan, plan_of, taken
from workflows.train import Summary, WorkflowRun

IDS_TOLD = 20
_CONVERSATIONS = (".json", ".jsonl")
_LIMITS = (
    "rows_per_shard", "rows_per_group", "group_bytes", "min_pixels", "max_pixels", "max_image_bytes", "max_text",
    "resize", "workers",
)  # fmt: skip


@dataclass
class Retrained:
    """What came of it; `as_json` is the last line of `--json`."""

    result: str = "nothing new"
    drops: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    set_aside: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: Summary | None = None
    data_version: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        summary = self.summary.as_json() if self.summary else {}
        return summary | {name: value for name, value in vars(self).items() if name != "summary"}


@dataclass(frozen=True)
class _Part:
    """One dataset of the version: `role` is base, old or new; `weight`: times that a sample is seen in an epoch."""

    role: str
    artifact: Artifact
    weight: float

    def as_json(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "uri": self.artifact.uri,
            "digest": self.artifact.digest,
            "weight": self.weight,
        }


def retrain(config: WorkflowConfig, root: str, prefixes: Sequence[str], wait: bool = False) -> Retrained:
    """Take the finished drops under `prefixes` that `root` has not taken, and train on them.

    Nothing new: no cluster, no MLflow run. Raises AlreadyRunning while another retraining of the root is on (with
    `wait`: waits for it), RefusedInput over `retrain.max_bad` and for a drop folder that does not exist; run again,
    it goes on from what is there.
    """
    store = open_store(root)
    looked = look(root, prefixes, config.retrain.settle)
    for uri in looked.waiting:
        say(f"{uri} waits: no {READY} lies in it yet, or its files still change", "retrain")
    for one in looked.refused:
        say(f"{printable(one.key)} is no drop: {printable(one.text)} ({one.reason})", "retrain")
    for uri in looked.empty:
        say(f"nothing at all lies under {uri}: is it where new data comes in?", "retrain")
    if not looked.new and store.stat(PLAN) is None:
        return _nothing_new(looked)
    with acquire(store.sub(PLACE), wait=wait, say=lambda text: say(text, "retrain")) as lease:
        # Whoever held the lease before may have taken these drops.
        looked = replace(looked, new=look(root, prefixes, 0).new)
        plan = _standing(store, looked) or _plan(config, root, store, looked)
        if plan is None:
            return _nothing_new(looked)
        return _run(config, root, plan, looked, wait, lease)


def _learning(steps: Sequence[Step]) -> int:
    """The place of the step that learns from new data: the last one that trains on conversations."""
    taught = [
        at
        for at, step in enumerate(steps)
        if step.component.trains and step.component.takes.get("dataset") == "conversations"
    ]
    return taught[-1]


def _nothing_new(looked: Looked) -> Retrained:
    say("nothing new", "retrain")
    return Retrained(waiting=looked.waiting)


def _standing(store: Store, looked: Looked) -> RetrainPlan | None:
    """The plan of a run that did not end, if its drops still are what they were."""
    found = plan_of(store)
    if found is None:
        return None
    plan, _ = found
    new = {drop.digest for drop in looked.new}
    done = [drop.digest for drop in plan.drops if store.stat(f"{RECORDS}/{drop.digest}.json") is not None]
    gone = [drop.uri for drop in plan.drops if drop.digest not in {*new, *done}]
    if gone or len(done) == len(plan.drops):
        if gone:
            say(f"a retraining that did not end is given up: {gone[0]} changed or is gone", "retrain")
        store.delete(PLAN)
        return None
    say("going on with a retraining that did not end", "retrain")
    return plan


def _plan(config: WorkflowConfig, root: str, store: Store, looked: Looked) -> RetrainPlan | None:
    """A plan of all new drops but those that hold what was taken already; None where none is left."""
    known = {record.contents: record.uri for record in taken(store)}
    drops: list[Drop] = []
    contents: dict[str, str] = {}
    for drop in sorted(looked.new, key=lambda drop: drop.uri):
        holds = _contents(drop)
        if (other := known.get(holds)) is not None:
            say(f"{drop.uri} holds what {other} held: nothing to take", "retrain")
            take(root, drop, {"same_as": other})
            continue
        known[holds] = drop.uri
        contents[drop.digest] = holds
        drops.append(drop)
    if not drops:
        return None
    start = _champion(config, root) if config.retrain.start == "champion" else None
    plan = RetrainPlan(drops=tuple(drops), contents=contents, start=start)
    if not store.create(PLAN, plan.to_bytes()):
        raise AlreadyRunning(
            f"{store.uri}/{PLAN}: another retraining has made its plan; run again to join it"
        )
    return plan


def _champion(config: WorkflowConfig, root: str) -> str:
    """The artifact of the champion that is trained on."""
    name = config.register_.name
    champion = Registry(tracking_uri(root)).by_alias(name, CHAMPION)
    found = artifact_named(champion, MODEL_URI, MODEL_DIGEST) if champion else None
    if found is None:
        raise RefusedInput(
            f"retrain.start=champion: {name} has no champion whose artifact is there: run `llava train` first, "
            "or set retrain.start=pretrain"
        )
    return found.uri


def _contents(drop: Drop) -> str:
    """Digest of what a drop's files hold; reads them all."""
    store = open_drop(drop.uri)
    return sha256_of([[entry.key, store.sha256(entry.key)] for entry in store.list() if entry.key != READY])


def _run(
    config: WorkflowConfig, root: str, plan: RetrainPlan, looked: Looked, wait: bool, lease: Lease
) -> Retrained:
    workspace = train.open_workspace(config.name, root, wait)
    steps = plans.make_plan(config)
    if plan.start:
        steps = plans.make_plan(config, start={steps[_learning(steps)].name: open_artifact(plan.start)})
    plans.preflight(steps, workspace)
    with train.running(config, workspace, "retrain") as run:
        retraining = _Retraining(config, run, plan, lease)
        retraining.make(steps)
    summary = run.summary
    assert summary.model is not None
    lease.check()
    for drop in plan.drops:
        take(root, drop, retraining.note(drop) | {"model": summary.model})
    workspace.store.delete(PLAN)
    uris = [drop.uri for drop in plan.drops]
    result = summary.model["alias"]
    return Retrained(result, uris, looked.waiting, retraining.set_aside, summary, retraining.version)


class _Retraining:
    """One run of the workflow on old and new data."""

    def __init__(self, config: WorkflowConfig, run: WorkflowRun, plan: RetrainPlan, lease: Lease) -> None:
        self.config, self.run, self.plan, self.lease = config, run, plan, lease
        self.datasets: dict[str, list[Artifact]] = {}
        """The shards of each new drop, by its digest."""
        self.set_aside: dict[str, dict[str, Any]] = {}
        self.version: str | None = None

    def make(self, steps: Sequence[Step]) -> None:
        """The steps of a training, with new data first: what is bad is found before anything is trained."""
        self.tell({"drops": [drop.uri for drop in self.plan.drops]})
        for drop in self.plan.drops:
            self.shard(drop)
        self.judge_what_was_set_aside()
        places = {drop.uri for drop in self.plan.drops}
        old = [
            dataset.open()
            for record in taken(self.run.workspace.store)
            if record.uri not in places
            for dataset in record.datasets or ()
        ]
        new = [dataset for drop in self.plan.drops for dataset in self.datasets[drop.digest]]
        new = [dataset for dataset in new if source_of(dataset).keys]
        if not new:
            raise RefusedInput("the new drops hold no record that can be trained on; see what was set aside")
        at = _learning(steps)
        self.run.make(steps[:at])
        weight = 1.0 if self.plan.start is None else self.config.retrain.replay
        base = self.run.made[str(steps[at].inputs["dataset"])]
        before = [_Part("base", base, weight), *(_Part("old", one, weight) for one in old)]
        parts = [*before, *(_Part("new", one, 1.0) for one in new)]
        self.keep_version([part for part in parts if part.weight])
        trained = self.trained_on(steps[at], [part for part in parts if part.weight])
        self.lease.check()
        self.run.make([trained])
        # Whoever slept through the end of the lease registers nothing beside the one that took over.
        self.lease.check()
        self.run.make(steps[at + 1 :])

    def trained_on(self, step: Step, parts: Sequence[_Part]) -> Step:
        """Stage 2 on all parts; the first one of weight 1 is its dataset, the others stand beside it."""
        settings = step.settings
        first = next(part for part in parts if part.weight == 1.0)
        beside = tuple(
            Extra(uri=part.artifact.uri, weight=part.weight) for part in parts if part is not first
        )
        changed: dict[str, Any] = {"extra": (*settings.extra, *beside)}
        if settings.eval_every and not source_of(first.artifact, "heldout").keys:
            say(f"{first.artifact.uri} holds no held-out samples: {step.name}.eval_every is off", "retrain")
            changed["eval_every"] = 0
        inputs = {**step.inputs, "dataset": first.artifact}
        return replace(step, settings=settings.model_copy(update=changed), inputs=inputs)

    def shard(self, drop: Drop) -> None:
        """One artifact per conversations file of the drop; what cannot be read is set aside."""
        store = open_drop(drop.uri)
        files = [entry for entry in store.list() if _holds_conversations(entry.key)]
        datasets: list[Artifact] = []
        reasons: dict[str, dict[str, Any]] = {}
        for one in self.refused(drop, store):
            _count(reasons, one.reason, [one.text], 1)
        if not files:
            _count(reasons, "no-conversations", [f"neither .json nor .jsonl lies in {drop.uri}"], 1)
        limits = {name: getattr(self.config.shard, name) for name in _LIMITS}
        for file in files:
            settings = ShardSettings(
                source="llava",
                path=drop.uri,
                conversations=file.key,
                follow_links=False,
                heldout=0,
                max_bad=1,
                **limits,
            )
            try:
                empty = not len(llava_source.listing(settings).items)
            except RefusedInput as error:
                _count(reasons, "unreadable-file", [f"{file.key}: {error}"], 1)
                continue
            if empty:
                _count(reasons, "empty-file", [file.key], 1)
                continue
            name = f"drop {drop.uri.rsplit('/', 1)[-1]}" + (f"/{file.key}" if len(files) > 1 else "")
            self.run.make([Step(name, Shard(), settings)])
            made = self.run.made[name]
            for reason, refused in made.note("refused", dict[str, RefusedNote]).items():
                _count(reasons, reason, refused.ids, refused.count)
            datasets.append(made)
        self.datasets[drop.digest] = datasets
        kept = sum(dataset.note("rows", dict[str, int]).get("train", 0) for dataset in datasets)
        bad = sum(one["count"] for one in reasons.values())
        if bad:
            self.set_aside[drop.uri] = {"records": kept + bad, "set_aside": bad, "reasons": reasons}
            say(f"{drop.uri}: {bad} of {kept + bad} records set aside: {_said(reasons)}", "retrain")

    def refused(self, drop: Drop, store: Store) -> list[Refusal]:
        """What of a drop is no file of its own: all of it is told; those are given that would hold records.

        Of photos each record that names one is refused and counted.
        """
        found = store.refused()
        for one in found[:IDS_TOLD]:
            say(f"{drop.uri}: not read: {printable(one.text)} ({one.reason})", "retrain")
        if len(found) > IDS_TOLD:
            say(f"{drop.uri}: {len(found) - IDS_TOLD:,} more are not read", "retrain")
        return [one for one in found if _holds_conversations(one.key)]

    def judge_what_was_set_aside(self) -> None:
        """Report it to MLflow, and stop over the limit."""
        if self.set_aside:
            self.run.parent.text(json.dumps(self.set_aside, indent=1), "set_aside.json")
        self.tell({"set_aside": sum(one["set_aside"] for one in self.set_aside.values())})
        for uri, found in self.set_aside.items():
            share = found["set_aside"] / found["records"]
            if share > self.config.retrain.max_bad:
                raise RefusedInput(
                    f"{uri}: {found['set_aside']} of {found['records']} records are bad ({_said(found['reasons'])}), "
                    f"limit retrain.max_bad={self.config.retrain.max_bad:g}: mend or remove the drop, or raise it"
                )

    def keep_version(self, parts: Sequence[_Part]) -> None:
        """The version of the dataset: its parts with their digests, kept in the root and in MLflow."""
        told = [part.as_json() for part in parts]
        self.version = sha256_of([[one["role"], one["digest"], one["weight"]] for one in told])
        data = json.dumps({"version": self.version, "parts": told}, indent=1)
        self.run.workspace.store.create(f"{VERSIONS}/{self.version[:16]}.json", data.encode())
        self.run.parent.text(data, "data_version.json")
        self.tell({"data_version": self.version})
        say(f"data version {self.version[:16]}: {len(parts)} datasets", "retrain")

    def tell(self, tags: dict[str, Any]) -> None:
        self.run.parent.tags(tags)

    def note(self, drop: Drop) -> dict[str, Any]:
        """What the root keeps about a drop that was taken."""
        datasets = [{"uri": one.uri, "digest": one.digest} for one in self.datasets[drop.digest]]
        return {
            "contents": self.plan.contents[drop.digest],
            "datasets": datasets,
            "set_aside": self.set_aside.get(drop.uri),
            "data_version": self.version,
        }


def _holds_conversations(key: str) -> bool:
    return "/" not in key and key.endswith(_CONVERSATIONS)


def _count(reasons: dict[str, dict[str, Any]], reason: str, ids: list[str], times: int) -> None:
    found = reasons.setdefault(reason, {"count": 0, "ids": []})
    found["count"] += times
    found["ids"] = [*found["ids"], *ids][:IDS_TOLD]


def _said(reasons: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        f"{found['count']} x {reason} (such as {found['ids'][0]})"
        for reason, found in sorted(reasons.items())
    )
