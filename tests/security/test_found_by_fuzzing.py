"""What the fuzz run found, one plain case of each kind: a line that a command would say, or a count."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from components.backbones.sources import as_safetensors
from components.contract import Manifest, Settings, open_store, read_artifact
from components.contract.runner import RUN
from components.evaluate.contamination import _lineage
from components.finetune import FinetuneSettings
from components.instruct.llm.responses import SCHEMA, stored
from components.register import Register, RegisterSettings, dataset_digest
from components.scoring.benchmarks import find
from components.scoring.outcomes import excluded, outcomes
from components.shard import ShardSettings
from components.shard.component import Shard
from components.training.data import extra_sources
from components.training.settings import Extra
from llava import model as models
from llava.data.jsonl import from_json
from llava.data.schema import write_rows
from llava.errors import RefusedInput
from tests.components.scoring.benchmarks.test_golden import files
from tests.support.fuzz_kinds.records import DIGEST, evaluation
from tests.support.sources import coco, told
from tests.support.tiny_llava import tiny_llava
from workflows.config import config_model
from workflows.references import unfinished_inputs
from workflows.scores.compare import in_folder
from workflows.scores.models import _settings

NOTES: dict[str, Any] = {
    "exams": {"pope": "x"},
    "refused": [],
    "rows": {"train": "3"},
    "model": 7,
    "example": [7],
}


def artifact(place: Path, **changes: Any) -> Any:
    address, manifest = evaluation(place)
    (address / "manifest.json").write_text(json.dumps(manifest | changes))
    found = read_artifact(open_store(address))
    assert found is not None
    return found


READERS: list[Callable[[Any], object]] = [
    outcomes,
    lambda found: Register().check(RegisterSettings(name="m"), {"model": found, "evaluation": found}),
    lambda found: Shard().check_found(ShardSettings(source="coco", path="x"), found),
]


@pytest.mark.parametrize("reader", READERS)
def test_notes_of_another_form_are_a_damaged_manifest(
    reader: Callable[[Any], object], tmp_path: Path
) -> None:
    found = artifact(tmp_path, notes=NOTES, inputs={"model": DIGEST})
    with pytest.raises(RefusedInput, match=r"manifest\.json is damaged \(notes\.") as refused:
        reader(found)
    assert "\n" not in str(refused.value)


def test_settings_of_another_form_in_a_manifest_are_one_line(tmp_path: Path) -> None:
    found = artifact(tmp_path, recipe={"extra": 7}, run={"extra": [7, {}, {"uri": "\0"}]})
    assert _lineage(found, [])[1]
    assert dataset_digest(found.manifest)
    with pytest.raises(RefusedInput, match="no settings of an evaluation"):
        _settings(found)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_metric_is_a_number(number: str, tmp_path: Path) -> None:
    address, manifest = evaluation(tmp_path)
    text = json.dumps(manifest | {"metrics": {"a": 1.25}}).replace("1.25", number)
    (address / "manifest.json").write_text(text)
    with pytest.raises(RefusedInput, match=r"damaged \(metrics\.a: .*finite"):
        read_artifact(open_store(address))


def test_a_metric_of_our_own_that_is_none_does_not_damage_the_manifest() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Manifest(
            component="a", version="1", digest=DIGEST, recipe={}, files=[], code="x", metrics={"a": math.nan}
        )


@pytest.mark.parametrize("data", ["[" * 100_000, b"\xff", "{", "1" * 5000])
def test_json_that_is_none_is_a_value_error(data: str | bytes) -> None:
    with pytest.raises(ValueError):
        from_json(data)


def test_a_deep_record_of_a_run_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text("[" * 100_000)
    assert unfinished_inputs(open_store(tmp_path)) == []


def test_a_member_without_a_name_is_a_damaged_zip(tmp_path: Path) -> None:
    settings = coco(tmp_path, ["a.jpg"])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("x", b"")
    data = (tmp_path / "images.zip").read_bytes().replace(b"x", b"")
    data = bytearray(data)
    for mark, at in ((b"PK\3\4", 26), (b"PK\1\2", 28)):
        data[data.index(mark) + at] = 0
    data[data.index(b"PK\5\6") + 12] -= 1
    data[data.index(b"PK\5\6") + 16] -= 1
    (tmp_path / "images.zip").write_bytes(data)
    with pytest.raises(RefusedInput, match=r"no zip archive that can be read in place"):
        told(settings)


ROWS: dict[str, tuple[str, str]] = {
    "mmbench": ("answers.jsonl", '{"question_id": "1", "round_id": "x", "text": "A"}'),
    "llava-bench": ("run1.jsonl", '{"question_id": 1' + "0" * 500 + ', "tuple": [1' + "0" * 400 + ", 1]}"),
    "pope": ("questions.jsonl", '{"question_id": [], "image": {}, "text": 7, "category": []}'),
    "vqa": ("annotations.json", '{"annotations": [7]}'),
    "scienceqa": ("problems.json", '{"11": []}'),
    "mm-vet": ("grades.json", '{"v1_0": 7}'),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_another_form_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    changed, row = ROWS[name]
    known = files(name)
    path = tmp_path / changed
    path.write_text(row)

    def instead(old: Path | None) -> Path | None:
        return path if old is not None and old.name == changed else old

    given = {
        "answers": instead(known.answers),
        "questions": instead(known.questions),
        "labels": {split: instead(one) for split, one in known.labels.items()},
        "reviews": [instead(one) for one in known.reviews],
    }
    with pytest.raises(RefusedInput) as refused:
        find(name).score(files(name, **given))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_an_answers_file_of_deep_json_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(RefusedInput, match=r"a\.jsonl: line 1 is no JSON"):
        find("vqa").score(files("vqa", answers=tmp_path / "a.jsonl"))


def classes(kind: type[Settings]) -> set[type[Settings]]:
    return {kind}.union(*(classes(one) for one in kind.__subclasses__()))


def test_no_setting_takes_a_number_that_is_none() -> None:
    config_model()
    every = classes(Settings)
    assert len(every) > 15
    assert all(one.model_config.get("allow_inf_nan") is False for one in every)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, "inf", "nan"])
def test_epochs_end(number: float | str) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        FinetuneSettings(epochs=number)


def test_a_picture_of_an_answers_file_is_opened_with_care(tmp_path: Path) -> None:
    """An EPS would start Ghostscript; a name may lead anywhere."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "good.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "bad.jpg", "EPS")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    unit = find("pope").score(files("pope")).units[0]
    look = in_folder(tmp_path / "images")

    def found(name: str) -> Any:
        return look("pope", dataclasses.replace(unit, image=name))

    assert found("good").size == (8, 8)
    for name in ("bad", "bad.jpg", "../outside", "missing", "x" * 5000, "\0", ""):
        assert found(name) is None


