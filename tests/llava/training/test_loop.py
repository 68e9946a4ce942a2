"""The loop on real processes: the same samples give the same loss wherever they are computed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava import model as models
from llava.errors import LlavaError
from llava.training import checkpoint
from llava.training.engine import AdamW, PlainEngine
from llava.training.guards import SpikeGuard
from llava.training.loop import Schedule, train
from tests.support.mixed_batches import pieces
from tests.support.training import make_world, train_group


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder, and a dataset in which every third sample is text only."""
    return make_world(tmp_path_factory.mktemp("training"))


def test_a_resumed_run_ends_with_the_very_same_weights(world: tuple[Path, Path], tmp_path: Path) -> None:
    losses, weights = train_group(world, 2)
    saved = tmp_path / "checkpoint"
    begun, _ = train_group(world, 2, stop_at=8, save=saved)
    resumed, again = train_group(world, 2, resume=saved)
    assert begun + resumed == losses
    assert torch.equal(again, weights)
    alone, close = train_group(world, 1, resume=saved)
    assert alone == pytest.approx(losses[8:], abs=1e-4)
    assert torch.allclose(close, weights, atol=1e-4)


def test_a_checkpoint_of_another_run_is_refused(world: tuple[Path, Path], tmp_path: Path) -> None:
    train_group(world, 1, stop_at=2, save=tmp_path / "checkpoint")
    with pytest.raises(LlavaError, match="seed differ"):
        checkpoint.opened(tmp_path / "checkpoint", {"seed": 4})


def test_a_checkpoint_is_refused_where_what_is_frozen_is_not_the_same(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    train_group(world, 1, stage=1, stop_at=2, save=tmp_path / "checkpoint")
    stock = models.load(world[0], torch.float32)
    with torch.no_grad():
        stock.model.language_model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    stock.save_pretrained(tmp_path / "model")
    models.load_processor(world[0]).save_pretrained(tmp_path / "model")
    with pytest.raises(LlavaError, match="frozen differ"):
        train_group((tmp_path / "model", world[1]), 1, stage=1, resume=tmp_path / "checkpoint")


def test_a_checkpoint_holds_what_trains_and_no_pickle(world: tuple[Path, Path], tmp_path: Path) -> None:
    train_group(world, 1, stage=1, stop_at=2, save=tmp_path / "checkpoint")
    files = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    tensors = {checkpoint.file_of(part, 0, 1) for part in checkpoint.PARTS}
    assert files == {"state.json", "share-00000.json", *tensors}
    for file in tensors:
        held = load_file(tmp_path / "checkpoint" / file)
        assert len(held) == 4
        assert all("multi_modal_projector" in name for name in held)


def test_only_what_should_train_gets_trained(world: tuple[Path, Path]) -> None:
    stock = models.load(world[0], torch.float32)
    projector = models.set_trainable(stock, ["projector"])
    assert projector and all(name.startswith("model.multi_modal_projector.") for name in projector)
    both = models.set_trainable(stock, ["projector", "language_model"])
    assert set(projector) < set(both)
    assert not any("vision_tower" in name for name in both)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples_of_every_rank(
    world: tuple[Path, Path], tmp_path: Path, workers: int
) -> None:
    train_group(world, 1, stop_at=1, save=tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / checkpoint.file_of("weights", 0, 1)
    weights = load_file(file)
    weights["model.multi_modal_projector.linear_1.weight"].fill_(float("nan"))
    save_file(weights, file)
    with pytest.raises(LlavaError, match=r"step 2: .* is no number") as stopped:
        train_group(world, workers, resume=tmp_path / "checkpoint")
    made = pieces(*world, stage=2, tokens_per_row=1000)
    for rank in range(workers):
        for name in made.collator.step(1, rank, workers).ids:
            assert name in str(stopped.value).split(f"rank {rank}: ")[1].split(";")[0]


def test_a_jump_of_the_loss_is_found_once_there_is_something_to_compare_with() -> None:
    guard = SpikeGuard(factor=3.0, before=[2.0] * 10)
    assert [guard.median(loss) for loss in (9.0, *[2.0] * 10)] == [None] * 11
    assert guard.median(5.9) is None
    assert guard.median(6.1) == 2.0


def test_parts_may_learn_at_rates_of_their_own(world: tuple[Path, Path]) -> None:
    made = pieces(*world, stage=2, tokens_per_row=1000)
    engine = PlainEngine(made.module, AdamW(scales=(("model.multi_modal_projector.", 0.0),)), 1.0)
    before = {name: value.detach().clone() for name, value in engine.named.items()}
    train(engine, made.collator, Schedule(3, 1e-2, 0.1), 0, lambda report: False)
    still = {name for name, value in engine.named.items() if torch.equal(value, before[name])}
    assert still == {name for name in before if "multi_modal_projector" in name}
