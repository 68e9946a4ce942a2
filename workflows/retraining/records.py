"""What a root remembers of retraining: the drops that it took, the versions of the dataset, the plan of a run.

These files are read again for years, and a root may have been written by anybody who can write there: each is checked
when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, TypeVar

import pydantic
from pydantic import Field

from components.contract import Artifact, Digest, Line, Store, open_artifact, printable
from llava.errors import RefusedInput
from workflows.retraining.drops import RECORDS, Drop

PLACE = "retrain"
PLAN = f"{PLACE}/plan.json"
VERSIONS = f"{PLACE}/versions"
LARGEST = 64 << 20  # bytes of one record


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="ignore")


class Dataset(_Record):
    """A dataset artifact, by where it lies and what it is."""

    uri: Line
    digest: Digest

    def open(self) -> Artifact:
        """The artifact; RefusedInput where it is gone, or another one lies there."""
        found = open_artifact(self.uri)
        if found.digest != self.digest:
            raise RefusedInput(f"{self.uri}: has digest {found.digest}, the record says {self.digest}")
        return found


class Taken(_Record):
    """A drop that was taken. `datasets`: its shards; None where all that it holds had been taken before (`same_as`)."""

    uri: Line
    taken: datetime
    contents: Digest | None = None
    datasets: tuple[Dataset, ...] | None = None
    same_as: Line | None = None


class Part(Dataset):
    """One dataset of a version: `role` is base, old or new; `weight`: times that a sample is seen in an epoch."""

    role: Line
    weight: float = Field(ge=0, allow_inf_nan=False)


class DataVersion(_Record):
    """A version of the dataset that a retraining saw."""

    version: Digest
    parts: tuple[Part, ...]


class RetrainPlan(_Record):
    """What one retraining takes, fixed before it starts."""

    drops: tuple[Drop, ...]
    contents: dict[Digest, Digest]
    """Of each drop, by its digest: what its files hold, wherever and whenever they were copied."""
    start: Line | None
    """The champion's artifact, where that is what is trained on."""

    def to_bytes(self) -> bytes:
        """For the root."""
        return self.model_dump_json(indent=1).encode()


R = TypeVar("R", bound=_Record)


def plan_of(store: Store) -> tuple[RetrainPlan, str] | None:
    """The plan of a run that did not end and the version of its file, or None."""
    found = store.fetch(PLAN, LARGEST)
    return None if found is None else (_parsed(RetrainPlan, found[0], f"{store.uri}/{PLAN}"), found[1])


def taken(store: Store) -> list[Taken]:
    """What was taken, the oldest first; of several drops at one place the latest."""
    found = sorted(
        (one for one in every_taken(store) if one.datasets is not None), key=lambda one: (one.taken, one.uri)
    )
    latest = {one.uri: one for one in found}
    return [one for one in found if latest[one.uri] is one]


def every_taken(store: Store) -> Iterator[Taken]:
    """The record of each drop that was ever taken."""
    yield from _all(Taken, store, RECORDS)


def versions(store: Store) -> Iterator[DataVersion]:
    """Every version of the dataset."""
    yield from _all(DataVersion, store, VERSIONS)


def _all(kind: type[R], store: Store, folder: str) -> Iterator[R]:
    for entry in store.list(f"{folder}/"):
        if entry.key.endswith(".json") and (found := store.fetch(entry.key, LARGEST)) is not None:
            yield _parsed(kind, found[0], f"{store.uri}/{entry.key}")


def _parsed(kind: type[R], data: bytes, where: str) -> R:
    try:
        return kind.model_validate_json(data)
    except pydantic.ValidationError as error:
        first: Any = error.errors(include_input=False, include_url=False)[0]
        what = printable(".".join(str(part) for part in first["loc"])) or "the file"
        raise RefusedInput(
            f"{printable(where)} is damaged ({what}: {first['msg']}): restore it, or delete it if you know what it was"
        ) from None
