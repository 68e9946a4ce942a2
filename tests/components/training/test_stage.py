"""Both stages as Ray Train jobs with DeepSpeed: what they write, and what survives a kill."""

import functools
import gzip
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from components.contract import Artifact, Component, Job, Settings, TrackedRun
from components.contract.runner import Outcome
from components.finetune import Finetune, FinetuneSettings
from components.pretrain import Pretrain, PretrainSettings
from components.tiny_world import scenes
from components.training.board import ProgressClient, start_progress_actor
from llava.data.schema import write_rows
from llava.errors import LlavaError, RefusedInput
from llava.training.memory import can_fuse_loss
from tests.components.conftest import Lines
from tests.support.tiny_llava import tiny_llava

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


@pytest.mark.drill
def test_stage_1_changes_the_projector_alone(run_in: Run, inputs: dict[str, Artifact]) -> None:
    trained = run_in(Pretrain(), PretrainSettings(**SMALL, workers=2, zero_stage=2), inputs).artifact
    before, after = weights(inputs["model"]), weights(trained)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert not any(entry.key.startswith("checkpoints/") for entry in trained.folder.list())
    assert trained.manifest.notes["coverage"]["samples"] == len(losses(trained)) * 8


@pytest.mark.drill
def test_plain_torch_zero_2_and_zero_3_give_one_curve(undisturbed: Callable[[int], Artifact]) -> None:
    alone = losses(undisturbed(0))
    assert len(alone) == 24
    assert losses(undisturbed(2)) == pytest.approx(alone, abs=1e-4)
    assert losses(undisturbed(3)) == pytest.approx(alone, abs=1e-4)


def test_stock_transformers_loads_what_was_trained(adapted: tuple[Artifact, Lines]) -> None:
    folder = adapted[0].local("model")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert model.config.text_config._attn_implementation != "llava_segments"
    text = processor.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.drill
def test_a_killed_worker_costs_nothing_but_time(
    run_in: Run, inputs: dict[str, Artifact], undisturbed: Callable[[int], Artifact], tmp_path: Path
) -> None:
    zero_stage = 3
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
        if any(root.glob("finetune/*/**/checkpoints/*/COMMITTED")):
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


def test_a_dataset_whose_answers_would_lose_their_ends_is_refused_before_workers_start(
    run_in: Run, inputs: dict[str, Artifact]
) -> None:
    settings = FinetuneSettings(**SMALL, template="chatml", max_length=90)
    with pytest.raises(
        RefusedInput, match=r"longer than finetune\.max_length=90.*finetune\.max_truncated=5\.0%"
    ):
        run_in(Finetune(), settings, inputs)


@pytest.fixture(scope="module")
def adapted(
    run_at: Run, inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, Lines]:
    """Stage 2 with LoRA and everything else that a run may be told, on as many workers as there is room for."""
    lines = Lines()
    settings = FinetuneSettings(
        # So slow that the loss only wavers: some step is above the median.
        **{**SMALL, "checkpoint_every": 1000, "learning_rate": 1e-5},
        template="chatml",
        workers=9,
        min_workers=1,
        epochs=2,
        lora=True,
        lora_rank=8,
        lora_alpha=16,
        projector_learning_rate=1e-6,
        checkpointing="selective",
        fused_loss=can_fuse_loss(),
        profile=True,
        spike_factor=1.0001,
    )
    root = tmp_path_factory.mktemp("adapted")
    return run_at(root, Finetune(), settings, inputs, lines).artifact, lines


def test_lora_ends_in_a_stock_model_in_which_only_the_language_models_matrices_and_the_projector_changed(
    adapted: tuple[Artifact, Lines], inputs: dict[str, Artifact]
) -> None:
    before, after = weights(inputs["model"]), weights(adapted[0])
    assert sorted(after) == sorted(before)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    layers = {name for name in before if ".layers." in name and "vision_tower" not in name}
    matrices = {name for name in layers if before[name].dim() == 2}
    assert len(matrices) == 14
    assert changed == matrices | {name for name in before if "multi_modal_projector" in name}


def test_qlora_ends_in_a_stock_model_with_the_very_base_that_it_began_with(
    run_in: Run, inputs: dict[str, Artifact], lines: Lines
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = FinetuneSettings(
        **SMALL,
        template="chatml",
        workers=2,
        zero_stage=2,
        lora=True,
        lora_rank=8,
        lora_alpha=16,
        lora_bits=4,
    )
    trained = run_in(Finetune(), settings, inputs).artifact
    before, after = weights(inputs["model"]), weights(trained)
    assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
    thin = [
        torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4)
        for name in before
        if "_proj" in name and ".layers." in name and "vision_tower" not in name
    ]
    assert len(thin) == 14 and 0 < max(thin) <= 8
    assert losses(trained)[-1] < losses(trained)[0]
    assert trained.manifest.notes["lora"]["adapted_share"] > 0.99


