"""Where the samples of a global batch are computed: on which rank, in which row.

Nothing here changes what is learned. Three aims, in this order: ranks get nearly equal work; a row group is
read by as few ranks as possible, since Parquet gives whole row groups only; rows are full.

A row group has a home rank. A quarter of each rank's groups has a second home, a different one each time: with
a little choice for some samples the loads even out, and few bytes are read twice. Only what is still over the
tolerance after that goes to a rank that would not have read its group.
"""

from collections.abc import Sequence

import numpy as np

FILLER = 1
"""Tokens that a row without an image computes for the blank one: one slot takes its first feature."""

_SHARED = 0.25
_TOLERANCE = 0.05

Rows = list[list[int]]
"""Rows of one rank, each a list of positions in the global batch."""


def homes(loads: Sequence[float], ranks: int) -> list[tuple[int, ...]]:
    """The ranks that read each row group; `loads`: the work that each group of a window holds.

    The first is the home. With fewer groups than ranks a group has several.
    """
    if not len(loads):
        return []
    pieces = -(-ranks // len(loads))
    filled = [0.0] * ranks
    own: list[list[int]] = [[] for _ in range(ranks)]
    found: list[list[int]] = [[] for _ in loads]
    for group in sorted(range(len(loads)), key=lambda group: (-loads[group], group)):
        for _ in range(pieces):
            rank = filled.index(min(filled))
            filled[rank] += loads[group] / pieces
            if rank not in found[group]:
                found[group].append(rank)
                own[rank].append(group)
    for rank, groups in enumerate(own if ranks > 1 else []):
        for number, group in enumerate(groups[: int(np.ceil(_SHARED * len(groups)))]):
            second = (rank + 1 + 2 * number % (ranks - 1)) % ranks
            if second not in found[group]:
                found[group].append(second)
    return [tuple(each) for each in found]


def balance(cost: Sequence[float], choices: Sequence[tuple[int, ...]], ranks: int) -> list[int]:
    """The rank of each sample. `cost`: its work; `choices`: the homes of its row group.

    Samples without a choice first, then the longest to the lighter home; then single moves off the heaviest
    rank, among the homes as long as that helps, to any rank while it is over the tolerance.
    """
    loads = [0.0] * ranks
    where = [0] * len(cost)
    for sample in sorted(range(len(cost)), key=lambda one: (len(choices[one]) > 1, -cost[one], one)):
        where[sample] = min(choices[sample], key=lambda rank: (loads[rank], rank))
        loads[where[sample]] += cost[sample]
    # With few samples on a rank one of them is more than the tolerance.
    bound = sum(loads) / ranks * (1 + max(_TOLERANCE, ranks / (2 * max(1, len(cost)))))
    for _ in range(4 * len(cost)):
        heavy = loads.index(max(loads))
        move = _best_move(cost, choices, where, loads, heavy, anywhere=loads[heavy] > bound)
        if move is None:
            break
        sample, rank = move
        loads[heavy] -= cost[sample]
        loads[rank] += cost[sample]
        where[sample] = rank
    return where


def _best_move(
    cost: Sequence[float],
    choices: Sequence[tuple[int, ...]],
    where: list[int],
    loads: list[float],
    heavy: int,
    anywhere: bool,
) -> tuple[int, int] | None:
    """The move off rank `heavy` that leaves the lower peak; a home of the sample's group before any other."""
    best: tuple[bool, float, int, int] | None = None
    lightest = loads.index(min(loads))
    for sample, rank in enumerate(where):
        if rank != heavy:
            continue
        for goal in {*choices[sample], lightest} if anywhere else choices[sample]:
            peak = max(loads[heavy] - cost[sample], loads[goal] + cost[sample])
            if goal != heavy and peak < loads[heavy] - 1e-9:
                found = (goal not in choices[sample], peak, sample, goal)
                best = found if best is None else min(best, found)
    return best and best[2:]


def pack(tokens: np.ndarray, images: np.ndarray, ranks: Sequence[Sequence[int]], limit: int) -> list[Rows]:
    """Rows of at most `limit` tokens for each rank, the same number on all; some may be empty.

    `tokens`, `images`: (n,) of the global batch; `ranks`: each rank's positions in it. A row is over the limit
    only where one sample alone is. Samples with images are spread first, so that few rows need a filler.
    """
    sizes, pictures = tokens.tolist(), images.tolist()
    packed = [_first_fit(sizes, pictures, mine, limit) for mine in ranks]
    count = max(1, *(len(rows) for rows in packed))
    placed = []
    for mine, rows in zip(ranks, packed, strict=True):
        even = _spread(sizes, pictures, mine, count)
        fits = all(len(row) <= 1 or _length(sizes, pictures, row) <= limit for row in even)
        placed.append(even if fits else rows + [[] for _ in range(count - len(rows))])
    return placed


def _length(tokens: list[int], images: list[int], row: list[int]) -> int:
    return sum(tokens[one] for one in row) + (0 if any(images[one] for one in row) else FILLER)


def _in_order(tokens: list[int], images: list[int], members: Sequence[int]) -> list[int]:
    return sorted(members, key=lambda one: (images[one] == 0, -tokens[one], one))


def _spread(tokens: list[int], images: list[int], members: Sequence[int], count: int) -> Rows:
    loads = [0] * count
    rows: Rows = [[] for _ in range(count)]
    for one in _in_order(tokens, images, members):
        lightest = loads.index(min(loads))
        rows[lightest].append(one)
        loads[lightest] += tokens[one]
    return rows


def _first_fit(tokens: list[int], images: list[int], members: Sequence[int], limit: int) -> Rows:
    rows: Rows = []
    for one in _in_order(tokens, images, members):
        for row in rows:
            if _length(tokens, images, [*row, one]) <= limit:
                row.append(one)
                break
        else:
            rows.append([one])
    return rows
