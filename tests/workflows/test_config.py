"""Every mistake in a config is one clear line that names the key, before anything starts."""

from pathlib import Path

import pytest

from llava.errors import RefusedInput
from workflows import config as configs


@pytest.mark.parametrize("name", configs.preset_names())
def test_every_preset_loads(name: str) -> None:
    # What only the user knows; see tests/workflows/test_estimate.py.
    paths = [] if name == "tiny" else ["shard.path=/data", "shard_captions.path=/data"]
    assert configs.load(name, paths).name == name


def test_overrides_are_read_as_yaml_and_as_numbers() -> None:
    config = configs.load(
        "tiny",
        ["finetune.learning_rate=2e-5", "pretrain.enabled=false", "shard.scenes=10", "shard.path=null"],
    )
    assert config.finetune.learning_rate == 2e-5
    assert config.pretrain.enabled is False
    assert config.shard.scenes == 10


def test_a_file_is_a_preset_of_ones_own(tmp_path: Path) -> None:
    text = (configs.PRESETS / "tiny.yaml").read_text().replace("name: tiny", "name: mine")
    (tmp_path / "mine.yaml").write_text(text)
    assert configs.load(str(tmp_path / "mine.yaml")).name == "mine"


@pytest.mark.parametrize(
    ("preset", "override", "message"),
    [
        ("tinny", None, r"'tinny' is neither a preset \(.*tiny.*\) nor a YAML file; did you mean 'tiny'"),
        (
            "tiny",
            "finetune.learning_rat=1",
            r"finetune\.learning_rat: unknown key; did you mean 'learning_rate'",
        ),
        ("tiny", "finetun.learning_rate=1", r"finetun: unknown key; did you mean 'finetune'"),
        ("tiny", "finetune.epochs=many", r"finetune\.epochs: .*number.*'many'"),
        ("tiny", "finetune.epochs=-1", r"finetune\.epochs: .*greater than 0"),
        ("tiny", "finetune.template=v9", r"finetune.*template 'v9' is unknown; known: chatml"),
        ("tiny", "finetune.zero_stage=4", r"finetune\.zero_stage: .*0, 1, 2, 3 or 'auto'"),
        ("tiny", "shard.source=coco", r"shard.*path"),
        ("tiny", "finetune.epochs", r"write KEY=VALUE"),
        ("tiny", "register.benchmarks=[accuracy]", r"^register\.benchmarks: 'accuracy' is no score: write"),
        (
            "tiny",
            "evaluate.benchmarks=[{benchmark: nope}]",
            r"^evaluate\.benchmarks\[0\]\.benchmark: no such",
        ),
        (
            "tiny",
            "evaluate.benchmarks=[{benchmark: pope, questions: q, labels: 3}]",
            r"^evaluate\.benchmarks\[0\]\.labels: .*string, got 3, or .*dictionary",
        ),
        ("tiny", "register.api_key=abc", r"secrets are read from the environment"),
        ("tiny", "shard.path=s3://user:pass@host/bucket", r"credentials"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(preset: str, override: str | None, message: str) -> None:
    with pytest.raises(RefusedInput, match=message) as caught:
        configs.load(preset, [override] if override else [])
    assert "\n" not in str(caught.value)
    assert "abc" not in str(caught.value)
    assert "pass@" not in str(caught.value)


def test_flat_keys_begin_with_the_component() -> None:
    flat = configs.flat(configs.load("tiny"))
    assert flat["shard.source"] == "shapes"
    assert flat["register.name"] == "llava-tiny"
