"""From samples to packed rows: what one micro-step computes.

Shapes: T tokens of a row, N images, P image tokens per image, K supervised positions.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from llava.attention import Segments, segments
from llava.conversation import IGNORE, Encoded, Encoder
from llava.data.images import BadImage, decode
from llava.data.place import FILLER
from llava.data.plan import Plan
from llava.data.reader import Rows
from llava.data.samples import VIEWS
from llava.data.schema import images_of
from llava.errors import LlavaError
from llava.pixels import Pixels


@dataclass
class Row:
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

    def to(self, device: torch.device | str) -> "Row":
        """The same on another device."""
        return Row(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass
class Step:
    """One rank's part of a global batch."""

    rows: list[Row]
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
        self, rows: Rows, view: str, encoder: Encoder, pixels: Pixels, plan: Plan, tokens_per_row: int
    ):
        self.rows, self.encoder, self.pixels, self.plan = rows, encoder, pixels, plan
        self.samples_of = VIEWS[view][0]
        self.tokens_per_row = tokens_per_row

    def step(self, number: int, rank: int, world: int) -> Step:
        """What `rank` of `world` computes in step `number`."""
        index, chosen = self.plan.index, self.plan.samples(number)
        placed = self.plan.place(number, world, self.tokens_per_row)[rank]
        self.rows.keep_only(self.plan.open_groups(number))
        rows, ids = [], []
        for members in placed:
            encoded, images = [], []
            for position in members:
                sample, picture, name = self._sample(int(chosen[position]))
                encoded.append(sample)
                images += picture
                ids.append(name)
            rows.append(self._row(encoded, images))
        mine = [int(chosen[position]) for members in placed for position in members]
        return Step(
            rows=rows,
            supervised=int(index.supervised[chosen].sum()),
            tokens=int(index.tokens[chosen].sum()),
            samples=len(chosen),
            useful=int(index.tokens[mine].sum()),
            computed=sum(len(row.input_ids) for row in rows),
            ids=ids,
        )

    def steps(self, first: int, last: int, rank: int, world: int, ahead: int = 2) -> Iterator[Step]:
        """Steps `first` to `last` (not included), prepared `ahead` of the training in a thread."""
        with ThreadPoolExecutor(1, "collate") as pool:
            waiting = [
                pool.submit(self.step, number, rank, world)
                for number in range(first, min(first + ahead, last))
            ]
            for number in range(first, last):
                if number + ahead < last:
                    waiting.append(pool.submit(self.step, number + ahead, rank, world))
                yield waiting.pop(0).result()

    def _sample(self, sample: int) -> tuple[Encoded, list[np.ndarray], str]:
        index = self.plan.index
        row = self.rows.row(int(index.group[sample]), int(index.row[sample]))
        turns = self.samples_of(row)[int(index.part[sample])]
        cells = images_of(row)
        try:
            pictures = [self.pixels(decode(cell["bytes"])) for cell in cells]
        except BadImage as bad:
            raise LlavaError(f"sample {row['id']}: {bad}; leave it out of the dataset") from bad
        encoded = self.encoder.encode(turns, len(cells))
        if len(encoded.ids) != index.tokens[sample]:
            raise LlavaError(
                f"sample {row['id']}: {len(encoded.ids)} tokens, {index.tokens[sample]} when it was measured: the "
                "dataset or the tokenizer changed since; start the stage afresh"
            )
        return encoded, pictures, row["id"]

    def blank_row(self) -> Row:
        """A row with an image and nothing supervised."""
        return self._row([], [])

    def _row(self, encoded: list[Encoded], images: list[np.ndarray]) -> Row:
        if not images:
            # Every row runs the vision tower and the projector, so that no rank waits for another in ZeRO-3.
            # One slot is enough for the graph; the model lets the blank image's other features go.
            encoded = [*encoded, Encoded([self.encoder.image_id] * FILLER, [IGNORE] * FILLER, 1)]
            images = [self.pixels.blank()]
        ids = torch.tensor([token for sample in encoded for token in sample.ids])
        # A label belongs to the position before it; the first label of a sample has none.
        shifted = torch.tensor([label for sample in encoded for label in [*sample.labels[1:], IGNORE]])
        predict = (shifted != IGNORE).nonzero().squeeze(1)
        return Row(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(len(sample.ids)) for sample in encoded]),
            segments=segments([len(sample.ids) for sample in encoded]),
            image_positions=(ids == self.encoder.image_id).nonzero().squeeze(1),
            pixels=torch.from_numpy(np.stack(images)),
            predict=predict,
            targets=shifted[predict],
        )
