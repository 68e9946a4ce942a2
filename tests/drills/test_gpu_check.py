"""The whole check of a GPU, on the CPU: with the compiler, the larger shapes and DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import FAILED, OK, STEPS
from components.training.deepspeed_engine import DeepSpeedEngine
from tests.support.repository import REPOSITORY

pytestmark = pytest.mark.drill


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


def test_an_engine_that_restores_nothing_is_a_failed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(DeepSpeedEngine, "_set", lambda *given: None)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "deepspeed", "--short", "--device", "cpu", "--out", str(out)])
    (step,) = json.loads(out.read_text())["steps"]
    assert step["state"] == FAILED
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            assert f"ZeRO-{stage}, {precision}: the bits after a restore" in step["why"]
