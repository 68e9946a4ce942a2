"""A training state as files: safetensors and JSON, never a pickle, the same for every world size.

Only what trains is stored. What is frozen stands there as a digest, so that a run cannot go on with another
tower or language model. Random numbers need no place: they follow from seed, step and rank (`loop.seed_step`).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava.errors import LlavaError
from llava.quantized import parts
from llava.training.engine import TrainingState

STATE = "state.json"
_TENSORS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Position:
    """Where in a run a checkpoint stands, besides the weights."""

    step: int
    """Steps done; with the plan's seed it is the whole data position."""
    plan: dict[str, Any]
    """Seed, epochs, global batch, number of samples, and the digests of what is frozen: must be equal on resume."""


def write(folder: Path, state: TrainingState, position: Position) -> None:
    """Into an empty `folder`; the JSON last."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in _TENSORS:
        save_file(
            {name: value.contiguous() for name, value in getattr(state, part).items()},
            folder / f"{part}.safetensors",
        )
    body = {"update": state.update, "step": position.step, "plan": position.plan}
    (folder / STATE).write_text(json.dumps(body, indent=1))


def read(folder: Path, plan: dict[str, Any]) -> tuple[TrainingState, Position]:
    """What `write` wrote. Refuses a checkpoint of another plan."""
    body = json.loads((folder / STATE).read_text())
    differing = sorted(key for key in {*body["plan"], *plan} if body["plan"].get(key) != plan.get(key))
    if differing:
        raise LlavaError(
            f"checkpoint {folder} belongs to another run: {', '.join(differing)} differ; delete it to start afresh"
        )
    tensors = {part: load_file(folder / f"{part}.safetensors") for part in _TENSORS}
    return TrainingState(body["update"], **tensors), Position(body["step"], body["plan"])


@torch.no_grad()
def frozen_digest(module: nn.Module) -> str:
    """Of every parameter that does not train: names, shapes and bits, on whatever device they are."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad:
            for part, tensor in sorted(parts(parameter).items()):
                rows = torch.hash_tensor(tensor.flatten(1), dim=1) if tensor.dim() > 1 else tensor.flatten()
                bits = rows.contiguous().cpu().view(torch.uint8).numpy().tobytes()
                digest.update(f"{name}{part} {tuple(tensor.shape)}".encode() + bits)
    return digest.hexdigest()
