"""What cannot work together is refused in one line, when the config is read."""

import json
from pathlib import Path

import pytest

from components.finetune import Finetune
from components.training import settings
from llava.errors import RefusedInput
from workflows import config


def refusal(*overrides: str) -> str:
    """What `--set` with these values is answered."""
    with pytest.raises(RefusedInput) as refused:
        config.load("tiny", overrides)
    assert refused.value.exit_status == 2
    said = str(refused.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["pretrain.lora=true"], "pretrain: stage 1 trains the projector alone and has no place for LoRA"),
        (["finetune.precision=bf16", "finetune.zero_stage=0"], "finetune: zero_stage 0 keeps no fp32 copy"),
        (
            ["finetune.compile=true", "finetune.zero_stage=3"],
            "finetune: compile does not go with zero_stage 3",
        ),
        (["finetune.workers=2", "finetune.min_workers=3"], "finetune: min_workers 3 is above workers 2"),
        (
            ["finetune.checkpointing=some"],
            "finetune.checkpointing: Input should be 'none', 'selective', 'full' or 'auto'",
        ),
        (
            ["finetune.attention=flash_attention_2"],
            "finetune: attention 'flash_attention_2' cannot pack: it does not know where a sample ends; choose one of",
        ),
        (
            ["finetune.lora_bits=4"],
            "finetune: lora_bits=4 keeps the weights beside adapters in 4 bit: set lora",
        ),
        (["finetune.lora=true", "finetune.lora_bits=8"], "finetune.lora_bits: Input should be 16 or 4"),
        (["pretrain.vision_learning_rate=1e-5"], "pretrain.vision_learning_rate: unknown key"),
        (
            ["finetune.vision_learning_rate=0"],
            "finetune.vision_learning_rate: Input should be greater than 0",
        ),
        (["finetune.attention=varlen"], "finetune: attention varlen needs gpu=true and precision=bf16"),
        (["finetune.gradient_clipping=null"], "finetune.gradient_clipping: Input should be a valid number"),
        (["finetune.spike_factor=1"], "finetune.spike_factor: Input should be greater than 1"),
        (["finetune.deepspeed_config=gone.json"], "finetune: gone.json: No such file"),
    ],
)
def test_a_mix_that_cannot_work_is_refused(overrides: list[str], says: str) -> None:
    assert says in refusal(*overrides)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "sets 'scheduler': it would replace the cosine schedule"),
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage to 3, here it is 2: the key zero_stage",
        ),
        ({"gradient_clipping": 0.1}, "gradient_clipping to 0.1, here it is 1.0: the key gradient_clipping"),
        ([], "expected an object"),
    ],
)
def test_a_deepspeed_json_that_contradicts_the_config_is_refused(
    tmp_path: Path, content: object, says: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    assert says in refusal(f"finetune.deepspeed_config={path}")


def test_a_deepspeed_json_goes_with_deepspeed_only(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("{}")
    said = refusal(f"finetune.deepspeed_config={path}", "finetune.zero_stage=0")
    assert "finetune: deepspeed_config is given, but zero_stage 0 is plain torch" in said


def test_a_deepspeed_json_adds_what_ours_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}, "gradient_clipping": "auto"}))
    settings = config.load("tiny", [f"finetune.deepspeed_config={path}"]).finetune
    made = settings.deepspeed()
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["gradient_clipping"] == settings.gradient_clipping == 1.0


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    assert "pip install 'llava-workflow[lora]'" in refusal("finetune.lora=true")


def test_4_bit_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    assert "pip install 'llava-workflow[qlora]'" in refusal("finetune.lora=true", "finetune.lora_bits=4")


def test_the_vision_tower_learns_where_it_has_a_rate_and_only_there() -> None:
    usual = config.load("tiny", []).finetune
    assert usual.parts(Finetune.trains) == ("projector", "language_model") and usual.own_rates() == {}
    rates = ["finetune.vision_learning_rate=3e-6", "finetune.projector_learning_rate=2e-5"]
    learning = config.load("tiny", rates).finetune
    assert learning.parts(Finetune.trains) == ("projector", "language_model", "vision_tower")
    assert learning.own_rates() == {"projector": 2e-5, "vision_tower": 3e-6}
