"""The exported folder in the oldest and the newest transformers: each in an environment of its own, from the registry.

torch and the rest are shared with this environment; nothing of this project can be imported there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava import generate
from llava import model as models
from llava.model import Reading
from llava.pixels import fitted
from llava.text_tokenizer import IMAGE
from tests.llava.test_export import ROPE
from tests.llava.test_model import TOWERS, language_model
from tests.support.repository import REPOSITORY
from tests.support.tiny_llava import byte_tokenizer
from tests.support.tokenizer_kinds import tokenizer_of

pytestmark = pytest.mark.drill

VERSIONS = ("transformers==4.57.*", "transformers==5.16.*", "transformers>=5.23")
"""The last of transformers 4, the oldest that vLLM takes, and the newest there is."""
READER = REPOSITORY / "tests/support/read_export.py"

KINDS: dict[str, dict[str, Any]] = {
    "clip, llama": {},
    "clip padded, llama 3's rope": {
        "fit": "pad",
        "text": {"rope_parameters": ROPE, "max_position_embeddings": 512},
    },
    "clip, tied qwen 2": {
        "language": "qwen2",
        "text": {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    },
    "siglip, qwen 3": {
        "tower": "siglip",
        "language": "qwen3",
        "text": {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
    },
    "clip, one linear layer, mistral": {"language": "mistral", "reading": Reading("linear")},
    "a begin token": {"tokenizer": "regex", "template": "v1"},
    "a begin token, sentencepiece": {"tokenizer": "sentencepiece", "template": "v1"},
    "a begin token, legacy": {"tokenizer": "legacy", "template": "llama_2"},
}


def exported(
    folder: Path,
    tower: str = "clip",
    language: str = "llama",
    tokenizer: str | None = None,
    template: str = "chatml",
    reading: Reading | None = None,
    fit: Any = "model",
    text: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    torch.manual_seed(5)
    words = byte_tokenizer() if tokenizer is None else tokenizer_of.__wrapped__(tokenizer)
    vision, images = TOWERS[tower]()
    written = language_model(language, len(words), **(text or {}))
    model, processor = models.join(vision, written, words, fitted(images, fit, 64), template, 3, reading)
    models.save(model, processor, folder, template)
    return model.eval(), processor


def expected(model: Any, processor: Any, picture: Image.Image) -> tuple[list[int], torch.Tensor]:
    """The ids that training would use, and the logits behind them."""
    pixels = generate.pixel_values(processor, picture)
    assert pixels is not None
    ids = generate.prompt(processor, "What is it?", pixels)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels[None]).logits[0, -1]
    return ids, logits


@pytest.mark.parametrize("wanted", VERSIONS)
def test_another_version_reads_the_same_weights_ids_pixels_and_logits(wanted: str, tmp_path: Path) -> None:
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    shown.save(tmp_path / "picture.png")
    known, folders = {}, []
    for number, (kind, how) in enumerate(KINDS.items()):
        folders.append(tmp_path / f"model-{number}")
        known[str(folders[-1])] = (kind, *expected(*exported(folders[-1], **how), shown))
    python = environment(tmp_path / "environment", wanted)
    told = read(python, tmp_path / "picture.png", folders)
    assert len(told) == len(KINDS)
    print(f"\n{wanted}: {told[0]['version']}")
    for found in told:
        kind, ids, logits = known[found["folder"]]
        apart = (torch.tensor(found["logits"]) - logits).abs().max().item()
        print(f"  {kind}: {len(found['lost'])} weights lost, logits differ by {apart:.1e}")
        assert found["lost"] == []
        assert found["ids"] == found["ids_at_once"] == ids, kind
        assert apart <= 1e-5, kind
        assert IMAGE not in found["ids"]


def environment(folder: Path, wanted: str) -> Path:
    """The python of a fresh environment with `wanted`, and all else from this one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--upgrade", wanted]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return python


def read(python: Path, picture: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """What `read_export` tells of each folder."""
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, READER, picture, *folders],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=alone | {"HF_HUB_OFFLINE": "1"},
        cwd=folders[0].parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
