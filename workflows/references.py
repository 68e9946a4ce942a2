"""What a root's artifacts are needed for: every root of reachability that `llava prune` must know.

An artifact is known by its digest, never by a name: another registry may well have a model of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pydantic
from pydantic import Field

from components.contract import RUN, Artifact, Folder, Line, Store
from components.register import Register
from components.registry import EVALUATION_DIGEST, MODEL_DIGEST, Registry, Version
from llava.data.jsonl import from_json
from llava.errors import RefusedInput
from workflows.retraining import records

_TOLD = 3


def references(
    store: Store, artifacts: Mapping[str, Artifact], registry: Registry, gone: Sequence[str] = ()
) -> list[str]:
    """Digests of the artifacts that something refers to: registered versions, drops, dataset versions, a plan.

    `artifacts`: those of the root `store`, by digest. `gone`: versions that were deleted on purpose. Raises
    RefusedInput where a registration of the root is missing in `registry`, or the registry knows none of its runs.
    """
    known = registry.versions()
    registrations = _registrations(artifacts, known, registry, gone)
    if not registrations:
        _check_runs(artifacts, registry)
    return [*registrations, *_of_versions(store, artifacts, known), *_of_retraining(store, artifacts)]


def with_inputs(waiting: Sequence[str], artifacts: Mapping[str, Artifact]) -> set[str]:
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


def unfinished_inputs(folder: Folder) -> list[str]:
    """Digests of what an unfinished artifact is made from, as far as its record tells."""
    found = folder.fetch(RUN, records.LARGEST)
    try:
        told = from_json(found[0])["made_from"] if found else []
    except (ValueError, TypeError, KeyError):
        return []
    return [one for one in told if isinstance(one, str)] if isinstance(told, list) else []


def _registrations(
    artifacts: Mapping[str, Artifact], known: Sequence[Version], registry: Registry, gone: Sequence[str]
) -> list[str]:
    """Digests of the registrations whose version stands; RefusedInput for one whose version is not there."""
    by_name = {(one.name, one.version): one for one in known}
    standing, missing = [], []
    for artifact in artifacts.values():
        if artifact.manifest.component != Register.name:
            continue
        model = _registered(artifact)
        found = by_name.get((model.name, model.version))
        if found is not None and (
            found.source == model.source
            or found.tags.get(MODEL_DIGEST) == artifact.manifest.inputs.get("model")
        ):
            standing.append(artifact.digest)
        elif (named := f"{model.name}/{model.version}") not in gone:
            missing.append(named)
    if missing:
        told = ", ".join(missing[:_TOLD]) + (f" and {len(missing) - _TOLD} more" if missing[_TOLD:] else "")
        raise RefusedInput(
            f"{told}, registered from this root, {'is' if len(missing) == 1 else 'are'} not in MLflow at "
            f"{registry.uri}, or of another model there, so nothing is deleted: set MLFLOW_TRACKING_URI to the one "
            f"that the root was trained with; for a version that you deleted yourself add --gone {missing[0]}"
        )
    return standing


class _Model(pydantic.BaseModel):
    """What a registration made."""

    name: str = Field(pattern=r"^[\w.-]+$", max_length=250)
    version: str = Field(pattern="^[0-9]{1,9}$")
    source: Line


def _registered(artifact: Artifact) -> _Model:
    try:
        return _Model.model_validate(artifact.manifest.notes.get("model"))
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, ("notes", "model", *first["loc"])))
        raise RefusedInput(f"{artifact.uri}: its manifest is damaged ({where}: {first['msg']})") from None


def _check_runs(artifacts: Mapping[str, Artifact], registry: Registry) -> None:
    """RefusedInput where the artifacts name MLflow runs and this MLflow has none of them."""
    runs = [one.manifest.mlflow_run_id for one in artifacts.values() if one.manifest.mlflow_run_id]
    if runs and not any(registry.has_run(run) for run in runs):
        raise RefusedInput(
            f"MLflow at {registry.uri} knows none of the {len(runs)} runs that made this root's artifacts, so nothing "
            "is deleted: set MLFLOW_TRACKING_URI to the one that the root was trained with"
        )


def _of_versions(store: Store, artifacts: Mapping[str, Artifact], known: Sequence[Version]) -> list[str]:
    """What versions of any name are made of.

    By their tags, since a registration that was killed after it made the version has no manifest; and by their source.
    """
    by_address = {one.uri: digest for digest, one in artifacts.items()}
    found = []
    for version in known:
        found += [version.tags.get(key, "") for key in (MODEL_DIGEST, EVALUATION_DIGEST)]
        if version.source.startswith(f"{store.uri}/"):
            address = "/".join(version.source.removeprefix(f"{store.uri}/").split("/")[:2])
            found.append(by_address.get(f"{store.uri}/{address}", ""))
    return [digest for digest in found if digest]


def _of_retraining(store: Store, artifacts: Mapping[str, Artifact]) -> list[str]:
    """The shards of taken drops, the parts of dataset versions, and the model from which a planned run starts."""
    found = [dataset.digest for one in records.every_taken(store) for dataset in one.datasets or ()]
    found += [part.digest for version in records.versions(store) for part in version.parts]
    if (standing := records.plan_of(store)) is not None and standing[0].start is not None:
        found += [digest for digest, one in artifacts.items() if one.uri == standing[0].start]
    return found
