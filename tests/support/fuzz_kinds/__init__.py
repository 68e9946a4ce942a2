"""Kinds of input that come from outside, by name: what they are like, and who reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.fuzz_kinds import checkpoint, data, records, weights
from tests.support.fuzz_kinds.kind import Kind

KINDS: dict[str, Callable[[Path], Kind]] = {
    "manifests": records.manifests,
    "records": records.record_files,
    "LLaVA JSON": data.llava_json,
    "COCO JSON": data.coco_json,
    "Parquet": data.parquet_files,
    "tar": data.tars,
    "zip": data.zips,
    "YAML": records.presets,
    "answers and reviews": records.scored_files,
    "answers of endpoints": records.bodies,
    "model folders": weights.model_folders,
    "weights": weights.weight_files,
    "checkpoints": checkpoint.checkpoints,
    "pictures": data.pictures,
}
