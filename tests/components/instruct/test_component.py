"""`instruct`: conversations about real photos and drawn scenes, through the real runner, MLflow store and Ray."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from components.contract.manifest import Artifact
from components.instruct import Instruct, InstructSettings
from components.instruct.samples import WrittenQuestion, questions, samples, spread_over_kinds
from components.shard import Shard, ShardSettings
from llava.data.schema import to_table
from llava.errors import LlavaError, RefusedInput


def rows_of(artifact: Artifact, split: str) -> list[dict[str, Any]]:
    files = sorted(artifact.local().glob(f"{split}/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def contents(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifact.manifest.files}


@pytest.fixture(scope="module")
def scenes(run_at: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Drawn scenes in three shards."""
    settings = ShardSettings(scenes=90, rows_per_shard=30)
    artifact: Artifact = run_at(tmp_path_factory.mktemp("scenes"), Shard(), settings).artifact
    return artifact


@pytest.fixture(scope="module")
def photos(run_at: Any, tmp_path_factory: pytest.TempPathFactory, coco_folder: Path) -> Artifact:
    """Real photos, a third of them held out."""
    settings = ShardSettings(source="coco", path=str(coco_folder), heldout=0.3, rows_per_shard=50)
    artifact: Artifact = run_at(tmp_path_factory.mktemp("photos"), Shard(), settings).artifact
    return artifact


def given(name: str, **columns: Any) -> dict[str, Any]:
    """A row as it is read from a dataset."""
    row = {"id": name, "width": 64, "height": 64, "captions": ["a red square on a table"], **columns}
    (read,) = to_table([row]).to_pylist()
    return dict(read)


def two_things(name: str) -> dict[str, Any]:
    boxes = [("dog", [2.0, 30.0, 20.0, 20.0]), ("red ball", [40.0, 30.0, 10.0, 10.0])]
    return given(
        name,
        captions=["A dog looks at a red ball.", "There is a dog left of a ball."],
        objects=[{"category": category, "bbox": box} for category, box in boxes],
    )


def test_conversations_about_real_photos_have_the_form_that_training_expects(
    run_in: Any, photos: Artifact
) -> None:
    artifact = run_in(Instruct(), InstructSettings(max_bad=0.2), {"dataset": photos}).artifact
    sources = {row["id"]: row for row in rows_of(photos, "train")}
    rows = rows_of(artifact, "train")
    assert len(rows) > len(sources)
    assert {row["type"] for row in rows} == {"conversation", "detail", "reasoning"}
    placed = Counter()
    for row in rows:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        first = turns[0]["value"]
        assert first.count("<image>") == 1
        placed[
            "before" if first.startswith("<image>\n") else "after" if first.endswith("\n<image>") else "?"
        ] += 1
        assert all(turn["value"].strip() and "<image>" not in turn["value"] for turn in turns[1:])
        assert len(row["kinds"]) == len(turns) // 2
        source = sources[row["id"].rpartition("-")[0]]
        assert (row["image"], row["captions"], row["objects"]) == (
            source["image"],
            source["captions"],
            source["objects"],
        )
    assert set(placed) == {"before", "after"}
    assert len({row["id"] for row in rows}) == len(rows)


def test_held_out_questions_are_single_short_and_about_held_out_photos_only(
    run_in: Any, photos: Artifact
) -> None:
    artifact = run_in(
        Instruct(), InstructSettings(heldout_questions=40, max_bad=0.2), {"dataset": photos}
    ).artifact
    rows = rows_of(artifact, "heldout")
    assert len(rows) == 40
    held_out = {row["id"] for row in rows_of(photos, "heldout")}
    for row in rows:
        assert row["id"].rpartition("-q")[0] in held_out
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert (len(row["conversations"]), len(row["kinds"]), row["type"]) == (2, 1, "conversation")
    assert len({row["id"] for row in rows}) == 40
    counted = artifact.manifest.notes["heldout_questions"]
    unknown = sum(row["objects"] is None for row in rows_of(photos, "heldout"))
    assert unknown > 0
    assert counted["photos without any"] >= unknown
    assert counted["photos without any"] + counted["photos asked about"] == len(held_out)


