"""LoRA: adapters that train, and the stock model that they become."""

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava import lora
from llava import model as models
from llava.training.engine import AdamW, PlainEngine
from llava.training.loop import Schedule, train
from tests.support.mixed_batches import TrainingParts, pieces
from tests.support.training import ADAPTERS, make_world, train_group


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_world(tmp_path_factory.mktemp("lora"))


def logits(made: TrainingParts, model: LlavaForConditionalGeneration) -> torch.Tensor:
    """Of one sample with a picture, by the stock forward pass."""
    sample = int(made.plan.index.images.nonzero()[0][0])
    index = made.plan.index
    row = made.rows.row(int(index.group[sample]), int(index.row[sample]))
    ids = torch.tensor([made.encoder.encode(row["conversations"], 1).ids])
    picture = made.module.pixels.blank()
    values = made.module.pixels.normalise(torch.from_numpy(picture)[None], torch.float32)
    model.eval()
    with torch.no_grad(), models.stock_attention(model):
        return model(input_ids=ids, pixel_values=values).logits


def test_the_merged_model_is_a_stock_one_with_the_same_logits(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    made = pieces(*world, 2, 1000, adapters=ADAPTERS)
    untrained = logits(made, made.stock)
    assert torch.equal(untrained, logits(made, models.load(world[0], torch.float32)))
    made.stock.model.language_model.train()
    engine = PlainEngine(made.module, AdamW(), 1.0)
    train(engine, made.collator, Schedule(4, 1e-2, 0.1), 0, lambda report: False)
    trained = logits(made, made.stock)
    assert (trained - untrained).abs().max() > 0.1
    lora.merge(made.stock)
    models.save(made.stock, made.processor, tmp_path / "model", "chatml")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert sorted(merged.state_dict()) == sorted(models.load(world[0], torch.float32).state_dict())
    assert torch.allclose(logits(made, merged), trained, atol=1e-4)


def test_adapters_stand_beside_every_linear_layer_of_the_language_model_and_train_with_the_projector(
    world: tuple[Path, Path],
) -> None:
    made = pieces(*world, 2, 1000, adapters=ADAPTERS)
    learns = {name for name, value in made.stock.named_parameters() if value.requires_grad}
    assert sum("multi_modal_projector" in name for name in learns) == 4
    adapters = {name for name in learns if "lora_" in name}
    assert len(learns) == 4 + len(adapters)
    # Seven matrices in each of the two layers, two thin ones beside each.
    assert len(adapters) == 2 * 7 * 2
    assert all(name.startswith("model.language_model.layers.") for name in adapters)


def test_a_resumed_run_with_dropout_ends_with_the_very_same_weights(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    losses, weights = train_group(world, 1, lora=True)
    begun, _ = train_group(world, 1, lora=True, stop_at=5, save=tmp_path / "checkpoint")
    resumed, again = train_group(world, 1, lora=True, resume=tmp_path / "checkpoint")
    assert begun + resumed == losses
    assert torch.equal(again, weights)
