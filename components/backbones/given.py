"""A LLaVA that exists already, released or one's own, as the model that stage 2 starts from.

A stock folder from anywhere is mirrored into the root, so that every worker finds it, it cannot change while it
is trained on, and the artifacts made from it know what they come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from components.contract import (
    Artifact,
    Component,
    Job,
    Outcome,
    Settings,
    Workspace,
    artifact_with,
    fingerprint,
    open_store,
    run_component,
    run_field,
)
from components.registry import MODEL, resolve
from llava import faithful, generate
from llava import model as models
from llava.errors import RefusedInput
from llava.pretrained import reading

_TAKEN = (".json", ".jinja", ".model", ".safetensors", ".txt")


class NoTemplate(RefusedInput):
    """A folder does not say which template it was trained with, and nobody else does."""


class GivenSettings(Settings):
    """Which folder, and what its own files do not say."""

    uri: str = run_field(..., description="A stock LLaVA folder: a path or s3://BUCKET/PREFIX; fingerprinted")
    template: str | None = Field(None, description="Template it was trained with, where no llava.json tells")


class Given(Component):
    """Takes nothing from the root, gives the folder as it is in `model/`."""

    name: ClassVar[str] = "backbones"
    version: ClassVar[str] = "given-1"
    Settings = GivenSettings
    gives = ("model",)
    on_ray = False

    def external(self, settings: GivenSettings) -> dict[str, str]:
        """The fingerprint of the folder."""
        return {"model": fingerprint(settings.uri)}

    def run(self, job: Job[GivenSettings]) -> None:
        settings: GivenSettings = job.settings
        store = open_store(settings.uri)
        names = [entry.key for entry in store.list() if entry.key.endswith(_TAKEN) and "/" not in entry.key]
        if not any(name.endswith(".safetensors") for name in names):
            raise RefusedInput(
                f"{settings.uri}: holds no *.safetensors; pickled weights are not read: load the model where you "
                "trust it and save it again"
            )
        folder = job.scratch / MODEL
        folder.mkdir()
        for name in names:
            store.download(name, folder / name)
        if not (folder / models.ABOUT).is_file():
            models.write_about(folder, require_template(settings.uri, settings.template))
        _check(folder, settings.uri)
        for path in sorted(folder.iterdir()):
            job.folder.upload(path, f"{MODEL}/{path.name}")
        job.say(f"{settings.uri}, template {models.template_of(folder)}")


def require_template(found: Artifact | str, template: str | None) -> str:
    """`template`; NoTemplate where it is None and the folder does not tell. An artifact always does."""
    if template is None and isinstance(found, str) and open_store(found).stat(models.ABOUT) is None:
        raise NoTemplate(
            f"{found} has no {models.ABOUT}, which says the template that it was trained with: write one there, such "
            'as {"template": "v1"}'
        )
    return template or ""


def find(uri: str, workspace: Workspace) -> Artifact | str:
    """The artifact whose model `uri` names, or the URI of a stock LLaVA folder that is none.

    Raises RefusedInput where nothing lies there, or no such version is registered.
    """
    folder = resolve(uri, workspace.tracking)
    if artifact := artifact_with(folder, MODEL):
        return artifact
    fingerprint(folder)
    return folder


def start_from(uri: str, template: str | None, workspace: Workspace) -> Outcome:
    """The model that `uri` names as an artifact; a folder that is none is mirrored into the root first.

    `template`: what a folder was trained with that does not say so itself.
    """
    found = find(uri, workspace)
    if isinstance(found, Artifact):
        return Outcome(found, reused=True, seconds=0.0)
    if open_store(found).stat(models.ABOUT) is not None:
        template = None
    return run_component(Given(), GivenSettings(uri=found, template=template), {}, workspace)


def _check(folder: Path, uri: str) -> None:
    """Everything that training needs of it, before anything is trained, and one answer about a picture."""
    try:
        with reading(f"{uri}: no stock LLaVA folder"):
            kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
            if kind != "llava":
                raise RefusedInput(f"{uri}: a model of type {kind!r}; a stock LLaVA has the type 'llava'")
            config, processor = models.load_config(folder), models.load_processor(folder)
            faithful.check_language_model(config.text_config)
            model = models.load(folder, models.dtype_of(config))
            generate.try_out(folder, model, processor, models.template_of(folder))
    except RefusedInput as error:
        # The user knows the folder by its URI; ours is gone in a moment.
        raise RefusedInput(str(error).replace(str(folder), uri)) from error
