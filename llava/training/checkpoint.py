"""A training state as files: safetensors and JSON, never a pickle, the same for every world size."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
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
    body = {
        "update": state.update,
        "step": position.step,
        "plan": position.plan,
        "torch_rng": torch.get_rng_state().tolist(),
    }
    (folder / STATE).write_text(json.dumps(body))


def read(folder: Path, plan: dict[str, Any]) -> tuple[TrainingState, Position]:
    """What `write` wrote, with torch's random state set back. Refuses a checkpoint of another plan."""
    body = json.loads((folder / STATE).read_text())
    differing = sorted(key for key in {*body["plan"], *plan} if body["plan"].get(key) != plan.get(key))
    if differing:
        raise LlavaError(
            f"checkpoint {folder} belongs to another run: {', '.join(differing)} differ; delete it to start afresh"
        )
    torch.set_rng_state(torch.tensor(body["torch_rng"], dtype=torch.uint8))
    tensors = {part: load_file(folder / f"{part}.safetensors") for part in _TENSORS}
    return TrainingState(body["update"], **tensors), Position(body["step"], body["plan"])