SOUND: dict[str, Any] = {"digest": "ab" * 32, "photo": "p", "type": "detail", "shard": 0, "status": 200, "body": "{}",
                         "prompt_tokens": 3, "completion_tokens": 4, "seconds": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_tokens": -5},
        {"completion_tokens": 2**62},
        {"prompt_tokens": None},
        {"digest": "no hex"},
        {"digest": None},
        {"status": None},
    ],
)
def test_stored_responses_cannot_lower_or_break_the_budget(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "responses").mkdir()
    path = tmp_path / "responses" / "00000-00000-ab.parquet"
    for row in (SOUND, SOUND | change):
        pq.write_table(pa.table({name: [value] for name, value in row.items()}, SCHEMA), path)
        if row == SOUND:
            assert stored(open_store(tmp_path)).tokens == (3, 4)
    with pytest.raises(RefusedInput, match=r"00000-00000-ab\.parquet: no responses that can be read again"):
        stored(open_store(tmp_path))


@pytest.mark.parametrize("name", ["digest", "prompt_tokens"])
def test_stored_responses_have_their_columns(name: str, tmp_path: Path) -> None:
    (tmp_path / "responses").mkdir()
    path = tmp_path / "responses" / "00000-00000-ab.parquet"
    pq.write_table(pa.table({key: [value] for key, value in SOUND.items() if key != name}), path)
    with pytest.raises(RefusedInput, match="no responses that can be read again"):
        stored(open_store(tmp_path))


