"""`llava estimate`: what the stages of a preset need on given GPUs, how long they take, and how to run them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from components.backbones import shipped
from components.backbones.component import BackbonesSettings
from components.contract import tell
from components.registry import model_config
from components.training.candidates import candidates, setup_of
from components.training.settings import WITHOUT_GPU, TrainSettings
from components.training.ways_out import ways_out
from llava import estimate as arithmetic
from llava.errors import RefusedInput
from llava.estimate import GIB, RESERVE, Choice, Corpus, Gpu
from llava.host_memory import HostMemory, checkpoint_bytes, host_memory, model_bytes
from llava.sizes import (
    PUBLISHED,
    Flops,
    LanguageSizes,
    Sizes,
    Training,
    language_sizes,
    llava_sizes,
    vision_sizes,
)
from llava.towers.base import VisionSizes
from workflows import config as configs
from workflows import plan as plans
from workflows.config import Expected, WorkflowConfig
from workflows.plan import Step

PER_NODE = 8
"""GPUs of a node, at most."""
UNKNOWN = Expected(samples=1, text_tokens=256, supervised_tokens=128)
"""What a sample is taken for where the config expects nothing; there is no number of hours then."""


@dataclass(frozen=True)
class StagePlan:
    """One stage on the GPUs."""

    stage: str
    training: Training
    corpus: Corpus
    known: bool
    """Whether the config says what the data holds."""
    found: list[Choice]
    """Every way to run it that the config leaves open."""
    best: Choice
    faster: Choice | None
    """The fastest that does not fit with room to spare, where it is faster."""
    updates: int
    hours: float
    learning: int
    """Parameters that learn."""
    host: HostMemory
    checkpoint: int
    """Bytes of one checkpoint."""
    model: int
    """Bytes of the stage's model."""


def plan(
    preset: str, overrides: list[str], gpus: int, gpu: str, mfu: float
) -> tuple[WorkflowConfig, Sizes, list[StagePlan]]:
    """The stages of a preset on `gpus` GPUs. Raises `RefusedInput` where one cannot fit."""
    if not 0 < mfu < 1:
        raise RefusedInput(f"--mfu {mfu}: a share between 0 and 1, such as 0.4")
    card = arithmetic.gpu(gpu)
    config = configs.load_without_data(preset, overrides)
    sizes = sizes_of(config)
    training = [step for step in plans.make_plan(config) if step.component.trains]
    return (
        config,
        sizes,
        [_stage(step, config, sizes, gpus, gpu, card, mfu) for step in training],
    )


