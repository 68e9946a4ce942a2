"""An MLflow server that refuses, answers errors and loses answers: every call goes on, and makes nothing twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest

from components.contract import TrackedRun, Tracking, TrackingError, outages
from components.contract.tracked_run import TABLES_TAG
from components.registry import Registry
from tests.support.faulty_proxy import GONE, LATE, LOST, FaultyProxy

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def one_proxy(mlflow_uri: str) -> Iterator[FaultyProxy]:
    """A proxy before the MLflow server."""
    with FaultyProxy(mlflow_uri).running() as running:
        yield running


@pytest.fixture
def proxy(one_proxy: FaultyProxy, s3_env: Any, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """The proxy, which does no harm yet; MLflow is waited for 20 s."""
    monkeypatch.setenv(outages.VARIABLE, "20")
    monkeypatch.setattr(outages, "FIRST_PAUSE", 0.02)
    outages.service.cache_clear()
    one_proxy.faults([])
    return one_proxy


@pytest.fixture(scope="module")
def name() -> str:
    """Of an experiment and of a model."""
    return f"outages-{uuid4().hex[:8]}"


class World:
    """An experiment with a run, and a model with a version, as the proxy shows them and as they are."""

    def __init__(self, proxy: FaultyProxy, mlflow_uri: str, name: str) -> None:
        from mlflow import MlflowClient

        self.tracking, self.registry, self.name = Tracking(proxy.url, name), Registry(proxy.url), name
        self.run = self.tracking.start("train")
        known = self.registry.by_alias(name, "first")
        self.version = known or self.registry.add(name, "s3://llava-tests/x/model", None, {"digest": "d"})
        self.registry.name_as(self.version, "first")
        self.truth = MlflowClient(tracking_uri=mlflow_uri, registry_uri=mlflow_uri)

    def stored(self) -> Any:
        """The run as the server has it."""
        return self.truth.get_run(self.run.id)

    def runs(self) -> list[str]:
        """The names of all runs, deleted ones left out."""
        found = self.truth.search_runs([self.tracking.experiment_id])
        return [run.info.run_name for run in found]

    def sources(self) -> list[str]:
        """The sources of all versions."""
        return [version.source for version in self.truth.search_model_versions(f"name = '{self.name}'")]


@pytest.fixture
def world(proxy: FaultyProxy, mlflow_uri: str, name: str) -> World:
    """What the calls are about."""
    return World(proxy, mlflow_uri, name)


def _params(world: World) -> bool:
    world.run.params({"a": 1})
    return bool(world.stored().data.params == {"a": "1"})


def _tags(world: World) -> bool:
    world.run.tags({"b": "2"})
    return bool(world.stored().data.tags["b"] == "2")


def _text(world: World) -> bool:
    world.run.text("words", "words.txt")
    return "words.txt" in [file.path for file in world.truth.list_artifacts(world.run.id)]


def _table(world: World) -> bool:
    world.run.table({"a": [1]}, "table.json")
    with TemporaryDirectory() as folder:
        found = json.loads(
            Path(world.truth.download_artifacts(world.run.id, "table.json", folder)).read_text()
        )
    return found == {"columns": ["a"], "data": [[1]]} and "table.json" in world.stored().data.tags[TABLES_TAG]


def _dataset(world: World) -> bool:
    world.run.dataset("data", "d" * 64, "s3://llava-tests/x")
    return len(world.stored().inputs.dataset_inputs) == 1


def _finish(world: World) -> bool:
    world.run.metrics({"loss": 1.0}, 1)
    world.run.finish()
    found = world.stored()
    return found.info.status == "FINISHED" and found.data.metrics == {"loss": 1.0}


def _start(world: World) -> bool:
    started = uuid4().hex
    run = world.tracking.start(started, tags={"a": "b"}, params={"c": 1})
    return world.truth.get_run(run.id).data.tags["a"] == "b" and world.runs().count(started) == 1


def _add(world: World) -> bool:
    source = f"s3://llava-tests/{uuid4().hex}/model"
    made = world.registry.add(world.name, source, world.run.id, {"digest": "e"})
    found = world.truth.get_model_version(world.name, made.version)
    return (found.source, found.tags) == (source, made.tags) and world.sources().count(source) == 1


def _first_of_a_model(world: World) -> bool:
    made = world.registry.add(f"{world.name}-{uuid4().hex[:4]}", "s3://llava-tests/x/model", None, {})
    return made.version == "1"


def _tag_version(world: World) -> bool:
    world.registry.tag(world.version, {"c": "3"})
    return bool(world.truth.get_model_version(world.name, world.version.version).tags["c"] == "3")


def _alias(world: World) -> bool:
    world.registry.name_as(world.version, "champion")
    there = bool(world.truth.get_model_version_by_alias(world.name, "champion"))
    world.registry.drop_alias(world.name, "champion")
    return there and world.registry.by_alias(world.name, "champion") is None


CALLS: dict[str, Callable[[World], bool]] = {
    "experiment": lambda world: (
        Tracking(world.tracking.uri, world.name).experiment_id == world.tracking.experiment_id
    ),
    "start": _start,
    "resume": lambda world: world.tracking.resume(world.run.id).id == world.run.id,
    "params": _params,
    "tags": _tags,
    "steps": lambda world: world.run.steps("loss") == set(),
    "text": _text,
    "table": _table,
    "dataset": _dataset,
    "finish": _finish,
    "add": _add,
    "first version": _first_of_a_model,
    "tag of a version": _tag_version,
    "alias": _alias,
    "by alias": lambda world: world.registry.by_alias(world.name, "first") == world.version,
    "by version": lambda world: world.registry.by_version(world.name, "1") is not None,
    "with tag": lambda world: len(world.registry.with_tag(world.name, "digest", "d")) == 1,
    "versions": lambda world: world.name in {version.name for version in world.registry.versions()},
    "has run": lambda world: world.registry.has_run(world.run.id),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_goes_on_after_errors_and_lost_answers(
    world: World, proxy: FaultyProxy, call: Callable[[World], bool]
) -> None:
    proxy.faults([503, GONE, LOST, 500, -500, 429])
    assert call(world)
    assert proxy.met == 6


def test_a_server_that_refuses_connections_is_waited_for_by_all_calls(
    world: World, proxy: FaultyProxy
) -> None:
    for call in CALLS.values():
        back = proxy.away(0.2)
        assert call(world)
        back.join()


@pytest.mark.parametrize(
    ("path", "call"), [("runs/create", _start), ("model-versions/create", _add)], ids=["run", "version"]
)
@pytest.mark.parametrize("fault", [-500, LOST, LATE])
def test_what_was_made_though_its_answer_was_lost_is_made_once(
    world: World, proxy: FaultyProxy, path: str, call: Callable[[World], bool], fault: str | int
) -> None:
    proxy.faults([fault, fault], "POST", path)
    assert call(world)


def test_waiting_is_told_once_and_ends_with_one_line(
    world: World, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(outages.VARIABLE, "2")
    proxy.manners = lambda method, path: 503
    started = time.monotonic()
    with pytest.raises(TrackingError, match=f"MLflow at {proxy.url}: ") as raised:
        world.run.tags({"a": "b"})
    assert "\n" not in str(raised.value)
    assert 2 <= time.monotonic() - started < 4
    with pytest.raises(TrackingError):  # the time is the service's: what comes after waits no more
        world.registry.tag(world.version, {"a": "b"})
    assert time.monotonic() - started < 6
    told = capsys.readouterr().err
    assert told == f"MLflow at {proxy.url} does not answer (HTTP 503): trying again for 2 s\n"


def test_answers_that_do_not_pass_are_not_waited_for_even_while_an_outage_is_handled(
    world: World, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(outages.VARIABLE, "0")
    proxy.faults([GONE])
    with pytest.raises(TrackingError) as raised:
        world.run.tags({"a": "b"})
    monkeypatch.setenv(outages.VARIABLE, "20")
    started = time.monotonic()
    try:
        raise raised.value
    except TrackingError:
        with pytest.raises(TrackingError, match="not found"):
            TrackedRun.attach(world.tracking.uri, uuid4().hex).tags({"a": "b"})
    assert world.registry.by_alias(world.name, "nobody") is None
    assert time.monotonic() - started < 5


def test_metrics_wait_for_nobody_and_the_end_of_the_run_brings_them(world: World, proxy: FaultyProxy) -> None:
    back = proxy.away(2.0)
    started = time.monotonic()
    world.run.metrics({"loss": 0.5}, 3)
    assert time.monotonic() - started < 1
    world.run.finish()
    back.join()
    found = world.stored()
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 0.5})


def test_files_that_mlflows_client_puts_on_s3_wait_for_s3(
    s3_env: Any, s3_root: str, mlflow_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(s3_env.endpoint).running() as s3:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        monkeypatch.setattr(outages, "FIRST_PAUSE", 0.02)
        run = Tracking(mlflow_db, f"outages-{uuid4().hex[:8]}", f"{s3_root}/files").start("train")
        s3.faults([503, GONE, LOST, 500, -500], "PUT")
        run.text("words", "words.txt")
        assert s3.met == 5
