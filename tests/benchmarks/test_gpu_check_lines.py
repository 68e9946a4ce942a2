"""The lines of the GPU check that only a GPU reaches: here a CPU says that it is one, so that they have run before."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import bench, copies, here, speed
from benchmarks.gpu.bench import Bench
from llava.estimate import GIB


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's functions about a GPU, answered by the CPU; bytes at the peak come from a counter that falls."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    peaks = itertools.count(60 * GIB, -GIB // 8)
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=79 * GIB
    )
    answers: dict[str, Any] = {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: next(peaks),
        "mem_get_info": lambda device=None: (78 * GIB, 79 * GIB),
        "get_device_name": lambda: properties.name,
        "get_device_properties": lambda device: properties,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(Bench, "cuda", property(lambda self: True))
    monkeypatch.setattr(copies, "EDGE", 8)
    monkeypatch.setitem(bench.SHAPES, "gpu", bench.SHAPES["short"])
    # The proportions of 7B's layers, of which the arithmetic chooses, with the widths of a small one.
    short = bench.SHAPES["short"]
    language = replace(short.sizes.language, layers=4)
    small = replace(short, sizes=replace(short.sizes, language=language))
    monkeypatch.setattr(speed, "SHAPES", {**speed.SHAPES, "7b": small})
    monkeypatch.setattr(speed, "BUDGETS", {1: (512,), 2: (1024,)})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("pretended")
@pytest.mark.drill
def test_every_step_runs_its_lines_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = here.about
    monkeypatch.setattr(here, "about", lambda device: about(torch.device("cuda")))
    wanted = [step.name for step in gpu_check.STEPS if step.name not in ("compile", "generation")]
    out = tmp_path / "out.json"
    gpu_check.main(["--device", "cpu", "--out", str(out), "--minutes", "20", "--only", *wanted])
    report = json.loads(out.read_text())
    assert report["machine"]["device"] == "NVIDIA H100 80GB HBM3"
    steps = {step["name"]: step for step in report["steps"]}
    assert {step["state"] for step in steps.values()} == {"ok"}
    peaks = steps["checkpointing"]["findings"]["figures"]["peak_bytes"]["bf16"]
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    copied = steps["copies"]["findings"]["figures"]["seconds"]
    assert set(copied) == {"pageable", "pinned"} and set(copied["pinned"]) == {"alone", "behind_work"}
    for stage in ("stage 1", "stage 2"):
        found = steps["speed"]["findings"]["figures"][stage]
        assert found["shape"].startswith(f"{stage}: all of 7B")
        assert set(found["ratios"]) == {"hf", "hf, nothing saved"}
        ours = found["gpu"]["ours"]
        assert 0 < ours["mfu"] < 1
        assert found["gpu"]["peak_over_estimate"] == ours["peak_gib"] / found["arithmetic"]["allocated_gib"]
    assert "MFU" in steps["speed"]["line"]


@pytest.mark.usefixtures("pretended")
def test_what_does_not_fit_after_all_is_a_fault_and_is_measured_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = speed._measured

    def full(given: Any, findings: Any, stage: int, chosen: Any, *more: Any) -> Any:
        if stage == 1 and chosen.shape.sizes.language.layers == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory\nof much")
        return inner(given, findings, stage, chosen, *more)

    monkeypatch.setattr(speed, "_measured", full)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cpu", "--out", str(out), "--minutes", "20", "--only", "speed"])
    (step,) = json.loads(out.read_text())["steps"]
    assert step["state"] == "FAILED" and "all of 7B" in step["why"] and "CUDA out of memory" in step["why"]
    assert step["findings"]["figures"]["stage 1"]["sizes"]["language"]["layers"] == 3
    assert step["findings"]["figures"]["stage 2"]["sizes"]["language"]["layers"] == 4
