"""A safetensors file that is written a tensor at a time, so that no more than one of them need be in memory.

The library's own `save_file` takes all tensors of a file at once and copies them. The format is a JSON table of names,
types, shapes and offsets, followed by the numbers (https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Form(NamedTuple):
    """Type and shape of a tensor that is yet to come."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Form":
        """Of a tensor, which may be on `meta`."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFile:
    """Writes `forms` into the new file `path`; each tensor is given once, in any order, before the end."""

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        self._forms, self._offsets, end = dict(forms), {}, 0
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        # The widest first: each tensor then begins where its type may lie in memory.
        for name in sorted(forms, key=lambda name: -forms[name].dtype.itemsize):
            form = forms[name]
            self._offsets[name], end = end, end + form.bytes
            table[name] = {
                "dtype": _TYPES[form.dtype],
                "shape": list(form.shape),
                "data_offsets": [self._offsets[name], end],
            }
        head = json.dumps(table, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        self._begin = 8 + len(head)
        self._file = path.open("wb")
        self._file.write(len(head).to_bytes(8, "little") + head)
        self._file.truncate(self._begin + end)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the tensors; it has the form that was promised."""
        if Form.of(tensor) != (promised := self._forms.pop(name)):
            raise AssertionError(f"{name}: {Form.of(tensor)} came, {promised} was promised")
        self._file.seek(self._begin + self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None and self._forms:
            raise AssertionError(f"{self._file.name}: {len(self._forms)} tensors did not come")
