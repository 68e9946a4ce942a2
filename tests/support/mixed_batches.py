"""A small dataset with several-image, one-image and text-only samples, and what training on it needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from components.tiny_world import scenes
from llava import lora, quantized
from llava import model as models
from llava.conversation import Encoder
from llava.data.collate import Collator
from llava.data.plan import BatchPlan, scan
from llava.data.reader import ParquetRows
from llava.data.samples import VIEWS
from llava.data.schema import GroupSize, write_rows
from llava.pixels import Pixels

STAGES = {
    1: ("captions", "plain", ["projector"]),
    2: ("conversations", "chatml", ["projector", "language_model"]),
}
"""View, template and what trains."""


def write_mixed(path: Path, samples: int = 90) -> Path:
    """Every third sample is text only, every fourth has two or three pictures; six row groups."""
    rows = []
    drawn = list(scenes(0, samples + 2, "train"))
    for number, scene in enumerate(drawn[:samples]):
        count = 0 if number % 3 == 0 else 2 + number // 4 % 2 if number % 4 == 0 else 1
        cells = [{"bytes": one.png, "path": f"{one.id}.png"} for one in drawn[number : number + count]]
        slots = " and ".join(["<image>"] * count)
        rows.append(
            {
                "id": scene.id,
                "image": cells[0] if cells else None,
                "more_images": cells[1:] or None,
                "captions": scene.captions[:1],
                "conversations": [
                    {
                        "from": "human",
                        "value": f"{slots}\nWhat is there?" if count else "Say <image> <|im_end|>",
                    },
                    {"from": "gpt", "value": scene.captions[0][: 5 + number]},
                    {"from": "human", "value": "And?"},
                    {"from": "gpt", "value": scene.captions[-1]},
                ],
            }
        )
    write_rows(path, rows, GroupSize(rows=-(-samples // 6)))
    return path


@dataclass
class TrainingParts:
    """Everything between the files and the engine."""

    stock: Any
    processor: Any
    encoder: Encoder
    rows: ParquetRows
    plan: BatchPlan
    collator: Collator
    module: models.LlavaForTraining


def pieces(
    model: Path,
    data: Path,
    stage: int,
    tokens_per_row: int,
    global_batch: int = 12,
    adapters: lora.Lora | None = None,
    bits: int = 16,
    tower: bool = False,
) -> TrainingParts:
    """The pieces of one run in fp32; with `adapters` the language model trains through LoRA, its own in `bits`.

    `tower`: the vision tower learns, too.
    """
    stock, processor = models.load(model, torch.float32), models.load_processor(model)
    view, template, parts = STAGES[stage]
    models.set_trainable(stock, [*parts, *["vision_tower"] * tower])
    if bits == 4:
        quantized.quantize(stock, torch.device("cpu"))
    if adapters is not None:
        lora.inject(stock, adapters, seed=5)
    pixels = Pixels(processor.image_processor)
    encoder = Encoder(processor.tokenizer, template, models.image_tokens(stock.config), 2048)
    rows = ParquetRows(fs.LocalFileSystem(), [str(data)], VIEWS[view][1])
    index, _ = scan(rows, view, encoder)
    plan = BatchPlan(index, seed=3, epochs=10, global_batch=global_batch)
    collator = Collator(rows, view, encoder, pixels, plan, tokens_per_row)
    stock.model.language_model.train()
    return TrainingParts(
        stock, processor, encoder, rows, plan, collator, models.LlavaForTraining(stock, pixels)
    )
