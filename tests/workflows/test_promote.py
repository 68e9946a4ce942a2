"""The champion moved by hand, in a real MLflow database: promotion, the way back, what is written down about it."""

import json
from pathlib import Path

import pytest

from components.registry import BEFORE, CHALLENGER, CHAMPION, Registry
from llava.errors import RefusedInput
from workflows.promote import MOVED, promote, rollback

NAME = "llava-hand"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Three versions: 1 was champion, then 2; 3 did not win."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    for number, before in ((1, ""), (2, "1"), (3, "")):
        model = tmp_path / f"model-{number}"
        model.mkdir()
        (model / "config.json").write_text("{}")
        version = found.add(NAME, str(model), None, {BEFORE: before})
        found.name_as(version, CHALLENGER if number == 3 else CHAMPION)
    return found


def champion(registry: Registry) -> str:
    found = registry.by_alias(NAME, CHAMPION)
    assert found is not None
    return found.version


def test_promotion_and_the_way_back_are_written_down(registry: Registry, tmp_path: Path) -> None:
    promote(NAME, "3", str(tmp_path), by="ada", reason="better on our own photos")
    assert champion(registry) == "3"
    assert registry.by_alias(NAME, CHALLENGER) is None
    tags = registry.by_version(NAME, "3").tags  # type: ignore[union-attr]
    (audit,) = [json.loads(value) for key, value in tags.items() if key.startswith(MOVED)]
    assert {key: audit[key] for key in ("how", "who", "from", "to", "reason")} == {
        "how": "promote", "who": "ada", "from": "2", "to": "3", "reason": "better on our own photos",
    }  # fmt: skip
    assert tags[BEFORE] == "2"
    rollback(NAME, str(tmp_path), by="bob", reason="slower than we thought")
    assert champion(registry) == "2"
    back = registry.by_version(NAME, "2").tags  # type: ignore[union-attr]
    (audit,) = [json.loads(value) for key, value in back.items() if key.startswith(MOVED)]
    assert (audit["how"], audit["who"], audit["from"], audit["to"]) == ("rollback", "bob", "3", "2")


def test_rolling_back_twice_goes_back_two_champions_and_then_no_further(
    registry: Registry, tmp_path: Path
) -> None:
    promote(NAME, "3", str(tmp_path))
    rollback(NAME, str(tmp_path))
    rollback(NAME, str(tmp_path))
    assert champion(registry) == "1"
    with pytest.raises(RefusedInput, match=f"models:/{NAME}/1 names no champion before it"):
        rollback(NAME, str(tmp_path))


def test_who_promotes_is_the_user_unless_named(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "grace")
    promote(NAME, "1", str(tmp_path))
    tags = registry.by_version(NAME, "1").tags  # type: ignore[union-attr]
    assert [json.loads(v)["who"] for k, v in tags.items() if k.startswith(MOVED)] == ["grace"]


@pytest.mark.parametrize("version", ["9", "newest"])
def test_an_unknown_version_is_refused(registry: Registry, tmp_path: Path, version: str) -> None:
    with pytest.raises(RefusedInput, match=f"{NAME} has no version '{version}'"):
        promote(NAME, version, str(tmp_path))
    assert champion(registry) == "2"


def test_a_version_whose_files_are_gone_is_refused(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "model-3" / "config.json").unlink()
    with pytest.raises(RefusedInput, match=f"models:/{NAME}/3: nothing lies at"):
        promote(NAME, "3", str(tmp_path))
    assert champion(registry) == "2"
