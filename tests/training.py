"""Training on real processes without Ray: a tiny world, and a group of ranks that trains on it."""

import multiprocessing
import os
import queue
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from torch import distributed

from components.shapes import scenes
from llava import lora
from llava import model as models
from llava.conversation import Encoder
from llava.data.collate import Collator
from llava.data.plan import Plan, scan
from llava.data.reader import ParquetRows
from llava.data.samples import VIEWS
from llava.data.schema import GroupSize, write_rows
from llava.pixels import Pixels
from llava.training import checkpoint, memory
from llava.training.engine import AdamW, Engine, PlainEngine
from llava.training.loop import Schedule, StepReport, train
from tests.tiny_llava import tiny_llava

STEPS = 12
ADAPTERS = lora.Lora(rank=8, alpha=16, dropout=0.1)
Where = tuple[Path, Path]


def make_world(folder: Path) -> Where:
    """A model folder, and a dataset in which every third sample is text only."""
    rows = []
    for number, scene in enumerate(scenes(0, 120, "train")):
        with_image = number % 3 != 0
        rows.append(
            {
                "id": scene.id,
                "image": {"bytes": scene.png, "path": f"{scene.id}.png"} if with_image else None,
                "captions": scene.captions,
                "conversations": [
                    {
                        "from": "human",
                        "value": "<image>\nWhat is there?" if with_image else "Say <image> <|im_end|>",
                    },
                    {"from": "gpt", "value": scene.captions[0][: 5 + number]},
                    {"from": "human", "value": "And?"},
                    {"from": "gpt", "value": scene.captions[-1]},
                ],
            }
        )
    write_rows(folder / "data.parquet", rows, GroupSize(rows=20))
    return tiny_llava(folder / "model"), folder / "data.parquet"


@dataclass
class Pieces:
    """What a rank trains with."""

    stock: Any
    processor: Any
    encoder: Encoder
    rows: ParquetRows
    plan: Plan
    collator: Collator
    module: models.LlavaForTraining


def build(
    model: Path, data: Path, stage: int, tokens_per_row: int, adapters: lora.Lora | None = None
) -> Pieces:
    """The pieces of stage 1 or 2; with `adapters` the language model trains through LoRA."""
    stock, processor = models.load(model, torch.float32), models.load_processor(model)
    view, template, parts = {
        1: ("captions", "plain", ["projector"]),
        2: ("conversations", "chatml", ["projector", "language_model"]),
    }[stage]
    models.set_trainable(stock, parts)
    if adapters is not None:
        lora.inject(stock, adapters, seed=5)
    pixels = Pixels(processor.image_processor)
    encoder = Encoder(processor.tokenizer, template, models.image_tokens(stock.config), 2048)
    rows = ParquetRows(fs.LocalFileSystem(), [str(data)], VIEWS[view][1])
    index, _ = scan(rows, view, encoder)
    plan = Plan(index, seed=3, epochs=10, global_batch=12)
    collator = Collator(rows, view, encoder, pixels, plan, tokens_per_row)
    module = models.LlavaForTraining(stock, pixels)
    stock.model.language_model.train()
    return Pieces(stock, processor, encoder, rows, plan, collator, module)


def _engine(pieces: Pieces, task: dict[str, Any]) -> Engine:
    memory.checkpoint_activations(pieces.stock.model.language_model, task.get("checkpointing", "none"))
    if task.get("fused"):
        memory.fuse_loss(pieces.module)
    adamw = AdamW(weight_decay=0.01, scales=task.get("scales", ()))
    if not task["zero"]:
        return PlainEngine(pieces.module, adamw, gradient_clipping=1.0)
    from components.training.deepspeed_config import deepspeed_config
    from components.training.deepspeed_engine import DeepSpeedEngine, prepare_environment

    prepare_environment("cpu")
    config = deepspeed_config(task["zero"], 1.0, bf16=False)
    return DeepSpeedEngine(pieces.module, adamw, config, pieces.collator.blank_row())


def run_rank(rank: int, world_size: int, port: int, out: Any, where: Where, task: dict[str, Any]) -> None:
    """One process of a group: trains; rank 0 sends back losses and weights, any rank what went wrong."""
    torch.set_num_threads(1)
    if world_size > 1 or task["zero"]:
        os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
        distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        result = _train(where, task)
    except Exception as error:
        out.put(error)
        return
    if rank == 0:
        out.put(result)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _train(where: Where, task: dict[str, Any]) -> Any:
    adapters = ADAPTERS if task.get("lora") else None
    pieces = build(*where, task["stage"], task["tokens_per_row"], adapters)
    identity = {"seed": 3, "frozen": checkpoint.frozen_digest(pieces.stock)}
    engine = _engine(pieces, task)
    first = 0
    if resume := task.get("resume"):
        state, position = checkpoint.read(resume, identity)
        engine.restore(state)
        first = position.step
    losses: list[float] = []

    def after(report: StepReport) -> bool:
        losses.append(report.loss)
        return report.step == task.get("stop_at")

    done = train(engine, pieces.collator, Schedule(STEPS, 1e-2, 0.1), first, after)
    state = engine.state()
    if state is None:
        return None
    if "save" in task:
        checkpoint.write(task["save"], state, checkpoint.Position(done, identity))
    return losses, torch.cat([value.flatten() for _, value in sorted(state.weights.items())]).numpy()


def run_group(where: Where, workers: int, **task: Any) -> tuple[list[float], torch.Tensor]:
    """Losses and weights of a run on `workers` real processes.

    `task`: stage, tokens_per_row, zero (0: plain torch), lora, checkpointing, fused, scales, stop_at, save, resume.
    """
    task = {"stage": 2, "tokens_per_row": 1000, "zero": 0, **task}
    if workers == 1 and not task["zero"]:
        alone: queue.SimpleQueue[Any] = queue.SimpleQueue()
        run_rank(0, 1, 0, alone, where, task)
        return _result(alone.get())
    # The server imports once what every rank needs, and forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training", *(["deepspeed"] if task["zero"] else [])])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, workers, port, out, where, task))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        result = _result(out.get(timeout=180))
    finally:
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0] * workers
    return result


def _result(sent: Any) -> tuple[list[float], torch.Tensor]:
    if isinstance(sent, Exception):
        raise sent
    losses, weights = sent
    return losses, torch.from_numpy(weights)
