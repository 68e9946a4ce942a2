"""ScienceQA as training data."""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks.evaluation import shapes
from components.scoring import science_data
from components.scoring.benchmarks.letters import letter
from components.shard.settings import ShardSettings
from components.shard.sources import llava as llava_source
from components.tiny_world import scenes


def test_scienceqa_is_written_as_training_data_that_shard_reads(tmp_path: Path) -> None:
    shapes.write_science(tmp_path / "data", list(scenes(5, 12, "train")), random.Random(1), "train")
    problems, splits = (tmp_path / "data" / f"{name}.json" for name in ("problems", "pid_splits"))
    count = science_data.write(problems, splits, "train", "QCM-LEA", tmp_path / "data" / "train.json")
    settings = ShardSettings(
        source="llava", path=str(tmp_path / "data"), conversations="train.json", heldout=0
    )
    listed = llava_source.listing(settings)
    rows = [llava_source.load(settings, listed.shared, item).row for item in listed.items]
    assert count == len(rows) > 6
    known = json.loads(problems.read_text())
    for row in rows:
        asked, told = (turn["value"] for turn in row["conversations"])
        problem = known[row["id"]]
        assert ("<image>" in asked) is (row.get("image") is not None) is (problem["image"] is not None)
        assert told.startswith("Things have colours.\n")
        assert letter(told) == "ABC"[problem["answer"]]
