"""What a root holds that nothing refers to, and its removal.

Referred to is every artifact from which a registered version was made: its model, its evaluation and their
inputs, by the registration's manifest and by the version's own tags. Whatever somebody is making right now stays,
and so does what was finished a moment ago, with its inputs: a run may be between two stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from components.contract import (
    Artifact,
    Folder,
    Store,
    artifact_folders,
    holder,
    open_store,
    read_artifact,
    remove_artifact,
    say,
)
from components.registry import EVALUATION_DIGEST, MODEL_DIGEST, Registry, tracking_uri
from llava.errors import AlreadyRunning, RefusedInput
from workflows.stages import STAGES


@dataclass(frozen=True)
class Found:
    """One artifact folder of a root."""

    folder: Folder
    artifact: Artifact | None
    """None where it is not finished."""
    size: int
    """Bytes."""


def prune(root: str, yes: bool, fresh: timedelta) -> None:
    """List the artifacts that no registered version comes from; `yes` deletes them.

    `fresh`: what was finished in that time stays, with its inputs.
    """
    store = open_store(root)
    found = _artifacts(store)
    artifacts = {each.artifact.digest: each.artifact for each in found if each.artifact is not None}
    recent = [one.digest for one in artifacts.values() if datetime.now(UTC) - one.manifest.created < fresh]
    kept = _with_inputs(recent + _registered(artifacts, Registry(tracking_uri(root)), store), artifacts)
    busy = [owner for each in found if (owner := holder(each.folder))]
    if yes and busy:
        raise AlreadyRunning(f"{root}: {busy[0].who} is making something here; prune when nothing runs")
    gone = 0
    for each in found:
        if each.artifact is not None and each.artifact.digest in kept:
            continue
        if owner := holder(each.folder):
            say(f"in use     {each.folder.uri}: {owner.who}")
            continue
        state = "unfinished" if each.artifact is None else "unreferred"
        say(f"{state} {each.size / 2**20:10.1f} MiB  {each.folder.uri}")
        gone += each.size
        if yes:
            remove_artifact(each.folder)
    say(f"{gone / 2**20:.1f} MiB {'deleted' if yes else 'could go; --yes deletes them'}")


def _artifacts(store: Store) -> list[Found]:
    """Every artifact folder of the root, finished or not, whatever stage it is of."""
    return [
        Found(folder := store.sub(address), read_artifact(folder), size)
        for address, size in artifact_folders(store, {stage.component.name for stage in STAGES}).items()
    ]


def _registered(artifacts: dict[str, Artifact], registry: Registry, store: Store) -> list[str]:
    """Digests that the registry's versions name, and those of the registrations that made them."""
    made = {one.digest: one.manifest for one in artifacts.values() if one.manifest.component == "register"}
    standing = [
        digest
        for digest, manifest in made.items()
        if registry.by_version(manifest.notes["model"]["name"], manifest.notes["model"]["version"])
    ]
    if made and not standing:
        raise RefusedInput(
            f"none of the {len(made)} registrations of this root is in MLflow at {registry.uri}: "
            "set MLFLOW_TRACKING_URI to the one that it was trained with"
        )
    # A registration that was killed after it made the version has no manifest; the version's tags tell the same.
    tagged = [
        version.tags.get(key, "")
        for version in registry.versions()
        if version.source.startswith(f"{store.uri}/")
        for key in (MODEL_DIGEST, EVALUATION_DIGEST)
    ]
    return standing + tagged


def _with_inputs(waiting: Sequence[str], artifacts: dict[str, Artifact]) -> set[str]:
    """These digests and those of everything that they were made from."""
    kept: set[str] = set()
    left = list(waiting)
    while left:
        digest = left.pop()
        if digest not in kept:
            kept.add(digest)
            if digest in artifacts:
                manifest = artifacts[digest].manifest
                # Further datasets of a training stand among what came from outside, by their digests.
                left += [*manifest.inputs.values(), *manifest.external.values()]
    return kept
