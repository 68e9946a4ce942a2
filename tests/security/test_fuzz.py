"""Whatever stands in a record, a file of data, an archive, a config or an answer: one line at most, and no damage.

The normal run takes a second of each kind. `make drills` takes `LLAVA_FUZZ_SECONDS` (600) for all of them. Both print
the seed; `LLAVA_FUZZ_SEED` sets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.chat import counted, parsed
from components.chat import told as told_by
from components.contract import find_artifact, open_artifact, open_store, read_artifact
from components.contract.lease import LEASE, holder
from components.contract.runner import RUN
from components.datasets.reading import rows_of
from components.evaluate.contamination import _lineage
from components.instruct.llm.parse import Unusable, parse
from components.instruct.llm.responses import SCHEMA, adopt, stored
from components.register import Register, RegisterSettings, dataset_digest
from components.scoring.judge import _said
from components.scoring.outcomes import outcomes
from components.shard import ShardSettings
from components.shard.component import Shard
from components.training.data import extra_sources
from components.training.settings import Extra
from llava import model as models
from llava.data.images import BadImage, decode, prove, shrink, thumbnail
from llava.data.reader import ParquetRows
from llava.data.schema import write_rows
from tests.components.scoring.benchmarks.test_golden import GOLDEN, files
from tests.support.fuzzing import Held, Make, fuzz, like_bytes, like_json, like_lines
from tests.support.sources import coco, in_zip, jpeg, llava, told
from tests.support.tiny_llava import tiny_llava
from workflows import config as configs
from workflows.references import unfinished_inputs
from workflows.retraining import records
from workflows.scores.score import score
from workflows.show import show
from workflows.summary import show as summarise
from workflows.train import Summary

SECONDS = 1.0
DIGEST = "0123456789abcdef" * 4
SAMPLE = {"id": "a", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                         {"from": "gpt", "value": "It."}]}  # fmt: skip
Readers = list[Callable[[], object]]
Kind = tuple[Make, Callable[[Any], Readers]]
"""The inputs, and what reads one."""


def allowing(kind: type[Exception], work: Callable[[], object]) -> Callable[[], object]:
    """`work`, whose callers know what to do with such an error."""

    def done() -> None:
        with contextlib.suppress(kind):
            work()

    return done


def evaluation(place: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished evaluation, and its manifest."""
    address = place / "root" / "evaluate" / DIGEST[:16]
    shutil.copytree(GOLDEN / "pope", address / "exams" / "pope")
    (address / "report").mkdir()
    (address / "report" / "page.md").write_text("page")
    store = open_store(address)
    told = [{"path": one.key, "size": one.size, "sha256": store.sha256(one.key)} for one in store.list()]
    exam = {
        "benchmark": "pope", "digest": DIGEST, "folder": "exams/pope", "n": 7, "failed": 1, "excluded": False,
        "scores": {"mean_f1": 75.0}, "intervals": {"mean_f1": [70.0, 80.0]}, "remarks": [],
        "files": {"answers": "answers.jsonl", "questions": "questions.jsonl", "splits": None, "split": "test",
                  "labels": {"random": "random.jsonl", "adversarial": "adversarial.jsonl"}, "reviews": [],
                  "max_failed": 0.5},
    }  # fmt: skip
    return address, {
        "component": "evaluate", "version": "1", "digest": DIGEST, "recipe": {"extra": [{"weight": 2.0}], "limit": 5},
        "run": {"extra": [{"uri": str(place / "root"), "follow_links": None}]}, "inputs": {"model": DIGEST},
        "external": {"extra 0": DIGEST}, "files": told, "metrics": {"eval/pope/mean_f1": 75.0},
        "notes": {"exams": {"pope": exam}, "example": {"picture": "a.jpg", "question": "What?"}, "questions": DIGEST,
                  "model": {"name": "m", "version": "1", "uri": "models:/m/1", "source": "x", "alias": "champion",
                            "decision": "first"},
                  "refused": {"broken": {"count": 1, "ids": ["a"]}}, "rows": {"train": 3, "heldout": 1}},
        "mlflow_run_id": "a1", "code": "x", "versions": {"torch": "2"}, "attempt": "",
        "created": "2026-01-01T00:00:00Z",
    }  # fmt: skip


