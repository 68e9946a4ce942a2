"""Training on real processes without Ray: a tiny world, and a group of ranks that trains on it."""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava import lora
from llava.placing import place
from llava.training import checkpoint, memory
from llava.training.engine import AdamW, Engine, PlainEngine
from llava.training.loop import Schedule, StepReport, gathered, train
from tests.support.mixed_batches import TrainingParts, pieces, write_mixed
from tests.support.process_group import run_group
from tests.support.tiny_llava import tiny_llava

STEPS = 12
ADAPTERS = lora.Lora(rank=8, alpha=16, dropout=0.1)
Where = tuple[Path, Path]


def make_world(folder: Path, **language: Any) -> Where:
    """A model folder, and a dataset in which every third sample is text only. `language`: as `tiny_llava`."""
    return tiny_llava(folder / "model", **language), write_mixed(folder / "data.parquet", 120)


def _engine(made: TrainingParts, task: dict[str, Any]) -> Engine:
    memory.checkpoint_activations(made.stock.model.language_model, task.get("checkpointing", "none"))
    if task.get("tower"):
        memory.checkpoint_tower(made.stock.model.vision_tower, task.get("checkpointing", "none"))
    if task.get("fused"):
        memory.fuse_loss(made.module)
    adamw = AdamW(weight_decay=0.01, scales=task.get("scales", ()))
    if not task["zero"]:
        return PlainEngine(made.module, adamw, gradient_clipping=1.0)
    from components.training.deepspeed_config import deepspeed_config
    from components.training.deepspeed_engine import DeepSpeedEngine, partition, prepare_environment

    prepare_environment("cpu")
    config = deepspeed_config(
        task["zero"],
        1.0,
        bf16=bool(task.get("bf16")),
        user=task.get("deepspeed"),
        offload=task.get("offload", "no"),
    )
    if task.get("placed"):
        dtype = torch.bfloat16 if task.get("bf16") else torch.float32
        cut = partial(partition, config=config) if task["zero"] == 3 else None
        place(made.stock, torch.device("cpu"), dtype, lambda name, value: None, cut)
    return DeepSpeedEngine(made.module, adamw, config, made.collator.blank_row())


def _train(where: Where, task: dict[str, Any]) -> Any:
    adapters = replace(ADAPTERS, dropout=task.get("dropout", ADAPTERS.dropout)) if task.get("lora") else None
    tower = task.get("tower", False)
    made = pieces(
        *where,
        task["stage"],
        task["tokens_per_row"],
        adapters=adapters,
        bits=task.get("bits", 16),
        tower=tower,
    )
    identity = {"seed": 3, "frozen": checkpoint.frozen_digest(made.stock)}
    engine = _engine(made, task)
    first = 0
    if resume := task.get("resume"):
        position, saved = checkpoint.opened(resume, identity)
        engine.restore(saved)
        first = position.step
    losses: list[float] = []

    def after(report: StepReport) -> bool:
        losses.append(report.loss)
        return report.step == task.get("stop_at")

    done = train(engine, made.collator, Schedule(STEPS, 1e-2, 0.1), first, after)
    with tempfile.TemporaryDirectory() as own:
        folder = gathered(engine, task.get("save", Path(own)))[0]
        checkpoint.save(folder, engine, checkpoint.Position(done, identity, engine.updates))
        gathered(engine, None)
        _, saved = checkpoint.opened(folder, identity)
        whole = [saved.whole("weights", name, shape_of(each)) for name, each in sorted(engine.named.items())]
        gathered(engine, None)
    return losses, torch.cat([value.flatten() for value in whole]).numpy()


def shape_of(parameter: Any) -> torch.Size:
    """The whole parameter's; ZeRO-3 leaves an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def train_group(where: Where, workers: int, **task: Any) -> tuple[list[float], torch.Tensor]:
    """Losses and weights of a run on `workers` real processes.

    `task`: stage, tokens_per_row, zero (0: plain torch), lora, dropout, bits, tower, checkpointing, fused, scales,
    stop_at, save, resume, bf16, deepspeed (a JSON), offload (see `deepspeed_config`), placed (as a worker places it,
    which is cut at once in ZeRO-3).
    """
    task = {"stage": 2, "tokens_per_row": 1000, "zero": 0, **task}
    if workers == 1 and not task["zero"]:
        found = _train(where, task)
    else:
        found = run_group(_train, workers, where, task, seconds=180)[0]
    losses, weights = found
    return losses, torch.from_numpy(weights)