def test_links_of_a_further_dataset_follow_the_rule(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    write_rows(tmp_path / "outside.parquet", [{"id": "a"}])
    write_rows(tmp_path / "own" / "a.parquet", [{"id": "b"}])
    (tmp_path / "own" / "b.parquet").symlink_to(tmp_path / "outside.parquet")
    (tmp_path / "own" / "c.parquet").symlink_to("a.parquet")
    keys = {
        None: ("a.parquet", "c.parquet"),
        True: ("a.parquet", "b.parquet", "c.parquet"),
        False: ("a.parquet",),
    }
    digests = set()
    for follow, wanted in keys.items():
        (source,) = extra_sources("finetune", [Extra(uri=str(tmp_path / "own"), follow_links=follow)])
        assert source.keys == wanted
        assert ("not read" in source.unread) is (follow is not True)
        digests.add(source.digest)
    assert len(digests) == 3


@pytest.mark.parametrize("field", ["recipe", "run"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_manifest_with_a_number_that_is_none_is_damaged(field: str, number: str) -> None:
    text = json.dumps({"component": "finetune", "version": "1", "digest": "ab" * 32, "inputs": {}, "files": [],
                       "recipe": {}, "run": {}, "code": "x", "created": "2026-01-01T00:00:00Z"})  # fmt: skip
    Manifest.model_validate_json(text)
    spoilt = text.replace(f'"{field}": {{}}', f'"{field}": {{"extra": [{{"weight": {number}}}]}}')
    with pytest.raises(ValidationError, match=field):
        Manifest.model_validate_json(spoilt)


def test_scores_that_leave_questions_out_need_the_file_that_names_them(tmp_path: Path) -> None:
    address, manifest = evaluation(tmp_path)
    manifest["notes"]["exams"]["pope"]["excluded"] = True
    (address / "manifest.json").write_text(json.dumps(manifest))
    artifact = read_artifact(open_store(address))
    assert artifact is not None
    with pytest.raises(
        RefusedInput, match=r"evaluate/.*: holds no contamination.json; make the artifact again"
    ):
        excluded(artifact, "pope")


def _compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:400]), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "no pickle": (lambda path: path.write_bytes(b"\x80\x02}"), "cannot be read|more than tensors"),
    "a number as a name": (lambda path: torch.save({1: torch.ones(2)}, path), "no plain table of tensors"),
    "a sparse tensor": (lambda path: torch.save({"a": torch.eye(2).to_sparse()}, path), "cannot be read"),
    "one number a million times": (
        lambda path: torch.save({"a": torch.ones(1).expand(1_000_000)}, path),
        "unpacked, it has 4,000,000 bytes",
    ),
    "a compressed archive": (_compressed, "unpacked, it has"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickled_weights_that_are_damaged_or_grow_are_one_line(what: str, tmp_path: Path) -> None:
    spoil, told_ = PICKLES[what]
    path = tmp_path / "in" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save({"a": torch.zeros(64, 64)}, path)
    spoil(path)
    with pytest.raises(RefusedInput, match=told_) as refused:
        as_safetensors(path.parent, tmp_path / "out", lambda _: None)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": []}', '{"weight_map": {"a": "other.bin"}}'])
def test_an_index_of_pickled_weights_that_fits_nothing_is_one_line(index: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(RefusedInput, match=r"pytorch_model\.bin\.index\.json: cannot be read"):
        as_safetensors(tmp_path, tmp_path / "out", lambda _: None)


def test_an_index_of_weights_names_files_of_its_folder(tmp_path: Path) -> None:
    folder = tiny_llava(tmp_path / "model")
    (tmp_path / "private").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "private" / "model.safetensors")
    outside = dict.fromkeys(
        load_file(tmp_path / "private" / "model.safetensors"), "../private/model.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": outside}))
    with pytest.raises(RefusedInput, match=r"index\.json names '\.\./private/model\.safetensors'"):
        models.load(folder, torch.float32)