def test_every_kind_of_question_about_scenes_is_held_out_alike(run_in: Any, scenes: Artifact) -> None:
    settings = InstructSettings(heldout_questions=12, detail_share=0, reasoning_share=0)
    artifact = run_in(Instruct(), settings, {"dataset": scenes}).artifact
    kinds = Counter(row["kinds"][0] for row in rows_of(artifact, "heldout"))
    assert sum(kinds.values()) == 12
    assert artifact.manifest.notes["kinds"]["heldout"] == dict(kinds)
    assert len(kinds) > 3
    assert max(kinds.values()) - min(kinds.values()) <= 1
    assert {row["type"] for row in rows_of(artifact, "train")} == {"conversation"}


def test_samples_that_share_a_photo_store_it_once(run_in: Any, photos: Artifact) -> None:
    settings = InstructSettings(per_photo=3, max_bad=0.2)
    artifact = run_in(Instruct(), settings, {"dataset": photos}).artifact
    rows, sources = rows_of(artifact, "train"), rows_of(photos, "train")
    assert len(rows) > 2 * len(sources)
    stored = sum(file.size for file in artifact.manifest.files if file.path.startswith("train/"))
    assert stored < 1.1 * sum(len(row["image"]["bytes"]) for row in sources)


def test_one_worker_and_two_make_the_same_bytes(run_in: Any, scenes: Artifact, tmp_path: Path) -> None:
    one = run_in(Instruct(), InstructSettings(workers=1), {"dataset": scenes}, root=tmp_path / "one").artifact
    two = run_in(Instruct(), InstructSettings(workers=2), {"dataset": scenes}, root=tmp_path / "two").artifact
    assert len(contents(one)) == 5
    assert contents(one) == contents(two)


def test_the_ecosystems_file_holds_the_training_samples(run_in: Any, scenes: Artifact) -> None:
    artifact = run_in(Instruct(), InstructSettings(), {"dataset": scenes}).artifact
    records = json.loads((artifact.local() / "llava_instruct.json").read_text())
    assert records == [
        {"id": row["id"], "image": row["image"]["path"], "conversations": row["conversations"]}
        for row in rows_of(artifact, "train")
    ]
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(artifact.local() / "train" / "*.parquet"),
        split="train",
        cache_dir=str(artifact.local().parent / "cache"),
    )
    assert loaded[0]["image"].size == (64, 64)
    assert len(loaded) == len(records)


def test_given_conversations_pass_through_and_held_out_ones_become_single_questions(
    run_in: Any, tmp_path: Path
) -> None:
    records = [
        {
            "id": f"r{number}",
            "conversations": [
                {"from": "human", "value": f"Question {number}?"},
                {"from": "gpt", "value": "Answer."},
                {"from": "human", "value": "More?"},
                {"from": "gpt", "value": "No."},
            ],
        }
        for number in range(30)
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "mix.json").write_text(json.dumps(records))
    settings = ShardSettings(source="llava", path=str(data), heldout=0.3)
    dataset = run_in(Shard(), settings).artifact
    artifact = run_in(Instruct(), InstructSettings(), {"dataset": dataset}).artifact
    assert rows_of(artifact, "train") == rows_of(dataset, "train")
    asked = rows_of(artifact, "heldout")
    assert [row["id"] for row in asked] == [row["id"] for row in rows_of(dataset, "heldout")]
    assert all(len(row["conversations"]) == 2 and row["type"] is None for row in asked)


