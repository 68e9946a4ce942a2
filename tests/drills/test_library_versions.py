"""The oldest and the newest libraries of pyproject.toml's ranges: the core tests and `llava train tiny` on both.

Each has a virtual environment of its own, in which pip puts what differs from the one that runs this test; all else,
torch and Ray above all, is read from that one. So these two are not varied: one build of each is at hand.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from components.contract import open_artifact
from tests.support.repository import REPOSITORY

SHARED = ("torch", "ray", "deepspeed")
CORE = (
    "tests/llava",
    "tests/components/training",
    "tests/components/backbones",
    "tests/security/test_templates.py",
)
PROGRAMS = ("weed", "kubectl", "hadolint")
RUN = "from workflows.cli import main; main()"
_REQUIREMENT = re.compile(r"([\w.-]+)(\[[\w,]+\])?>=([\w.]+),<([\w.]+)$")


def requirements(which: str) -> list[str]:
    """What pip is asked for: each library at its lower bound, or the newest that the range allows."""
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    asked = []
    for text in declared:
        parts = _REQUIREMENT.match(text)
        assert parts is not None, f"{text}: a range has a lower and an upper bound"
        name, _, lowest, _ = parts.groups()
        if name in SHARED:
            asked.append(f"{name}=={version(name).partition('+')[0]}")
        else:
            asked.append(f"{name}=={lowest}" if which == "oldest" else text)
    return asked


def make(folder: Path, which: str) -> Path:
    """A virtual environment with these libraries; its interpreter."""
    venv.create(folder, with_pip=True)
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    own = sysconfig.get_path("purelib")
    (inside / "shared.pth").write_text(f"{own}\n")
    for name in PROGRAMS:
        (folder / "bin" / name).symlink_to(Path(sys.executable).parent / name)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--upgrade", "setuptools>=77", *requirements(which)]
    subprocess.run(pip, check=True, timeout=1200)
    return python


def environment() -> dict[str, str]:
    """Of a command that runs this checkout; DeepSpeed's operators are compiled in its own environment."""
    left = ("RAY_", "MLFLOW_", "TORCH_EXTENSIONS_DIR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"}


def summary(python: Path, folder: Path) -> dict[str, Any]:
    """What `llava train tiny` says at its end."""
    done = subprocess.run(
        [python, "-c", RUN, "train", "tiny", "--json"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=2400,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.drill
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_core_tests_and_the_tiny_run_pass_with_these_libraries(which: str, tmp_path: Path) -> None:
    python = make(tmp_path / "environment", which)
    shown = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    named = {text.partition(">=")[0].partition("==")[0].partition("[")[0] for text in requirements(which)}
    print(f"\n{which}: " + ", ".join(line for line in shown if line.partition("==")[0].lower() in named))
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not drill", *CORE]
    subprocess.run(tests, cwd=REPOSITORY, env=environment(), check=True, timeout=2400)
    found = summary(python, tmp_path)
    for stage in ("pretrain", "finetune"):
        history = open_artifact(found["artifacts"][stage]).folder.read("history.jsonl")
        losses = [json.loads(line)["train/loss"] for line in history.splitlines()]
        print(f"{which}: {stage} loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} updates")
        assert losses[-1] < losses[0]
    right, blank = (found["scores"][f"eval/vqa/{name}"] for name in ("exact_match", "blank_image"))
    print(f"{which}: right picture {right:.1f} %, blank {blank:.1f} %")
    assert right > 70 and right - blank >= 30


def test_every_range_has_both_ends() -> None:
    oldest, newest = requirements("oldest"), requirements("newest")
    assert len(oldest) == len(newest) > 20
    assert all(
        text.startswith(f"{name}==") for text in oldest + newest for name in SHARED if text.startswith(name)
    )
