"""What stands in a manifest is checked before it becomes a file name, a URI or a line on a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.contract import (
    Artifact,
    FileEntry,
    Manifest,
    has_controls,
    open_artifact,
    open_store,
    printable,
    read_artifact,
    say,
)
from components.registry import open_model
from llava.errors import RefusedInput
from workflows.show import show

DIGEST = "0123456789abcdef" * 4
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def written(root: Path, changes: dict[str, Any] | None = None, file: dict[str, Any] | None = None) -> Path:
    """An artifact with a report and a model, its manifest changed after it was made."""
    address = root / "finetune" / DIGEST[:16]
    store = open_store(address)
    store.write("report/page.md", b"# import os")
    store.write("report/page.pth", b"import os; os.system('touch owned')")
    store.write("model/config.json", b"{}")
    files = [
        FileEntry(path=entry.key, size=entry.size, sha256=store.sha256(entry.key)) for entry in store.list()
    ]
    manifest = Manifest(component="finetune", version="1", digest=DIGEST, recipe={}, files=files, code="x")
    content = json.loads(manifest.to_bytes()) | (changes or {})
    if file:
        content["files"][0] |= file
    store.write("manifest.json", json.dumps(content).encode())
    return address


HOSTILE: dict[str, dict[str, Any]] = {
    "a component that leaves the folder": {"component": "../../site-packages/owned"},
    "an absolute component": {"component": "/tmp/owned"},
    "a component with a space": {"component": "fine tune"},
    "a component with an escape": {"component": f"finetune{ESCAPE}"},
    "a component that ends a line": {"component": "finetune\n"},
    "an empty component": {"component": ""},
    "a digest that leaves the folder": {"digest": "../../../../owned"},
    "a short digest": {"digest": "0123456789abcdef"},
    "a digest in capitals": {"digest": DIGEST.upper()},
    "an input that is no digest": {"inputs": {"model": "../backbones"}},
    "an input with an escape": {"inputs": {f"model{ESCAPE}": DIGEST}},
    "code with an escape": {"code": ESCAPE},
    "an MLflow run that is a path": {"mlflow_run_id": "../../owned"},
    "an attempt that leaves the folder": {"attempt": "attempts/../../../other"},
    "an attempt elsewhere": {"attempt": "../0123456789abcdef"},
    "a version with an escape": {"versions": {"torch": ESCAPE}},
}
FILES: dict[str, dict[str, Any]] = {
    "a file outside": {"path": "../../../etc/passwd"},
    "an absolute file": {"path": "/etc/passwd"},
    "a file with an escape": {"path": f"model/{ESCAPE}"},
    "a file of negative size": {"size": -1},
    "a hash that is none": {"sha256": "x"},
}


@pytest.mark.parametrize("case", [*HOSTILE, *FILES])
def test_a_hostile_manifest_is_refused_by_field(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    address = written(tmp_path / "root", HOSTILE.get(case), FILES.get(case))
    for look in (show, open_artifact, lambda uri: read_artifact(open_store(uri)), open_model):
        with pytest.raises(RefusedInput, match=r"manifest\.json is damaged \(") as refusal:
            look(str(address))
        assert not has_controls(str(refusal.value)), "one line, nothing that a terminal obeys"
    assert {path.name for path in tmp_path.iterdir()} == {"here", "root"} and not list(here.iterdir())


def test_show_saves_pages_and_pictures_and_nothing_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    show(str(written(tmp_path / "root")))
    assert [path.name for path in here.iterdir()] == [f"finetune-{DIGEST[:8]}-page.md"]
    assert "page.pth" in capsys.readouterr().err, "what is left out is said"


def test_the_command_shows_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    notes = {"title": ESCAPE, "nested": {f"a{ESCAPE}": "\u202egnp.exe", "b": "\x9b31m"}}
    address = written(tmp_path / "root", {"notes": notes, "recipe": {"text": "\r\x08 over"}})
    shown = subprocess.run(
        [sys.executable, "-m", "workflows.cli", "show", str(address)],
        capture_output=True,
        cwd=tmp_path,
        timeout=90,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    text = (shown.stderr + shown.stdout).decode()
    assert "\\x1b]0;owned\\x07" in text and "\\u202e" in text
    assert not [line for line in text.splitlines() if has_controls(line)]


def test_a_manifest_of_any_size_is_not_read_into_memory(tmp_path: Path) -> None:
    address = written(tmp_path / "root")
    with (address / "manifest.json").open("r+b") as file:
        file.truncate(40 << 30)  # sparse: it takes no room
    with pytest.raises(RefusedInput, match=r"manifest\.json: has 42,949,672,960 bytes, at most"):
        open_artifact(address)


def test_printable_leaves_what_people_write() -> None:
    harmless = "naïve 中文 emoji 🙂 tab\there\nnext line"
    assert printable(harmless) == harmless
    assert printable("\x1b[31m\udcff\u2066\x7f\r") == "\\x1b[31m\\udcff\\u2066\\x7f\\r"


def test_a_line_from_outside_is_printed_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"name {ESCAPE}\nand \udce9", "shard")
    assert capsys.readouterr().err == "shard: name \\x1b]0;owned\\x07\\x1b[2J\nshard: and \\udce9\n"


def test_an_artifact_is_known_by_its_address(tmp_path: Path) -> None:
    artifact = read_artifact(open_store(written(tmp_path / "root")))
    assert isinstance(artifact, Artifact) and artifact.folder == artifact.address
