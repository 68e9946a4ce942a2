"""Where a model is: MLflow's registry, and from any way to name a model to the folder that holds it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from components.contract import MANIFEST, Artifact, TrackingError, artifact_with, open_store, read_artifact
from components.contract.database import checked, database_path, database_uri
from components.contract.mlflow_client import client, errors, made_once
from components.contract.tracking import Tracking
from llava.errors import RefusedInput

MODEL = "model"
"""The subfolder of an artifact that is the stock LLaVA folder."""

CHAMPION, CHALLENGER = "champion", "challenger"
MODEL_DIGEST, EVALUATION_DIGEST = "artifact_digest", "evaluation_digest"
MODEL_URI, EVALUATION_URI = "artifact_uri", "evaluation_uri"
"""Tags of a version: the artifacts that it is made of, and where they lie."""
BEFORE = "champion_before"
"""Tag of a champion: the version from which it took over; empty for the first, and after a rollback from it."""

CALL_TAG = "llava_registration"
"""Tag that names one call of `Registry.add`, by which its version is found where MLflow's answer was lost."""

_NUMBER = re.compile(r"[0-9]{1,9}")
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    version: str
    source: str
    """URI of the stock LLaVA folder."""
    tags: dict[str, str]


def artifact_named(version: Version, uri_tag: str, digest_tag: str) -> Artifact | None:
    """The artifact that two tags of `version` name; None where it is gone, or another lies there."""
    uri = version.tags.get(uri_tag)
    found = read_artifact(open_store(uri)) if uri else None
    return found if found is not None and found.digest == version.tags.get(digest_tag) else None


def resolve(uri: str, tracking: Tracking | None = None) -> str:
    """The URI of the stock LLaVA folder that `uri` names.

    `uri`: `models:/name@alias`, `models:/name/3` (looked up in `tracking`), an artifact, or a LLaVA folder.
    Raises `RefusedInput` when there is no such model.
    """
    if uri.startswith("models:"):
        named = _REGISTERED.fullmatch(uri)
        if named is None:
            raise RefusedInput(f"{uri}: write models:/NAME@ALIAS or models:/NAME/VERSION")
        if tracking is None:
            raise RefusedInput(f"{uri}: name the MLflow store in which it is registered")
        name, alias, number = named["name"], named["alias"], named["version"]
        database = database_path(tracking.uri)
        if database is not None and not database.is_file():
            raise RefusedInput(
                f"{uri}: there is no MLflow database at {database}; name the root it was trained in"
            )
        registry = Registry(tracking.uri)
        found = registry.by_alias(name, alias) if alias else registry.by_version(name, number)
        if found is None:
            raise RefusedInput(f"{uri}: MLflow at {tracking.uri} has no such model version or alias")
        return found.source
    store = open_store(uri)
    if artifact := read_artifact(store):
        store = artifact.folder.sub(MODEL)
    if store.stat("config.json") is None:
        raise RefusedInput(
            f"{uri}: neither an artifact with a {MODEL}/ folder nor a LLaVA folder (no config.json)"
        )
    return store.uri


def open_model(uri: str, tracking: Tracking | None = None) -> Path:
    """The model that `uri` names (see `resolve`) as a local folder; one from S3 is a verified copy."""
    folder = resolve(uri, tracking)
    if artifact := artifact_with(folder, MODEL):
        return artifact.local(MODEL)
    local = open_store(folder).local_path
    if local is None:
        raise RefusedInput(
            f"{folder}: no {MANIFEST} above it says what its files must be; give an artifact, or a local folder"
        )
    if not (local / "config.json").is_file():
        raise RefusedInput(f"{folder}: no config.json lies there: the model that {uri} names is gone")
    return local


def model_config(uri: str, tracking: Tracking | None = None) -> Any:
    """The config of the model that `uri` names (see `resolve`), without its weights."""
    from llava.model import load_config

    folder = resolve(uri, tracking)
    artifact = artifact_with(folder, MODEL)
    store = artifact.folder.sub(MODEL) if artifact else open_store(folder)
    with tempfile.TemporaryDirectory() as local:
        try:
            store.download("config.json", Path(local) / "config.json")
        except FileNotFoundError:
            raise RefusedInput(
                f"{folder}: no config.json lies there: the model that {uri} names is gone"
            ) from None
        return load_config(Path(local))