def test_photos_that_nothing_can_be_said_about_are_counted_and_too_many_fail(
    run_in: Any, tmp_path: Path
) -> None:
    records = [{"id": "spoken", "conversations": [{"from": f, "value": "Hm."} for f in ("human", "gpt")]}]
    data = tmp_path / "data"
    data.mkdir()
    (data / "mix.json").write_text(json.dumps(records))
    dataset = run_in(Shard(), ShardSettings(source="llava", path=str(data), heldout=0)).artifact
    silent = to_table([{"id": "silent"}, {"id": "mute"}])
    path = dataset.folder.local_path / "train" / "part-00000.parquet"
    pq.write_table(silent, path)
    with pytest.raises(
        LlavaError, match=r"2 of 2 samples refused, limit instruct\.max_bad=0\.05: 2 x nothing-to-say"
    ):
        run_in(Instruct(), InstructSettings(), {"dataset": dataset})
    artifact = run_in(Instruct(), InstructSettings(max_bad=1), {"dataset": dataset}).artifact
    assert artifact.manifest.notes["refused"] == {"nothing-to-say": {"count": 2, "ids": ["silent", "mute"]}}


def test_types_follow_their_shares() -> None:
    settings = InstructSettings(per_photo=1, conversation_share=1, detail_share=3, reasoning_share=0)
    types = Counter(sample["type"] for n in range(400) for sample in samples(two_things(f"p{n}"), settings))
    assert set(types) == {"conversation", "detail"}
    assert types["detail"] / 400 == pytest.approx(0.75, abs=0.07)


def test_no_sample_of_a_photo_is_said_twice() -> None:
    settings = InstructSettings(per_photo=6)
    said = [json.dumps([t["value"].replace("<image>", "").strip() for t in sample["conversations"]])
            for sample in samples(two_things("p"), settings)]  # fmt: skip
    assert len(said) > 2
    assert len(set(said)) == len(said)


def test_samples_depend_on_the_photo_and_the_seed_and_on_nothing_around_them() -> None:
    settings = InstructSettings(per_photo=3)
    alone = list(samples(two_things("p"), settings))
    random.seed(1)
    list(samples(two_things("other"), settings))
    assert list(samples(two_things("p"), settings)) == alone
    assert list(samples(two_things("p"), settings.model_copy(update={"seed": 1}))) != alone


def test_the_picture_stands_first_where_that_is_wanted() -> None:
    settings = InstructSettings(per_photo=4, image_position="first")
    found = [sample for n in range(10) for sample in samples(two_things(f"p{n}"), settings)]
    assert all(sample["conversations"][0]["value"].startswith("<image>\n") for sample in found)


def test_unknown_boxes_are_not_taken_for_no_objects() -> None:
    unknown = given("p", captions=["A dog sleeps."], objects=None)
    none = given("p", captions=["An empty beach."], objects=[])
    assert questions(unknown, 0, InstructSettings()) == []
    assert {question.kind for question in questions(none, 0, InstructSettings())} == {"count", "exists"}


def test_the_choice_is_even_over_kinds_and_uses_up_the_rare_ones() -> None:
    turns = ({"from": "human", "value": "?"}, {"from": "gpt", "value": "!"})
    candidates = [
        WrittenQuestion(n, 0, kind, turns)
        for n, kind in enumerate(["often"] * 50 + ["some"] * 20 + ["rare"] * 2)
    ]
    chosen = Counter(question.kind for question in spread_over_kinds(candidates, 20, seed=0))
    assert chosen == {"often": 9, "some": 9, "rare": 2}
    assert spread_over_kinds(candidates, 20, 0) == spread_over_kinds(candidates, 20, 0)
    assert len(spread_over_kinds(candidates, 500, 0)) == 72


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"teacher": "gpt"}, "'rules'"),
        ({"conversation_share": 0, "detail_share": 0, "reasoning_share": 0}, "nothing to write"),
        ({"turn": 3}, "turn"),
    ],
)
def test_impossible_settings_are_refused_with_the_key(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        InstructSettings(**settings)


def test_an_input_that_is_no_dataset_is_refused(run_in: Any) -> None:
    with pytest.raises(RefusedInput, match="needs the input 'dataset'"):
        run_in(Instruct(), InstructSettings())
