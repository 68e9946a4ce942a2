"""DeepSpeed ZeRO 1-3 behind the loop's `Engine`.

DeepSpeed averages gradients over the ranks, so a local sum is scaled by `world / supervised`. Its own
checkpoints are pickles that need the same world size. Each rank reads and sets its own part of the state instead: in
ZeRO-3 through the public accessors of partitions, in ZeRO-1 and 2 through the mapping that the accessors of whole
parameters are built on, since those add up what all ranks hold (docs/how-it-works.md, "Training").
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from llava.data.collate import PackedRow
from llava.training.checkpoint import PARTS, Fragment, SavedState
from llava.training.engine import AdamW, on_host, set_rate, trainable


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

    @property
    def updates(self) -> int:
        return self._updates

    def fragments(self) -> list[Fragment]:
        found = [self._held(name, parameter) for name, parameter in self.named.items()]
        return [each for each in found if each is not None]

    def restore(self, saved: SavedState) -> None:
        # ZeRO-2 has no optimizer state before a first step: take one that changes nothing.
        self.backward(self.loss(self._blank.to(self.device)), 1, last=True)
        self.step(0.0)
        self._updates = saved.update
        with torch.no_grad():
            for name, parameter in self.named.items():
                (self._set_partition if self._zero3 else self._set_fragment)(name, parameter, saved)
            self._tell_the_module()
        for kept in self._ds.optimizer.optimizer.state.values():
            if "step" in kept:
                kept["step"] = torch.full_like(torch.as_tensor(kept["step"]), float(saved.update))

    def _held(self, name: str, parameter: Any) -> Fragment | None:
        """What this rank holds of a parameter."""
        from deepspeed import utils as access

        if self._zero3:
            start, count = self._partition_of(parameter)
            if not count:
                return None
            parts = {
                "weights": access.safe_get_local_fp32_param(parameter),
                "exp_avg": access.safe_get_local_optimizer_state(parameter, "exp_avg"),
                "exp_avg_sq": access.safe_get_local_optimizer_state(parameter, "exp_avg_sq"),
            }
            # What is over the end only fills up.
            return Fragment(name, start, {part: on_host(value[:count]) for part, value in parts.items()})
        if (mapping := parameter._hp_mapping) is None:
            return None
        parts = {part: mapping.get_hp_fragment(_KEYS[part]) for part in PARTS}
        start = mapping.lp_fragment_address.start
        return Fragment(name, start, {part: on_host(value) for part, value in parts.items()})

    def _partition_of(self, parameter: Any) -> tuple[int, int]:
        """First element and number of elements of this rank's partition in ZeRO-3."""
        size, whole = parameter.ds_tensor.numel(), parameter.ds_numel
        start = min(size * self.rank, whole)
        return start, min(size, whole - start)

    def _link_states(self) -> None:
        # ZeRO-1 and 2 look for the optimizer's state once, when the first parameter group was updated and the
        # others have none yet; without another look `safe_get_*` finds nothing for those.
        zero = self._ds.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
        self._linked = True

    def _set_partition(self, name: str, parameter: Any, saved: SavedState) -> None:
        from deepspeed import utils as access

        start, count = self._partition_of(parameter)
        for part, key in _KEYS.items():
            # The setters for whole tensors fail where the size is not divisible by the world size.
            mine = torch.zeros(parameter.ds_tensor.numel(), device=self.device)
            mine[:count] = saved.read(part, name, start, start + count)
            if key is None:
                access.safe_set_local_fp32_param(parameter, mine)
                parameter.ds_tensor.data.copy_(mine)
            else:
                access.safe_set_local_optimizer_state(parameter, mine, key)

    def _set_fragment(self, name: str, parameter: Any, saved: SavedState) -> None:
        if (mapping := parameter._hp_mapping) is not None:
            start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            for part, key in _KEYS.items():
                mapping.get_hp_fragment(key).copy_(saved.read(part, name, start, start + count))

    def _tell_the_module(self) -> None:
        """The setters leave the module's own copies as they were."""
        zero = self._ds.optimizer
        if not self._zero3:
            zero.update_lp_params()
        elif kept := zero.persistent_parameters:
            # Small parameters stay gathered between steps; their partitions alone would not be seen.
            kept[0].partition(kept)
            kept[0].all_gather(kept)


_KEYS: dict[str, str | None] = {"weights": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""What DeepSpeed calls `PARTS`."""


def partition(module: nn.Module, config: dict[str, Any]) -> None:
    """Cut the parameters of `module` that ZeRO-3 has not cut yet, one after the other: none is whole on a device before
    the next one comes. All ranks call it."""
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=config)
