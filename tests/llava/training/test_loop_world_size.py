"""What is learned does not depend on where it is computed: workers, micro-batches and packing are free to choose."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llava import model as models
from llava.data.images import decode
from llava.data.schema import images_of
from llava.training.engine import AdamW, PlainEngine
from llava.training.loop import Schedule, StepReport, train
from tests.support.mixed_batches import pieces, write_mixed
from tests.support.process_group import run_group
from tests.support.tiny_llava import tiny_llava

STEPS = 20
MICRO_BATCHES = (1, 700, 4000)
"""Tokens of a row: every sample alone, a few of them, all that a rank has."""


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("world-size")
    return tiny_llava(folder / "model"), write_mixed(folder / "data.parquet")


def learn(model: Path, data: Path, stage: int, tokens_per_row: int) -> tuple[list[float], Any, int]:
    """Losses, trained weights and the number of rows of one rank's run."""
    run = pieces(model, data, stage, tokens_per_row)
    engine = PlainEngine(run.module, AdamW(), gradient_clipping=1.0)
    losses: list[float] = []

    def after(report: StepReport) -> bool:
        losses.append(report.loss)
        return False

    train(engine, run.collator, Schedule(STEPS, 2e-3, 0.1), 0, after)
    weights = torch.cat([parameter.detach().flatten() for _, parameter in sorted(engine.named.items())])
    rows = len(run.collator.step(0, engine.rank, engine.world).rows)
    return losses, weights.numpy(), rows


def learn_all(model: Path, data: Path) -> list[tuple[list[float], Any, int]]:
    return [learn(model, data, 2, budget) for budget in MICRO_BATCHES] + [learn(model, data, 1, 700)]


def test_loss_and_weights_depend_neither_on_workers_nor_on_micro_batches(where: tuple[Path, Path]) -> None:
    runs = {workers: run_group(learn_all, workers, *where) for workers in (1, 2, 4)}
    furthest = [0.0, 0.0]
    for ranks in runs.values():
        for rank in ranks:
            for number, (losses, weights, _) in enumerate(rank):
                expected, same, _ = runs[1][0][3 if number == 3 else 2]
                assert len(losses) == STEPS
                apart = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
                furthest = [max(furthest[0], apart), max(furthest[1], float(abs(weights - same).max()))]
    rows = {workers: [found[2] for found in ranks[0]] for workers, ranks in runs.items()}
    print(
        f"\n  rows per rank in the first step: {rows}; furthest loss {furthest[0]:.1e}, weight {furthest[1]:.1e}"
    )
    assert len({*rows[1][:3]}) == 3
    assert max(furthest) < 1e-4
    first, last = (sum(part) for part in (runs[1][0][0][0][:5], runs[1][0][0][0][-5:]))
    assert last < 0.9 * first


def test_packed_rows_have_the_stock_models_loss_with_none_one_and_several_images(
    where: tuple[Path, Path],
) -> None:
    run = pieces(*where, stage=2, tokens_per_row=700)
    kinds: set[int] = set()
    for number in range(2):
        step = run.collator.step(number, rank=0, world=1)
        with torch.no_grad():
            ours = sum(float(run.module(row)) for row in step.rows)
        theirs, supervised = 0.0, 0
        for sample in run.plan.samples(number):
            index = run.plan.index
            row = run.rows.row(int(index.group[sample]), int(index.row[sample]))
            cells = images_of(row)
            kinds.add(len(cells))
            encoded = run.encoder.encode(row["conversations"], len(cells))
            pixels = None
            if cells:
                pictures = [decode(cell["bytes"]) for cell in cells]
                pixels = run.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            with models.stock_attention(run.stock), torch.no_grad():
                logits = run.stock(input_ids=torch.tensor([encoded.ids]), pixel_values=pixels).logits[0, :-1]
            labels = torch.tensor(encoded.labels)[1:]
            theirs += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            supervised += encoded.supervised
        assert step.supervised == supervised
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert step.computed == sum(len(row.input_ids) for row in step.rows)
    assert kinds == {0, 1, 2, 3}


def test_a_row_without_an_image_gets_a_blank_one_in_a_single_unsupervised_slot(
    where: tuple[Path, Path],
) -> None:
    run = pieces(*where, stage=2, tokens_per_row=1)
    step = run.collator.step(0, rank=0, world=1)
    image_tokens = run.encoder.image_tokens
    filled = [row for row in step.rows if len(row.image_positions) == 1]
    assert filled
    for row in step.rows:
        assert len(row.pixels) == max(1, len(row.image_positions) // image_tokens)
    for row in filled:
        assert row.input_ids[-1] == run.encoder.image_id
        assert not (row.predict >= len(row.input_ids) - 2).any()
    assert step.computed == step.useful + len(filled)
