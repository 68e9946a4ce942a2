"""A loaded model onto its device, a block at a time, so that no device holds more of it than it keeps."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from llava.packing import layers_of


def place(
    stock: Any,
    device: torch.device,
    dtype: torch.dtype,
    see: Callable[[str, nn.Parameter], None],
    cut: Callable[[nn.Module], None] | None = None,
) -> None:
    """Move a stock LLaVA to `device` as if it had been loaded there in `dtype`.

    Buffers that no file holds, such as the frequencies of rotary embeddings, keep their precision.
    `see` is given each parameter by name, whole and on the device. `cut`, where there is one, is then given the
    block that it belongs to (the tower, a decoder layer, the rest) and may leave only a part of it there.
    """
    names = {id(parameter): name for name, parameter in stock.named_parameters()}
    seen: set[int] = set()
    for block in _blocks(stock):
        for module in block.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    # What is cut is written to first (rank 0's values go to all): not into the pages of the files.
                    parameter.data = _moved(parameter.data, device, dtype, copy=cut is not None)
                    see(names[id(parameter)], parameter)
            for name, buffer in module.named_buffers(recurse=False):
                kept = name in module._non_persistent_buffers_set
                module._buffers[name] = _moved(buffer, device, buffer.dtype if kept else dtype)
        if cut is not None:
            cut(block)


def _blocks(stock: Any) -> Iterator[nn.Module]:
    yield stock.model.vision_tower
    yield from layers_of(stock.model.language_model)
    yield stock


def _moved(value: torch.Tensor, device: torch.device, dtype: torch.dtype, copy: bool = False) -> torch.Tensor:
    return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=copy)
