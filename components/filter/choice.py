"""The choice itself, on numbers: which rows of a dataset are kept, from which phrases stand in which rows.

Source: the filter of CC3M in "Visual Instruction Tuning" (arXiv 2304.08485). Phrases are numbered from the rarest to
the most frequent, so that a phrase's number is its turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PENDING = 1_000_000  # counted phrases that wait before they are added up


@dataclass
class Counts:
    """In how many rows each phrase stands; Arrow tables, so that millions of phrases stay compact."""

    _tables: list[pa.Table] = field(default_factory=list)
    _pending: int = 0

    def add(self, table: pa.Table) -> None:
        """Take in a table of `phrase` and `rows`."""
        self._tables.append(table)
        self._pending += table.num_rows
        if self._pending > PENDING:
            self._tables, self._pending = [self.total()], 0

    def total(self) -> pa.Table:
        """`phrase` and `rows`, each phrase once, in no order."""
        if not self._tables:
            return pa.table({"phrase": pa.array([], pa.string()), "rows": pa.array([], pa.int64())})
        together = pa.concat_tables(self._tables).group_by("phrase").aggregate([("rows", "sum")])
        return together.select(["phrase", "rows_sum"]).rename_columns(["phrase", "rows"])


def count(table: pa.Table) -> pa.Table:
    """`phrase` and `rows` of one file of phrases (see `phrases.py`)."""
    found = pc.value_counts(pc.list_flatten(table["phrases"]).combine_chunks())
    return pa.table({"phrase": found.field("values"), "rows": found.field("counts")})


def by_rarity(counts: pa.Table) -> pa.Table:
    """The same phrases from the rarest to the most frequent; of equal ones the alphabet decides."""
    return counts.sort_by([("rows", "ascending"), ("phrase", "ascending")])


@dataclass(frozen=True)
class Postings:
    """Which phrases stand in which rows, of one file or of all.

    `phrase`, `row`: (P,) numbers of a phrase and of a row that holds it; `keys`: (R,) what stands for each row in the
    draw; `captions`, `phrases`: (R,) bool, whether the row has a caption, and any phrase.
    """

    phrase: np.ndarray
    row: np.ndarray
    keys: np.ndarray
    captions: np.ndarray
    phrases: np.ndarray


def look_up(table: pa.Table, vocabulary: pa.Array) -> Postings:
    """The postings of one file of phrases, for the phrases of `vocabulary` only."""
    lists = table["phrases"].combine_chunks()
    numbers = pc.index_in(lists.flatten(), value_set=vocabulary)
    rows = pc.list_parent_indices(lists)
    known = pc.is_valid(numbers)
    keys = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) for name in table["id"].to_pylist()]
    return Postings(
        numbers.filter(known).to_numpy(zero_copy_only=False).astype(np.int32),
        rows.filter(known).to_numpy(zero_copy_only=False).astype(np.int32),
        np.array(keys, np.uint64),
        lists.is_valid().to_numpy(zero_copy_only=False),
        pc.fill_null(pc.greater(pc.list_value_length(lists), 0), False).to_numpy(zero_copy_only=False),
    )


def joined(files: Sequence[Postings]) -> Postings:
    """The postings of all files; rows are numbered through."""
    starts = np.cumsum([0, *(len(one.keys) for one in files)])
    return Postings(
        np.concatenate([one.phrase for one in files]),
        np.concatenate([one.row + start for one, start in zip(files, starts, strict=False)]).astype(np.int64),
        np.concatenate([one.keys for one in files]),
        np.concatenate([one.captions for one in files]),
        np.concatenate([one.phrases for one in files]),
    )


def choose(postings: Postings, vocabulary: pa.Array, cap: int, count_chosen: bool, seed: int) -> np.ndarray:
    """(R,) bool: the rows that are kept.

    From the rarest phrase upwards: all rows that hold it, or `cap` of them at random. With `count_chosen` the rows
    that are kept already take a place in the cap. The draw depends on seed, phrase and row id only: how
    rows are cut into files, or what else the dataset holds, does not change it.
    """
    names = [
        int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8])
        for name in vocabulary.to_pylist()
    ]
    draw = _mixed(np.array(names, np.uint64)[postings.phrase] ^ postings.keys[postings.row])
    order = np.lexsort((postings.row, draw, postings.phrase))
    rows = postings.row[order]
    ends = np.cumsum(np.bincount(postings.phrase, minlength=len(vocabulary)))
    chosen = np.zeros(len(postings.keys), bool)
    start = 0
    for end in ends:
        holders = rows[start:end]
        start = end
        if len(holders) > cap:
            if count_chosen:
                fresh = holders[~chosen[holders]]
                holders = fresh[: max(0, cap - (len(holders) - len(fresh)))]
            else:
                holders = holders[:cap]
        chosen[holders] = True
    return chosen


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each 64-bit number scrambled (the finaliser of splitmix64), so that close ones end far apart."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
        return mixed
