"""The loop on real processes: the same samples give the same loss wherever they are computed."""

import multiprocessing
import queue
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from torch import distributed

from components.shapes import scenes
from llava import model as models
from llava.conversation import Encoder
from llava.data.collate import Collator
from llava.data.images import decode
from llava.data.plan import Plan, scan
from llava.data.reader import ParquetRows
from llava.data.samples import VIEWS
from llava.data.schema import GroupSize, write_rows
from llava.errors import LlavaError
from llava.pixels import Pixels
from llava.training import checkpoint
from llava.training.engine import AdamW, PlainEngine
from llava.training.loop import Schedule, StepReport, train
from tests.tiny_llava import tiny_llava

STEPS = 12
IDENTITY = {"seed": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder, and a dataset in which every third sample is text only."""
    folder = tmp_path_factory.mktemp("training")
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
    stock: Any
    processor: Any
    encoder: Encoder
    rows: ParquetRows
    plan: Plan
    collator: Collator
    module: models.LlavaForTraining


def build(model: Path, data: Path, stage: int, tokens_per_row: int) -> Pieces:
    stock, processor = models.load(model, torch.float32), models.load_processor(model)
    view, template, parts = {
        1: ("captions", "plain", ["projector"]),
        2: ("conversations", "chatml", ["projector", "language_model"]),
    }[stage]
    models.set_trainable(stock, parts)
    pixels = Pixels(processor.image_processor)
    encoder = Encoder(processor.tokenizer, template, models.image_tokens(stock.config), 2048)
    rows = ParquetRows(fs.LocalFileSystem(), [str(data)], VIEWS[view][1])
    index, _ = scan(rows, view, encoder)
    plan = Plan(index, seed=3, epochs=10, global_batch=12)
    collator = Collator(rows, view, encoder, pixels, plan, tokens_per_row)
    return Pieces(stock, processor, encoder, rows, plan, collator, models.LlavaForTraining(stock, pixels))


def run_rank(
    rank: int, world_size: int, port: int, out: Any, where: tuple[Path, Path], task: dict[str, Any]
) -> None:
    """One process of a group: trains and sends back losses and weights."""
    torch.set_num_threads(1)
    if world_size > 1:
        distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    pieces = build(*where, task["stage"], task["tokens_per_row"])
    engine = PlainEngine(pieces.module, AdamW(), gradient_clipping=1.0)
    first = 0
    if resume := task.get("resume"):
        state, position = checkpoint.read(resume, IDENTITY)
        engine.restore(state)
        first = position.step
    losses: list[float] = []

    def after(report: StepReport) -> bool:
        losses.append(report.loss)
        return report.step == task.get("stop_at")

    done = train(engine, pieces.collator, Schedule(STEPS, 1e-2, 0.1), first, after)
    state = engine.state()
    if rank == 0:
        assert state is not None
        if "save" in task:
            checkpoint.write(task["save"], state, checkpoint.Position(done, IDENTITY))
        weights = torch.cat([value.flatten() for _, value in sorted(state.weights.items())])
        out.put((losses, weights.numpy()))
    if world_size > 1:
        distributed.destroy_process_group()


def run_group(where: tuple[Path, Path], workers: int, **task: Any) -> tuple[list[float], torch.Tensor]:
    """Losses and weights of a run on `workers` real processes."""
    task = {"stage": 2, "tokens_per_row": 1000, **task}
    if workers == 1:
        alone: queue.SimpleQueue[Any] = queue.SimpleQueue()
        run_rank(0, 1, 0, alone, where, task)
        losses, weights = alone.get()
        return losses, torch.from_numpy(weights)
    context = multiprocessing.get_context("spawn")
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
    losses, weights = out.get(timeout=120)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * workers
    return losses, torch.from_numpy(weights)


def test_the_packed_loss_is_the_stock_loss_of_each_sample_alone(world: tuple[Path, Path]) -> None:
    pieces = build(*world, stage=2, tokens_per_row=700)
    step = pieces.collator.step(0, rank=0, world=1)
    assert len(step.rows) > 1
    ours = sum(float(pieces.module(row).detach()) for row in step.rows)
    stock_sum, supervised = 0.0, 0
    with models.stock_attention(pieces.stock), torch.no_grad():
        for sample in pieces.plan.samples(0):
            index = pieces.plan.index
            row = pieces.rows.row(int(index.group[sample]), int(index.row[sample]))
            encoded = pieces.encoder.encode(row["conversations"], int(row["image"] is not None))
            pixels = None
            if row["image"] is not None:
                image = decode(row["image"]["bytes"])
                pixels = pieces.processor.image_processor(image, return_tensors="pt")["pixel_values"]
            ids, labels = torch.tensor([encoded.ids]), torch.tensor([encoded.labels])
            logits = pieces.stock(input_ids=ids, pixel_values=pixels).logits[0, :-1]
            stock_sum += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
            supervised += encoded.supervised
    assert step.supervised == supervised
    assert ours == pytest.approx(stock_sum, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_workers_and_packing_change_neither_losses_nor_weights(world: tuple[Path, Path], stage: int) -> None:
    alone, weights = run_group(world, 1, stage=stage, tokens_per_row=600)
    assert len(alone) == STEPS
    assert alone[-1] < alone[0]
    for workers, tokens_per_row in ((1, 4000), (2, 600)):
        losses, others = run_group(world, workers, stage=stage, tokens_per_row=tokens_per_row)
        assert losses == pytest.approx(alone, abs=1e-4)
        assert torch.allclose(others, weights, atol=1e-4)


def test_a_resumed_run_ends_with_the_very_same_weights(world: tuple[Path, Path], tmp_path: Path) -> None:
    losses, weights = run_group(world, 2)
    saved = tmp_path / "checkpoint"
    begun, _ = run_group(world, 2, stop_at=8, save=saved)
    resumed, again = run_group(world, 2, resume=saved)
    assert begun + resumed == losses
    assert torch.equal(again, weights)
    alone, close = run_group(world, 1, resume=saved)
    assert alone == pytest.approx(losses[8:], abs=1e-4)
    assert torch.allclose(close, weights, atol=1e-4)


def test_a_checkpoint_of_another_run_is_refused(world: tuple[Path, Path], tmp_path: Path) -> None:
    run_group(world, 1, stop_at=2, save=tmp_path / "checkpoint")
    with pytest.raises(LlavaError, match="seed differ"):
        checkpoint.read(tmp_path / "checkpoint", {"seed": 4})


def test_only_what_should_train_gets_trained(world: tuple[Path, Path]) -> None:
    stock = models.load(world[0], torch.float32)
    projector = models.set_trainable(stock, ["projector"])
    assert projector and all(name.startswith("model.multi_modal_projector.") for name in projector)
    both = models.set_trainable(stock, ["projector", "language_model"])
    assert set(projector) < set(both)
    assert not any("vision_tower" in name for name in both)


def test_a_loss_that_is_no_number_stops_the_run_and_names_samples(world: tuple[Path, Path]) -> None:
    pieces = build(*world, stage=2, tokens_per_row=1000)
    engine = PlainEngine(pieces.module, AdamW(), gradient_clipping=0.0)
    with torch.no_grad():
        engine.named["model.multi_modal_projector.linear_1.weight"].fill_(float("nan"))
    with pytest.raises(LlavaError, match=r"step 1: .* is no number .*shapes-0-"):
        train(engine, pieces.collator, Schedule(STEPS, 1e-2, 0.1), 0, lambda report: False)
