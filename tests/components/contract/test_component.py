"""Settings in two halves, digests, fingerprints, secrets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pydantic
import pytest
from pydantic import Field

from components.contract import (
    Settings,
    artifact_digest,
    canonical_json,
    fingerprint,
    open_store,
    recipe,
    refuse_secrets,
    run_field,
    run_part,
)
from llava.errors import RefusedInput


class Optimiser(Settings):
    rate: float = Field(default=1e-3, description="learning rate")
    fused: bool = run_field(False, description="fused kernels")


class Training(Settings):
    steps: int = Field(default=10, description="number of steps")
    optimiser: Optimiser = Field(default=Optimiser(), description="optimiser")
    workers: int = run_field(1, description="number of processes", ge=1)
    where: Path = Field(default=Path("a/b"), description="a path")


def test_halves_split_recipe_from_run() -> None:
    settings = Training(workers=4)
    assert recipe(settings) == {"steps": 10, "optimiser": {"rate": 1e-3}, "where": "a/b"}
    assert run_part(settings) == {"optimiser": {"fused": False}, "workers": 4}


def test_settings_are_frozen_strict_in_keys_and_described() -> None:
    with pytest.raises(pydantic.ValidationError, match="stepz"):
        Training.model_validate({"stepz": 3})
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Training().steps = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="bare"):
        type("Bad", (Settings,), {"__annotations__": {"bare": int}, "bare": 1})


def test_digest_depends_on_each_part_and_on_no_order() -> None:
    parts: dict[str, Any] = {"version": "1", "recipe": {"a": 1, "b": 2}, "inputs": {"x": "d"}, "external": {}}
    digest = artifact_digest("shard", **parts)
    assert digest == artifact_digest("shard", **(parts | {"recipe": {"b": 2, "a": 1}}))
    changes: list[dict[str, Any]] = [
        {"version": "2"},
        {"recipe": {"a": 1}},
        {"inputs": {"x": "e"}},
        {"external": {"hub": "c"}},
    ]
    others = {artifact_digest("shard", **(parts | change)) for change in changes}
    assert len(others | {digest, artifact_digest("instruct", **parts)}) == 6


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, 0.5], "a": "ü"}) == '{"a":"ü","b":[1,0.5]}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_fingerprint_sees_names_sizes_and_times_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (data / name).write_text(name)
    first = fingerprint(data)
    assert first == fingerprint([str(data)]), "the same files give the same fingerprint"
    os.utime(data / "a", ns=(1, 1))
    second = fingerprint(data)
    (data / "sub" / "b").rename(data / "sub" / "c")
    third = fingerprint(data)
    assert len({first, second, third, fingerprint(data / "a")}) == 4
    with pytest.raises(RefusedInput, match="nothing lies there"):
        fingerprint(tmp_path / "none")


def test_fingerprint_of_an_s3_prefix_follows_contents(s3_root: str) -> None:
    store = open_store(s3_root)
    store.write("in/a.jpg", b"1")
    store.write("in/b.jpg", b"2")
    first = fingerprint(f"{s3_root}/in")
    assert first == fingerprint([f"{s3_root}/in/"])
    store.write("in/b.jpg", b"3")
    assert first != fingerprint(f"{s3_root}/in")
    assert fingerprint(f"{s3_root}/in/a.jpg") != fingerprint(f"{s3_root}/in/b.jpg")
    with pytest.raises(RefusedInput):
        fingerprint(f"{s3_root}/none")


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user:hunter2@db/mlflow",
        "https://hunter2@host/x",
        "s3://hunter2@bucket/x",
        "https://bucket/x?X-Amz-Signature=hunter2",
        "key " + "AKIA" + "HUNTER2HUNTER2AB",
    ],
)
def test_secrets_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(RefusedInput, match="--set root") as refusal:
        refuse_secrets(text, "--set root")
    assert "hunter2" not in str(refusal.value).casefold()


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a@b/c", "http://127.0.0.1:5000", "postgresql://user@db/x", "user@example.org", "a:b@c"],
)
def test_text_without_secrets_passes(text: str) -> None:
    assert refuse_secrets(text) == text
