"""One worker's life: build the model, find the newest checkpoint, train, write the model."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from components.contract import StoreError
from components.training.board import ProgressClient
from components.training.checkpoints import CheckpointFolders, Damaged
from components.training.data import HELD_OUT_INDEX, INDEX, MODEL, open_all, source_of
from components.training.deepspeed_engine import DeepSpeedEngine, partition, prepare_environment
from components.training.observers.base import RunState
from components.training.run import Run, observers_of
from components.training.settings import TrainSettings
from components.training.task import Task
from components.training.utilisation import utilisation
from llava import lora, quantized
from llava import model as models
from llava.conversation import Encoder
from llava.data.collate import Collator
from llava.data.images import BadImage
from llava.data.plan import BatchPlan, SampleIndex
from llava.errors import LlavaError
from llava.pixels import Pixels
from llava.placing import place
from llava.training import memory
from llava.training.checkpoint import FrozenDigest
from llava.training.engine import AdamW, Engine, PlainEngine
from llava.training.heldout import heldout_loss
from llava.training.loop import Schedule, told, train


def work(task: Task) -> None:
    """The train function of Ray Train: all workers run it together, from the start after each loss of one."""
    client = ProgressClient(task.progress_actor)
    if client.failure():
        return
    try:
        _work(task)
    except (StoreError, Damaged):
        # A store that is away for a moment, or a checkpoint before which there may be another: starting again may help.
        raise
    except LlavaError as error:
        dataset = f"dataset {task.dataset.uri}: " if isinstance(error.__cause__, BadImage) else ""
        client.fail(f"{dataset}{error}", error.exit_status)
        raise


def _work(task: Task) -> None:
    settings = task.settings
    with tempfile.TemporaryDirectory(prefix="llava-worker-") as scratch:
        setup = _Setup(task, Path(scratch))
        state = RunState(
            task,
            setup.engine,
            setup.plan,
            Path(scratch),
            ProgressClient(task.progress_actor),
            CheckpointFolders(task.folder, task.guard, settings.keep_checkpoints, task.earlier),
            told(setup.engine, uuid4().hex[:8]),
        )
        observers = observers_of(state, setup.identity, setup.utilisation, setup.heldout)
        run = Run(state, setup.identity, observers)
        try:
            first = run.resume()
            schedule = Schedule(
                setup.plan.steps,
                settings.learning_rate,
                settings.warmup_ratio,
                settings.seed,
                settings.warmup_from_zero,
            )
            train(setup.engine, setup.collator, schedule, first, run.after_step, run.word)
            if not state.stopped:
                run.finish(setup.source)
        finally:
            run.close()


class _Setup:
    """The pieces that training needs, built from the task."""

    def __init__(self, task: Task, scratch: Path):
        settings = self.settings = task.settings
        cuda = settings.gpu and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        prepare_environment(device.type)
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.source = task.model.local(MODEL)
        # As it is stored, the system maps it: one copy for all ranks of a node, and none that is theirs.
        stock = models.load(self.source, models.stored_dtype(self.source) or dtype)
        models.set_trainable(stock, list(task.parts))
        cost = models.image_cost(stock)
        frozen = FrozenDigest()
        if settings.lora_bits == 4:
            quantized.quantize(stock, device, dtype, frozen.add)
        processor = models.load_processor(self.source, settings.image_fit)
        if task.training == "lora":
            lora.inject(stock, settings.adapters(), settings.seed)
        cut = partial(partition, config=task.deepspeed) if settings.zero_stage == 3 else None
        place(stock, device, dtype, frozen.add, cut)
        pixels = Pixels(processor.image_processor)
        encoder = self._encoder(processor, stock.config)
        task.folder.download(INDEX, scratch / INDEX)
        index = SampleIndex.load(scratch / INDEX)
        rows = open_all([source_of(task.dataset), *task.extra], task.view)
        self.plan = BatchPlan(
            index,
            settings.seed,
            settings.epochs,
            settings.global_batch,
            rows.weights,
            cost,
        )
        budget = settings.layout.tokens_per_row
        self.collator = Collator(rows, task.view, encoder, pixels, self.plan, budget)
        self.utilisation = utilisation(stock.config, task.training, settings.lora_rank, device)
        self.identity = {
            "model": task.model.digest,
            "frozen": frozen.hexdigest(),
            "dataset": task.dataset.digest,
            "samples": len(index),
            "steps": self.plan.steps,
            "global_batch": settings.global_batch,
            "seed": settings.seed,
            "parts": list(task.parts),
            "training": task.training,
        }
        training = models.LlavaForTraining(stock, pixels, settings.attention)
        self.engine = _engine(settings, training, task.deepspeed, self.collator)
        self.heldout: Callable[[], float] | None = None
        if settings.eval_every:
            task.folder.download(HELD_OUT_INDEX, scratch / HELD_OUT_INDEX)
            plan = BatchPlan(
                SampleIndex.load(scratch / HELD_OUT_INDEX), settings.seed, 1.0, settings.global_batch
            )
            unseen = source_of(task.dataset, "heldout").open(task.view)
            # Of its own: both collators work at the same time, and a tokenizer changes while it does.
            own = self._encoder(models.load_processor(self.source), stock.config)
            collator = Collator(unseen, task.view, own, pixels, plan, budget)
            self.heldout = partial(heldout_loss, self.engine, training, collator, plan.steps)

    def _encoder(self, processor: Any, config: Any) -> Encoder:
        settings = self.settings
        return Encoder(
            processor.tokenizer, settings.template, models.image_tokens(config), settings.max_length
        )


def _engine(
    settings: TrainSettings, module: models.LlavaForTraining, deepspeed: dict[str, Any], collator: Collator
) -> Engine:
    language_model = module.stock.model.language_model
    # The tower stays in evaluation mode; adapters drop out and layers keep less only in training mode.
    language_model.train()
    memory.checkpoint_activations(language_model, settings.layout.checkpointing)
    if settings.compile:
        memory.compile_layers(language_model)
    if settings.fused_loss:
        memory.fuse_loss(module)
    if models.learns(module.stock.model.vision_tower):
        memory.checkpoint_tower(module.stock.model.vision_tower, settings.layout.checkpointing)
    rates = settings.own_rates()
    scales = tuple((str(models.PARTS[part]), rate / settings.learning_rate) for part, rate in rates.items())
    adamw = AdamW(weight_decay=settings.weight_decay, scales=scales)
    if settings.zero_stage == 0:
        return PlainEngine(module, adamw, settings.gradient_clipping)
    return DeepSpeedEngine(module, adamw, deepspeed, collator.blank_row())
