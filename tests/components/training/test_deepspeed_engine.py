"""DeepSpeed against plain torch on real processes: one curve, one checkpoint, whatever the stage and the workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.training.deepspeed_config import deepspeed_config
from llava.model import load, set_trainable
from llava.training.engine import AdamW, trainable
from tests.support.mixtures import FUSED
from tests.support.training import make_world, train_group


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_world(tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.drill), 2])
def test_a_run_moves_from_two_workers_to_one_to_four_and_through_the_zero_stages(
    world: tuple[Path, Path], tmp_path: Path, stage: int
) -> None:
    alone, weights = train_group(world, 1, stage=stage)
    losses: list[float] = []
    folder = None
    for number, (workers, zero, until) in enumerate(((2, 2, 4), (1, 1, 8), (4, 3, 12))):
        saved = tmp_path / str(number)
        some, others = train_group(
            world, workers, stage=stage, zero=zero, resume=folder, stop_at=until, save=saved
        )
        losses += some
        folder = saved
    assert losses == pytest.approx(alone, abs=1e-4)
    assert torch.allclose(others, weights, atol=1e-4)


@pytest.mark.parametrize(
    "zero", [pytest.param(1, marks=pytest.mark.drill), pytest.param(2, marks=pytest.mark.drill), 3]
)
def test_a_run_in_bf16_that_is_cut_as_it_is_placed_resumes_exactly(
    world: tuple[Path, Path], tmp_path: Path, zero: int
) -> None:
    """Twice the same number of workers: bit for bit, though bf16 weights and fp32 state lie apart."""
    options: dict[str, Any] = {"zero": zero, "bf16": True, "placed": True}
    losses, weights = train_group(world, 2, **options)
    begun, _ = train_group(world, 2, stop_at=5, save=tmp_path / "checkpoint", **options)
    resumed, again = train_group(world, 2, resume=tmp_path / "checkpoint", **options)
    assert begun + resumed == losses
    assert torch.equal(again, weights)
    assert_each_wrote_its_share(world[0], tmp_path / "checkpoint", 2)


def assert_each_wrote_its_share(model: Path, saved: Path, ranks: int) -> None:
    """About as much by each, and every element of what trains once."""
    sizes = [sum(path.stat().st_size for path in saved.glob(f"*-{rank:05d}-of-*")) for rank in range(ranks)]
    assert max(sizes) < 1.2 * min(sizes)
    stock = load(model, torch.float32)
    set_trainable(stock, ["projector", "language_model"])
    pieces = [json.loads(path.read_text())["pieces"] for path in saved.glob("share-*")]
    for name, parameter in trainable(stock).items():
        held = sorted(piece[name] for piece in pieces if name in piece)
        ends = [0, *(start + count for start, count in held)]
        assert [start for start, _ in held] == ends[:-1] and ends[-1] == parameter.numel()


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.drill)])
def test_an_optimizer_on_the_host_changes_nothing_and_resumes_exactly(
    world: tuple[Path, Path], tmp_path: Path, zero: int
) -> None:
    options: dict[str, Any] = {"zero": zero, "offload": "cpu"}
    plain, expected = train_group(world, 1)
    losses, weights = train_group(world, 2, **options)
    assert losses == pytest.approx(plain, abs=1e-4)
    assert torch.allclose(weights, expected, atol=1e-4)
    begun, _ = train_group(world, 2, stop_at=5, save=tmp_path / "checkpoint", **options)
    resumed, again = train_group(world, 2, resume=tmp_path / "checkpoint", **options)
    assert begun + resumed == losses
    assert torch.equal(again, weights)


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.drill), 3])
def test_lora_trains_in_zero_as_in_plain_torch_and_resumes_exactly(
    world: tuple[Path, Path], tmp_path: Path, zero: int
) -> None:
    options: dict[str, Any] = {
        "lora": True,
        "checkpointing": "full",
        "scales": (("model.multi_modal_projector.", 0.1),),
    }
    plain, expected = train_group(world, 2, **options)
    losses, weights = train_group(world, 2, zero=zero, **options)
    assert losses == pytest.approx(plain, abs=1e-4)
    assert torch.allclose(weights, expected, atol=1e-4)
    begun, _ = train_group(world, 2, zero=zero, stop_at=5, save=tmp_path / "checkpoint", **options)
    resumed, again = train_group(world, 2, zero=zero, resume=tmp_path / "checkpoint", **options)
    assert begun + resumed == losses
    assert torch.equal(again, weights)


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.drill), 3])
def test_lora_of_fused_experts_trains_in_zero_as_in_plain_torch(
    tmp_path_factory: pytest.TempPathFactory, zero: int
) -> None:
    mixture = make_world(tmp_path_factory.mktemp("experts"), **FUSED["mixtral"])
    options: dict[str, Any] = {"lora": True, "dropout": 0.0, "checkpointing": "full", "stop_at": 6}
    plain, expected = train_group(mixture, 1, **options)
    # Nothing is so small that each rank keeps it whole.
    whole = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    losses, weights = train_group(mixture, 2, zero=zero, deepspeed=whole, **options)
    assert losses == pytest.approx(plain, abs=1e-4)
    assert torch.allclose(weights, expected, atol=1e-4)


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.drill), 3])
def test_a_vision_tower_learns_in_zero_as_in_plain_torch_and_resumes_exactly(
    world: tuple[Path, Path], tmp_path: Path, zero: int
) -> None:
    options: dict[str, Any] = {
        "tower": True,
        # Rows without a picture are among these, on one rank and not on the other, at the same time.
        "tokens_per_row": 200,
        "checkpointing": "full",
        "scales": (("model.vision_tower.", 0.3),),
        "stop_at": 6,
        # Nothing is so small that each rank keeps it whole.
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    plain, expected = train_group(world, 1, **options | {"checkpointing": "none"})
    losses, weights = train_group(world, 2, zero=zero, **options)
    assert losses == pytest.approx(plain, abs=1e-4)
    assert torch.allclose(weights, expected, atol=1e-4)
    begun, _ = train_group(world, 2, zero=zero, save=tmp_path / "checkpoint", **options | {"stop_at": 3})
    resumed, again = train_group(world, 2, zero=zero, resume=tmp_path / "checkpoint", **options)
    assert begun + resumed == losses
    assert torch.equal(again, weights)


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.drill), 3])
def test_saving_memory_changes_nothing_in_zero(world: tuple[Path, Path], zero: int) -> None:
    plain, expected = train_group(world, 1)
    saving, weights = train_group(world, 2, zero=zero, checkpointing="selective", fused=True)
    assert saving == pytest.approx(plain, abs=1e-4)
    assert torch.allclose(weights, expected, atol=1e-4)


def test_every_value_that_deepspeed_would_choose_itself_is_written() -> None:
    config = deepspeed_config(2, 0.0, bf16=True)
    assert config["gradient_clipping"] == 0.0
    assert config["gradient_accumulation_steps"] == 1
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_a_users_json_arranges_memory_and_communication() -> None:
    user = {
        "zero_optimization": {
            "stage": "auto",
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"device": "cpu"},
        },
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "train_batch_size": "auto",
        "wall_clock_breakdown": True,
    }
    config = deepspeed_config(3, 1.0, bf16=False, user=user)
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu"},
    }
    assert config["gradient_clipping"] == 1.0
    assert config["wall_clock_breakdown"] is True
    assert "train_batch_size" not in config


def test_a_json_as_the_trainer_takes_it_is_taken_here() -> None:
    """With everything "auto" and fp16 switched off, as users of other trainers bring it."""
    user = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    config = deepspeed_config(3, 1.0, bf16=True, user=user)
    assert "fp16" not in config
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["sub_group_size"] == 1e9


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler'.*cosine"),
        ({"optimizer": {"type": "AdamW"}}, "'optimizer'.*learning_rate"),
        (
            {"zero_optimization": {"stage": 3}},
            r"zero_optimization.stage to 3, here it is 2: the key zero_stage",
        ),
        ({"gradient_clipping": 0.5}, "gradient_clipping to 0.5, here it is 1.0: the key gradient_clipping"),
        ({"bf16": {"enabled": False}}, "bf16.enabled to False, here it is True: the key precision"),
        ({"fp16": {"enabled": True}}, "'fp16'.*precision"),
        ({"scheduler": {"type": "WarmupLR", "enabled": False}}, "'scheduler'.*cosine"),
        ({"gradient_allreduce_op": "sum"}, "'gradient_allreduce_op', which may change the result"),
        ({"bf16": {"bf16_optimizer_states": True}}, "'bf16.bf16_optimizer_states', which may"),
        ({"bf16": {"check_grad_overflow": False}}, "'bf16.check_grad_overflow', which may"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients', which may"),
        ({"communication_data_type": "fp16"}, "'communication_data_type', which may"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps to 4.*tokens_per_row"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype to 'bf16'.*cannot be changed"),
    ],
)
def test_a_users_json_cannot_change_the_recipe(user: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        deepspeed_config(2, 1.0, bf16=True, user=json.loads(json.dumps(user)))


def test_parameter_groups_follow_the_names() -> None:
    named = {name: torch.nn.Parameter(torch.zeros(1)) for name in ("a.x", "a.y", "b.x")}
    groups = AdamW(scales=(("a.", 0.5),)).build(named).param_groups
    assert {group["scale"]: len(group["params"]) for group in groups} == {0.5: 2, 1.0: 1}
