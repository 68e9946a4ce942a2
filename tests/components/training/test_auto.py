"""`auto`: what is chosen by the arithmetic, and the arithmetic's static parts against real ZeRO groups."""

from typing import Any

import pytest
import torch

from components.finetune import FinetuneSettings
from components.training import auto
from components.training.settings import TrainSettings
from llava.data.plan import Coverage
from llava.errors import RefusedInput
from llava.estimate import Corpus, Setup, gpu, memory
from llava.sizes import CLIP_L14_336, VICUNA_7B, Sizes, Work, llava_sizes
from tests.support.process_group import run_group

SEVEN = Sizes(CLIP_L14_336, VICUNA_7B)
PARTS = ("projector", "language_model")
DATA = Coverage(samples=1000, tokens=1000 * 926, supervised=180_000)
OPEN: dict[str, Any] = {"zero_stage": "auto", "tokens_per_row": "auto", "checkpointing": "auto"}
STAGES = (1, 2, 3)


def settings(**values: Any) -> TrainSettings:
    return FinetuneSettings(**{"gpu": True, "workers": 8, **OPEN, **values})


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the question to a GPU of the cluster."""
    monkeypatch.setattr(auto, "gpu_at_hand", lambda stage: gpu("h100-80g"))


@pytest.mark.usefixtures("h100")
def test_auto_becomes_what_fits_and_what_is_written_stays() -> None:
    chosen, told = auto.choose("finetune", settings(), PARTS, SEVEN, DATA, images=1000)
    assert chosen.layout.zero_stage in STAGES and chosen.layout.tokens_per_row >= 2048
    assert told.startswith("auto: ZeRO-") and "of 75 GiB per GPU" in told
    kept, _ = auto.choose(
        "finetune", settings(zero_stage=3, checkpointing="full"), PARTS, SEVEN, DATA, images=1000
    )
    assert (kept.layout.zero_stage, kept.layout.checkpointing) == (3, "full")
    written, told = auto.choose(
        "finetune",
        settings(zero_stage=3, checkpointing="none", tokens_per_row=512),
        PARTS,
        SEVEN,
        DATA,
        images=1000,
    )
    assert (written.layout, told) == ((3, 512, "none"), "")


@pytest.mark.usefixtures("h100")
def test_auto_never_compiles_under_zero_3() -> None:
    chosen, _ = auto.choose("finetune", settings(compile=True), PARTS, SEVEN, DATA, images=1000)
    assert chosen.layout.zero_stage != 3


@pytest.mark.usefixtures("h100")
def test_auto_refuses_what_cannot_fit_and_what_it_does_not_know() -> None:
    with pytest.raises(RefusedInput, match=r"finetune on 1 GPUs of 80 GiB does not fit: the least is"):
        auto.choose("finetune", settings(workers=1), PARTS, SEVEN, DATA, images=1000)
    with pytest.raises(RefusedInput, match="finetune: auto knows no shapes of this model: set zero_stage"):
        auto.choose("finetune", settings(), PARTS, None, DATA, images=1000)


@pytest.mark.usefixtures("h100")
def test_auto_chooses_what_still_fits_when_the_group_goes_on_with_fewer() -> None:
    corpus = Corpus(1000, 926 - SEVEN.image_tokens, 180.0, 1.0, 1.0)

    def fits_on_three(**more: int) -> bool:
        chosen, _ = auto.choose("finetune", settings(**more), PARTS, SEVEN, DATA, images=1000)
        (choice,) = auto.candidates(SEVEN, chosen, PARTS, 3, corpus, gpu("h100-80g"))
        return choice.fits

    assert (fits_on_three(), fits_on_three(min_workers=3)) == (False, True)
    with pytest.raises(RefusedInput, match="finetune on min_workers=1 GPUs of 80 GiB does not fit"):
        auto.choose("finetune", settings(min_workers=1), PARTS, SEVEN, DATA, images=1000)


def test_auto_without_a_gpu_is_a_plain_value() -> None:
    chosen, told = auto.choose("finetune", settings(gpu=False, workers=1), PARTS, None, DATA, images=0)
    assert chosen.layout == (2, 4096, "none")
    assert told == "auto without a GPU: zero_stage=2, tokens_per_row=4096, checkpointing=none"
    assert chosen == settings(gpu=False, workers=1, zero_stage=2, tokens_per_row=4096, checkpointing="none")


def test_auto_that_nobody_resolved_is_a_bug_and_not_a_run() -> None:
    with pytest.raises(RuntimeError, match="not resolved"):
        _ = settings().layout


@pytest.mark.parametrize(
    "wrong", [{"tokens_per_row": "all"}, {"tokens_per_row": 0}, {"checkpointing": "some"}]
)
def test_another_word_than_auto_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        settings(**wrong)


def parts(stage: int, held: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Where DeepSpeed's optimizer of a ZeRO stage keeps gradients and fp32 weights."""
    if stage == 1:
        return held.fp32_groups_gradients_flat, held.fp32_groups_flat_partition
    if stage == 2:
        gradients = [each for part in held.averaged_gradients.values() for each in part]
        return gradients, held.single_partition_of_fp32_groups
    return [held.grad_partitions_flat_buffer], held.fp32_partitioned_groups_flat


def zero_groups() -> dict[int, tuple[Sizes, dict[str, int]]]:
    """A rank of two, for each ZeRO stage in bf16, after one update: sizes of the model, bytes that DeepSpeed holds."""
    from components.training.deepspeed_config import deepspeed_config
    from components.training.deepspeed_engine import DeepSpeedEngine, prepare_environment
    from llava import model as models
    from llava.pixels import Pixels
    from llava.training.engine import AdamW
    from tests.llava.test_model import made
    from tests.llava.test_sizes import packed

    prepare_environment("cpu")
    found = {}
    wide = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
    for stage in STAGES:
        model, processor = made(more_language=wide)
        sizes = llava_sizes(model.config.to_dict())
        model.to(torch.bfloat16)
        models.set_trainable(model, ["projector", "language_model"])
        module = models.LlavaForTraining(model, Pixels(processor.image_processor))
        row = packed(model, [40])
        engine = DeepSpeedEngine(module, AdamW(), deepspeed_config(stage, 1.0, True), row)
        held = engine._ds.optimizer
        engine.backward(engine.loss(row), 4, last=True)
        gradients, master = parts(stage, held)
        sent = {"gradients": sum(each.nbytes for each in gradients)}
        engine.step(1e-3)
        moments = [value for kept in held.optimizer.state.values() for value in kept.values()]
        sent["optimizer"] = sum(each.nbytes for each in [*master, *moments] if each.numel() > 1)
        weights = [getattr(each, "ds_tensor", each) for each in model.parameters()]
        sent["weights"] = sum(each.nbytes for each in weights)
        found[stage] = (sizes, sent)
    return found


def test_static_parts_are_what_zero_groups_hold() -> None:
    held, _ = run_group(zero_groups, 2)
    for stage, (sizes, sent) in held.items():
        expected = memory(sizes, Setup("full", 2, zero_stage=stage), Work(40, 1600, 2, 1))
        # Parts are padded to whole numbers of elements per rank.
        assert sent["weights"] == pytest.approx(expected.weights, rel=0.01), stage
        assert sent["optimizer"] == pytest.approx(expected.optimizer, rel=0.01), stage
        # ZeRO-1 holds the last row's gradients in bf16 beside the fp32 sums until they are added.
        sums = 4 * sizes.trainable("full") if stage == 1 else expected.gradients
        assert sent["gradients"] == pytest.approx(sums, rel=0.01), stage
