"""A vision tower that learns: its gradients on packed rows against stock transformers, and what is saved of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from llava import model as models
from llava.data.collate import PackedRow
from llava.training.engine import AdamW, PlainEngine
from llava.training.loop import Schedule, train
from llava.training.memory import checkpoint_tower
from tests.llava.test_lora import logits
from tests.support.mixed_batches import TrainingParts, pieces
from tests.support.training import make_world

TOWER = "model.vision_tower."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_world(tmp_path_factory.mktemp("tower"))


def made_of(world: tuple[Path, Path], tokens_per_row: int = 1000) -> TrainingParts:
    return pieces(*world, 2, tokens_per_row, tower=True)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def stock_gradients(folder: Path, made: TrainingParts, row: PackedRow) -> dict[str, torch.Tensor]:
    """The samples of a row one by one through what stock transformers loads, each with its own pictures."""
    stock = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    image, each = stock.config.image_token_index, stock.config.image_seq_length
    pictures = made.module.pixels.normalise(row.pixels, torch.float32)
    start = used = 0
    for length in row.segments.lengths:
        ids = row.input_ids[start : start + length]
        own = int((ids == image).sum()) // each
        values = pictures[used : used + own] if own else None
        found = stock(input_ids=ids[None], pixel_values=values).logits[0]
        mine = (row.predict >= start) & (row.predict < start + length)
        functional.cross_entropy(
            found[row.predict[mine] - start], row.targets[mine], reduction="sum"
        ).backward()
        start, used = start + length, used + own
    return gradients(stock)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_its_gradients_are_those_of_the_stock_model_on_each_sample_alone(
    world: tuple[Path, Path], how: Any
) -> None:
    made = made_of(world)
    checkpoint_tower(made.stock.model.vision_tower, how)
    row = made.collator.step(0, 0, 1).rows[0]
    assert len(row.segments.lengths) > 2 and len(row.pixels) > 2
    made.module(row).backward()
    ours, theirs = gradients(made.stock), stock_gradients(world[0], made, row)
    tower = {name for name in ours if name.startswith(TOWER)}
    assert tower == {name for name in theirs if name.startswith(TOWER)}
    # The last of two layers is not read, so nothing of it learns.
    assert any("layers.0." in name for name in tower) and not any("layers.1." in name for name in tower)
    for name in tower:
        # The bias of keys moves all scores alike: its gradient is rounding, here and there.
        if not name.endswith("k_proj.bias"):
            off = (ours[name] - theirs[name]).norm() / theirs[name].norm()
            assert off < 1e-4, (name, off)


def test_a_row_without_a_picture_gives_zeros_to_every_parameter_that_learns(world: tuple[Path, Path]) -> None:
    made = made_of(world, 100)
    rows = [row for number in range(3) for row in made.collator.step(number, 0, 1).rows]
    # One slot behind the samples, for the blank picture.
    row = next(row for row in rows if len(row.image_positions) == 1)
    assert not row.pixels.float().std((-2, -1)).any()
    made.module(row).backward()
    learning = {n: p for n, p in made.stock.named_parameters() if p.requires_grad and n.startswith(TOWER)}
    assert learning
    for name, parameter in learning.items():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_the_saved_model_has_the_tower_that_was_learned(world: tuple[Path, Path], tmp_path: Path) -> None:
    made = made_of(world)
    before = {name: value.detach().clone() for name, value in made.stock.named_parameters()}
    names = {name for name, value in made.stock.named_parameters() if value.requires_grad}
    engine = PlainEngine(made.module, AdamW(scales=((TOWER, 0.5),)), 1.0)
    train(engine, made.collator, Schedule(4, 1e-2, 0.1), 0, lambda report: False)
    trained = logits(made, made.stock)
    models.save(made.stock, made.processor, tmp_path / "model", "chatml")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert torch.allclose(logits(made, stock), trained, atol=1e-5)
    changed = {name for name, value in stock.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name in changed if name.startswith(TOWER)} == {n for n in names if n.startswith(TOWER)}


def test_a_picture_costs_three_times_as_much_where_the_tower_learns(world: tuple[Path, Path]) -> None:
    frozen, learning = pieces(*world, 2, 1000).stock, made_of(world).stock
    assert models.image_cost(learning) == pytest.approx(3 * models.image_cost(frozen))
