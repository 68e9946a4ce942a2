"""A root's name and state: nothing is written outside it, and one that is wrong is one line and no new file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from components.contract import Tracking, open_store
from components.registry import Registry, existing_registry, tracking_uri
from llava.errors import RefusedInput
from tests.workflows.test_cli import Command, llava, own_signals
from workflows import prune as pruning
from workflows.train import open_workspace

__all__ = ["llava", "own_signals"]
CUT = ["a%20b", "50%", "%", "a?b=c", "?", "a#b", "#"]
"""Names in which MLflow sees a part of a URI."""
ODD = "a b;c&d=e+f:@\u00e4'\"\\!$()[]{}~^|"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize(
    "command", [["train", "tiny"], ["prune", "--yes"], ["promote", "m", "1"]], ids=" ".join
)
def test_a_root_that_mlflow_would_cut_is_one_line_and_nothing_is_made(
    llava: Command, tmp_path: Path, name: str, command: list[str]
) -> None:
    (tmp_path / "there" / name).mkdir(parents=True)
    before = files(tmp_path)
    status, out, err = llava(*command, "--root", f"there/{name}")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and name in err, err
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", CUT)
def test_a_tracking_uri_that_mlflow_would_cut_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedInput, match="MLflow cannot keep its database"):
        Tracking(f"sqlite:///{tmp_path}/{name}/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/{name}.db")
    with pytest.raises(RefusedInput, match="MLflow cannot keep its database"):
        existing_registry(str(tmp_path))


@pytest.mark.services
def test_everything_of_a_root_with_an_odd_name_is_inside_it(tmp_path: Path) -> None:
    root = tmp_path / ODD
    workspace = open_workspace("odd", str(root))
    run = workspace.tracking.start("run", params={"a": 1})
    run.metrics({"m": 1.0}, 1)
    run.text("told", "told.txt")
    run.finish()
    version = Registry(workspace.tracking.uri).add("m", str(root / "model"), run.id, {"k": "v"})
    assert version.source == str(root / "model")
    assert {path.parts[0] for path in map(Path, files(tmp_path))} == {root.name}
    assert {"mlflow.db", "mlartifacts"} <= files(root)
    assert [path.read_text() for path in root.rglob("told.txt")] == ["told"]
    assert Registry(tracking_uri(str(root))).by_version("m", "1") == version


@pytest.mark.parametrize("mark", ["?", "#"])
def test_an_s3_root_that_mlflow_would_cut_is_refused(mark: str) -> None:
    with pytest.raises(RefusedInput, match="MLflow cuts"):
        open_workspace("odd", f"s3://bucket/a{mark}b")


@pytest.mark.parametrize(
    "command",
    [
        ["prune"],
        ["prune", "--yes"],
        ["prune", "--restore", "shard/0123456789abcdef"],
        ["promote", "m", "1"],
        ["rollback", "m"],
        ["ask", "--model", "models:/m@champion", "--image", "red.png", "What?"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("root", ["mistyped", "there", "file"])
def test_a_mistyped_root_is_one_line_and_nothing_is_made(
    llava: Command, tmp_path: Path, command: list[str], root: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("a file")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    before = files(tmp_path)
    status, out, err = llava(*command, "--root", root)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and root in err, err
    assert files(tmp_path) == before


def _unwritable(tmp_path: Path) -> list[Path]:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "closed").mkdir(mode=0o555)
    # For root, no mode closes a folder: the kernel's own do.
    return [
        tmp_path / "file",
        Path("/proc/llava"),
        *([tmp_path / "closed"] if os.getuid() else [Path("/sys/llava")]),
    ]


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("deeper", ["", "root"])
def test_a_root_that_cannot_be_written_is_one_line(
    llava: Command, tmp_path: Path, place: int, deeper: str
) -> None:
    root = _unwritable(tmp_path)[place] / deeper
    before = files(tmp_path)
    status, out, err = llava("train", "tiny", "--root", str(root))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and f"{root}" in err and "cannot write there" in err, err
    assert files(tmp_path) == before


@pytest.mark.parametrize("database", ["file/mlflow.db", "folder", "text.db"])
def test_an_mlflow_database_that_cannot_be_written_is_one_line(
    llava: Command, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("no database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/{database}")
    status, _, err = llava("train", "tiny", "--root", str(tmp_path / "root"))
    assert status == 2
    assert err.count("\n") == 1 and "cannot write there" in err and database in err, err


def test_restore_makes_nothing_in_a_root_without_trash(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="no shard/0123456789abcdef lies there"):
        pruning.restore(str(tmp_path / "gone"), "shard/0123456789abcdef")
    assert open_store(tmp_path / "gone").local_path is not None
    assert not (tmp_path / "gone").exists()
