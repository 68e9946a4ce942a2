"""How much of what the device could have done was done: model FLOPs utilisation (MFU)."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from llava.errors import RefusedInput
from llava.estimate import GPUS, Gpu
from llava.sizes import Sizes, Training, Work, flops, llava_sizes


@dataclass(frozen=True)
class Utilisation:
    """Of one run: its model, what trains, and the peak of one device."""

    sizes: Sizes
    training: Training
    lora_rank: int
    tflops: float

    def mfu(self, tokens: int, supervised: int, seconds: float, devices: int) -> float:
        """Share of the peak that a step's useful tokens needed; nothing that is computed twice counts."""
        done = flops(self.sizes, Work(tokens, 0, supervised, 0), self.training, self.lora_rank)
        return done.matrices / (seconds * devices * self.tflops * 1e12)


def utilisation(config: Any, training: Training, lora_rank: int, device: torch.device) -> Utilisation | None:
    """None where the device's peak or the model's shapes are not known: no figure is better than a guess."""
    if device.type != "cuda" or (peak := peak_tflops(torch.cuda.get_device_name(device))) is None:
        return None
    try:
        return Utilisation(llava_sizes(config.to_dict()), training, lora_rank, peak)
    except RefusedInput:
        return None


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by the name that its driver gives; boards that run slower are unknown."""
    found = named(device_name)
    return found.tflops if found is not None else None


def named(device_name: str) -> Gpu | None:
    """The kind of a device by the name that its driver gives; boards that run slower than it are unknown."""
    words = re.sub(r"\brtx (\d)", r"rtx\1", device_name.lower())
    if "pcie" in words or "nvl" in words:
        return None
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name.split('-')[0]}\b", words)), None)
