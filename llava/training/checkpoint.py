"""A training state as files: each rank's share in files of its own, read at any world size.

A parameter's fp32 weight and AdamW's two moments are flat; each element lies in the share of exactly one rank, as its
optimizer had it. Safetensors and JSON, never a pickle. Only what trains is stored. What is frozen stands there as a
digest, so that a run cannot go on with another tower or language model. Random numbers need no place: they follow from
seed, step and rank (`loop.seed_step`).
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pyarrow import fs
from torch import nn

from llava.data.jsonl import from_json
from llava.errors import LlavaError
from llava.tensor_file import Form, TensorFile

STATE = "state.json"
PARTS = ("weights", "exp_avg", "exp_avg_sq")
_WINDOW = 8 << 20
"""Bytes that are read at once where less is asked for: pieces lie in the order in which they are read."""
_WINDOWS, _WINDOW_AT_LEAST = 128 << 20, 1 << 20
"""Of all files together: who reads whole parameters reads in the files of all ranks. And of one, all the same."""
_HEADER_AT_MOST = 256 << 20


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter as a rank's optimizer holds it."""

    name: str
    """The parameter's name in the stock model."""
    start: int
    """Where the piece begins in the flat parameter."""
    values: Mapping[str, torch.Tensor]
    """(elements,) fp32 on the host, for each of `PARTS`."""


class Holder(Protocol):
    """One rank that holds a part of the state."""

    rank: int
    world: int

    def fragments(self) -> list[Fragment]:
        """Its share of the state."""
        ...


@dataclass(frozen=True)
class Written:
    """One file of a checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Share:
    """What one rank wrote: its files, and which elements of which parameter lie in them."""

    files: dict[str, Written]
    pieces: dict[str, tuple[int, int]]
    """First element and number of elements, by parameter; in the order of the file."""

    def as_json(self) -> dict[str, Any]:
        """For the commit marker."""
        return {
            "files": {name: [file.size, file.sha256] for name, file in self.files.items()},
            "pieces": self.pieces,
        }

    @classmethod
    def from_json(cls, found: Any) -> "Share":
        """Raises ValueError, TypeError, KeyError or AttributeError for what `as_json` would not have written."""
        files = {
            str(name): Written(int(size), str(digest)) for name, (size, digest) in found["files"].items()
        }
        pieces = {str(name): (int(start), int(count)) for name, (start, count) in found["pieces"].items()}
        if any(start < 0 or count < 0 for start, count in pieces.values()):
            raise ValueError("a piece of less than no elements")
        return cls(files, pieces)


@dataclass(frozen=True)
class Position:
    """Where in a run a checkpoint stands, besides the weights."""

    step: int
    """Steps done; with the plan's seed it is the whole data position."""
    plan: dict[str, Any]
    """Seed, epochs, global batch, number of samples, and the digests of what is frozen: must be equal on resume."""
    update: int = 0
    """Updates that the optimizer has made."""


def file_of(part: str, rank: int, world: int) -> str:
    """The file of one of `PARTS` in a rank's share."""
    return f"{part}-{rank:05d}-of-{world:05d}.safetensors"


def share_file(rank: int) -> str:
    """What a rank wrote, as JSON: the last file of its share."""
    return f"share-{rank:05d}.json"


def write_share(folder: Path, rank: int, world: int, fragments: Sequence[Fragment]) -> Share:
    """Write a rank's share into `folder`, which the ranks may have in common."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part in PARTS:
        path = folder / file_of(part, rank, world)
        forms = {each.name: Form.of(each.values[part]) for each in fragments}
        with TensorFile(path, forms) as file:
            for each in fragments:
                file.put(each.name, each.values[part])
        files[path.name] = written(path)
    return Share(files, {each.name: (each.start, len(each.values[PARTS[0]])) for each in fragments})


def written(path: Path) -> Written:
    """Size and digest of a file, which is on the disk by then: what is committed survives a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(path.stat().st_size, digest)


def position_json(position: Position) -> bytes:
    """The file `STATE`."""
    body = {"update": position.update, "step": position.step, "plan": position.plan}
    return json.dumps(body, indent=1).encode()


def position_of(data: bytes, plan: dict[str, Any], where: str) -> Position:
    """What `position_json` wrote. Refuses a checkpoint of another plan; `where` names it."""
    body = from_json(data)
    differing = sorted(key for key in {*body["plan"], *plan} if body["plan"].get(key) != plan.get(key))
    if differing:
        raise LlavaError(
            f"checkpoint {where} belongs to another run: {', '.join(differing)} differ; delete it to start afresh"
        )
    return Position(body["step"], body["plan"], body["update"])


