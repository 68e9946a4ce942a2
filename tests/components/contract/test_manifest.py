"""A finished artifact is what its manifest says, or it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.contract import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    open_artifact,
    open_store,
    remove_artifact,
    verify,
)
from components.contract import manifest as module
from llava.errors import RefusedInput

FILES = {"train/part-0": b"rows", "model/weights": b"weights", "model/config": b"{}"}


@pytest.fixture
def artifact(root: str) -> Artifact:
    folder = open_store(root).sub("shard/0123456789abcdef")
    for key, data in FILES.items():
        folder.write(key, data)
    files = [FileEntry(path=key, size=len(data), sha256=folder.sha256(key)) for key, data in FILES.items()]
    manifest = Manifest(
        component="shard",
        version="1",
        digest="0123456789abcdef" * 4,
        recipe={"rows": 1},
        files=files,
        code="x",
    )
    assert folder.create(MANIFEST, manifest.to_bytes())
    return Artifact(folder, manifest)


def test_artifact_opens_by_its_uri(artifact: Artifact) -> None:
    found = open_artifact(artifact.uri)
    assert found.manifest == artifact.manifest and found.manifest.size == 13


def test_unfinished_artifact_does_not_open(artifact: Artifact) -> None:
    artifact.folder.delete(MANIFEST)
    with pytest.raises(RefusedInput, match="no finished artifact"):
        open_artifact(artifact.uri)


@pytest.mark.parametrize(
    ("data", "says"),
    [(None, "model/weights is missing"), (b"weight", "model/weights has 6 bytes, the manifest says 7")],
)
def test_missing_and_shortened_files_are_refused_by_name(
    artifact: Artifact, data: bytes | None, says: str
) -> None:
    if data is None:
        artifact.folder.delete("model/weights")
    else:
        artifact.folder.write("model/weights", data)
    with pytest.raises(RefusedInput, match=says) as refusal:
        open_artifact(artifact.uri)
    assert f"Delete {artifact.uri}" in str(refusal.value) and "llava prune" in str(refusal.value)


def test_tampered_bytes_are_refused_before_they_are_read(artifact: Artifact) -> None:
    artifact.folder.write("model/weights", b"weighty")
    with pytest.raises(RefusedInput, match=r"model/weights has sha256 .* the manifest says"):
        open_artifact(artifact.uri).local("model")


@pytest.mark.parametrize("root", ["folder"], indirect=True)
def test_large_local_artifacts_are_compared_by_size_and_that_is_said(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HASH_UP_TO", 5)
    artifact.folder.write("model/weights", b"weighty")
    said: list[str] = []
    verify(artifact, said.append)
    assert len(said) == 1 and "not hashed" in said[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"component": "shard"}'])
def test_damaged_manifest_is_refused_by_name(artifact: Artifact, text: str) -> None:
    artifact.folder.write(MANIFEST, text.encode())
    with pytest.raises(RefusedInput, match=r"manifest\.json is damaged"):
        open_artifact(artifact.uri)


def test_manifest_cannot_name_files_outside(artifact: Artifact) -> None:
    content = json.loads(artifact.folder.read(MANIFEST))
    content["files"][0]["path"] = "../../etc/passwd"
    artifact.folder.write(MANIFEST, json.dumps(content).encode())
    with pytest.raises(RefusedInput, match=r"files\.0\.path"):
        open_artifact(artifact.uri)


def test_local_gives_files_and_fetches_them_once(artifact: Artifact) -> None:
    model = artifact.local("model")
    assert (model / "weights").read_bytes() == b"weights"
    if artifact.folder.local_path is None:
        assert not (model.parent / "train").exists(), "only what was asked for"
        artifact.folder.delete("model/weights")
    assert (artifact.local("model/") / "weights").read_bytes() == b"weights"
    assert artifact.local("model") == model


def test_local_of_an_absent_folder_is_refused(artifact: Artifact) -> None:
    with pytest.raises(RefusedInput, match="holds no folder 'heldout'"):
        artifact.local("heldout")


def test_removed_artifact_leaves_nothing(artifact: Artifact, root: str) -> None:
    remove_artifact(artifact.folder)
    assert list(open_store(root).list()) == []


def test_manifest_survives_its_own_bytes(tmp_path: Path) -> None:
    manifest = Manifest(
        component="a", version="1", digest="d" * 64, recipe={"x": [1.5, None]}, files=[], code="c"
    )
    assert Manifest.model_validate_json(manifest.to_bytes()) == manifest