def manifests(place: Path) -> Kind:
    address, manifest = evaluation(place)
    settings = RegisterSettings(name="m", benchmarks=("pope/mean_f1",))
    shards = ShardSettings(source="coco", path=str(place))

    def readers(data: bytes) -> Readers:
        (address / "manifest.json").write_bytes(data)
        store = open_store(address)

        def found() -> Any:
            artifact = read_artifact(store)
            assert artifact is not None
            return artifact

        def reported() -> None:
            summary = Summary(
                artifacts={"evaluate": str(address)}, seconds={"evaluate": 1.0}, reused=["evaluate"]
            )
            summary.scores = dict(found().manifest.metrics)
            summarise(summary, Place())  # type: ignore[arg-type]

        return [
            lambda: show(str(address)),
            lambda: open_artifact(address).local("exams/pope"),
            lambda: find_artifact(DIGEST, [open_store(place / "root")]),
            lambda: outcomes(found()),
            lambda: _lineage(found(), [open_store(place / "root")]),
            lambda: dataset_digest(found().manifest),
            lambda: Register().check(settings, {"model": found(), "evaluation": found()}),
            lambda: Shard().check_found(shards, found()),
            reported,
        ]

    return lambda chance: like_json(chance, manifest), readers


class Place:
    """A workspace whose MLflow is never asked."""

    tracking = type("Tracking", (), {"uri": "sqlite:///x.db"})


def record_files(place: Path) -> Kind:
    dataset = {"uri": str(place), "digest": DIGEST}
    drop = {"uri": str(place), "digest": DIGEST, "files": 1, "size": 5}
    seeds: dict[str, Any] = {
        LEASE: {"owner": "o", "token": 3, "ttl": 30.0, "host": "h", "pid": 1, "started": 5.0, "space": "s",
                "renewed": 7.0, "released": False, "user": "u"},
        RUN: {"mlflow_run_id": "a1", "tracking_uri": "sqlite:///x", "made_from": [DIGEST]},
        records.PLAN: {"drops": [drop], "contents": {DIGEST: DIGEST}, "start": "x"},
        "retrain/versions/a.json": {"version": DIGEST, "parts": [{**dataset, "role": "old", "weight": 0.5}]},
        "drops/a.json": {**drop, "taken": "2026-01-01T00:00:00Z", "contents": DIGEST, "datasets": [dataset],
                         "same_as": None},
    }  # fmt: skip
    store = open_store(place / "root")

    def inputs(chance: Random) -> tuple[str, bytes]:
        key = chance.choice(list(seeds))
        return key, like_json(chance, seeds[key])

    def readers(found: tuple[str, bytes]) -> Readers:
        store.write(*found)
        return [
            lambda: holder(store),
            lambda: unfinished_inputs(store),
            lambda: records.plan_of(store),
            lambda: list(records.versions(store)),
            lambda: records.taken(store),
        ]

    return inputs, readers


def llava_json(place: Path) -> Kind:
    settings = llava(place / "data", ["a.jpg", None, ["a.jpg", "b.jpg"]])
    lines = llava(place / "lines", ["a.jpg", None, ["a.jpg", "b.jpg"]], "mix.jsonl")
    for folder in ("data", "lines"):
        for name in ("a.jpg", "b.jpg"):
            (place / folder / name).write_bytes(jpeg())
    values = json.loads((place / "data" / "mix.json").read_text())

    def inputs(chance: Random) -> tuple[str, ShardSettings, bytes]:
        if chance.random() < 0.5:
            return "data/mix.json", settings, like_json(chance, values)
        return "lines/mix.jsonl", lines, like_lines(chance, values)

    def readers(found: tuple[str, ShardSettings, bytes]) -> Readers:
        (place / found[0]).write_bytes(found[2])
        return [lambda: told(found[1])]

    return inputs, readers


def coco_json(place: Path) -> Kind:
    settings = coco(place / "data", ["a.jpg", "b.jpg"])
    (path,) = (place / "data").rglob("captions*.json")
    for name in ("a.jpg", "b.jpg"):
        (place / "data" / name).write_bytes(jpeg())

    def readers(data: bytes) -> Readers:
        path.write_bytes(data)
        return [lambda: told(settings)]

    value = json.loads(path.read_text())
    return lambda chance: like_json(chance, value), readers


