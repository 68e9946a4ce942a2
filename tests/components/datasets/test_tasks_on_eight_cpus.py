"""`shard` on a Ray of eight CPUs: the bytes are those of one worker."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

from components.contract.manifest import Artifact, open_artifact
from components.shard import ShardSettings
from tests.components.datasets.test_tasks import contents, driver
from tests.support.repository import REPOSITORY

PHOTOS = 400


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray that starts eight tasks at once, however many CPUs there are."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "object_store_memory": 200 * 2**20})
    try:
        yield made.address
    finally:
        made.shutdown()


def photos_in_a_zip(folder: Path) -> Path:
    """COCO captions and boxes with noisy photos in a zip; a few of them are broken or not there."""
    (folder / "annotations").mkdir(parents=True)
    images, captions, boxes, noise = [], [], [], np.random.default_rng(3)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(PHOTOS):
            name, side = f"{number * 7919 % 10007:05d}.jpg", 40 + number % 50
            images.append({"id": number, "file_name": name, "width": side, "height": 48})
            captions += [{"image_id": number, "caption": f"photo {number}, {turn}"} for turn in range(2)]
            boxes.append({"image_id": number, "category_id": 1, "bbox": [1, 2, 30, 40], "iscrowd": 0})
            pixels = noise.integers(0, 256, (48, side, 3), np.uint8)
            Image.fromarray(pixels).save(buffer := io.BytesIO(), format="JPEG")
            if number % 97 != 1:
                archive.writestr(name, buffer.getvalue()[: 500 if number % 89 == 2 else None])
    for name, value in (
        ("captions", {"images": images, "annotations": captions}),
        (
            "instances",
            {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]},
        ),
    ):
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.drill
def test_eight_workers_make_the_bytes_of_one_from_photos_in_a_zip(
    eight_cpus: str, mlflow_db: str, tmp_path: Path
) -> None:
    data = photos_in_a_zip(tmp_path / "data")
    made: dict[int, Artifact] = {}
    for workers in (1, 8):
        settings = ShardSettings(
            source="coco", path=str(data), heldout=0.1, rows_per_shard=10, rows_per_group=4, workers=workers
        )
        root = tmp_path / str(workers)
        with driver(eight_cpus, mlflow_db, root, tmp_path, settings) as process:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
        (manifest,) = root.glob("shard/*/manifest.json")
        made[workers] = open_artifact(manifest.parent)
    assert made[1].manifest.notes["rows"]["train"] > 300 and made[1].manifest.notes["refused"]
    assert len(contents(made[1])) > 60
    assert contents(made[8]) == contents(made[1])
    assert made[8].manifest.notes == made[1].manifest.notes
    assert made[8].digest == made[1].digest
