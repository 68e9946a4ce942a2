"""The whole check of a GPU, on the CPU: with the compiler, the larger shapes and DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import OK, STEPS
from tests.support.repository import REPOSITORY


@pytest.mark.drill
def test_every_step_ends_well_on_the_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--deepspeed"),
            *("--minutes", "12", "--out", str(tmp_path / "out.json")),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert [step["state"] for step in steps] == [OK] * (len(STEPS) + 1)
