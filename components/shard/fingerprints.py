"""What makes pictures comparable: a few numbers of each, made once per shard, and which of them are alike.

A picture is scaled to 9 x 9 pixels. `gradients`: 128 bits, whether each of 8 x 8 cells is brighter than its right and
than its lower neighbour; `colours`: the means of 3 x 3 fields. Scaling and compressing change neither much.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from components.contract.digest import canonical_json
from components.contract.store import Folder
from components.datasets.kept import kept_table
from components.datasets.reading import rows_of
from llava.data.images import Limits, thumbnail
from llava.data.schema import images_of

CACHE = "fingerprints"
BITS_APART = 7
"""Of 128: two pictures with no more are near, since then one of 8 bands of 16 bits is equal."""
COLOURS_APART = 12
"""Of 255, in any channel of any field."""
NEIGHBOURS = 32
"""With how many pictures of one band a picture is compared at most."""
_RULES = "1"
"""Raised whenever the same picture would give other numbers."""
_CONTRAST = 2  # levels: less is noise of the compression

PICTURES = pa.schema(
    [
        ("id", pa.string()),
        ("sha256", pa.binary(32)),
        ("gradients", pa.binary(16)),
        ("colours", pa.binary(27)),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("words", pa.int32()),
        ("sample", pa.binary(16)),
    ]
)
"""One row for each picture, and one for a sample without any. `words` of all texts and `sample`, a hash of all texts
and pictures, stand in the first row of a sample; everything about a picture is null where there is none."""


@dataclass(frozen=True)
class Fingerprints:
    """Reads shards. Small and picklable."""

    dataset: Folder
    cache: Folder
    limits: Limits

    def table(self, file: tuple[str, str]) -> pa.Table:
        """`PICTURES` of one shard (path, sha256), found in the cache or made now."""
        path, sha256 = file
        return kept_table(self.cache, {"file": sha256, "rules": _RULES}, lambda: self._read(path))

    def _read(self, path: str) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for row in rows_of(self.dataset, path):
            texts = [*(row["captions"] or []), *(turn["value"] for turn in row["conversations"] or [])]
            pictures = [self._of(image["bytes"]) for image in images_of(row)]
            whole = canonical_json([texts, [one["sha256"].hex() for one in pictures]])
            first = {
                "words": sum(len(text.split()) for text in texts),
                "sample": hashlib.sha256(whole).digest()[:16],
            }
            if pictures:
                first |= {"width": row["width"], "height": row["height"]}
            rows += [
                {"id": row["id"], **one, **(first if number == 0 else {})}
                for number, one in enumerate(pictures or [{}])
            ]
        return pa.Table.from_pylist(rows, schema=PICTURES)

    def _of(self, data: bytes) -> dict[str, Any]:
        gradients, colours = fingerprint(data, self.limits)
        return {
            "sha256": hashlib.sha256(data).digest(),
            "gradients": gradients,
            "colours": colours,
            "bytes": len(data),
        }


def fingerprint(data: bytes, limits: Limits) -> tuple[bytes, bytes]:
    """`gradients` and `colours` of a picture. Raises BadImage."""
    small = np.asarray(thumbnail(data, 9, 9, limits), np.int16)  # (9, 9, 3)
    grey = small @ np.array([77, 150, 29]) // 256
    cells = grey[:8, :8]
    right, below = cells - grey[:8, 1:] > _CONTRAST, cells - grey[1:, :8] > _CONTRAST
    colours = small.reshape(3, 3, 3, 3, 3).mean(axis=(1, 3)).astype(np.uint8)
    return np.packbits([right, below]).tobytes(), colours.tobytes()


def near(gradients: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(K, 2) numbers of pictures that look alike, from `gradients` (N, 16) and `colours` (N, 27), both uint8.

    Pictures with equal fingerprints are paired with the first of them only. Time and memory grow with N, not with its
    square: a picture is compared with the next `NEIGHBOURS` of each band, so that in a crowd of pictures with hardly
    any structure some pairs are left out.
    """
    whole = np.concatenate([gradients, colours], axis=1)
    _, first, number = np.unique(whole, axis=0, return_index=True, return_inverse=True)
    leaders = first[number.reshape(-1)]
    followers = np.flatnonzero(leaders != np.arange(len(leaders)))
    found = [np.stack([leaders[followers], followers], axis=1)]
    gradients, colours = np.ascontiguousarray(gradients[first]), colours[first].astype(np.int16)
    bands, halves = gradients.view(">u2"), gradients.view(">u8")  # (N, 8), (N, 2)
    for band in bands.T:
        order = np.lexsort((halves[:, 1], halves[:, 0], band))
        for distance in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            one, other = order[:-distance], order[distance:]
            same = band[one] == band[other]
            if not same.any():
                break
            one, other = one[same], other[same]
            close = np.bitwise_count(halves[one] ^ halves[other]).sum(axis=1) <= BITS_APART
            one, other = one[close], other[close]
            close = np.abs(colours[one] - colours[other]).max(axis=1, initial=0) <= COLOURS_APART
            found.append(np.stack([first[one[close]], first[other[close]]], axis=1))
    pairs = np.sort(np.concatenate(found), axis=1)
    codes = np.unique(pairs[:, 0] * len(whole) + pairs[:, 1])
    return np.stack(np.divmod(codes, max(1, len(whole))), axis=1)


def groups(pairs: np.ndarray) -> list[list[int]]:
    """The connected groups of `pairs` (K, 2), the largest first, each in ascending order."""
    leader: dict[int, int] = {}

    def find(one: int) -> int:
        while leader.setdefault(one, one) != one:
            leader[one] = one = leader[leader[one]]
        return one

    for first, second in pairs.tolist():
        a, b = find(first), find(second)
        leader[max(a, b)] = min(a, b)
    members: dict[int, list[int]] = {}
    for one in sorted(leader):
        members.setdefault(find(one), []).append(one)
    return sorted(members.values(), key=lambda group: (-len(group), group))
