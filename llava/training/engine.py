"""What the loop needs of whatever computes gradients and updates: plain torch here, DeepSpeed in components."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import distributed, nn

from llava.data.collate import PackedRow


@dataclass
class TrainingState:
    """Everything that an optimizer knows, per trainable parameter, whole and in fp32, whatever the world size."""

    update: int
    """Updates made so far."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, torch.Tensor] = field(default_factory=dict)


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

    def state(self) -> TrainingState | None:
        """The state, gathered on rank 0 (None elsewhere). All ranks call it."""
        ...

    def restore(self, state: TrainingState) -> None:
        """Continue from `state`, which every rank gives whole."""
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
    return parameter.ndim > 1 and not name.endswith("bias")


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

    def state(self) -> TrainingState | None:
        if self.rank:
            return None
        state = TrainingState(self.updates)
        for name, parameter in self.named.items():
            kept = self.optimizer.state[parameter]
            state.weights[name] = parameter.detach().float().cpu().clone()
            if kept:
                state.exp_avg[name] = kept["exp_avg"].float().cpu().clone()
                state.exp_avg_sq[name] = kept["exp_avg_sq"].float().cpu().clone()
        return state

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        self.updates = state.update
        for name, parameter in self.named.items():
            parameter.copy_(state.weights[name])
            if name in state.exp_avg:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.update), device=parameter.device),
                    "exp_avg": state.exp_avg[name].to(parameter),
                    "exp_avg_sq": state.exp_avg_sq[name].to(parameter),
                }
