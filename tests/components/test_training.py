"""Both stages as Ray Train jobs with DeepSpeed: what they write, and what survives a kill."""

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from components.contract import Artifact, Component, Job, Settings
from components.contract.runner import Outcome
from components.finetune import Finetune, FinetuneSettings
from components.pretrain import Pretrain, PretrainSettings
from components.shapes import scenes
from llava.data.schema import write_rows
from llava.errors import RefusedInput
from tests.tiny_llava import tiny_llava

Run = Callable[..., Outcome]
SMALL: dict[str, Any] = {"precision": "fp32", "global_batch": 8, "checkpoint_every": 5, "learning_rate": 1e-3}


class GivenModel(Component):
    """A random LLaVA as an artifact."""

    name: ClassVar[str] = "backbones"
    version: ClassVar[str] = "test"
    on_ray = False

    def run(self, job: Job) -> None:
        for path in sorted(tiny_llava(job.scratch / "model").iterdir()):
            job.folder.upload(path, f"model/{path.name}")


class GivenData(Component):
    """A few scenes with captions and conversations as an artifact; with `text_only` every third has no image."""

    name: ClassVar[str] = "shard"
    version: ClassVar[str] = "test"
    on_ray = False

    def run(self, job: Job) -> None:
        rows = []
        for number, scene in enumerate(scenes(0, 96, "train")):
            image = None if number % 3 == 0 else {"bytes": scene.png, "path": f"{scene.id}.png"}
            asked = {"from": "human", "value": "<image>\nWhat is there?" if image else "Say something."}
            told = {"from": "gpt", "value": scene.captions[0]}
            rows.append(
                {
                    "id": scene.id,
                    "image": image,
                    "captions": scene.captions[:1],
                    "conversations": [asked, told],
                }
            )
        write_rows(job.scratch / "part.parquet", rows)
        job.folder.upload(job.scratch / "part.parquet", "train/part-00000.parquet")


@pytest.fixture(scope="module")
def inputs(run_at: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("inputs")
    return {
        "model": run_at(root, GivenModel(), Settings()).artifact,
        "dataset": run_at(root, GivenData(), Settings()).artifact,
    }


@pytest.fixture(scope="module")
def undisturbed(
    run_at: Run, inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Artifact]:
    """Stage 2 at a ZeRO stage, run once for all tests; 0 is plain torch on one worker."""

    @functools.cache
    def run(zero_stage: int) -> Artifact:
        root = tmp_path_factory.mktemp(f"zero-{zero_stage}")
        return run_at(root, Finetune(), stage_2(zero_stage), inputs).artifact

    return run


def stage_2(zero_stage: int) -> FinetuneSettings:
    workers = 2 if zero_stage else 1
    return FinetuneSettings(**SMALL, template="chatml", workers=workers, zero_stage=zero_stage, epochs=2)


def losses(artifact: Artifact) -> list[float]:
    lines = artifact.folder.read("history.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line)["train/loss"] for line in lines]


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.local("model") / "model.safetensors")


def test_stage_1_changes_the_projector_alone(run_in: Run, inputs: dict[str, Artifact]) -> None:
    trained = run_in(Pretrain(), PretrainSettings(**SMALL, workers=2, zero_stage=2), inputs).artifact
    before, after = weights(inputs["model"]), weights(trained)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert not any(entry.key.startswith("checkpoints/") for entry in trained.folder.list())
    assert trained.manifest.notes["coverage"]["samples"] == len(losses(trained)) * 8


def test_plain_torch_zero_2_and_zero_3_give_one_curve(undisturbed: Callable[[int], Artifact]) -> None:
    alone = losses(undisturbed(0))
    assert len(alone) == 24
    assert losses(undisturbed(2)) == pytest.approx(alone, abs=1e-4)
    assert losses(undisturbed(3)) == pytest.approx(alone, abs=1e-4)


def test_stock_transformers_loads_what_was_trained(undisturbed: Callable[[int], Artifact]) -> None:
    folder = undisturbed(2).local("model")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert model.config.text_config._attn_implementation != "llava_segments"
    text = processor.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_killed_worker_costs_nothing_but_time(
    run_in: Run,
    inputs: dict[str, Artifact],
    undisturbed: Callable[[int], Artifact],
    tmp_path: Path,
    zero_stage: int,
) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill_after_checkpoint, args=(tmp_path / "root", killed), daemon=True)
    killer.start()
    disturbed = run_in(Finetune(), stage_2(zero_stage), inputs, root=tmp_path / "root").artifact
    killer.join(10)
    assert len(killed) == 1
    assert losses(disturbed) == losses(undisturbed(zero_stage))
    ours, theirs = weights(disturbed), weights(undisturbed(zero_stage))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def kill_after_checkpoint(root: Path, killed: list[int]) -> None:
    """kill -9 one training worker as soon as a checkpoint is committed."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not killed:
        if any(root.glob("finetune/*/checkpoints/*/COMMITTED")):
            for process in psutil.Process().children(recursive=True):
                with_name = " ".join(process.cmdline()[:1]) if process.is_running() else ""
                if "RayTrainWorker" in with_name:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.05)


def test_a_dataset_that_cannot_be_trained_on_is_refused_before_workers_start(
    run_in: Run, inputs: dict[str, Artifact]
) -> None:
    settings = FinetuneSettings(**SMALL, template="chatml", max_length=20)
    with pytest.raises(RefusedInput, match=r"image does not fit.*finetune\.max_lost"):
        run_in(Finetune(), settings, inputs)
