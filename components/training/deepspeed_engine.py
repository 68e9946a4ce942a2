"""DeepSpeed ZeRO 1-3 behind the loop's `Engine`.

DeepSpeed averages gradients over the ranks, so a local sum is scaled by `world / supervised`. Its own
checkpoints are pickles that need the same world size; the state is read and set through its public
per-parameter accessors instead (docs/how-it-works.md, "Training").
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from llava.data.collate import PackedRow
from llava.training.engine import AdamW, TrainingState, set_rate, trainable


def prepare_environment(device: str) -> None:
    """Set before the first import: the accelerator, and a folder where compiled operators stay."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    # The operators are built with ninja, which pip put beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


class DeepSpeedEngine:
    """One rank of a ZeRO group. The process group exists already (Ray made it)."""

    def __init__(
        self,
        module: nn.Module,
        adamw: AdamW,
        config: dict[str, Any],
        blank_row: PackedRow,
    ):
        """`config`: see `deepspeed_config`; `blank_row`: a row with nothing supervised, which brings the
        optimizer's state into being on restore."""
        import deepspeed

        self.named = trainable(module)
        self._zero3 = config["zero_optimization"]["stage"] == 3
        self._blank = blank_row
        self._updates = 0
        self._linked = self._zero3
        self._ds, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw.build(self.named),
            config=config,
        )
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.device = torch.device(self._ds.device)

    def loss(self, row: PackedRow) -> torch.Tensor:
        loss: torch.Tensor = self._ds(row)
        return loss

    def backward(self, loss_sum: torch.Tensor, supervised: int, last: bool) -> None:
        self._ds.backward(loss_sum * (self.world / supervised), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        set_rate(self._ds.optimizer.param_groups, learning_rate)
        self._ds.step()
        self._updates += 1
        if not self._linked:
            self._link_states()
        return float(self._ds.get_global_grad_norm())

    def state(self) -> TrainingState | None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = TrainingState(self._updates)
        for name, parameter in self.named.items():
            parts = {
                "weights": safe_get_full_fp32_param(parameter),
                "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg"),
                "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
            }
            if self.rank == 0:
                for part, value in parts.items():
                    getattr(state, part)[name] = value.detach().reshape(shape_of(parameter)).cpu().clone()
        return state if self.rank == 0 else None

    def restore(self, state: TrainingState) -> None:
        # ZeRO-2 has no optimizer state before a first step: take one that changes nothing.
        self.backward(self.loss(self._blank.to(self.device)), 1, last=True)
        self.step(0.0)
        self._updates = state.update
        with torch.no_grad():
            for name, parameter in self.named.items():
                self._set(parameter, state.weights[name], state.exp_avg[name], state.exp_avg_sq[name])
        for kept in self._ds.optimizer.optimizer.state.values():
            if "step" in kept:
                kept["step"] = torch.full_like(torch.as_tensor(kept["step"]), float(state.update))

    def _link_states(self) -> None:
        # ZeRO-1 and 2 look for the optimizer's state once, when the first parameter group was updated and the
        # others have none yet; without another look `safe_get_*` finds nothing for those.
        zero = self._ds.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
        self._linked = True

    def _set(
        self, parameter: nn.Parameter, weight: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor
    ) -> None:
        from deepspeed import utils as access

        partitioned: Any = parameter
        if self._zero3:
            # The setters for whole tensors fail where the size is not divisible by the world size.
            mine = self._partition(parameter, weight)
            access.safe_set_local_fp32_param(parameter, mine)
            access.safe_set_local_optimizer_state(parameter, self._partition(parameter, exp_avg), "exp_avg")
            access.safe_set_local_optimizer_state(
                parameter, self._partition(parameter, exp_avg_sq), "exp_avg_sq"
            )
            partitioned.ds_tensor.data.copy_(mine)
            if parameter.data.numel() == weight.numel():
                # A small parameter stays gathered between steps; its partition alone would not be seen.
                parameter.data.copy_(weight)
        else:
            access.safe_set_full_fp32_param(parameter, weight.to(self.device))
            access.safe_set_full_optimizer_state(parameter, exp_avg.to(self.device), "exp_avg")
            access.safe_set_full_optimizer_state(parameter, exp_avg_sq.to(self.device), "exp_avg_sq")
            # The setters leave the module's own copy as it was.
            parameter.data.copy_(weight)

    def _partition(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self.world, dtype=whole.dtype)
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, size * self.rank, size).to(self.device)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape; ZeRO-3 leaves an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
