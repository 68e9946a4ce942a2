"""The tiny towers: made from nothing on two cores, gated, and kept in half precision beside this module.

`python -m components.backbones.tiny --out DIR` makes them again; `towers/record.json` holds what that printed.
"""

import argparse
import itertools
import json
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from components import tiny_world
from components.backbones import language, probe, vision
from components.backbones.shipped import GATED, LANGUAGE, RECORD, VISION
from components.backbones.tokenizer import train_tokenizer
from llava import pretrained

GATE = 95.0
TOKENIZER_SAMPLES = 6000
SHARD_SIZE = "480KB"
GATE_SCENES = 600


def train_towers(out: Path, seed: int, say: Callable[[str], None]) -> dict[str, float]:
    """Makes tokenizer, language model and vision tower in `out`; returns the gates' figures, in percent.

    The gates are measured on what was written; one that stays below 95 % is said aloud.
    """
    lines: list[str] = []

    def record(line: str) -> None:
        lines.append(line)
        say(line)

    samples = itertools.islice(language.world_samples(seed, tiny_world.TRAIN), TOKENIZER_SAMPLES)
    tokenizer = train_tokenizer(text for sample in samples for text in sample.texts)
    record(f"tokenizer: {len(tokenizer)} tokens")
    tokenizer.save_pretrained(out / LANGUAGE)
    _save(language.train_language(tokenizer, seed, record), out / LANGUAGE)
    _save(vision.train_vision(tokenizer, seed, record), out / VISION)
    vision.image_processor().save_pretrained(out / VISION)
    gates = measure(out, seed, GATE_SCENES)
    for name, figure in gates.items():
        record(f"gate: {name} {figure:.1f} %")
    _write_record(out, seed, gates, lines)
    if low := [f"{name} {gates[name]:.1f} %" for name in GATED if gates[name] < GATE]:
        say(f"below {GATE:.0f} %, so train longer or try another seed: {', '.join(low)}")
    return gates


def measure(towers: Path, seed: int, scenes: int) -> dict[str, float]:
    """The gates' figures of the towers in a folder, on `scenes` scenes."""
    tokenizer = pretrained.tokenizer(towers / LANGUAGE)
    model = pretrained.model(LlamaForCausalLM, towers / LANGUAGE, dtype=torch.float32)
    tower = pretrained.model(CLIPVisionModel, towers / VISION, dtype=torch.float32)
    return {
        **probe.language_gates(model.eval(), tokenizer, seed, scenes),
        **probe.vision_gates(tower.eval(), seed, scenes),
    }


def _save(model: LlamaForCausalLM | CLIPVisionModel, folder: Path) -> None:
    module: nn.Module = model
    module.half()
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for path in folder.iterdir():
        path.chmod(0o644)


def _write_record(out: Path, seed: int, gates: dict[str, float], lines: list[str]) -> None:
    record = {
        "command": f"python -m components.backbones.tiny --out DIR --seed {seed}",
        "made": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow")},
        "gates": {name: round(figure, 2) for name, figure in gates.items()},
        "output": lines,
    }
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the tiny towers anew.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write language/ and vision/ into")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and scenes")
    arguments = parser.parse_args()
    train_towers(arguments.out, arguments.seed, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
