"""What an artifact holds, for a person."""

from pathlib import Path
from typing import Any

from components.contract import Artifact, open_artifact, say

REPORT = "report/"
"""Where an artifact keeps pages and pictures for people."""
SAVED = (".csv", ".html", ".jpeg", ".jpg", ".json", ".jsonl", ".md", ".png", ".svg", ".txt")
"""Endings of the files in it that are saved: an artifact may come from anybody, and some files run by their name."""
LONGEST, LINES = 400, 20


def show(uri: str) -> None:
    """Print the manifest of the artifact at `uri`, after looking whether its files are those it names.

    Pages and pictures made for people (a data set's quality and its contact sheet) are saved into the current folder.
    """
    artifact = open_artifact(uri)
    manifest = artifact.manifest
    say(f"{manifest.component} {manifest.digest}")
    say(
        f"made      {manifest.created:%Y-%m-%d %H:%M:%S} UTC by code {manifest.code}, "
        f"MLflow run {manifest.mlflow_run_id}"
    )
    for name, digest in {**manifest.inputs, **manifest.external}.items():
        say(f"from      {name:12} {digest[:16]}")
    say(f"files     {len(manifest.files):,}, {manifest.size / 2**20:,.1f} MiB, all there")
    for title, values in (("recipe", manifest.recipe), ("run", manifest.run), ("metrics", manifest.metrics)):
        for key, value in values.items():
            say(f"{title:9} {key} = {value}")
    for key, value in manifest.notes.items():
        _note(key, value)
    _save_report(artifact)


def _note(key: str, value: Any) -> None:
    """One line, or one for each entry of a mapping of several."""
    inner = list(value.items()) if isinstance(value, dict) else []
    if len(inner) < 2:
        text = str(value)
        say(f"note      {key}: {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}")
        return
    for name, one in inner[:LINES]:
        _note(f"{key}, {name!s:.80}", str(one))
    if len(inner) > LINES:
        say(f"note      {key}: {len(inner) - LINES:,} more in the manifest")


def _save_report(artifact: Artifact) -> None:
    manifest = artifact.manifest
    for file in manifest.files:
        if file.path.startswith(REPORT):
            flat = file.path.removeprefix(REPORT).replace("/", "-")
            if not flat.endswith(SAVED):
                say(f"not saved {file.path}: no page or picture by its name")
                continue
            here = Path(f"{manifest.component}-{manifest.digest[:8]}-{flat}")
            artifact.folder.download(file.path, here)
            say(f"saved     {here}")
