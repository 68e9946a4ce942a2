"""Weights that exist as PyTorch pickles only, rewritten as safetensors.

They are read with `weights_only=True`, here and nowhere else: no code runs, and what takes more memory than the file
has bytes is refused.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import RefusedInput

if TYPE_CHECKING:
    import torch

_TIED = 4
"""How many times a file's bytes its tensors may take: tied weights are written apart."""


def rewrite(pickled: Path, goal: Path) -> None:
    """One file at a time is in memory; tensors that share storage (tied weights) are written apart.

    Raises `RefusedInput` for a file that is damaged, holds more than tensors, or is larger inside than outside.
    """
    from safetensors.torch import save_file

    from llava import pretrained

    with pretrained.reading(f"{pickled}: cannot be read"):
        tensors = _tensors(pickled)
        save_file(tensors, goal, metadata={"format": "pt"})


def _tensors(pickled: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    room = pickled.stat().st_size
    if zipfile.is_zipfile(pickled):
        with zipfile.ZipFile(pickled) as archive:
            _check_size(pickled, sum(member.file_size for member in archive.infolist()), room)
    try:
        state: Any = torch.load(pickled, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RefusedInput(
            f"{pickled}: holds more than tensors, so it could run code when it is read; take a repository with "
            "safetensors"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise RefusedInput(f"{pickled}: is no plain table of tensors")
    _check_size(pickled, sum(value.numel() * value.element_size() for value in state.values()), _TIED * room)
    return _apart(state)


def _check_size(pickled: Path, size: int, room: int) -> None:
    if size > room:
        raise RefusedInput(
            f"{pickled}: unpacked, it has {size:,} bytes, more than a file of its size ({pickled.stat().st_size:,} "
            "bytes) can hold: take a repository with safetensors"
        )


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    storages: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.contiguous().clone() if shared else tensor.contiguous()
    return tensors