@pytest.mark.drill
def test_a_vision_tower_with_a_rate_is_learned_and_saved(run_in: Run, inputs: dict[str, Artifact]) -> None:
    settings = FinetuneSettings(
        **SMALL, template="chatml", workers=2, zero_stage=3, checkpointing="full", vision_learning_rate=1e-4
    )
    trained = run_in(Finetune(), settings, inputs).artifact
    before, after = weights(inputs["model"]), weights(trained)
    tower = {name for name in before if "vision_tower" in name}
    changed = {name for name in tower if not torch.equal(after[name], before[name])}
    # The last of two layers is not read, nor is the norm behind it.
    assert changed == {name for name in tower if "layers.1." not in name and "post_layernorm" not in name}
    LlavaForConditionalGeneration.from_pretrained(trained.local("model"))


def test_a_jump_of_the_loss_names_its_samples_in_the_log_the_history_and_mlflow(
    adapted: tuple[Artifact, Lines], mlflow_db: str
) -> None:
    artifact, lines = adapted
    steps = rows(artifact, "samples.jsonl")
    spikes = [line for line in rows(artifact, "history.jsonl") if "spike" in line]
    assert spikes
    tags = MlflowClient(mlflow_db).get_run(artifact.manifest.mlflow_run_id).data.tags
    for line in spikes:
        ids = line["spike"]["samples"]
        assert sorted(ids) == sorted(steps[line["step"] - 1]["ids"])
        assert line["train/loss"] > line["spike"]["median"]
        assert ids[0] in tags[f"spike.step_{line['step']}"]
    assert any(f"step {spikes[0]['step']}: loss" in said for said in lines.said)


def test_a_profile_is_a_trace_of_a_few_steps_in_the_artifact(adapted: tuple[Artifact, Lines]) -> None:
    trace = json.loads(gzip.decompress(adapted[0].folder.read("profile/trace.json.gz")))
    names = {event["name"] for event in trace["traceEvents"] if "name" in event}
    assert {f"ProfilerStep#{step}" for step in (3, 4, 5)} <= names
    assert "aten::mm" in names


def test_fewer_workers_than_wanted_give_the_same_global_batches(adapted: tuple[Artifact, Lines]) -> None:
    artifact, _ = adapted
    assert artifact.manifest.run["workers"] == 9
    ids = [name for line in rows(artifact, "samples.jsonl") for name in line["ids"]]
    assert all(len(line["ids"]) == 8 for line in rows(artifact, "samples.jsonl"))
    assert set(Counter(ids).values()) == {2}


def test_every_step_is_in_mlflow_once_and_nothing_is_claimed_that_a_cpu_cannot_know(
    adapted: tuple[Artifact, Lines], mlflow_db: str
) -> None:
    artifact, _ = adapted
    held = MlflowClient(mlflow_db).get_run(artifact.manifest.mlflow_run_id).data.metrics
    assert {"train/loss", "train/grad_norm", "train/fill", "train/data_wait"} <= set(held)
    assert not {"train/mfu", "train/gpu_memory_gib"} & set(held)
    logged = TrackedRun.attach(mlflow_db, artifact.manifest.mlflow_run_id)
    assert logged.steps("train/loss") == set(range(1, len(losses(artifact)) + 1))


class BrokenData(GivenData):
    """The last picture of the file ends too early."""

    version: ClassVar[str] = "broken"

    def run(self, job: Job) -> None:
        asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
        pictures = [(scene.id, scene.png) for scene in scenes(0, 8, "train")]
        pictures[-1] = ("torn-7", pictures[-1][1][:-200])
        made = [
            {"id": name, "image": {"bytes": png, "path": f"{name}.png"}, "conversations": asked}
            for name, png in pictures
        ]
        write_rows(job.scratch / "part.parquet", made)
        job.folder.upload(job.scratch / "part.parquet", "train/part-00000.parquet")


def test_a_picture_that_cannot_be_read_while_training_is_named_with_its_dataset(
    run_in: Run, inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    broken = run_in(BrokenData(), Settings()).artifact
    settings = FinetuneSettings(**SMALL, template="chatml", zero_stage=0, max_restarts=0)
    with pytest.raises(LlavaError, match=rf"dataset {broken.uri}: sample torn-7: .*leave it out") as stopped:
        run_in(Finetune(), settings, {**inputs, "dataset": broken})
    assert stopped.value.exit_status == 1


def test_a_board_that_is_lost_ends_nothing(ray_local: str) -> None:
    import ray

    progress_actor = start_progress_actor()
    client = ProgressClient(progress_actor, timeout=5)
    client.fail("no", 2)
    assert client.failure() == ("no", 2)
    ray.kill(progress_actor)
    with pytest.raises(ray.exceptions.RayActorError):
        while True:  # the kill is not immediate
            ray.get(progress_actor.failure.remote(), timeout=30)
    client.note("nobody hears this")
    assert (client.failure(), client.stopping(), client.notes(0)) == (None, False, [])


def rows(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in artifact.folder.read(name).decode().splitlines()]
