"""The check of a GPU, on the CPU: it ends well where all is well, and a fault of any kind is a FAILED step."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from benchmarks import gpu_check
from benchmarks.gpu import here, speed
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.findings import Findings, LeftOut
from benchmarks.gpu_check import FAILED, LEFT_OUT, OK, Step
from llava import attention, generate, lora
from llava.attention import Segments
from llava.data.collate import PackedRow
from llava.estimate import GIB, GPUS, usable
from llava.model import LlavaForTraining
from llava.pixels import Pixels
from llava.training import memory
from llava.training.checkpoint import SavedState
from llava.training.engine import AdamW

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """The command in this process on the CPU, in its shortest form; its status, and its steps by name."""

    def command(*options: str, short: bool = True) -> tuple[int, dict[str, Any]]:
        out, status = tmp_path / "out.json", 0
        try:
            gpu_check.main([*options, "--device", "cpu", "--out", str(out), *(["--short"] if short else [])])
        except SystemExit as end:
            status = int(end.code or 0)
        return status, {step["name"]: step for step in json.loads(out.read_text())["steps"]}

    return command


def test_all_steps_end_well_on_the_cpu_within_a_minute(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    status, steps = run()
    assert {name: step["state"] for name, step in steps.items()} == {
        step.name: OK for step in gpu_check.STEPS
    }
    assert status == 0
    assert time.process_time() - began < 60
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == list(steps)
    # What the CPU cannot show is said and not made up.
    assert "peak memory: a CPU has no counters" in "".join(
        steps["checkpointing"]["findings"]["parts_left_out"]
    )
    assert "peak_bytes" not in steps["checkpointing"]["findings"]["figures"]
    assert steps["here"]["findings"]["figures"]["attention"]["bf16"]["ran"]


def leaks(query: Any, key: Any, value: Any, segments: Segments, *options: Any) -> torch.Tensor:
    """Causal over the whole row."""
    whole = attention.segments([sum(segments.lengths)])
    return plain_sdpa(query, key, value, whole, *options)


plain_sdpa = attention.sdpa


def break_attention(patch: Patch) -> None:
    patch.setattr(attention, "sdpa", leaks)


def break_fused_loss(patch: Patch) -> None:
    inner = torch.nn.functional.linear_cross_entropy
    patch.setattr(
        torch.nn.functional, "linear_cross_entropy", lambda *given, **named: inner(*given, **named) * 1.005
    )


def spoils(inner: Callable[..., None]) -> Callable[..., None]:
    """What it does, and a matrix of the first layer that is no longer what it was."""

    def spoiled(language_model: Any, *options: Any) -> None:
        inner(language_model, *options)
        if options[-1:] != ("none",):
            with torch.no_grad():
                language_model.layers[0].mlp.down_proj.weight.mul_(1.05)

    return spoiled


def break_compile(patch: Patch) -> None:
    patch.setattr(memory, "compile_layers", spoils(memory.compile_layers))


def break_checkpointing(patch: Patch) -> None:
    patch.setattr(memory, "checkpoint_activations", spoils(memory.checkpoint_activations))


def break_lora(patch: Patch) -> None:
    def forgets(model: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                model.set_submodule(name, module.get_base_layer())

    patch.setattr(lora, "merge", forgets)


def break_resume(patch: Patch) -> None:
    inner = SavedState.whole

    def without_moments(saved: SavedState, part: str, name: str, shape: torch.Size) -> torch.Tensor:
        found = inner(saved, part, name, shape)
        return found if part == "weights" else torch.zeros_like(found)

    patch.setattr(SavedState, "whole", without_moments)


def break_optimizer(patch: Patch) -> None:
    inner = AdamW.build

    def other(adamw: AdamW, named: Any) -> Any:
        return inner(AdamW(adamw.weight_decay, beta2=0.99), named)

    patch.setattr(AdamW, "build", other)


def break_pixels(patch: Patch) -> None:
    inner = Pixels.normalise
    patch.setattr(Pixels, "normalise", lambda pixels, given, dtype: inner(pixels, given, dtype) * 1.01)


def break_copies(patch: Patch) -> None:
    def shifted(row: PackedRow, device: Any) -> PackedRow:
        moved = row._each(lambda tensor: tensor.to(device))
        moved.targets = moved.targets.roll(1)
        return moved

    patch.setattr(PackedRow, "to", shifted)


def break_generation(patch: Patch) -> None:
    inner = generate._batch
    patch.setattr(
        generate,
        "_batch",
        lambda model, processor, ids, pixels, side: inner(model, processor, ids, pixels, "right"),
    )


def break_speed(patch: Patch) -> None:
    inner = LlavaForTraining.loss
    patch.setattr(LlavaForTraining, "loss", lambda module, *given: inner(module, *given) * 1.001)


def break_here(patch: Patch) -> None:
    patch.setattr(here, "_profiled", lambda bench, dtype: {})


BROKEN: dict[str, Callable[[Patch], None]] = {
    "here": break_here,
    "attention": break_attention,
    "packing": break_attention,
    "fused-loss": break_fused_loss,
    "compile": break_compile,
    "checkpointing": break_checkpointing,
    "lora": break_lora,
    "resume": break_resume,
    "optimizer": break_optimizer,
    "pixels": break_pixels,
    "copies": break_copies,
    "generation": break_generation,
    "speed": break_speed,
}


QUICK = ("attention", "resume")
"""The steps whose faults are tried in every run of the tests."""


def test_there_is_a_fault_for_every_step() -> None:
    assert list(BROKEN) == [step.name for step in gpu_check.STEPS]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.drill) for name in BROKEN]
)
def test_a_fault_is_a_failed_step_and_status_1(name: str, run: Any, monkeypatch: Patch) -> None:
    BROKEN[name](monkeypatch)
    status, steps = run("--only", name)
    assert (status, steps[name]["state"]) == (1, FAILED)
    assert steps[name]["why"].strip() and "Error" not in steps[name]["why"], steps[name]["why"]


def test_bf16_alone_shows_a_leak(run: Any, monkeypatch: Patch) -> None:
    break_attention(monkeypatch)
    _, steps = run("--only", "attention", "packing")
    for step in steps.values():
        assert any("bf16" in fault for fault in step["findings"]["faults"])


def given(monkeypatch: Patch, **steps: Callable[[Bench, Findings], None]) -> None:
    monkeypatch.setattr(
        gpu_check, "STEPS", tuple(Step(name, name, run, (0.0, 0.0, 0.0)) for name, run in steps.items())
    )


def test_an_error_is_a_failed_step_and_the_next_one_runs(run: Any, monkeypatch: Patch) -> None:
    def breaks(bench: Bench, findings: Findings) -> None:
        findings.say("begun")
        raise RuntimeError("the card\nfell out")

    given(monkeypatch, first=breaks, second=lambda bench, findings: findings.say("fine"))
    status, steps = run()
    assert status == 1
    assert [(step["state"], step["why"]) for step in steps.values()] == [
        (FAILED, "RuntimeError: the card fell out"),
        (OK, ""),
    ]
    assert "fell out" in steps["first"]["findings"]["figures"]["traceback"]


def test_a_step_that_hangs_is_cut_off_with_the_budget_and_the_rest_is_left_out(
    run: Any, monkeypatch: Patch
) -> None:
    def hangs(bench: Bench, findings: Findings) -> None:
        findings.within("before", 2.0, 1.0)
        time.sleep(60)

    monkeypatch.setattr(gpu_check, "_needed", lambda step, bench: 1.0)
    given(monkeypatch, first=lambda bench, findings: time.sleep(0.1), second=hangs, third=hangs)
    began = time.monotonic()
    status, steps = run("--minutes", "0.15")
    assert time.monotonic() - began < 30
    assert status == 1
    assert [step["state"] for step in steps.values()] == [OK, FAILED, LEFT_OUT]
    assert (
        "off by 2" in steps["second"]["why"] and "cut off by the end of the budget" in steps["second"]["why"]
    )
    assert steps["third"]["why"] == "it takes about 1 s, 0 s of the budget are left"


def test_without_a_budget_nothing_runs_and_every_step_says_why(run: Any) -> None:
    status, steps = run("--minutes", "0", "--deepspeed", short=False)
    assert status == 0
    assert len(steps) == len(gpu_check.STEPS) + 1
    assert {step["state"] for step in steps.values()} == {LEFT_OUT}
    assert all("of the budget are left" in step["why"] for step in steps.values())


def test_a_killed_run_leaves_what_it_has(run: Any, monkeypatch: Patch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def looks(bench: Bench, findings: Findings) -> None:
        seen.append(json.loads((tmp_path / "out.json").read_text())["steps"])

    given(monkeypatch, first=looks, second=looks)
    run()
    states = [[(step["name"], step["state"]) for step in steps] for steps in seen]
    assert states == [[("first", "running")], [("first", OK), ("second", "running")]]


def test_an_unknown_step_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "everything"])
    assert "unknown step everything; the steps are here, attention" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_is_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match="no CUDA device is here: leave --device out, or give --device cpu"):
        gpu_check.main(["--device", "cuda"])


@pytest.mark.parametrize(
    ("card", "stage", "whole"),
    [("h100-80g", 1, True), ("h100-80g", 2, False), ("h200-141g", 1, True), ("h200-141g", 2, True)],
)
def test_the_shape_is_what_the_card_holds(card: str, stage: int, whole: bool) -> None:
    found = speed.fitted(GPUS[card], stage)
    layers = found.shape.sizes.language.layers
    assert (layers == 32) == whole
    assert layers >= 12
    assert found.shape.sizes.language.hidden == 4096
    assert found.expected_gib * GIB < usable(GPUS[card])
    assert ("all of 7B" if whole else f"{layers} of 7B's 32 layers") in speed.told(found)
    assert speed.smaller(found).shape.sizes.language.layers == layers * 3 // 4


def test_a_card_without_room_for_a_layer_is_told_so() -> None:
    with pytest.raises(LeftOut, match=r"not one layer of 7B fits into 0\.9 GiB"):
        speed.fitted(GPUS["l4-24g"], 2, 0.9 * GIB)


@pytest.mark.parametrize(
    ("name", "gib", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "h100-80g"),
        ("NVIDIA H200", 139, "h200-141g"),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 79, "a100-80g"),
        ("NVIDIA L4", 22, "l4-24g"),
        ("NVIDIA L40S", 44, "l40s-48g"),
        ("NVIDIA H100 PCIe", 79, None),
        ("Tesla T4", 15, None),
    ],
)
def test_a_device_is_known_by_its_name_and_memory(name: str, gib: int, card: str | None) -> None:
    assert speed.card_of(name, gib * GIB) == (GPUS[card] if card else None)
