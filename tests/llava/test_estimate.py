"""Memory, time and choice: against what torch allocates, against what was published, and in the right order."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llava import model as models
from llava.errors import RefusedInput
from llava.estimate import (
    GIB,
    ROWS,
    Choice,
    Corpus,
    Memory,
    Setup,
    choices,
    choose,
    gpu,
    heaviest_row,
    hours,
    memory,
    mfu,
    offloaded_seconds,
    step_flops,
    usable,
)
from llava.host_memory import checkpoint_bytes, host_memory
from llava.pixels import Pixels
from llava.sizes import CLIP_L14, CLIP_L14_336, VICUNA_7B, VICUNA_13B, Sizes, Training, Work, llava_sizes
from llava.training.engine import AdamW, PlainEngine
from llava.training.memory import checkpoint_activations, checkpoint_tower
from tests.llava.test_model import TOWERS, made
from tests.llava.test_sizes import packed

SEVEN, THIRTEEN = Sizes(CLIP_L14_336, VICUNA_7B), Sizes(CLIP_L14_336, VICUNA_13B)
MIX = Corpus(665_000, 350, 180, images=0.94)
CAPTIONS = Corpus(558_000, 20, 18)


def kept_bytes(module: torch.nn.Module, row: Any) -> int:
    """Bytes that a forward pass leaves allocated for the backward pass."""
    module(row).backward()
    module.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = module(row)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("training", ["frozen", "full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_torch_keeps(training: Training, how: Any, precision: Any) -> None:
    if training == "lora":
        pytest.importorskip("peft")
    wide = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    model, processor = made(language="llama", more_language=wide | {"num_key_value_heads": 2})
    sizes = llava_sizes(model.config.to_dict())
    models.set_trainable(model, ["projector"] + (["language_model"] if training == "full" else []))
    if training == "lora":
        from llava.lora import Lora, inject

        inject(model, Lora(rank=8, alpha=16, dropout=0.1), seed=0)
    model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    model.model.language_model.train()
    checkpoint_activations(model.model.language_model, how)
    lengths = [256, 256]
    setup = Setup(training, zero_stage=0, checkpointing=how, precision=precision, lora_rank=8)
    work = Work.of(lengths, supervised=4, images=2)
    expected = memory(sizes, setup, work)
    module = models.LlavaForTraining(model, Pixels(processor.image_processor))
    there = expected.activations
    if training == "lora" and how == "none":
        # On the CPU the mask of a dropout is as wide as its input, on CUDA it is a byte.
        language = sizes.language
        there += (setup.element - 1) * sum(i for i, _ in language.linear) * language.layers * work.tokens
    assert kept_bytes(module, packed(model, lengths)) == pytest.approx(there, rel=0.12)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tower_that_learns_keeps_what_torch_keeps_more(tower: str, how: Any, precision: Any) -> None:
    kept, expected = [], []
    for parts in (["projector"], ["projector", "vision_tower"]):
        model, processor = made(tower)
        models.set_trainable(model, parts)
        model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
        learns = len(parts) == 2
        if learns:
            checkpoint_tower(model.model.vision_tower, how)
        module = models.LlavaForTraining(model, Pixels(processor.image_processor))
        kept.append(kept_bytes(module, packed(model, [40, 40])))
        setup = Setup("frozen", zero_stage=0, checkpointing=how, precision=precision, tower=learns)
        sizes = llava_sizes(model.config.to_dict())
        expected.append(memory(sizes, setup, Work.of([40, 40], supervised=4, images=2)).activations)
    # A layer that is computed again keeps the random state, too, which is larger than this tower's results.
    again = 0 if how == "none" else 2 * torch.get_rng_state().nbytes
    assert kept[1] - kept[0] - again == pytest.approx(expected[1] - expected[0], rel=0.1)


@pytest.mark.parametrize(("training", "tower"), [("frozen", False), ("full", False), ("full", True)])
def test_static_parts_of_the_plain_engine_are_exact(training: Training, tower: bool) -> None:
    model, processor = made()
    sizes = llava_sizes(model.config.to_dict())
    parts = ["projector"] + ["language_model"] * (training == "full") + ["vision_tower"] * tower
    models.set_trainable(model, parts)
    module = models.LlavaForTraining(model, Pixels(processor.image_processor))
    engine = PlainEngine(module, AdamW(), 1.0)
    engine.backward(engine.loss(packed(model, [40])), 2, last=True)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    engine.step(1e-3)
    states = [state for kept in engine.optimizer.state.values() for state in kept.values()]
    expected = memory(
        sizes, Setup(training, zero_stage=0, precision="fp32", tower=tower), Work(40, 1600, 2, 1)
    )
    assert expected.weights == sum(p.nbytes for p in model.parameters())
    assert expected.optimizer == sum(state.nbytes for state in states if state.numel() > 1)
    assert expected.gradients == gradients


def found(
    sizes: Sizes, training: Training, corpus: Corpus, gpus: int, card: str, **more: Any
) -> list[Choice]:
    setup = Setup(training, gpus, lora_rank=128 if training == "lora" else 0)
    return list(choices(sizes, setup, corpus, gpu(card), 128, 2048, **more))


def test_seven_billion_fit_where_they_are_known_to_fit() -> None:
    """A full fine-tune needs 16 bytes per parameter: more than a card of 80 GB, not more than eight."""
    assert not any(choice.fits for choice in found(SEVEN, "full", MIX, 1, "a100-80g"))
    eight = found(SEVEN, "full", MIX, 8, "a100-80g", rows=[4096], checkpointing=["full"])
    assert {choice.setup.zero_stage: choice.fits for choice in eight} == {1: True, 2: True, 3: True}
    assert not any(choice.fits for choice in found(SEVEN, "full", MIX, 2, "a100-80g", zero_stages=[1]))
    assert any(choice.fits for choice in found(SEVEN, "lora", MIX, 1, "a100-80g"))
    assert any(choice.fits for choice in found(SEVEN, "frozen", CAPTIONS, 1, "l40s-48g"))
    assert not any(choice.fits for choice in found(SEVEN, "full", MIX, 4, "rtx4090-24g"))


def test_a_row_may_hold_more_than_a_gpus_mean_part_of_the_batch() -> None:
    """Two samples a GPU on average: one of `max_length` still has to fit, and a larger row stays empty."""
    setup = Setup("full", 16)
    few = Corpus(158_000, 250, 180)
    needed = {
        rows: next(iter(choices(SEVEN, setup, few, gpu("a100-80g"), 32, 2048, [2], [rows], ["none"]))).memory
        for rows in (1024, 2048, 4096, 32768)
    }
    mean = 2 * few.tokens(SEVEN)
    assert mean < 2048
    one = memory(SEVEN, replace(setup, zero_stage=2, checkpointing="none"), heaviest_row(SEVEN, few, 2048))
    assert needed[1024].activations == needed[2048].activations == one.activations
    assert needed[32768].activations == pytest.approx(one.activations * (mean + 2048) / 2048)


def test_thirteen_billion_fit_as_published() -> None:
    """Eight A100 of 80 GB with ZeRO-3 trained it (v1.5); replicated weights and gradients would not fit."""
    zero_3 = found(THIRTEEN, "full", MIX, 8, "a100-80g", zero_stages=[3])
    assert any(choice.fits for choice in zero_3)
    assert not any(choice.fits for choice in found(THIRTEEN, "full", MIX, 8, "a100-80g", zero_stages=[1]))
    assert not any(choice.fits for choice in found(THIRTEEN, "full", MIX, 2, "a100-80g"))
    assert any(choice.fits for choice in found(THIRTEEN, "frozen", CAPTIONS, 1, "a100-80g"))


@pytest.mark.parametrize(
    ("sizes", "training", "corpus", "published"),
    [
        (Sizes(CLIP_L14, VICUNA_13B, "linear"), "frozen", Corpus(595_000, 20, 18), 4.0),
        (Sizes(CLIP_L14, VICUNA_13B, "linear"), "full", Corpus(158_000, 250, 180, epochs=3), 10.0),
        (THIRTEEN, "frozen", CAPTIONS, 5.5),
        (THIRTEEN, "full", MIX, 20.0),
    ],
)
def test_the_published_hours_mean_a_believable_utilisation(
    sizes: Sizes, training: Training, corpus: Corpus, published: float
) -> None:
    card, setup = gpu("a100-80g"), Setup(training, gpus=8)
    done = step_flops(sizes, setup, corpus, corpus.samples * corpus.epochs)
    share = mfu(done, published * 3600, card, gpus=8)
    assert 0.1 < share < 0.5
    assert hours(sizes, setup, corpus, card, share) == pytest.approx(published)


def test_memory_moves_the_right_way() -> None:
    row = heaviest_row(SEVEN, MIX, 4096)

    def need(**changes: Any) -> Memory:
        return memory(SEVEN, replace(Setup("full", 8), **changes), row)

    by_stage = [need(zero_stage=stage) for stage in (1, 2, 3)]
    assert [each.static for each in by_stage] == sorted((each.static for each in by_stage), reverse=True)
    for stage in (1, 2, 3):
        by_gpus = [need(zero_stage=stage, gpus=gpus).total for gpus in (1, 2, 4, 8, 64)]
        assert by_gpus == sorted(by_gpus, reverse=True)
    by_saving = [need(checkpointing=how).total for how in ("none", "selective", "full")]
    assert by_saving == sorted(by_saving, reverse=True)
    by_row = [memory(SEVEN, Setup("full", 8), heaviest_row(SEVEN, MIX, tokens)).total for tokens in ROWS]
    assert by_row == sorted(by_row)
    assert need(training="frozen", fused_loss=True).loss < need(training="frozen").loss
    assert need(training="lora", lora_rank=128).static < need().static
    assert need(precision="fp32").total > need().total


def test_the_worst_row_holds_what_a_row_can_hold() -> None:
    mixed, pictured = heaviest_row(SEVEN, MIX, 4096), heaviest_row(SEVEN, CAPTIONS, 4096)
    assert mixed.images == 4096 / 576
    assert mixed.supervised == pytest.approx(4096 * 180 / 350)
    assert pictured.images == 4096 / 596
    assert pictured.supervised == pytest.approx(4096 * 18 / 596)


def test_the_choice_is_the_fastest_that_fits() -> None:
    card = gpu("h100-80g")
    every = found(SEVEN, "full", MIX, 8, "h100-80g")
    best = choose(every, card, "7B")
    assert best.fits and best.memory.total <= 0.9 * usable(card)
    assert all(each.seconds >= best.seconds for each in every if each.roomy)
    tight = [each for each in every if each.fits and not each.roomy]
    assert tight and choose(tight, card, "7B") in tight
    with pytest.raises(
        RefusedInput, match=r"7B does not fit: the least is \d+\.\d GiB .*: 8 of these cards; LoRA$"
    ):
        choose(found(SEVEN, "full", MIX, 1, "h100-80g"), card, "7B", lambda: ["8 of these cards", "LoRA"])


def test_a_roomier_card_is_never_a_slower_choice() -> None:
    seconds = [
        choose(found(SEVEN, "full", MIX, 8, card), gpu(card), "7B").seconds
        for card in ("h100-80g", "h200-141g")
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_zero_3_starts_on_cards_that_the_whole_model_would_not_fit() -> None:
    """13B in bf16 are 26 GB; a block at a time is whole on a card of 24 GB, and only its part stays."""
    needed = memory(THIRTEEN, Setup("frozen", 8, zero_stage=3), heaviest_row(THIRTEEN, CAPTIONS, 2048))
    assert 2 * THIRTEEN.parameters / 8 < needed.start < 2 * THIRTEEN.parameters / 6
    assert any(choice.fits for choice in found(THIRTEEN, "frozen", CAPTIONS, 8, "l4-24g", zero_stages=[3]))
    assert any(choice.fits for choice in found(THIRTEEN, "full", MIX, 16, "l4-24g", zero_stages=[3]))


def test_what_is_offloaded_leaves_the_card_and_costs_time_and_host_memory() -> None:
    setup = Setup("full", 8, zero_stage=2)
    row = heaviest_row(SEVEN, MIX, 2048)
    there, away = memory(SEVEN, setup, row), memory(SEVEN, replace(setup, offload=True), row)
    learning = SEVEN.trainable("full")
    assert there.static - away.static == pytest.approx(16 * learning / 8)
    hosts = [host_memory(SEVEN, replace(setup, offload=offload)) for offload in (False, True)]
    assert hosts[1].rank - hosts[0].rank == pytest.approx(16 * learning / 8)
    assert offloaded_seconds(setup, SEVEN) == 0 < offloaded_seconds(replace(setup, offload=True), SEVEN)


def test_a_checkpoint_is_copied_by_each_rank_and_by_none_whole() -> None:
    """13B: 156 GB on rank 0 once; now each of eight ranks copies its own part."""
    eight, many = (host_memory(THIRTEEN, Setup("full", gpus)) for gpus in (8, 64))
    whole = checkpoint_bytes(THIRTEEN, Setup("full", 8))
    assert whole == pytest.approx(156e9, rel=0.01)
    assert eight.saving == pytest.approx(whole / 8) and many.saving == pytest.approx(whole / 64)
    # A pod of 64 GiB held one rank of a 7B stage 2 until its first checkpoint.
    assert host_memory(SEVEN, Setup("full", 1)).node(1) > 64 * GIB
    assert host_memory(SEVEN, Setup("full", 8)).node(1) < 64 * GIB


def test_an_unknown_gpu_is_refused_by_name() -> None:
    with pytest.raises(RefusedInput, match=r"GPU 'b9000' is unknown; known: a100-40g, .*h200-141g"):
        gpu("b9000")
