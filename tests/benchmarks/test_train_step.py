"""The benchmark of a training step: its command line, its arithmetic, and that its sides compute the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.training_step import peers, shapes, sides
from benchmarks.training_step.layout import MasterAdamW, MixedAdamW, expected_memory
from llava.estimate import GIB
from llava.sizes import Work
from llava.training.engine import AdamW, set_rate
from tests.support.repository import REPOSITORY

ROOT = REPOSITORY
CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The command in this process; what it printed as JSON."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def command(*options: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["train_step.py", *options])
        train_step.main()
        return json.loads(capsys.readouterr().out)

    return command


def test_a_dry_run_prints_the_arithmetic_of_7b_without_a_gpu_or_its_weights(run: Callable[..., Any]) -> None:
    (result,) = run("--device", "cuda", "--stage", "2", "--rounds", "1", "--dry-run", "--json")["results"]
    found = result["arithmetic"]
    assert (result["shape"], result["stage"]) == ("7b", 2)
    assert found["parameters"] == 7_062_902_784
    assert "16 bytes per learning parameter" in found["layout"]
    # 16 bytes for what learns, 2 for the tower; a card of 141 GB holds it.
    static = 16 * found["learning"] + 2 * (found["parameters"] - found["learning"])
    parts = found["memory_gib"]
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == pytest.approx(static / GIB)
    assert static / GIB < found["allocated_gib"] < 130
    assert found["padded_tokens_per_step"] > found["tokens_per_step"]


def test_the_command_compares_both_sides_and_finds_them_equal() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/train_step.py",
            "--shape",
            "tiny",
            "--stage",
            "1",
            "--rounds",
            "1",
            "--json",
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (result,) = report["results"]
    assert set(result["ratios"]["hf"]) == {"median", "min", "max"}
    assert result["agree"] is True
    for side in result["sides"][1:]:
        assert 0 < side["gradient"] <= 1e-4
        assert side["loss"] <= 1e-5
        assert len(side["seconds"]) == result["rounds"] == 1
    assert report["versions"]["torch"] == torch.__version__


def test_without_a_gpu_cuda_is_refused_in_one_line(run: Callable[..., Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(
        SystemExit, match="no CUDA device is here; `--device cuda --dry-run` prints the arithmetic"
    ):
        run("--device", "cuda")


def test_texts_have_the_lengths_that_were_drawn(tmp_path: Path) -> None:
    world = shapes.make_world(shapes.SHAPES["tiny"], 2, 2, 5, tmp_path, CPU, torch.float32)
    text = world.plan.index.tokens - world.shape.sizes.image_tokens
    assert len(text) == 2 * world.batch.samples
    assert text.min() >= shapes.SHORTEST
    assert text.max() <= shapes.LONGEST
    assert world.plan.index.supervised.min() > 0


def test_the_plain_loop_takes_the_step_that_the_trainer_takes(tmp_path: Path) -> None:
    world = shapes.make_world(shapes.SHAPES["tiny"], 1, 2, 5, tmp_path, CPU, torch.float32)
    engine = sides.engine_of(world, MixedAdamW())
    kept: list[dict[str, torch.Tensor]] = []

    def keep(*_: Any) -> None:
        kept.append({name: parameter.grad.clone() for name, parameter in engine.named.items()})

    engine.optimizer.register_step_pre_hook(keep)
    losses = []
    for kind in (peers.TrainerSide, peers.LoopSide):
        side = kind("peer", world, engine.optimizer, 2, tmp_path)
        side.enter()
        losses.append(side.step(0))
        side.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, first in kept[0].items():
        assert (first - kept[1][name]).norm() <= 1e-5 * first.norm(), name


def test_half_precision_is_updated_through_an_fp32_copy() -> None:
    torch.manual_seed(0)
    start = torch.randn(8, 8).to(torch.bfloat16)
    half, whole = (torch.nn.Parameter(start.clone().to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    mixed, plain = MixedAdamW().build({"w": half}), AdamW().build({"w": whole})
    assert isinstance(mixed, MasterAdamW)
    for _ in range(20):
        half.grad = torch.randn(8, 8).to(torch.bfloat16)
        whole.grad = half.grad.float()
        for optimizer in (mixed, plain):
            # Too small for bf16 to show a single step.
            set_rate(optimizer.param_groups, 1e-5)
            optimizer.step()
    assert torch.equal(mixed.masters["w"], whole)
    assert torch.equal(half, whole.to(torch.bfloat16))


def test_checkpointing_lowers_the_expected_memory() -> None:
    row = Work.of([700] * 20, 4000, 20)
    shape, stage = shapes.SHAPES["7b"], shapes.STAGES[2]
    saved, kept = (expected_memory(shape, stage, row, True, checkpointing) for checkpointing in (True, False))
    assert saved.static == kept.static
    assert saved.allocated < kept.allocated
