"""docs/extending.md, "A tower family": DINOv2 becomes a tower that training, the arithmetic and `backbones` know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.recipes import Recipe, copied, lint, passed, run

pytestmark = pytest.mark.services

RECIPE = Recipe.read("A tower family")
LLAVA = "import sys; from workflows.cli import main; sys.exit(main())"

MAKE_TOWER = """
import sys
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16)
Dinov2Model(Dinov2Config(**shape)).save_pretrained(sys.argv[1])
edge = {"height": 64, "width": 64}
BitImageProcessorPil(size={"shortest_edge": 64}, crop_size=edge).save_pretrained(sys.argv[1])
"""

ASK = """
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

(folder,) = Path(sys.argv[1]).glob("backbones/*/model")
model = LlavaForConditionalGeneration.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder, backend="pil")
picture = Image.new("RGB", (90, 60), "orange")
inputs = processor(images=picture, text="<image> What is this?", return_tensors="pt")
print(model.config.vision_config.model_type)
print(int((inputs["input_ids"] == model.config.image_token_index).sum()))
with torch.no_grad():
    seen = model(**inputs).logits
    other = model(**{**inputs, "pixel_values": inputs["pixel_values"] * 0}).logits
print(bool(torch.isfinite(seen).all()), not torch.equal(seen, other))
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copied(tmp_path_factory.mktemp("tower"))
    RECIPE.follow(copy)
    return copy


def test_it_takes_one_new_file_and_its_line_in_the_table() -> None:
    assert list(RECIPE.new) == ["llava/towers/dinov2.py"]
    code = [path for path in RECIPE.changes if not path.startswith("tests/")]
    assert code == ["llava/towers/__init__.py"]


def test_its_code_is_clean_and_the_tests_of_every_family_take_it_up(followed: Path) -> None:
    lint(followed, *RECIPE.new, *RECIPE.changes)
    modules = [f"tests/llava/test_{name}.py" for name in ("model", "model_hidden_states", "sizes")]
    # Five language models each: training against stock, and the arithmetic; one for hidden states; three layers read.
    assert passed(followed, *modules, "-k", "dinov2") == 5 + 5 + 1 + 3


def test_backbones_joins_it_and_the_stock_model_sees_a_picture_with_it(
    followed: Path, tmp_path: Path
) -> None:
    tower, root = tmp_path / "dinov2", tmp_path / "root"
    done = run(followed, "-c", MAKE_TOWER, str(tower))
    assert done.returncode == 0, done.stderr[-3000:]
    language = followed / "components" / "backbones" / "towers" / "language"
    settings = {"kind": "hub", "vision": tower, "language": language}
    given = [part for name, value in settings.items() for part in ("--set", f"backbones.{name}={value}")]
    done = run(followed, "-c", LLAVA, "backbones", "tiny", "--root", str(root), *given)
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(followed, "-c", ASK, str(root))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["dinov2", "16", "True", "True"]


@pytest.mark.drill
def test_without_the_recipe_it_is_refused_with_the_families_that_are_known(tmp_path: Path) -> None:
    copy, tower = copied(tmp_path / "copy"), tmp_path / "dinov2"
    assert run(copy, "-c", MAKE_TOWER, str(tower)).returncode == 0
    language = copy / "components" / "backbones" / "towers" / "language"
    given = [f"backbones.kind=hub --set backbones.vision={tower} --set backbones.language={language}"]
    command = ["backbones", "tiny", "--root", str(tmp_path / "root"), "--set", *given[0].split()]
    done = run(copy, "-c", LLAVA, *command)
    assert done.returncode == 2
    assert "vision tower of type 'dinov2'; known: clip, siglip" in done.stderr
