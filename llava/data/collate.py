"""From samples to packed rows: what one micro-step computes.

Shapes: T tokens of a row, N images, P image tokens per image, K supervised positions.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from llava.attention import Segments, segments
from llava.conversation import IGNORE, Encoded, Encoder
from llava.data import placement
from llava.data.images import BadImage, decode
from llava.data.placement import FILLER
from llava.data.plan import BatchPlan
from llava.data.reader import Rows
from llava.data.samples import VIEWS
from llava.data.schema import images_of
from llava.errors import LlavaError
from llava.pixels import Pixels

DECODERS = 4
"""Threads that decode pictures on a rank."""
LOOK_AHEAD = 8
"""Steps whose row groups are read ahead of time."""


@dataclass
class PackedRow:
    """Several samples one after the other; each attends to itself only."""

    input_ids: torch.Tensor
    """(T,)"""
    position_ids: torch.Tensor
    """(T,), from 0 in every sample."""
    segments: Segments
    image_positions: torch.Tensor
    """(N * P,) positions whose embedding an image feature replaces; (1,) where a blank image only fills up."""
    pixels: torch.Tensor
    """(N, 3, H, W) uint8, resized but not normalised."""
    predict: torch.Tensor
    """(K,) positions whose next token is supervised."""
    targets: torch.Tensor
    """(K,) those next tokens."""

    def to(self, device: torch.device | str) -> "PackedRow":
        """The same on another device; from `pinned` memory to a GPU the copies do not hold up the caller.

        The host's tensors may be let go at once: torch gives page-locked memory away again only after the copies out
        of it (its notes on CUDA semantics, "Use pinned memory buffers"). Nothing may write into them.
        """
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "PackedRow":
        """The same in page-locked memory, from which a GPU copies by itself; needs CUDA."""
        return replace(self._each(torch.Tensor.pin_memory), segments=self.segments.pinned())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedRow":
        """With `change` made to every tensor; the segments' bounds stay where they are until a kernel asks for them."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)


@dataclass
class Step:
    """One rank's part of a global batch."""

    rows: list[PackedRow]
    supervised: int
    """Supervised tokens of the whole global batch, over all ranks."""
    tokens: int
    samples: int
    useful: int
    """Tokens of this rank's samples; the rest of `computed` fills up."""
    computed: int
    ids: list[str]