def parquet_files(place: Path) -> Kind:
    for folder in ("data", "dataset", "responses"):
        (place / folder).mkdir()
    features = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
    table = pa.table({"image": [{"bytes": jpeg(), "path": "a.jpg"}] * 6, "text": ["a cat"] * 6})
    pq.write_table(table.replace_schema_metadata({"huggingface": features}), place / "x", row_group_size=2)
    turns = SAMPLE["conversations"]
    rows: Any = [
        {"id": str(n), "image": {"bytes": jpeg(), "path": "a"}, "conversations": turns} for n in range(3)
    ]
    write_rows(place / "y", rows)
    answer: Any = ["ab" * 32, "p", "detail", 0, 200, "{}", 3, 4, 0.5]
    pq.write_table(
        pa.table({name: [one] for name, one in zip(SCHEMA.names, answer, strict=True)}, SCHEMA), place / "z"
    )
    goals = {"x": "data/a.parquet", "y": "dataset/a.parquet", "z": "responses/00000-00000-ab.parquet"}
    settings = ShardSettings(
        source="parquet", path=str(place / "data"), texts=("text",), image_columns=("image",)
    )
    extra = (Extra(uri=str(place / "dataset")),)
    whole = {name: (place / name).read_bytes() for name in goals}

    def inputs(chance: Random) -> tuple[str, bytes]:
        name = chance.choice(list(goals))
        return name, like_bytes(chance, whole[name])

    def trained_on() -> None:
        opened: ParquetRows = extra_sources("finetune", extra)[0].open("conversations")
        for group in range(len(opened.groups)):
            opened.table(group)

    def readers(found: tuple[str, bytes]) -> Readers:
        (place / goals[found[0]]).write_bytes(found[1])
        readers: dict[str, Readers] = {
            "x": [lambda: told(settings)],
            "y": [lambda: list(rows_of(open_store(place / "dataset"), "a.parquet")), trained_on],
            "z": [
                lambda: stored(open_store(place)),
                lambda: adopt(open_store(place), open_store(place / "n"), {}, int),
            ],
        }
        return readers[found[0]]

    return inputs, readers


def tars(place: Path) -> Kind:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as archive:
        for number in range(3):
            for suffix, data in {"jpg": jpeg(), "txt": b"a cat", "json": b'{"caption": "x"}'}.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    plain, packed = out.getvalue(), gzip.compress(out.getvalue(), mtime=0)
    settings = ShardSettings(source="webdataset", path=str(place / "data"))
    (place / "data").mkdir()

    def inputs(chance: Random) -> tuple[str, bytes]:
        match chance.randrange(3):
            case 0:
                return "a.tar", like_bytes(chance, plain)
            case 1:
                return "a.tar.gz", gzip.compress(like_bytes(chance, plain), 1, mtime=0)
        return "a.tar.gz", like_bytes(chance, packed)

    def readers(found: tuple[str, bytes]) -> Readers:
        for old in (place / "data").iterdir():
            old.unlink()
        (place / "data" / found[0]).write_bytes(found[1])
        return [lambda: told(settings)]

    return inputs, readers


def zips(place: Path) -> Kind:
    settings = coco(place / "data", ["a.jpg", "b.jpg"])
    seeds = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        in_zip(place / "data", "images", {"a.jpg": jpeg(), "b.jpg": jpeg()}, method)
        seeds.append((place / "data" / "images.zip").read_bytes())

    def readers(data: bytes) -> Readers:
        (place / "data" / "images.zip").write_bytes(data)
        return [lambda: told(settings)]

    return lambda chance: like_bytes(chance, chance.choice(seeds)), readers


def presets(place: Path) -> Kind:
    configs.config_model()
    folder = Path(str(configs.PRESETS))
    texts = [(folder / f"{name}.yaml").read_bytes() for name in configs.preset_names()]
    trees = [configs.config_files.parse(text.decode(), "x") for text in texts]

    def inputs(chance: Random) -> bytes:
        return (
            like_bytes(chance, chance.choice(texts))
            if chance.random() < 0.5
            else like_json(chance, chance.choice(trees))
        )

    def readers(data: bytes) -> Readers:
        (place / "own.yaml").write_bytes(data)
        return [lambda: configs.load(str(place / "own.yaml"))]

    return inputs, readers


