"""What a user would otherwise run: Hugging Face's `Trainer` with a padding collator, and TRL's `SFTTrainer`."""

import copy
import threading
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaProcessor, PrinterCallback, TrainerCallback

from benchmarks.training_step.shapes import World
from benchmarks.training_step.sides import CLIP, prepare, saving
from llava.conversation import IGNORE
from llava.data.images import decode
from llava.data.samples import VIEWS
from llava.training.engine import AdamW, trainable

LOADERS = 4
"""Worker processes that load data on a GPU, as in LLaVA's own scripts."""


class Samples(Dataset[dict[str, Any]]):
    """The samples of all steps, in the order of the plan; decoded and encoded when asked for, as on our side."""

    def __init__(self, world: World, steps: int, sort: bool):
        """`sort`: the longest first within each global batch, the best that grouping by length could do."""
        index, samples_of = world.plan.index, VIEWS[world.stage.view][0]
        self.encoder = world.encoder
        self.samples = []
        for number in range(steps):
            chosen = world.plan.samples(number)
            if sort:
                chosen = chosen[np.argsort(-index.tokens[chosen], kind="stable")]
            for sample in chosen:
                row = world.rows.row(int(index.group[sample]), int(index.row[sample]))
                self.samples.append((row["image"]["bytes"], samples_of(row)[int(index.part[sample])]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        data, turns = self.samples[number]
        encoded = self.encoder.encode(turns, 1)
        return {"image": decode(data), "input_ids": encoded.ids, "labels": encoded.labels}


@dataclass
class PaddingCollator:
    """Right-padded batches with an attention mask, pictures through the stock image processor."""

    image_processor: Any
    pad: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)

        def padded(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

        return {
            "input_ids": padded([sample["input_ids"] for sample in samples], self.pad),
            "attention_mask": padded([[1] * len(sample["input_ids"]) for sample in samples], 0),
            "labels": padded([sample["labels"] for sample in samples], IGNORE),
            "pixel_values": self.image_processor(
                [sample["image"] for sample in samples], return_tensors="pt"
            )["pixel_values"],
        }


class TrainerSide:
    """Hugging Face's `Trainer`, alive in a thread of its own, one update at a time."""

    what = "transformers.Trainer"

    def __init__(
        self,
        name: str,
        world: World,
        optimizer: torch.optim.Optimizer,
        steps: int,
        folder: Path,
        sort: bool = False,
        checkpointing: bool = False,
    ):
        self.name, self.world, self.checkpointing = name, world, checkpointing
        self.what = _padded(self.what, world, sort, checkpointing)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.loss, self.losses, self.closing = 0.0, list[torch.Tensor](), False
        batch, on_gpu = world.batch, next(world.model.parameters()).is_cuda
        arguments = {
            "output_dir": str(folder / name),
            "per_device_train_batch_size": batch.micro,
            "gradient_accumulation_steps": batch.samples // batch.micro,
            "max_steps": steps,
            "learning_rate": 0.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": CLIP,
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "dataloader_num_workers": LOADERS if on_gpu else 0,
            "dataloader_pin_memory": on_gpu,
            "bf16": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not on_gpu,
        }
        self.trainer = self._trainer(arguments, Samples(world, steps, sort), optimizer)
        self.trainer.remove_callback(PrinterCallback)
        self.thread = threading.Thread(target=self._train, name=name, daemon=True)
        self.thread.start()

    def _trainer(self, arguments: dict[str, Any], samples: Samples, optimizer: torch.optim.Optimizer) -> Any:
        from transformers import Trainer, TrainingArguments

        return _recorded(Trainer, self)(
            model=self.world.model,
            args=TrainingArguments(**arguments),
            train_dataset=samples,
            data_collator=_collator(self.world),
            optimizers=(optimizer, None),
            callbacks=[_Turns(self)],
        )

    def _train(self) -> None:
        self.go.acquire()
        try:
            if not self.closing:
                self.trainer.train()
        except BaseException as error:
            self.error = error
            self.done.release()

    def enter(self) -> None:
        prepare(self.world, "sdpa", self.checkpointing)

    def step(self, number: int) -> float:
        self.go.release()
        self.done.acquire()
        if self.error:
            raise self.error
        return self.loss

    def close(self) -> None:
        self.closing = True
        self.go.release()
        self.thread.join()


class TrlSide(TrainerSide):
    """TRL's `SFTTrainer`, on a copy of the model since it changes the model's forward pass."""

    what = "trl.SFTTrainer"

    def __init__(self, name: str, world: World, adamw: AdamW, steps: int, folder: Path):
        copied = replace(world, model=copy.deepcopy(world.model))
        copied.model.model.language_model.set_attn_implementation("sdpa")
        self.named = trainable(copied.model)
        self.optimizer = adamw.build(self.named)
        super().__init__(name, copied, self.optimizer, steps, folder)

    def _trainer(self, arguments: dict[str, Any], samples: Samples, optimizer: torch.optim.Optimizer) -> Any:
        from datasets import Dataset as Table
        from trl import SFTConfig, SFTTrainer

        world, collate = self.world, _collator(self.world)
        # On by default there; the name changed in transformers 5.
        names = ("activation_checkpointing", "gradient_checkpointing")
        arguments[next(name for name in names if name in SFTConfig.__dataclass_fields__)] = False
        processor = LlavaProcessor(world.image_processor, world.encoder.tokenizer, patch_size=1)
        return _recorded(SFTTrainer, self)(
            model=world.model,
            args=SFTConfig(**arguments),
            processing_class=processor,
            # It takes nothing but a table with a column of images: here their numbers.
            train_dataset=Table.from_dict({"image": list(range(len(samples)))}),
            data_collator=lambda items: collate([samples[item["image"]] for item in items]),
            optimizers=(optimizer, None),
            callbacks=[_Turns(self)],
        )


def _recorded(kind: type, side: TrainerSide) -> type:
    """The trainer class, which also keeps the loss of each micro-batch."""

    class Recorded(kind):  # type: ignore[misc]
        def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **keywords)
            side.losses.append(loss)
            return loss

    return Recorded


class _Turns(TrainerCallback):  # type: ignore[misc]
    """Stops the trainer's thread between two updates."""

    def __init__(self, side: TrainerSide):
        self.side = side

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        side = self.side
        side.loss = float(torch.stack(side.losses).sum())
        side.losses.clear()
        side.done.release()
        side.go.acquire()
        control.should_training_stop |= side.closing


class LoopSide:
    """What `Trainer` does in an update, written out: for where accelerate, which it needs, is not installed."""

    def __init__(
        self,
        name: str,
        world: World,
        optimizer: torch.optim.Optimizer,
        steps: int,
        folder: Path,
        sort: bool = False,
        checkpointing: bool = False,
    ):
        self.name, self.world, self.optimizer, self.checkpointing = name, world, optimizer, checkpointing
        self.what = _padded("a plain loop", world, sort, checkpointing)
        self.device = next(world.model.parameters()).device
        self.learning = [parameter for parameter in world.model.parameters() if parameter.requires_grad]
        self.batches = iter(
            DataLoader(
                Samples(world, steps, sort),
                batch_size=world.batch.micro,
                collate_fn=_collator(world),
                num_workers=LOADERS if self.device.type == "cuda" else 0,
                pin_memory=self.device.type == "cuda",
            )
        )

    def enter(self) -> None:
        prepare(self.world, "sdpa", self.checkpointing)

    def step(self, number: int) -> float:
        batches = [next(self.batches) for _ in range(self.world.batch.samples // self.world.batch.micro)]
        supervised = sum(batch["labels"][:, 1:].ne(IGNORE).sum() for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            inputs = {name: value.to(self.device) for name, value in batch.items()}
            loss = self.world.model(**inputs, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.learning, CLIP)
        self.optimizer.step()
        self.world.model.zero_grad()
        return float(total)

    def close(self) -> None:
        del self.batches


def peer() -> type[TrainerSide] | type[LoopSide]:
    """The padding side that can run here."""
    return TrainerSide if find_spec("accelerate") else LoopSide


def _collator(world: World) -> PaddingCollator:
    return PaddingCollator(world.image_processor, world.encoder.tokenizer.pad_token_id)


def _padded(what: str, world: World, sort: bool, checkpointing: bool) -> str:
    order = ", the longest first in each global batch" if sort else ""
    return f"{what}, right-padded batches of {world.batch.micro}{order}" + saving(checkpointing)