def _stage(
    step: Step, config: WorkflowConfig, sizes: Sizes, gpus: int, gpu: str, card: Gpu, mfu: float
) -> StagePlan:
    name: str = step.name
    settings: TrainSettings = step.settings
    expected = config.estimate.get(name)
    corpus = (expected or UNKNOWN).corpus(settings.epochs)
    parts = settings.parts(step.component.trains)
    training = settings.training(parts)
    found = candidates(sizes, settings, parts, gpus, corpus, card)
    best = arithmetic.choose(
        found,
        card,
        f"{config.name}, {name} on {gpus} x {gpu}",
        lambda: ways_out(name, sizes, settings, parts, gpus, corpus, card),
    )
    faster = min((each for each in found if not each.roomy), key=lambda each: each.seconds, default=None)
    return StagePlan(
        name,
        training,
        corpus,
        expected is not None,
        found,
        best,
        faster if faster is not None and faster.seconds < best.seconds else None,
        max(1, round(-(-corpus.samples // settings.global_batch) * settings.epochs)),
        arithmetic.hours(sizes, best.setup, corpus, card, mfu),
        sizes.trainable(training, best.setup.lora_rank, best.setup.tower),
        host_memory(sizes, best.setup),
        checkpoint_bytes(sizes, best.setup),
        model_bytes(sizes, best.setup),
    )


def host_needs(config: WorkflowConfig, gpus: int) -> Iterator[tuple[str, HostMemory, float]]:
    """What each training stage takes of a node with so many GPUs: of a rank, and in all, at its worst.

    With `min_workers` the group may be smaller: fewer ranks with larger shares.
    """
    sizes = sizes_of(config)
    for step in plans.make_plan(config):
        if step.component.trains and step.settings.gpu:
            settings: TrainSettings = step.settings
            parts = settings.parts(step.component.trains)
            counts = range(settings.min_workers or settings.workers, settings.workers + 1)
            hosts = [(host_memory(sizes, setup_of(settings, parts, count)), count) for count in counts]
            host, count = max(hosts, key=lambda each: each[0].node(min(gpus, each[1])))
            yield step.name, host, host.node(min(gpus, count))


def sizes_of(config: WorkflowConfig) -> Sizes:
    """The shapes of the config's model, without fetching anything."""
    if config.finetune.from_ is not None:
        return llava_sizes(model_config(config.finetune.from_).to_dict())
    backbones = config.backbones
    vision, language = _part(backbones, "vision"), _part(backbones, "language")
    assert isinstance(vision, VisionSizes) and isinstance(language, LanguageSizes)
    return Sizes(vision, language, backbones.projector, backbones.feature_layer, backbones.keep_cls)


def _part(settings: BackbonesSettings, what: str) -> VisionSizes | LanguageSizes:
    read = vision_sizes if what == "vision" else language_sizes
    if settings.kind == "tiny":
        return read(json.loads((shipped.TOWERS / what / "config.json").read_text()))
    source = next(each for each in settings.sources if each.what == what)
    if source.folder is not None:
        try:
            return read(json.loads((source.folder / "config.json").read_text()))
        except (OSError, ValueError) as error:
            raise RefusedInput(f"backbones.{what}={source.location}: {error}") from None
    if source.location not in PUBLISHED:
        raise RefusedInput(
            f"backbones.{what}={source.location}: its shapes are not known before it is fetched; name a folder that "
            f"holds its config.json, or one of {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[source.location]


def as_json(
    config: WorkflowConfig,
    sizes: Sizes,
    stages: list[StagePlan],
    gpus: int,
    gpu: str,
    mfu: float,
    price: float | None,
) -> dict[str, Any]:
    """Every figure; memory in bytes."""
    card = arithmetic.gpu(gpu)
    return {
        "name": config.name,
        "gpus": gpus,
        "gpu": {"name": gpu, **asdict(card), "usable_bytes": arithmetic.usable(card)},
        "mfu": mfu,
        "parameters": _parameters(sizes),
        "stages": {
            each.stage: {
                "training": each.training,
                "trainable": each.learning,
                "data": asdict(each.corpus) | {"expected": each.known},
                "flops_per_sample": asdict(_flops(sizes, each)),
                "updates": each.updates if each.known else None,
                "hours": each.hours if each.known else None,
                "price": price * gpus * each.hours if price is not None and each.known else None,
                "host_memory": asdict(each.host) | {"rank": each.host.rank},
                "checkpoint_bytes": each.checkpoint,
                "model_bytes": each.model,
                "chosen": _choice(each.best),
                "choices": [_choice(choice) for choice in each.found],
            }
            for each in stages
        },
    }


def _choice(choice: Choice) -> dict[str, Any]:
    setup = {name: getattr(choice.setup, name) for name in WITHOUT_GPU}
    memory = asdict(choice.memory) | {"allocated": choice.memory.allocated, "total": choice.memory.total}
    return setup | {
        "memory": memory,
        "fits": choice.fits,
        "roomy": choice.roomy,
        "seconds_per_update": choice.seconds,
    }


def _parameters(sizes: Sizes) -> dict[str, int]:
    return {
        "vision_tower": sizes.vision.parameters,
        "projector": sizes.projector_parameters,
        "language_model": sizes.language.parameters,
    }


def _flops(sizes: Sizes, stage: StagePlan) -> Flops:
    return arithmetic.step_flops(sizes, stage.best.setup, stage.corpus, 1)


def lines(
    config: WorkflowConfig,
    sizes: Sizes,
    stages: list[StagePlan],
    gpus: int,
    gpu: str,
    mfu: float,
    price: float | None,
) -> Iterator[str]:
    """The same for a person."""
    card = arithmetic.gpu(gpu)
    parameters = ", ".join(f"{part.replace('_', ' ')} {_count(n)}" for part, n in _parameters(sizes).items())
    yield f"{config.name}: {parameters}"
    yield (
        f"{gpus} x {gpu}: {card.memory_gib} GiB each, {arithmetic.usable(card) / GIB:.1f} of it to give; "
        f"{card.tflops:.0f} TFLOP/s dense bf16"
    )
    for stage in stages:
        yield ""
        yield from _stage_lines(config, sizes, stage, gpus, card, mfu, price)


def _stage_lines(
    config: WorkflowConfig,
    sizes: Sizes,
    stage: StagePlan,
    gpus: int,
    card: Gpu,
    mfu: float,
    price: float | None,
) -> Iterator[str]:
    corpus, best = stage.corpus, stage.best
    what = {
        "frozen": "weights of the projector alone",
        "full": "projector and language model",
        "lora": "projector and LoRA",
    }
    tower = " and vision tower" if best.setup.tower else ""
    yield f"{stage.stage}: {what[stage.training]}{tower} learn: {_count(stage.learning)} parameters"
    assumed = "as the config expects" if stage.known else "assumed: set estimate." + stage.stage
    yield (
        f"  a sample: {corpus.tokens(sizes):.0f} tokens, {corpus.supervised_tokens:.0f} supervised, "
        f"pictures {corpus.images:g} ({assumed})"
    )
    done = _flops(sizes, stage)
    parts = ", ".join(f"{part} {value / 1e12:.2f}" for part, value in asdict(done).items())
    yield f"  {done.total / 1e12:.1f} TFLOP per sample: {parts}"
    yield f"  GiB per GPU with {RESERVE.fragmentation:.0%} lost between blocks; * does not fit"
    yield from _table(stage)
    yield from _parts(stage)
    yield f"  choose {best.name}: {best.memory.total / GIB:.1f} GiB"
    yield f"    {_why(stage)}"
    yield from _host_lines(stage, gpus)
    if stage.known:
        cost = (
            f", {price * gpus * stage.hours:,.0f} at {price:g} per GPU and hour" if price is not None else ""
        )
        yield (
            f"  {stage.updates:,} updates of {config.section(stage.stage).global_batch} samples: "
            f"{stage.hours:.1f} h at {mfu:.0%} MFU{cost}"
        )


def _host_lines(stage: StagePlan, gpus: int) -> Iterator[str]:
    """What the start, checkpoints and the export take."""
    host, best = stage.host, stage.best
    if best.memory.start:
        yield f"  start: {best.memory.start / GIB:.1f} GiB per GPU, one block at a time"
    yield f"  checkpoint: {stage.checkpoint / GIB:.1f} GiB; each rank writes {stage.checkpoint / gpus / GIB:.1f} GiB"
    yield f"  model at the end: {stage.model / GIB:.1f} GiB, {host.exporting / GIB:.1f} GiB of it in memory at a time"
    node = min(gpus, PER_NODE)
    parts = {name: value for name, value in asdict(host).items() if value and name != "mapped"}
    told = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items())
    yield f"  host memory: {host.rank / GIB:.1f} GiB a rank at its peak: {told}"
    yield (
        f"    a node of {node}: {host.node(node) / GIB:.0f} GiB, {host.mapped / GIB:.1f} of it the model's files"
    )


def _table(stage: StagePlan) -> Iterator[str]:
    """A line per ZeRO stage and row, a column per checkpointing."""
    columns = list(dict.fromkeys(each.setup.checkpointing for each in stage.found))
    yield f"    {'ZeRO':>4} {'tokens per row':>14} " + " ".join(f"{name:>10}" for name in columns)
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for each in stage.found:
        location = each.setup.zero_stage, each.setup.tokens_per_row
        need = f"{each.memory.total / GIB:.1f}{' ' if each.fits else '*'}"
        cells.setdefault(location, {})[each.setup.checkpointing] = need
    for (zero_stage, tokens), row in cells.items():
        yield f"    {zero_stage:>4} {tokens:>14} " + " ".join(f"{row[name]:>10}" for name in columns)


def _parts(stage: StagePlan) -> Iterator[str]:
    """What the memory goes to, a line per ZeRO stage at the row and checkpointing of the choice."""
    best = stage.best.setup
    yield f"  by part, at {best.tokens_per_row} tokens per row, checkpointing {best.checkpointing}:"
    for each in stage.found:
        if (each.setup.tokens_per_row, each.setup.checkpointing) == (best.tokens_per_row, best.checkpointing):
            parts = (f"{part} {value / GIB:.1f}" for part, value in asdict(each.memory).items() if value)
            yield f"    {each.setup.zero_stage:>4} {', '.join(parts)}"


def _why(stage: StagePlan) -> str:
    if stage.faster is None:
        return "the fastest of all that fit: it computes least twice and sends least"
    gain, need = stage.best.seconds / stage.faster.seconds - 1, stage.faster.memory.total / GIB
    room = "with room to spare" if stage.best.roomy else "with little room to spare"
    return f"the fastest that fits {room}: {stage.faster.name} would be {gain:.0%} faster and needs {need:.1f} GiB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def run(
    preset: str, overrides: list[str], gpus: int, gpu: str, mfu: float, price: float | None, as_json_: bool
) -> None:
    """Print the estimate; where a stage cannot fit, `RefusedInput` names its least need."""
    config, sizes, stages = plan(preset, overrides, gpus, gpu, mfu)
    if as_json_:
        print(json.dumps(as_json(config, sizes, stages, gpus, gpu, mfu, price)))
    else:
        tell("\n".join(lines(config, sizes, stages, gpus, gpu, mfu, price)))