def scored_files(place: Path) -> Kind:
    """Answers, reviews and labels of every benchmark."""
    shutil.copytree(GOLDEN, place / "golden")
    paths = sorted(path for path in (place / "golden").rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in paths}

    def like(chance: Random, path: Path) -> bytes:
        if path.suffix == ".jsonl" and chance.random() < 0.7:
            lines = whole[path].decode().splitlines()
            return like_lines(chance, [json.loads(line) for line in lines if line.strip()])
        if path.suffix == ".json" and chance.random() < 0.7:
            return like_json(chance, json.loads(whole[path]))
        return like_bytes(chance, whole[path])

    def inputs(chance: Random) -> tuple[Path, bytes]:
        path = chance.choice(paths)
        return path, like(chance, path)

    def readers(found: tuple[Path, bytes]) -> Readers:
        path, data = found
        name = path.relative_to(place / "golden").parts[0]

        def scored() -> None:
            path.write_bytes(data)
            try:
                score(name, moved(name, place / "golden"))
            finally:
                path.write_bytes(whole[path])

        return [scored]

    return inputs, readers


def moved(name: str, folder: Path) -> Any:
    """The golden files of a benchmark where they are changed."""
    known = files(name)

    def there(path: Path | None) -> Path | None:
        return None if path is None else folder / path.relative_to(GOLDEN)

    return dataclasses.replace(
        known, answers=there(known.answers), questions=there(known.questions), splits=there(known.splits),
        labels={split: folder / path.relative_to(GOLDEN) for split, path in known.labels.items()},
        reviews=[folder / path.relative_to(GOLDEN) for path in known.reviews],
    )  # fmt: skip


def bodies(place: Path) -> Kind:
    """What a teacher or a judge answers."""
    answer = {"choices": [{"message": {"content": "Question:\nWhat?\n===\nAnswer:\nA cat.", "refusal": None},
                           "finish_reason": "stop"}],
              "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "error": {"message": "no"}}  # fmt: skip

    def usage(text: str) -> None:
        found = parsed(text)
        count = counted(found.get("usage")) if isinstance(found, dict) else None
        assert count is None or all(0 <= one <= 10**8 for one in count)

    def readers(data: bytes) -> Readers:
        text = data.decode(errors="replace")
        kinds = ("conversation", "detail", "reasoning")
        return [
            lambda: _said(text),
            lambda: told_by(text),
            allowing(ValueError, lambda: usage(text)),
            *(allowing(Unusable, functools.partial(parse, kind, text, None)) for kind in kinds),
        ]

    return lambda chance: like_json(chance, answer), readers


def model_folders(place: Path) -> Kind:
    folder = tiny_llava(place / "model")
    names = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
             "generation_config.json")  # fmt: skip
    whole = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}

    def inputs(chance: Random) -> tuple[str, bytes]:
        name = chance.choice(list(whole))
        return name, like_json(chance, json.loads(whole[name]))

    def readers(found: tuple[str, bytes]) -> Readers:
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        (folder / found[0]).write_bytes(found[1])
        return [lambda: models.load_config(folder), lambda: models.load_processor(folder)]

    return inputs, readers


def pictures(place: Path) -> Kind:
    from PIL import Image

    seeds = []
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        Image.new("RGB", (24, 16), (200, 30, 30)).save(out := io.BytesIO(), name)
        seeds.append(out.getvalue())

    def readers(data: bytes) -> Readers:
        works = [
            decode,
            prove,
            functools.partial(shrink, short_side=8),
            functools.partial(thumbnail, width=9, height=9),
        ]
        return [allowing(BadImage, functools.partial(work, data)) for work in works]

    return lambda chance: like_bytes(chance, chance.choice(seeds)), readers


KINDS: dict[str, Callable[[Path], Kind]] = {
    "manifests": manifests,
    "records": record_files,
    "LLaVA JSON": llava_json,
    "COCO JSON": coco_json,
    "Parquet": parquet_files,
    "tar": tars,
    "zip": zips,
    "YAML": presets,
    "answers and reviews": scored_files,
    "answers of endpoints": bodies,
    "model folders": model_folders,
    "pictures": pictures,
}


def run(kind: str, place: Path, seconds: float) -> None:
    """Inputs of one kind for so long."""
    here = place / "here"
    here.mkdir()
    inputs, readers = KINDS[kind](place)
    held, before = Held(place), Path.cwd()

    def work(found: Any) -> None:
        for reader in readers(found):
            held.run(reader)

    os.chdir(here)
    try:
        fuzz(kind, inputs, held, work, seconds=seconds)
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept beside a root stays in the test's own folder."""
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_of_each_kind(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path, SECONDS)


@pytest.mark.drill
@pytest.mark.parametrize("kind", KINDS)
def test_minutes_of_each_kind(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path, float(os.environ.get("LLAVA_FUZZ_SECONDS", "600")) / len(KINDS))
