"""ZeRO-3 on batches in which some ranks have pictures and others none: nobody waits for ever, and the loss is right."""

from pathlib import Path

import pytest

from components.training.deepspeed_config import deepspeed_config
from components.training.deepspeed_engine import DeepSpeedEngine, prepare_environment
from llava.training.engine import AdamW, Engine, PlainEngine
from llava.training.heldout import heldout_loss
from llava.training.loop import Schedule, StepReport, train
from tests.support.mixed_batches import pieces, write_mixed
from tests.support.process_group import run_group
from tests.support.tiny_llava import tiny_llava

STEPS = 6


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixed-batches")
    return tiny_llava(folder / "model"), write_mixed(folder / "data.parquet", samples=36)


def learn(
    model: Path, data: Path, zero_stage: int, evaluate: bool = False
) -> tuple[list[float], list[list[int]], list[float]]:
    """Losses, the images in each of this rank's rows step by step, and held-out losses."""
    prepare_environment("cpu")
    run = pieces(model, data, 2, tokens_per_row=300, global_batch=6)
    adamw = AdamW()
    engine: Engine = PlainEngine(run.module, adamw, gradient_clipping=1.0)
    if zero_stage:
        config = deepspeed_config(zero_stage, 1.0, bf16=False)
        engine = DeepSpeedEngine(run.module, adamw, config, run.collator.blank_row())
    losses: list[float] = []
    heldout: list[float] = []

    def after(report: StepReport) -> bool:
        losses.append(report.loss)
        if evaluate and report.step % 2 == 0:
            heldout.append(heldout_loss(engine, run.module, run.collator, 3))
        return False

    train(engine, run.collator, Schedule(STEPS, 2e-3, 0.1), 0, after)
    held = []
    for number in range(STEPS):
        images = run.plan.index.images[run.plan.samples(number)]
        held.append(
            [int(images[row].sum()) for row in run.plan.place(number, engine.world, 300)[engine.rank]]
        )
    return losses, held, heldout


@pytest.fixture(scope="module")
def alone(where: tuple[Path, Path]) -> tuple[list[float], list[float]]:
    """Losses and held-out losses of one process on plain torch."""
    ((losses, _, heldout),) = run_group(learn, 1, *where, 0, True)
    return losses, heldout


@pytest.mark.parametrize(("workers", "evaluate"), [(2, False), (2, True), (4, True)])
def test_zero_3_learns_from_mixed_batches_as_one_process_does_with_and_without_held_out_losses(
    where: tuple[Path, Path], alone: tuple[list[float], list[float]], workers: int, evaluate: bool
) -> None:
    ranks = run_group(learn, workers, *where, 3, evaluate)
    for losses, _, heldout in ranks:
        assert losses == pytest.approx(alone[0], abs=1e-4)
        assert heldout == pytest.approx(alone[1] if evaluate else [], abs=1e-4)
    # The batches are what they are meant to be: one rank has pictures in a micro-step in which another has none.
    together = [
        rows for number in range(STEPS) for rows in zip(*(held[number] for _, held, _ in ranks), strict=True)
    ]
    assert any(min(images) == 0 and max(images) > 1 for images in together)


def test_a_held_out_loss_between_steps_changes_no_bit_of_the_training(
    where: tuple[Path, Path], alone: tuple[list[float], list[float]]
) -> None:
    ((losses, _, heldout),) = run_group(learn, 1, *where, 0, False)
    assert losses == alone[0]
    assert not heldout
    assert alone[1][-1] < alone[1][0]
