"""QLoRA: 4-bit weights beside adapters, against a stock model with the same weights in fp32."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava import lora, quantized
from llava import model as models
from llava.errors import LlavaError, RefusedInput
from llava.estimate import Corpus, Setup, choices, gpu, memory
from llava.learned import Learned
from llava.sizes import CLIP_L14_336, VICUNA_13B, Sizes, Work, llava_sizes
from llava.training import checkpoint
from llava.training.engine import AdamW, PlainEngine
from llava.training.loop import Schedule, StepReport, train
from llava.training.memory import checkpoint_activations, compile_layers
from tests.llava.test_lora import logits
from tests.support.mixed_batches import TrainingParts, pieces
from tests.support.mixtures import FUSED
from tests.support.tiny_llava import tiny_llava
from tests.support.training import make_world, train_group

bitsandbytes = pytest.importorskip("bitsandbytes")
ADAPTERS = lora.Lora(rank=4, alpha=8, dropout=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_world(tmp_path_factory.mktemp("quantized"), hidden_size=64, intermediate_size=128)


def made_of(world: tuple[Path, Path], bits: int) -> TrainingParts:
    return pieces(*world, 2, 1000, adapters=ADAPTERS, bits=bits)


def in_4_bit(stock: Any) -> list[str]:
    return [name for name, found in stock.named_modules() if isinstance(found, bitsandbytes.nn.Linear4bit)]


@torch.no_grad()
def round_weights(stock: Any) -> None:
    """The weights beside adapters become what 4 bit can say, in fp32."""
    for module in stock.modules():
        if isinstance(base := getattr(module, "base_layer", None), nn.Linear):
            codes, state = bitsandbytes.functional.quantize_4bit(
                base.weight, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            base.weight.copy_(bitsandbytes.functional.dequantize_4bit(codes, state))


@torch.no_grad()
def stir(stock: Any) -> None:
    """Adapters that give something: the second of each two begins with zeros."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05, generator=generator)


def gradients(made: TrainingParts) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one packed row."""
    loss = made.module(made.collator.step(0, 0, 1).rows[0])
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in made.stock.named_parameters() if p.grad is not None}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance of two results in shares of the second."""
    return float((one - other).norm() / other.norm())


def test_the_language_models_linear_layers_alone_are_in_4_bit(world: tuple[Path, Path]) -> None:
    stock = models.load(world[0], torch.float32)
    linear = {f"model.language_model.{name}" for name, _ in lora.linear_layers(stock.model.language_model)}
    others = {n: p.clone() for n, p in stock.named_parameters() if n.removesuffix(".weight") not in linear}
    quantized.quantize(stock, torch.device("cpu"))
    assert set(in_4_bit(stock)) == linear and len(linear) == 14
    for name, before in others.items():
        assert torch.equal(stock.get_parameter(name), before), name


@pytest.mark.parametrize("how", ["none", "full", "compiled"])
def test_loss_and_gradients_are_those_of_a_stock_model_with_rounded_weights(
    world: tuple[Path, Path], how: Any
) -> None:
    made, stock = made_of(world, 4), made_of(world, 16)
    round_weights(stock.stock)
    for one in (made, stock):
        stir(one.stock)
        if how != "compiled":
            checkpoint_activations(one.stock.model.language_model, how)
    if how == "compiled":
        compile_layers(made.stock.model.language_model, backend="aot_eager")
    loss, found = gradients(made)
    expected, reference = gradients(stock)
    # The same sums in fp32, in another order.
    assert loss == pytest.approx(expected, rel=1e-5)
    assert found.keys() == reference.keys() and len(found) == 4 + 2 * 14
    assert max(apart(found[name], reference[name]) for name in found) < 1e-4


def codes_of(stock: Any) -> dict[str, torch.Tensor]:
    """What the matrices in 4 bit consist of, scales included."""
    return {
        f"{name} {part}": value.clone()
        for name, parameter in stock.named_parameters()
        if getattr(parameter, "quant_state", None) is not None
        for part, value in {"codes": parameter.data, **parameter.quant_state.as_dict(packed=True)}.items()
    }


