"""Where weights, gradients and optimizer lie on one GPU, and the arithmetic of its memory.

In bf16 both sides train with the same layout, which DeepSpeed has too: weights and gradients in bf16 (2 + 2 bytes
per parameter that learns), an fp32 copy and two fp32 moments (4 + 8). For all of 7B that is 16 bytes per
parameter; a frozen weight is 2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.training_step.shapes import Shape, Stage
from llava.estimate import Memory, Setup, memory
from llava.sizes import Work
from llava.training.engine import AdamW, set_rate

BF16 = (
    "bf16 weights and gradients, fp32 copy, fp32 moments: 16 bytes per learning parameter, 2 per frozen one"
)
FP32 = "fp32 weights, gradients and moments: 16 bytes per learning parameter, 4 per frozen one"


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on an fp32 copy of bf16 parameters, a tensor at a time: no gradient is held twice for longer."""

    def __init__(self, named: Mapping[str, nn.Parameter], adamw: AdamW):
        super().__init__(named.values(), {"lr": 0.0, "scale": 1.0})
        self.masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in named.items()}
        self.updates = [adamw.build({name: master}) for name, master in self.masters.items()]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the copies and round them into the parameters."""
        (group,) = self.param_groups
        for parameter, master, update in zip(
            group["params"], self.masters.values(), self.updates, strict=True
        ):
            if parameter.grad is None:
                continue
            master.grad = parameter.grad.float()
            set_rate(update.param_groups, group["lr"])
            update.step()
            master.grad = None
            parameter.copy_(master)


@dataclass(frozen=True)
class MixedAdamW(AdamW):
    """Builds `MasterAdamW` where the parameters are in half precision."""

    def build(self, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        if all(parameter.dtype == torch.float32 for parameter in named.values()):
            return super().build(named)
        return MasterAdamW(named, AdamW(self.weight_decay, self.beta1, self.beta2, self.eps))


def work_of(lengths: np.ndarray, supervised: np.ndarray, images: np.ndarray) -> Work:
    """What samples with these lengths in tokens ask for; arrays of shape (n,)."""
    return Work.of(lengths.tolist(), float(supervised.sum()), float(images.sum()))


def expected_memory(shape: Shape, stage: Stage, row: Work, bf16: bool, checkpointing: bool) -> Memory:
    """`llava estimate`'s arithmetic for the largest row, with this layout's static parts. Bytes."""
    setup = Setup(
        stage.training,
        zero_stage=2 if bf16 else 0,
        precision="bf16" if bf16 else "fp32",
        checkpointing="full" if checkpointing else "none",
        # Nothing travels: there is one GPU.
        reduce_bucket=0,
    )
    found = memory(shape.sizes, setup, row)
    return replace(found, gradients=setup.element * shape.sizes.trainable(stage.training))
