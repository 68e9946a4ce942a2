"""The check of a GPU where nothing is installed but what its page says: a copy of two folders and one pip line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import LEFT_OUT, OK
from tests.support.bare_machine import environment
from tests.support.repository import REPOSITORY

PAGE = (REPOSITORY / "benchmarks/README.md").read_text().partition("## `gpu_check.py`")[2]
ABSENT = ("ray", "deepspeed", "mlflow", "boto3", "peft", "accelerate", "pytest")


def installed() -> list[str]:
    """What the page installs."""
    found = re.search(r"pip install (.+)$", PAGE, re.MULTILINE)
    assert found
    return found[1].replace("'", "").split()


@pytest.mark.drill
def test_a_machine_with_what_the_page_installs_runs_every_step_or_says_what_is_missing(
    tmp_path: Path,
) -> None:
    (copy := tmp_path / "copy").mkdir()
    folders = re.search(r"git archive HEAD ([\w ]+?) \|", PAGE)
    assert folders
    for folder in folders[1].split():
        shutil.copytree(REPOSITORY / folder, copy / folder)
    variables = environment(tmp_path, installed())
    seen = subprocess.run(
        [sys.executable, "-c", f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)])"],
        cwd=copy, env=variables, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert seen.stdout.strip() == "[]"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu_check", "--short", "--device", "cpu", "--deepspeed"),
            *("--out", str(tmp_path / "out.json")),
        ],
        cwd=copy, env=variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    left_out = {step["name"]: step["why"] for step in report["steps"] if step["state"] == LEFT_OUT}
    assert left_out == {"lora": "peft is not installed", "deepspeed": "deepspeed is not installed"}
    ended_well = [step["name"] for step in report["steps"] if step["state"] == OK]
    assert len(ended_well) == len(gpu_check.STEPS) - 1
    # The padding side is the Trainer only where accelerate is installed; which it was is told.
    (speed,) = [step["line"] for step in report["steps"] if step["name"] == "speed"]
    assert "a plain loop" in speed
