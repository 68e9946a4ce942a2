"""Evaluation pictures that the model was trained on, found by the hash of their bytes.

The training data is what the model's own artifacts say they were made from. A picture that was scaled or saved again
has another hash and is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from components.contract import Artifact, Manifest, Store, find_artifact
from components.datasets import extra
from components.datasets.reading import opened
from components.scoring.outcomes import CONTAMINATION
from llava.data.schema import IMAGE_COLUMNS
from llava.errors import RefusedInput

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
        for uri, follow_links in _extras(manifest):
            further = _extra(uri, follow_links)
            if further is None:
                unknown.append(uri)
            elif further not in datasets:
                datasets.append(further)
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


def _extras(manifest: Manifest) -> list[tuple[str, bool | None]]:
    """URI of each further dataset of a training stage, and which of its links were followed."""
    given = manifest.run.get("extra", [])
    entries = [one if isinstance(one, dict) else {} for one in (given if isinstance(given, list) else [])]
    found = [(one.get("uri"), one.get("follow_links")) for one in entries]
    return [
        (uri, follow if follow in (True, False) else None) for uri, follow in found if isinstance(uri, str)
    ]


def _extra(uri: str, follow_links: bool | None) -> _Files | None:
    try:
        found = extra.look(uri, follow_links)
    except RefusedInput:
        return None  # what its manifest names may be anything
    return _Files(found.folder, found.keys) if found.keys else None


def _seek(folder: Store, key: str, wanted: frozenset[str]) -> set[str]:
    """Those of `wanted` that are pictures in one Parquet file; memory holds one row group."""
    hits: set[str] = set()
    with opened(folder, key) as file:
        for group in range(len(file.groups)):
            table = file.table(group, IMAGE_COLUMNS)
            for data in {data for name in table.column_names for data in _bytes(table[name])}:
                hits |= wanted & {hashlib.sha256(data).hexdigest()}
    return hits


def _bytes(column: Any) -> Iterator[bytes]:
    for cell in column.to_pylist():
        for image in cell if isinstance(cell, list) else [cell]:
            if image:
                yield image["bytes"]