def test_a_run_learns_and_merges_into_a_stock_model_as_near_as_quantising_lets_it(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    made = made_of(world, 4)
    rounding = apart(logits(made, made.stock), logits(made, models.load(world[0], torch.float32)))
    frozen, codes = checkpoint.frozen_digest(made.stock), codes_of(made.stock)
    made.stock.model.language_model.train()
    engine = PlainEngine(made.module, AdamW(), 1.0)
    losses: list[float] = []

    def after(report: StepReport) -> bool:
        losses.append(report.loss)
        return False

    train(engine, made.collator, Schedule(12, 1e-2, 0.1), 0, after)
    assert losses[-1] < 0.8 * losses[0]
    assert checkpoint.frozen_digest(made.stock) == frozen
    assert codes and all(torch.equal(value, codes[name]) for name, value in codes_of(made.stock).items())
    checkpoint.save(tmp_path / "saved", engine, checkpoint.Position(12, {}, 12))
    _, saved = checkpoint.opened(tmp_path / "saved", {})
    assert all("lora_" in name or "multi_modal_projector" in name for name in saved.names)
    learned = Learned(world[0], saved.names, partial(saved.whole, "weights"), torch.float32, ADAPTERS)
    (tmp_path / "model").mkdir()
    for file in learned.files:
        learned.write(file, tmp_path / "model")
    learned.write_rest(tmp_path / "model", "model", "chatml")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    difference = apart(logits(made, made.stock), logits(made, merged))
    assert 0 < difference < 1.5 * rounding, (difference, rounding)


def test_another_base_has_another_digest(world: tuple[Path, Path], tmp_path: Path) -> None:
    digests = []
    for times in (1.0, 2.0, 1.0):
        stock = models.load(world[0], torch.float32)
        with torch.no_grad():
            # The codes stay as they are: only what scales them differs.
            stock.model.language_model.layers[0].mlp.up_proj.weight.mul_(times)
        stock.requires_grad_(False)
        digest = checkpoint.FrozenDigest()
        quantized.quantize(stock, torch.device("cpu"), see=digest.add)
        for name, parameter in stock.named_parameters():
            digest.add(name, parameter)
        digests.append(digest.hexdigest())
    assert digests[0] == digests[2] != digests[1]
    written = checkpoint.position_json(checkpoint.Position(1, {"frozen": digests[0]}))
    with pytest.raises(LlavaError, match="frozen differ"):
        checkpoint.position_of(written, {"frozen": digests[1]}, "here")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_take_the_bytes_of_the_arithmetic(world: tuple[Path, Path], precision: Any) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    stock: Any = models.load(world[0], dtype)
    sizes = llava_sizes(stock.config.to_dict())
    quantized.quantize(stock, torch.device("cpu"))
    lora.inject(stock, ADAPTERS, seed=0)
    stock.to(dtype=dtype)
    tensors = {}
    for name, parameter in stock.named_parameters():
        tensors[name] = parameter
        if (state := getattr(parameter, "quant_state", None)) is not None:
            kept = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            tensors |= {f"{name}.{number}": tensor for number, tensor in enumerate(kept)}
    setup = Setup("lora", zero_stage=1, precision=precision, lora_rank=ADAPTERS.rank, lora_bits=4)
    assert memory(sizes, setup, Work(1, 1, 1, 1)).weights == sum(tensor.nbytes for tensor in tensors.values())


def test_thirteen_billion_weights_learn_on_one_card_of_24_gb() -> None:
    """As 65 billion fit 48 GB (arXiv 2305.14314, abstract)."""
    sizes, mix = Sizes(CLIP_L14_336, VICUNA_13B), Corpus(665_000, 350, 180, images=0.94)
    fits = {
        bits: any(
            one.fits
            for one in choices(
                sizes, Setup("lora", lora_rank=64, lora_bits=bits), mix, gpu("rtx4090-24g"), 128, 2048
            )
        )
        for bits in (16, 4)
    }
    assert fits == {16: False, 4: True}


@pytest.mark.parametrize(
    "zero", [pytest.param(1, marks=pytest.mark.drill), pytest.param(2, marks=pytest.mark.drill), 3]
)
def test_zero_trains_it_as_plain_torch_and_resumes_exactly(
    world: tuple[Path, Path], tmp_path: Path, zero: int
) -> None:
    options: dict[str, Any] = {"lora": True, "bits": 4, "dropout": 0.0, "stop_at": 8}
    # Nothing is so small that each rank keeps it whole.
    options["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    plain, expected = train_group(world, 1, **options)
    losses, weights = train_group(world, 2, zero=zero, **options)
    assert losses == pytest.approx(plain, abs=1e-4)
    assert torch.allclose(weights, expected, atol=1e-4)
    begun, _ = train_group(world, 2, zero=zero, save=tmp_path / "checkpoint", **options | {"stop_at": 4})
    resumed, again = train_group(world, 2, zero=zero, resume=tmp_path / "checkpoint", **options)
    assert begun + resumed == losses
    assert torch.equal(again, weights)


def test_fused_experts_are_refused_with_the_way_out(tmp_path: Path) -> None:
    stock = models.load(tiny_llava(tmp_path / "model", **FUSED["mixtral"]), torch.float32)
    with pytest.raises(RefusedInput, match=r"'mixtral': its fused experts cannot .* set lora_bits=16$"):
        quantized.quantize(stock, torch.device("cpu"))
