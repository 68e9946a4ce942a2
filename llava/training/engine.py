"""What the loop needs of whatever computes gradients and updates: plain torch here, DeepSpeed in components."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import distributed, nn

from llava.data.collate import PackedRow
from llava.training.checkpoint import PARTS, Fragment, SavedState


class Engine(Protocol):
    """One rank's model, gradients and optimizer."""

    rank: int
    world: int
    device: torch.device

    def loss(self, row: PackedRow) -> torch.Tensor:
        """The loss summed over the row's supervised tokens, a scalar."""
        ...

    def backward(self, loss_sum: torch.Tensor, supervised: int, last: bool) -> None:
        """Add the gradient of `loss_sum / supervised`, where `supervised` counts the whole global batch."""
        ...

    def step(self, learning_rate: float) -> float:
        """Update the weights; returns the norm of the gradient over all ranks before clipping."""
        ...

    @property
    def updates(self) -> int:
        """Updates made so far."""
        ...

    def fragments(self) -> list[Fragment]:
        """This rank's share of the state, copied to the host. Together the shares hold each element once.

        Ranks need not call it at the same time: nothing is gathered.
        """
        ...

    def restore(self, saved: SavedState) -> None:
        """Continue from `saved`, of which each rank reads what it holds. All ranks call it."""
        ...


@dataclass(frozen=True)
class AdamW:
    """The optimizer of both papers (v1.5, table 9: AdamW without weight decay)."""

    weight_decay: float = 0.0
    """Of matrices; biases and the weights of norms have none, as with the Trainer of transformers."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    scales: tuple[tuple[str, float], ...] = ()
    """(prefix of parameters' names, factor on the learning rate); the first that fits counts, else 1."""

    def build(self, named: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
        """Torch's own, in the variant that is the fastest on the parameters' device; one group per factor and decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in named.items():
            scale = next((scale for prefix, scale in self.scales if name.startswith(prefix)), 1.0)
            decay = self.weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": members, "scale": scale, "weight_decay": decay}
                for (scale, decay), members in groups.items()
            ],
            lr=0.0,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay takes the parameter: a matrix does, a bias or a norm's weight does not."""
    # ZeRO-3 leaves an empty tensor in the place of one that it has cut.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and not name.endswith("bias")


def set_rate(groups: list[dict[str, Any]], learning_rate: float) -> None:
    """Each of the optimizer's parameter groups gets its share of the rate."""
    for group in groups:
        group["lr"] = learning_rate * group["scale"]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by its name in the stock model."""
    return {
        name.removeprefix("stock."): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


class PlainEngine:
    """Every rank holds everything; gradients are summed over the ranks once per update.

    Works without a process group, too.
    """

    def __init__(self, module: nn.Module, adamw: AdamW, gradient_clipping: float):
        """`gradient_clipping`: the largest norm of the gradient; 0 does not clip."""
        self.module = module
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.named = trainable(module)
        self.device = next(iter(self.named.values())).device
        self.clip = gradient_clipping
        self.optimizer = adamw.build(self.named)
        self.updates = 0

    def loss(self, row: PackedRow) -> torch.Tensor:
        loss: torch.Tensor = self.module(row)
        return loss

    def backward(self, loss_sum: torch.Tensor, supervised: int, last: bool) -> None:
        (loss_sum / supervised).backward()

    def step(self, learning_rate: float) -> float:
        for parameter in self.named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.world > 1:
                distributed.all_reduce(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.clip if self.clip else float("inf"))
        set_rate(self.optimizer.param_groups, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return float(norm)

    def fragments(self) -> list[Fragment]:
        total = sum(parameter.numel() for parameter in self.named.values())
        first, last = (total * number // self.world for number in (self.rank, self.rank + 1))
        found, begin = [], 0
        for name, parameter in self.named.items():
            start, stop = max(first - begin, 0), min(last - begin, parameter.numel())
            if start < stop:
                kept = self.optimizer.state[parameter]
                tensors = {"weights": parameter, "exp_avg": kept["exp_avg"], "exp_avg_sq": kept["exp_avg_sq"]}
                found.append(
                    Fragment(
                        name,
                        start,
                        {part: on_host(value.flatten()[start:stop]) for part, value in tensors.items()},
                    )
                )
            begin += parameter.numel()
        return found

    @torch.no_grad()
    def restore(self, saved: SavedState) -> None:
        self.updates = saved.update
        for name, parameter in self.named.items():
            whole = {part: saved.whole(part, name, parameter.shape) for part in PARTS}
            parameter.copy_(whole["weights"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(saved.update), device=parameter.device),
                "exp_avg": whole["exp_avg"].to(parameter),
                "exp_avg_sq": whole["exp_avg_sq"].to(parameter),
            }


def on_host(value: torch.Tensor) -> torch.Tensor:
    """A copy in fp32 that later updates leave alone."""
    return value.detach().to("cpu", torch.float32, copy=True)
