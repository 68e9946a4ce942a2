"""What is written down: manifests, leases, plans, records of drops, configs, answers, and the files of benchmarks."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from components.chat import counted, parsed
from components.chat import told as told_by
from components.contract import find_artifact, open_artifact, open_store, read_artifact
from components.contract.lease import LEASE, holder
from components.contract.runner import RUN
from components.evaluate.contamination import _lineage
from components.instruct.llm.parse import Unusable, parse
from components.register import Register, RegisterSettings, dataset_digest
from components.scoring.judge import _said
from components.scoring.outcomes import outcomes
from components.shard import ShardSettings
from components.shard.component import Shard
from tests.components.scoring.benchmarks.test_golden import GOLDEN, files
from tests.support.fuzz_kinds.kind import Kind, Readers, allowing
from tests.support.fuzzing import like_bytes, like_json, like_lines
from workflows import config as configs
from workflows.references import unfinished_inputs
from workflows.retraining import records
from workflows.scores.score import score
from workflows.show import show
from workflows.summary import show as summarise
from workflows.train import Summary

DIGEST = "0123456789abcdef" * 4


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