def tracking_uri(root: str) -> str:
    """The MLflow that belongs to `root`: `MLFLOW_TRACKING_URI`, or a database in the root (beside it: ./runs)."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    return (
        checked(named) if named else database_uri((open_store(root).local_path or Path("runs")) / "mlflow.db")
    )


def existing_registry(root: str) -> Registry:
    """The registry that belongs to `root`; RefusedInput where root or database do not exist: none is made."""
    store = open_store(root)
    if store.local_path is not None and not store.local_path.is_dir():
        raise RefusedInput(f"root {root}: there is no folder {store.uri}; name the root that was trained in")
    uri = tracking_uri(root)
    database = database_path(uri)
    if database is not None and not database.is_file():
        raise RefusedInput(
            f"root {root}: there is no MLflow database at {database}: set MLFLOW_TRACKING_URI to the one that it was "
            "trained with"
        )
    return Registry(uri)


def model_folder(model: str, root: str) -> Path:
    """`open_model`, with the MLflow that belongs to `root`."""
    return open_model(model, Tracking(tracking_uri(root)))


class Registry:
    """MLflow's model registry at one tracking URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def by_alias(self, name: str, alias: str) -> Version | None:
        """The version that carries `alias`, or None."""
        with self._errors(missing=("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")):
            return _version(client(self.uri).get_model_version_by_alias(name, alias))
        return None

    def by_version(self, name: str, version: str) -> Version | None:
        """The version with that number, or None; also for what is no number."""
        if not _NUMBER.fullmatch(version):
            return None
        with self._errors(missing=("RESOURCE_DOES_NOT_EXIST",)):
            return _version(client(self.uri).get_model_version(name, version))
        return None

    def with_tag(self, name: str, key: str, value: str) -> list[Version]:
        """Versions of `name` whose tag `key` is `value`, the oldest first."""
        with self._errors():
            found = client(self.uri).search_model_versions(
                f"name = '{name}' and tags.`{key}` = '{value}'", max_results=1000
            )
        return sorted((_version(each) for each in found), key=lambda each: int(each.version))

    def versions(self) -> list[Version]:
        """Every version of every model."""
        found: list[Any] = []
        with self._errors():
            token = None
            while token != "":
                page = client(self.uri).search_model_versions("", max_results=1000, page_token=token)
                found += page
                token = page.token or ""
        return [_version(each) for each in found]

    def add(self, name: str, source: str, run_id: str | None, tags: dict[str, str]) -> Version:
        """A new version of `name`, which is made if it does not exist; one, even where MLflow's answer is lost."""
        tags = tags | {CALL_TAG: uuid4().hex}
        with self._errors(missing=("RESOURCE_ALREADY_EXISTS",)):
            client(self.uri).create_registered_model(name)

        def make(mlflow: Any) -> str:
            return str(mlflow.create_model_version(name, source, run_id=run_id, tags=tags).version)

        def find(mlflow: Any) -> list[str]:
            found = mlflow.search_model_versions(
                f"name = '{name}' and tags.`{CALL_TAG}` = '{tags[CALL_TAG]}'"
            )
            return sorted((str(one.version) for one in found), key=int)

        def undo(mlflow: Any, version: str) -> None:
            mlflow.delete_model_version(name, version)

        with self._errors():
            return Version(name, made_once(self.uri, make, find, undo), source, tags)

    def tag(self, version: Version, tags: dict[str, str]) -> None:
        """Set tags of `version`."""
        with self._errors():
            for key, value in tags.items():
                client(self.uri).set_model_version_tag(version.name, version.version, key, value)

    def name_as(self, version: Version, alias: str) -> None:
        """Let `alias` point to `version`, and to no other."""
        with self._errors():
            client(self.uri).set_registered_model_alias(version.name, alias, version.version)

    def drop_alias(self, name: str, alias: str) -> None:
        """Take `alias` away."""
        with self._errors():
            client(self.uri).delete_registered_model_alias(name, alias)

    def has_run(self, run_id: str) -> bool:
        """Whether the MLflow run is one of this store's."""
        with self._errors(missing=("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")):
            client(self.uri).get_run(run_id)
            return True
        return False

    @contextlib.contextmanager
    def _errors(self, missing: tuple[str, ...] = ()) -> Iterator[None]:
        """MLflow's errors in one line that names the store; those in `missing` are passed over."""
        try:
            with errors(self.uri):
                yield
        except TrackingError as error:
            if getattr(error.__cause__, "error_code", None) not in missing:
                raise


def _version(found: Any) -> Version:
    return Version(found.name, str(found.version), found.source, dict(found.tags))
