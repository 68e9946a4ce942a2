"""What a root holds that nothing refers to, and its removal.

Referred to is every artifact from which a registered version was made: its model, its evaluation and their
inputs, and what stands beside them under the same digests. Whatever somebody is making right now stays.
"""

from dataclasses import dataclass

from components.contract import (
    Artifact,
    Folder,
    Store,
    holder,
    open_store,
    read_artifact,
    remove_artifact,
    say,
)
from components.models import Registry, tracking_uri
from llava.errors import AlreadyRunning, RefusedInput
from workflows.train import STAGES


@dataclass(frozen=True)
class Found:
    """One artifact folder of a root."""

    folder: Folder
    artifact: Artifact | None
    """None where it is not finished."""
    size: int
    """Bytes."""


def prune(root: str, yes: bool) -> None:
    """List the artifacts that no registered version comes from; `yes` deletes them."""
    store = open_store(root)
    found = list(_artifacts(store))
    kept = _referred(found, Registry(tracking_uri(root)))
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
    sizes: dict[str, int] = {}
    for stage in STAGES:
        for entry in store.list(f"{stage}/"):
            address = "/".join(entry.key.split("/")[:2])
            sizes[address] = sizes.get(address, 0) + entry.size
    folders = {address: store.sub(address) for address in sizes}
    return [Found(folder, read_artifact(folder), sizes[address]) for address, folder in folders.items()]


def _referred(found: list[Found], registry: Registry) -> set[str]:
    """Digests of everything that a registered version came from."""
    artifacts = {each.artifact.digest: each.artifact for each in found if each.artifact is not None}
    registrations = [one for one in artifacts.values() if one.manifest.component == "register"]
    waiting = [one.digest for one in registrations if _registered(one, registry)]
    if registrations and not waiting:
        raise RefusedInput(
            f"none of the {len(registrations)} registrations of this root is in MLflow at {registry.uri}: "
            "set MLFLOW_TRACKING_URI to the one that it was trained with"
        )
    kept: set[str] = set()
    while waiting:
        digest = waiting.pop()
        if digest not in kept:
            kept.add(digest)
            if digest in artifacts:
                waiting += artifacts[digest].manifest.inputs.values()
    return kept


def _registered(artifact: Artifact, registry: Registry) -> bool:
    model = artifact.manifest.notes["model"]
    return registry.by_version(model["name"], model["version"]) is not None
