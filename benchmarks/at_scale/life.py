"""One rank's life in a training of a checkout: start, a step, save, resume, export; the same calls before and after.

It runs with the `llava` and `components` of whichever checkout comes first on the path, and calls the real `Run` with
the real `Saving`. Replaced are what needs a cluster: the client to the driver, and Ray's word on the local rank.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import distributed

from benchmarks.at_scale.group import run_group, values_of
from benchmarks.at_scale.phases import Phases, Watch
from components.contract import acquire, open_store
from components.training import run as run_module
from components.training.deepspeed_config import deepspeed_config
from components.training.deepspeed_engine import DeepSpeedEngine, prepare_environment
from components.training.observers.base import RunState
from components.training.observers.saving import Saving
from components.training.settings import TrainSettings
from llava import model as models
from llava.attention import segments
from llava.conversation import Encoder
from llava.data.collate import Collator, PackedRow
from llava.pixels import Pixels
from llava.training import checkpoint
from llava.training.engine import AdamW

PHASES = ("load", "engine", "step", "save", "flush", "blank step", "resume", "export")
_PARTS = ["projector", "language_model"]
_IDENTITY = {"seed": 0}
_TOKENS = 16


def life(job: dict[str, Any], guard: Any) -> dict[str, Any]:
    """`job`: model, root, zero, new (whether the checkout writes checkpoints on all ranks)."""
    transformers.utils.logging.set_verbosity_error()
    phases, rank = Phases(), distributed.get_rank()
    source, store = Path(job["model"]), open_store(job["root"])
    settings = TrainSettings(
        template="chatml",
        global_batch=8,
        learning_rate=1e-4,
        zero_stage=job["zero"],
        checkpoint_every=1,
    )
    config = deepspeed_config(job["zero"], 1.0, bf16=True)
    torch.manual_seed(rank)
    with phases.phase("load"):
        stock = (_loaded if job["new"] else _loaded_whole)(source, config)
    processor = models.load_processor(source)
    pixels = Pixels(processor.image_processor)
    encoder = Encoder(processor.tokenizer, "chatml", models.image_tokens(stock.config), 2048)
    nothing: Any = None
    blank = Collator(nothing, "captions", encoder, pixels, nothing, 1000).blank_row()
    with phases.phase("engine"):
        engine = DeepSpeedEngine(models.LlavaForTraining(stock, pixels), AdamW(), config, blank)
    with phases.phase("step"):
        engine.backward(engine.loss(_row(blank)), _TOKENS, last=True)
        engine.step(1e-4)
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as scratch:
        state = _state(job, settings, engine, store, guard, Path(scratch))
        saving = Saving(state, _IDENTITY)
        run = run_module.Run(state, _IDENTITY, [saving])
        report: Any = SimpleNamespace(step=1, ids=[f"sample-{rank}"])
        held: dict[str, float] = {}
        with phases.phase("save"):
            with _timed(held, "seconds"):
                run.after_step(report)
            saving._saver.wait()
        with phases.phase("flush"):
            written = _flushed(store) if rank == 0 else 0
        with phases.phase("blank step"):
            engine.backward(engine.loss(blank), 1, last=True)
            engine.step(0.0)
        with phases.phase("resume"):
            assert run.resume() == 1
        # The end of a training saves once more if it must; here the last checkpoint is there.
        state.plan.steps = 1
        with phases.phase("export"):
            run.finish(source)
        run.close()
    exported = sum(entry.size for entry in store.list("model/")) if rank == 0 else 0
    return {"phases": phases.found, "held": held["seconds"], "state": written, "model": exported}


def _loaded(source: Path, config: dict[str, Any]) -> Any:
    from components.training.deepspeed_engine import partition
    from llava.placing import place

    stock = models.load(source, models.stored_dtype(source) or torch.bfloat16)
    models.set_trainable(stock, _PARTS)
    frozen = checkpoint.FrozenDigest()
    cut = partial(partition, config=config) if config["zero_optimization"]["stage"] == 3 else None
    place(stock, torch.device("cpu"), torch.bfloat16, frozen.add, cut)
    frozen.hexdigest()
    return stock


def _loaded_whole(source: Path, config: dict[str, Any]) -> Any:
    stock: Any = models.load(source, torch.bfloat16)
    stock.to(device=torch.device("cpu"))
    models.set_trainable(stock, _PARTS)
    checkpoint.frozen_digest(stock)
    return stock


def _row(blank: PackedRow) -> PackedRow:
    """The blank row with text behind it, all of it supervised."""
    begin = len(blank.input_ids)
    ids = torch.randint(0, 200, (_TOKENS,))
    return PackedRow(
        input_ids=torch.cat([blank.input_ids, ids]),
        position_ids=torch.cat([blank.position_ids, torch.arange(_TOKENS)]),
        segments=segments([begin, _TOKENS]),
        image_positions=blank.image_positions,
        pixels=blank.pixels,
        predict=torch.arange(begin, begin + _TOKENS),
        targets=ids.roll(-1),
    )


def _state(
    job: dict[str, Any], settings: Any, engine: Any, store: Any, guard: Any, scratch: Path
) -> RunState:
    task: Any = SimpleNamespace(settings=settings, folder=store, guard=guard, earlier=(), training="full")
    plan: Any = SimpleNamespace(steps=2)
    client: Any = SimpleNamespace(note=lambda text: None, stopped=lambda step: None)
    if not job["new"]:
        # The checkout's only question to Ray: which rank of a node downloads. Here nothing has to be downloaded.
        context = SimpleNamespace(get_local_rank=distributed.get_rank)
        run_module.get_context = lambda: context  # type: ignore[attr-defined]
        return RunState(task, engine, plan, scratch, client)  # type: ignore[call-arg]
    from components.training.checkpoints import CheckpointFolders

    return RunState(task, engine, plan, scratch, client, CheckpointFolders(store, guard, 2), "bench000")


@contextlib.contextmanager
def _timed(into: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    into[name] = time.monotonic() - began


def _flushed(store: Any) -> int:
    """Wait until the tensors of the checkpoint are on the disk; their bytes."""
    total = 0
    for entry in store.list("checkpoints/"):
        with (store.local_path / entry.key).open("rb") as file:
            os.fsync(file.fileno())
        total += entry.size if entry.key.endswith(".safetensors") else 0
    return total


def _serve(answer: Callable[[Any], None]) -> None:
    """A job a line, each on a fresh group of ranks."""
    prepare_environment("cpu")
    import deepspeed  # noqa: F401

    for line in sys.stdin:
        job, watch = json.loads(line), Watch()
        # Its thread renews after a third of the time: it sleeps while the ranks are forked.
        with acquire(open_store(job["root"]), ttl=24 * 3600.0) as lease:
            ranks = values_of(
                run_group(life, job["world"], job, lease.guard, seconds=job["seconds"], watch=watch)
            )
        answer(
            [
                {
                    "held": one["held"],
                    "state": one["state"],
                    "model": one["model"],
                    "phases": {name: watch.peaks(rank, found) for name, found in one["phases"].items()},
                }
                for rank, one in enumerate(ranks)
            ]
        )


def main() -> None:
    """Answers go to the descriptor that was standard output; what libraries print goes to the errors."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(lambda found: print(json.dumps(found), file=out, flush=True))


if __name__ == "__main__":
    main()
