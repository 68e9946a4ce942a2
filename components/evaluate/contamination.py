"""Evaluation pictures that the model was trained on, found by the hash of their bytes.

The training data is what the model's own artifacts say they were made from. A picture that was scaled or saved again
has another hash and is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from components.contract import Artifact, Store, find_artifact, open_store, parquet_in, read_artifact
from components.scoring.outcomes import CONTAMINATION
from llava.data.schema import IMAGE_COLUMNS

TRAIN = "train"


@dataclass(frozen=True)
class Contamination:
    """What a look through the training data found."""

    datasets: list[str]
    """Those that were looked through."""
    unknown: list[str]
    """What the model was made from that is not found: digests, URIs of further datasets."""
    pictures: frozenset[str]
    """Hashes of evaluation pictures that are among them."""


@dataclass(frozen=True)
class _Files:
    """The training files of one dataset."""

    folder: Store
    keys: tuple[str, ...]


def look(model: Artifact, stores: Collection[Store], pictures: Collection[str]) -> Contamination:
    """Look for `pictures` (hex sha256 of the files) in everything that `model` was trained on; uses Ray.

    `stores`: the roots to look for its datasets in.
    """
    datasets, unknown = _lineage(model, [model.root, *stores])
    found: set[str] = set()
    if pictures and datasets:
        import ray

        wanted = ray.put(frozenset(pictures))
        seek = ray.remote(num_cpus=1, max_retries=2)(_seek)
        tasks = [seek.remote(dataset.folder, key, wanted) for dataset in datasets for key in dataset.keys]
        for hits in ray.get(tasks):
            found |= hits
    return Contamination([dataset.folder.uri for dataset in datasets], unknown, frozenset(found))


def remarks(
    found: Contamination, looked_for: int, by_exam: Mapping[str, Collection[str]], excluded: bool
) -> list[str]:
    """What a reader of the scores must know. `by_exam`: units that show such a picture, by exam."""
    verb = "are left out of the scores" if excluded else "count in the scores"
    if not found.datasets:
        return ["contamination: nothing is known of the data that the model was trained on"]
    if found.pictures:
        said = ", ".join(f"{len(units):,} of {name}" for name, units in by_exam.items())
        told = [
            f"contamination: {len(found.pictures):,} of {looked_for:,} pictures are in the training data; their "
            f"questions ({said}) {verb}; {CONTAMINATION} names them"
        ]
    else:
        told = [f"contamination: none of {looked_for:,} pictures is in the training data"]
    if found.unknown:
        told.append(
            f"contamination: {len(found.unknown)} artifacts that the model comes from are gone, unseen"
        )
    return told


def _lineage(model: Artifact, stores: Collection[Store]) -> tuple[list[_Files], list[str]]:
    """The datasets that the model, and the models it was made from, were trained on; what is not found."""
    datasets: list[_Files] = []
    unknown: list[str] = []
    waiting, seen = [model], {model.digest}
    while waiting:
        manifest = waiting.pop().manifest
        for uri in (one["uri"] for one in manifest.run.get("extra", ())):
            extra = _extra(uri)
            if extra is None:
                unknown.append(uri)
            elif extra not in datasets:
                datasets.append(extra)
        for digest in manifest.inputs.values():
            if digest in seen:
                continue
            seen.add(digest)
            found = find_artifact(digest, stores)
            if found is None:
                unknown.append(digest)
            elif keys := found.parquet(TRAIN):
                datasets.append(_Files(found.folder, keys))
            else:
                waiting.append(found)
    return datasets, unknown


def _extra(uri: str) -> _Files | None:
    """A further dataset of a training stage: an artifact, or a folder of Parquet files."""
    folder = open_store(uri)
    if artifact := read_artifact(folder):
        folder, names = artifact.folder, [file.path for file in artifact.manifest.files]
    else:
        names = [entry.key for entry in folder.list()]
    keys = parquet_in(names, TRAIN) or tuple(name for name in names if name.endswith(".parquet"))
    return _Files(folder, keys) if keys else None


def _seek(folder: Store, key: str, wanted: frozenset[str]) -> set[str]:
    """Those of `wanted` that are pictures in one Parquet file; memory holds one row group."""
    filesystem, base = folder.arrow()
    hits: set[str] = set()
    with pq.ParquetFile(f"{base}/{key}", filesystem=filesystem) as file:
        columns = [name for name in IMAGE_COLUMNS if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            for data in {data for name in columns for data in _bytes(table[name])}:
                hits |= wanted & {hashlib.sha256(data).hexdigest()}
    return hits


def _bytes(column: Any) -> Iterator[bytes]:
    for cell in column.to_pylist():
        for image in cell if isinstance(cell, list) else [cell]:
            if image:
                yield image["bytes"]
