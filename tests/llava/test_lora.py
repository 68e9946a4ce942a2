"""LoRA: adapters that train, and the stock model that they become."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlavaForConditionalGeneration

from llava import lora
from llava import model as models
from llava.errors import RefusedInput
from llava.training.engine import AdamW, PlainEngine
from llava.training.loop import Schedule, train
from tests.support.mixed_batches import TrainingParts, pieces
from tests.support.mixtures import FUSED
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


NO_DROPOUT = lora.Lora(rank=4, alpha=8, dropout=0.0)


@pytest.fixture(scope="module", params=FUSED)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A world whose language model has fused experts."""
    return make_world(tmp_path_factory.mktemp(request.param), **FUSED[request.param])


def test_every_expert_of_a_mixture_learns_and_merges_into_a_stock_model_with_the_same_logits(
    mixture: tuple[Path, Path], tmp_path: Path
) -> None:
    before = dict(models.load(mixture[0], torch.float32).named_parameters())
    made = pieces(*mixture, 2, 1000, adapters=NO_DROPOUT)
    start = {name: value.detach().clone() for name, value in made.stock.named_parameters()}
    engine = PlainEngine(made.module, AdamW(), 1.0)
    train(engine, made.collator, Schedule(4, 1e-2, 0.1), 0, lambda report: False)
    adapters = {
        name: value.detach().clone() for name, value in made.stock.named_parameters() if "lora_" in name
    }
    assert [name for name, value in adapters.items() if torch.equal(value, start[name])] == []
    fused = [name for name, value in before.items() if value.dim() == 3]
    assert fused and {lora.base_name(name) for name in adapters} >= set(fused)
    trained = logits(made, made.stock)
    lora.merge(made.stock)
    models.save(made.stock, made.processor, tmp_path / "model", "chatml")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert {name: value.shape for name, value in merged.named_parameters()} == {
        name: value.shape for name, value in before.items()
    }
    assert (logits(made, merged) - trained).norm() <= 1e-5 * trained.norm()
    for name, value in made.stock.named_parameters():
        own = {key for key in adapters if lora.base_name(key) == name}
        assert len(own) in (0, 2)
        if not name.startswith("model.multi_modal_projector."):
            assert torch.equal(lora.merged(name, before[name], adapters, NO_DROPOUT), value), name
        expert = value.dim() == 3
        if expert:
            # Each of the stack, not only some.
            assert (value - before[name]).flatten(1).abs().amax(1).min() > 0, name


def test_the_share_that_is_adapted_is_that_of_the_layers_weights(mixture: tuple[Path, Path]) -> None:
    found = lora.check(models.load_config(mixture[0]).text_config, NO_DROPOUT)
    stock = models.load(mixture[0], torch.float32)
    layers = [
        p.numel() for name, p in stock.named_parameters() if ".layers." in name and "vision" not in name
    ]
    lora.inject(stock, NO_DROPOUT, seed=0)
    named = {name.replace(".base_layer", ""): value for name, value in stock.named_parameters()}
    adapted = {lora.base_name(name) for name in named_adapters(stock)}
    assert found.share == pytest.approx(sum(named[name].numel() for name in adapted) / sum(layers))
    assert found.share > 0.9


def named_adapters(stock: Any) -> list[str]:
    return [name for name, _ in stock.named_parameters() if "lora_" in name]


def test_dropout_beside_fused_experts_is_refused_with_the_way_out() -> None:
    config = AutoConfig.for_model("mixtral", num_hidden_layers=1)
    with pytest.raises(RefusedInput, match=r"'mixtral'.*set finetune\.lora_dropout=0 \(it is 0\.05\)$"):
        lora.check(config, lora.Lora(), prefix="finetune.")
    assert lora.check(config, lora.Lora(dropout=0.0)).fused == 2


def test_a_language_model_that_lora_does_not_reach_is_refused() -> None:
    with pytest.raises(
        RefusedInput, match=r"'gpt2': LoRA finds no linear layers.* set finetune\.lora=false$"
    ):
        lora.check(GPT2Config(n_layer=1), lora.Lora(), prefix="finetune.")


def test_the_weight_of_a_linear_layer_is_that_of_the_merged_model(world: tuple[Path, Path]) -> None:
    made = pieces(*world, 2, 1000, adapters=ADAPTERS)
    before = dict(models.load(world[0], torch.float32).named_parameters())
    with torch.no_grad():
        for name in named_adapters(made.stock):
            made.stock.get_parameter(name).normal_()
    adapters = {name: made.stock.get_parameter(name).detach().clone() for name in named_adapters(made.stock)}
    lora.merge(made.stock)
    for name, value in made.stock.named_parameters():
        assert torch.equal(lora.merged(name, before[name], adapters, ADAPTERS), value), name
    with pytest.raises(ValueError, match="no adapter's parameter"):
        lora.base_name("model.language_model.layers.0.self_attn.q_proj.weight")