class SavedState:
    """Reads any piece of any parameter out of the shares of a checkpoint, whoever wrote them."""

    def __init__(
        self, where: str, update: int, shares: Sequence[Share], open_file: Callable[[str], Any]
    ) -> None:
        """`open_file`: gives pyarrow's file for a name; `where` names the checkpoint to people."""
        self.where, self.update = where, update
        self._open, self._files = open_file, dict[str, _Reader]()
        self._parts: dict[str, list[tuple[int, int, dict[str, str]]]] = {}
        for share in shares:
            own = {part: file for file in share.files for part in PARTS if file.startswith(f"{part}-")}
            for name, (start, count) in share.pieces.items():
                if count:
                    self._parts.setdefault(name, []).append((start, start + count, own))
        for pieces in self._parts.values():
            pieces.sort(key=lambda piece: piece[0])

    @property
    def names(self) -> set[str]:
        """The parameters that lie in it."""
        return set(self._parts)

    def read(self, part: str, name: str, start: int, stop: int) -> torch.Tensor:
        """(stop - start,) fp32: these elements of the flat parameter, of one of `PARTS`."""
        out = torch.empty(stop - start, dtype=torch.float32)
        values: np.ndarray = out.numpy()
        pieces, at = self._parts.get(name, []), start
        first = max(0, bisect_right(pieces, start, key=lambda piece: piece[0]) - 1)
        for begin, end, files in pieces[first:]:
            if at >= stop:
                break
            if not begin <= at < end:
                continue
            until = min(end, stop)
            value = self._file(files[part]).read(name, at - begin, until - begin, self._window())
            values[at - start : until - start] = value
            at = until
        if at < stop:
            raise LlavaError(
                f"checkpoint {self.where} holds no element {at} of {name}: it is damaged; delete it to resume from "
                "the one before"
            )
        return out

    def whole(self, part: str, name: str, shape: torch.Size) -> torch.Tensor:
        """One of `PARTS` of a whole parameter, fp32."""
        return self.read(part, name, 0, shape.numel()).view(shape)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _window(self) -> int:
        """Bytes that a file may read ahead, while so many are open."""
        return min(_WINDOW, max(_WINDOW_AT_LEAST, _WINDOWS // max(1, len(self._files))))

    def _file(self, name: str) -> "_Reader":
        if name not in self._files:
            self._files[name] = _Reader(self._open(name), f"{self.where}/{name}")
        return self._files[name]


class _Reader:
    """Ranges of the tensors of one safetensors file, wherever it lies; small ones are read ahead."""

    def __init__(self, file: Any, where: str) -> None:
        self._file, self._where = file, where
        self._window, self._at = memoryview(b""), 0
        try:
            length = int.from_bytes(file.read_at(8, 0), "little")
            if length > _HEADER_AT_MOST:
                raise ValueError(f"a table of {length:,} bytes")
            self._begin = 8 + length
            self._offsets = {
                str(name): (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
                for name, entry in from_json(file.read_at(length, 8)).items()
                if name != "__metadata__" and entry["dtype"] == "F32"
            }
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise self._damaged(f"is no safetensors file ({error})") from None

    def read(self, name: str, start: int, stop: int, window: int) -> np.ndarray:
        """(stop - start,) fp32 of the flat tensor, read-only; `window`: bytes read at once where less is asked for."""
        first, last = self._offsets.get(name, (0, 0))
        offset, size = self._begin + first + 4 * start, 4 * (stop - start)
        if start < 0 or offset + size > self._begin + last:
            raise self._damaged(f"does not hold elements {start} to {stop} of {name}")
        if size >= window:
            return self._values(self._file.read_at(size, offset), size)
        if offset < self._at or offset + size > self._at + len(self._window):
            self._window, self._at = memoryview(self._file.read_at(window, offset)), offset
        ahead = offset - self._at
        return self._values(self._window[ahead : ahead + size], size)

    def _values(self, data: Any, size: int) -> np.ndarray:
        if len(data) != size:
            raise self._damaged("is shorter than its table says")
        return np.frombuffer(data, np.float32)

    def _damaged(self, what: str) -> LlavaError:
        return LlavaError(f"{self._where} {what}: delete the checkpoint to resume from the one before")

    def close(self) -> None:
        self._file.close()


def save(folder: Path, engine: Holder, position: Position) -> None:
    """One rank's part of a checkpoint in a local folder that all ranks share; rank 0 says where it stands.

    It is whole when all ranks have come back. What is committed to a store is in `components.training.checkpoints`.
    """
    share = write_share(folder, engine.rank, engine.world, engine.fragments())
    (folder / share_file(engine.rank)).write_text(json.dumps(share.as_json()))
    if engine.rank == 0:
        (folder / STATE).write_bytes(position_json(position))


def opened(folder: Path, plan: dict[str, Any]) -> tuple[Position, SavedState]:
    """What `save` wrote on all ranks. Refuses a checkpoint of another plan."""
    position = position_of((folder / STATE).read_bytes(), plan, str(folder))
    shares = [Share.from_json(json.loads(path.read_text())) for path in sorted(folder.glob("share-*.json"))]
    local = fs.LocalFileSystem()
    return position, SavedState(
        str(folder), position.update, shares, lambda name: local.open_input_file(str(folder / name))
    )


@torch.no_grad()
def frozen_digest(module: nn.Module) -> str:
    """Of every parameter that does not train: names, shapes and bits, on whatever device they are."""
    digest = FrozenDigest()
    for name, parameter in module.named_parameters():
        digest.add(name, parameter)
    return digest.hexdigest()


class FrozenDigest:
    """`frozen_digest` of parameters that come one after the other, in any order."""

    def __init__(self) -> None:
        self._found: dict[str, bytes] = {}

    @torch.no_grad()
    def add(self, name: str, parameter: nn.Parameter) -> None:
        """Count `parameter` in, unless it trains.

        One in 4 bit is skipped: its values may depend on the device. `quantized.quantize` reports the original.
        """
        if not parameter.requires_grad and getattr(parameter, "quant_state", None) is None:
            rows = (
                torch.hash_tensor(parameter.flatten(1), dim=1) if parameter.dim() > 1 else parameter.flatten()
            )
            bits = rows.contiguous().cpu().view(torch.uint8).numpy().tobytes()
            self._found[name] = f"{name} {tuple(parameter.shape)}".encode() + bits

    def hexdigest(self) -> str:
        """The sha256 of all, in the order of their names."""
        digest = hashlib.sha256()
        for name in sorted(self._found):
            digest.update(self._found[name])
        return digest.hexdigest()
