"""The data of a training stage: several datasets, lengths that are found again, a held-out loss, pad and crop."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoProcessor

from components.contract import (
    Artifact,
    FileEntry,
    Job,
    Manifest,
    Tracking,
    Workspace,
    artifact_digest,
    open_store,
    recipe,
)
from components.contract.runner import Outcome
from components.finetune import Finetune, FinetuneSettings
from components.pretrain import Pretrain, PretrainSettings
from components.tiny_world import scenes
from components.training import data
from llava.data.plan import SampleIndex
from llava.data.schema import write_rows
from llava.errors import RefusedInput
from tests.support.tiny_llava import tiny_llava

Run = Callable[..., Outcome]
SMALL: dict[str, Any] = {"template": "chatml", "precision": "fp32", "global_batch": 8, "zero_stage": 0}


def write_scenes(path: Path, seed: int, count: int) -> Path:
    rows = [
        {
            "id": scene.id,
            "image": {"bytes": scene.png, "path": f"{scene.id}.png"},
            "captions": scene.captions[:1],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is there?"},
                {"from": "gpt", "value": scene.captions[0]},
            ],
        }
        for scene in scenes(seed, count, "train")
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    return path


def as_artifact(folder: Path, component: str) -> Artifact:
    """The files of a folder, declared finished."""
    store = open_store(folder)
    files = [FileEntry(path=e.key, size=e.size, sha256=store.sha256(e.key)) for e in store.list()]
    digest = artifact_digest(component, "test", {}, {}, {file.path: file.sha256 for file in files})
    manifest = Manifest(
        component=component, version="test", digest=digest, recipe={}, files=files, code="test"
    )
    store.write("manifest.json", manifest.to_bytes())
    return Artifact(store, manifest)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("training-data")
    tiny_llava(folder / "model" / "model")
    write_scenes(folder / "dataset/train/part-00000.parquet", 0, 24)
    write_scenes(folder / "dataset/heldout/part-00000.parquet", 1, 12)
    write_scenes(folder / "more/train/part-00000.parquet", 2, 16)
    write_scenes(folder / "plain/some.parquet", 3, 10)
    found = {name: as_artifact(folder / name, "shard") for name in ("model", "dataset", "more")}
    return {**found, "plain": dataclasses.replace(found["more"], address=open_store(folder / "plain"))}


def stage_inputs(inputs: dict[str, Artifact]) -> dict[str, Artifact]:
    return {name: inputs[name] for name in ("model", "dataset")}


def extra(inputs: dict[str, Artifact], **weights: float) -> list[dict[str, Any]]:
    return [{"uri": inputs[name].uri, "weight": weight} for name, weight in weights.items()]


@pytest.fixture
def job_of(inputs: dict[str, Artifact], tmp_path: Path) -> Callable[..., Job]:
    """A job with the root of the test, and everything that measuring needs."""

    def job(name: str, **settings: Any) -> Job:
        scratch = tmp_path / f"scratch-{name}"
        scratch.mkdir()
        workspace = Workspace(open_store(tmp_path / "root"), Tracking(f"sqlite:///{tmp_path}/mlflow.db"))
        folder = workspace.store.sub(f"finetune/{name}")
        return Job(
            settings=FinetuneSettings(**{**SMALL, **settings}),
            inputs=stage_inputs(inputs),
            folder=folder,
            scratch=scratch,
            run=None,  # type: ignore[arg-type]
            lease=None,  # type: ignore[arg-type]
            workspace=workspace,
            component="finetune",
        )

    return job


def index_of(job: Job, name: str = data.INDEX) -> SampleIndex:
    return SampleIndex.load(job.scratch / name)


def test_further_datasets_enter_by_their_contents_and_their_weights(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    def enters(settings: FinetuneSettings) -> tuple[str, str]:
        return json.dumps(recipe(settings)), json.dumps(Finetune().external(settings))

    one = FinetuneSettings(**SMALL, extra=extra(inputs, more=1.0))
    half = FinetuneSettings(**SMALL, extra=extra(inputs, more=0.5))
    none = FinetuneSettings(**SMALL)
    assert len({enters(settings) for settings in (one, half, none)}) == 3
    assert inputs["more"].uri not in "".join(enters(one))
    assert inputs["more"].digest in enters(one)[1]
    copied = tmp_path / "copied"
    for entry in inputs["more"].folder.list():
        inputs["more"].folder.download(entry.key, copied / entry.key)
    assert enters(FinetuneSettings(**SMALL, extra=[{"uri": str(copied)}])) == enters(one)


def test_what_is_missing_or_of_another_schema_is_refused_before_anything_starts(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    def check(**settings: Any) -> None:
        Finetune().check(FinetuneSettings(**SMALL, **settings), stage_inputs(inputs))

    check(extra=extra(inputs, more=1.0, plain=0.5), eval_every=2)
    with pytest.raises(RefusedInput, match=r"finetune\.extra: .*nowhere holds no Parquet file for training"):
        check(extra=[{"uri": str(tmp_path / "nowhere")}])
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "other" / "part.parquet")
    with pytest.raises(RefusedInput, match=r"finetune\.extra: .*column 'conversations' is missing"):
        check(extra=[{"uri": str(tmp_path / "other")}])
    with pytest.raises(RefusedInput, match=r"pretrain\.eval_every=3: .* has no held-out samples"):
        settings = PretrainSettings(precision="fp32", zero_stage=0, eval_every=3)
        Pretrain().check(settings, {**inputs, "dataset": inputs["more"]})


def test_lengths_are_found_again_by_another_run_and_measured_anew_for_another_template(
    inputs: dict[str, Artifact], job_of: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[int] = []
    really = data.scan

    def counting(*arguments: Any) -> Any:
        scans.append(1)
        return really(*arguments)

    monkeypatch.setattr(data, "scan", counting)
    first = job_of("first", extra=extra(inputs, more=1.0, plain=0.5), eval_every=2, eval_samples=5)
    coverage = data.measure(first, "conversations")
    assert len(scans) == 4
    assert coverage.samples == 24 + 16 + 10
    assert (len(index_of(first)), len(index_of(first, data.HELD_OUT_INDEX))) == (50, 5)
    assert sorted(set(index_of(first).group.tolist())) == [0, 1, 2]
    second = job_of("second", extra=extra(inputs, plain=2.0), eval_every=2, learning_rate=1e-3, seed=9)
    assert data.measure(second, "conversations").samples == 24 + 10
    assert len(scans) == 4
    assert len(index_of(second, data.HELD_OUT_INDEX)) == 12
    data.measure(job_of("third", template="v1"), "conversations")
    assert len(scans) == 5


def test_a_run_on_several_datasets_with_a_held_out_loss_and_padded_pictures(
    run_in: Run, inputs: dict[str, Artifact]
) -> None:
    settings = FinetuneSettings(
        **SMALL,
        extra=extra(inputs, more=0.5, plain=2.0),
        image_fit="pad",
        learning_rate=3e-3,
        eval_every=2,
        eval_samples=6,
    )
    artifact = run_in(Finetune(), settings, stage_inputs(inputs)).artifact
    history = [json.loads(line) for line in artifact.folder.read("history.jsonl").splitlines()]
    assert len(history) == -(-(24 + 8 + 20) // 8)
    heldout = {e["step"]: e["eval/heldout/loss"] for e in history if "eval/heldout/loss" in e}
    assert list(heldout) == [2, 4, 6, 7]
    assert heldout[7] < heldout[2]
    each = artifact.manifest.notes["coverage_by_dataset"]
    assert [one["samples"] for one in each] == [24, 16, 10]
    lines = artifact.folder.read("samples.jsonl").splitlines()
    seen = [name for line in lines for name in json.loads(line)["ids"]]
    once, half, twice = (
        sorted(seen.count(one.id) for one in scenes(seed, count, "train"))
        for seed, count in ((0, 24), (2, 16), (3, 10))
    )
    assert (set(once), half, set(twice)) == ({1}, [0] * 8 + [1] * 8, {2})
    saved = AutoProcessor.from_pretrained(artifact.local("model"), backend="pil")
    assert saved.image_processor.do_pad is True
    assert (artifact.manifest.recipe["image_fit"], artifact.manifest.recipe["extra"]) == (
        "pad",
        [{"weight": 0.5}, {"weight": 2.0}],
    )
    assert len(artifact.manifest.external) == 2