class Collator:
    """Reads, encodes and packs the samples of a step for one rank."""

    def __init__(
        self, rows: Rows, view: str, encoder: Encoder, pixels: Pixels, plan: BatchPlan, tokens_per_row: int
    ):
        self.rows, self.encoder, self.pixels, self.plan = rows, encoder, pixels, plan
        self.samples_of = VIEWS[view][0]
        self.tokens_per_row = tokens_per_row
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        self._places: dict[tuple[int, int, int], placement.Rows] = {}

    def step(self, number: int, rank: int, world: int) -> Step:
        """What `rank` of `world` computes in step `number`."""
        index, chosen = self.plan.index, self.plan.samples(number)
        placed = self._placed(number, rank, world)
        self._look_ahead(number, rank, world)
        mine = [int(chosen[position]) for members in placed for position in members]
        # Decoding lets go of the interpreter: it is what the threads share.
        decoded = self._decoders.map(self._decoded, mine)
        rows, ids, left = [], [], iter(mine)
        for members in placed:
            encoded, images = [], []
            for sample, (row, pictures) in zip(islice(left, len(members)), decoded, strict=False):
                encoded.append(self._encoded(sample, row))
                images += pictures
                ids.append(row["id"])
            rows.append(self._row(encoded, images))
        return Step(
            rows=rows,
            supervised=int(index.supervised[chosen].sum()),
            tokens=int(index.tokens[chosen].sum()),
            samples=len(chosen),
            useful=int(index.tokens[mine].sum()),
            computed=sum(len(row.input_ids) for row in rows),
            ids=ids,
        )

    def steps(
        self,
        first: int,
        last: int,
        rank: int,
        world: int,
        ahead: int = 2,
        device: torch.device | None = None,
    ) -> Iterator[Step]:
        """Steps `first` to `last` (not included), prepared `ahead` of the training in a thread.

        Rows for a GPU, `device`, come in page-locked memory; they are copied there by who computes them.
        """
        pin = device is not None and device.type == "cuda"
        # A thread begins on the first GPU, whichever its process computes on.
        begin = partial(torch.cuda.set_device, device) if pin else None
        with ThreadPoolExecutor(1, "collate", begin) as pool:
            waiting = [
                pool.submit(self._prepared, number, rank, world, pin)
                for number in range(first, min(first + ahead, last))
            ]
            for number in range(first, last):
                if number + ahead < last:
                    waiting.append(pool.submit(self._prepared, number + ahead, rank, world, pin))
                yield waiting.pop(0).result()

    def _prepared(self, number: int, rank: int, world: int, pin: bool) -> Step:
        step = self.step(number, rank, world)
        return replace(step, rows=[row.pinned() for row in step.rows]) if pin else step

    def _look_ahead(self, number: int, rank: int, world: int) -> None:
        """Begin to read what this rank needs in the next steps of the epoch, and forget what nobody will need."""
        kept = self.plan.open_groups(number)
        last = min(number + LOOK_AHEAD, self.plan.steps_per_epoch * (number // self.plan.steps_per_epoch + 1))
        for step in range(number, last):
            chosen = self.plan.samples(step)
            wanted = [
                int(chosen[position]) for members in self._placed(step, rank, world) for position in members
            ]
            groups = dict.fromkeys(self.plan.index.group[wanted].tolist())
            self.rows.prefetch(groups)
            kept |= groups.keys()
        self.rows.keep_only(kept)

    def _placed(self, number: int, rank: int, world: int) -> placement.Rows:
        """This rank's rows of a step; the last few are kept, since they are asked for ahead of time."""
        key = (number, rank, world)
        if key not in self._places:
            self._places[key] = self.plan.place(number, world, self.tokens_per_row)[rank]
            while len(self._places) > 2 * LOOK_AHEAD:
                self._places.pop(next(iter(self._places)))
        return self._places[key]

    def _decoded(self, sample: int) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The row of a sample and its pictures."""
        row = self.rows.row(int(self.plan.index.group[sample]), int(self.plan.index.row[sample]))
        try:
            return row, [self.pixels(decode(cell["bytes"])) for cell in images_of(row)]
        except BadImage as bad:
            raise LlavaError(f"sample {row['id']}: {bad}; leave it out of the dataset") from bad

    def _encoded(self, sample: int, row: dict[str, Any]) -> Encoded:
        """Tokens and labels. Not for several threads: a tokenizer may change while it works."""
        turns = self.samples_of(row)[int(self.plan.index.part[sample])]
        encoded = self.encoder.encode(turns, len(images_of(row)))
        if len(encoded.ids) != (measured := self.plan.index.tokens[sample]):
            raise LlavaError(
                f"sample {row['id']}: {len(encoded.ids)} tokens, {measured} when it was measured: "
                "the dataset or the tokenizer changed since; start the stage afresh"
            )
        return encoded

    def blank_row(self) -> PackedRow:
        """A row with an image and nothing supervised."""
        return self._row([], [])

    def _row(self, encoded: list[Encoded], images: list[np.ndarray]) -> PackedRow:
        if not images:
            # Every row runs the vision tower and the projector, so that no rank waits for another in ZeRO-3.
            # One slot is enough for the graph; the model lets the blank image's other features go.
            encoded = [*encoded, Encoded([self.encoder.image_id] * FILLER, [IGNORE] * FILLER, 1)]
            images = [self.pixels.blank()]
        ids = torch.tensor([token for sample in encoded for token in sample.ids])
        # A label belongs to the position before it; the first label of a sample has none.
        shifted = torch.tensor([label for sample in encoded for label in [*sample.labels[1:], IGNORE]])
        predict = (shifted != IGNORE).nonzero().squeeze(1)
        return PackedRow(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(len(sample.ids)) for sample in encoded]),
            segments=segments([len(sample.ids) for sample in encoded]),
            image_positions=(ids == self.encoder.image_id).nonzero().squeeze(1),
            pixels=torch.from_numpy(np.stack(images)),
            predict=predict,
            targets=shifted[predict],
        )
