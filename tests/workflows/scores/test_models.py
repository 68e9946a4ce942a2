"""`llava compare MODEL_A MODEL_B`: real models, evaluated where they are not yet, side by side with pictures."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from benchmarks.evaluation import shapes
from components.contract import Artifact, Component, Job, Settings, Workspace, run_component
from components.evaluate import Evaluate, EvaluateSettings, ExamSettings
from components.tiny_world import scenes
from llava import generate
from llava.data.schema import Row, write_rows
from llava.errors import RefusedInput
from llava.model import save
from tests.support.tiny_llava import tiny_llava
from workflows.scores import models
from workflows.scores.compare import Rule
from workflows.train import open_workspace

RULE = Rule([], 0.0, 0.95, [])


class GivenSettings(Settings):
    """Nothing to set."""


class Given(Component):
    """An artifact that holds a copy of a folder."""

    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = GivenSettings
    on_ray: ClassVar[bool] = False

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.source, self.version = name, folder, folder.name  # type: ignore[misc]

    def run(self, job: Job) -> None:
        for path in sorted(self.source.rglob("*")):
            if path.is_file():
                job.folder.upload(path, path.relative_to(self.source).as_posix())


@dataclass
class World:
    """A root with two models and an exam to which the first one's answers are right."""

    root: Path
    workspace: Workspace
    first: Artifact
    second: Artifact
    evaluation: Artifact


@pytest.fixture(scope="module")
def world(ray_local: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("compare")
    workspace = open_workspace("compare", str(folder / "root"))

    def given(name: str, source: Path) -> Artifact:
        return run_component(Given(name, source), GivenSettings(), {}, workspace).artifact

    model, processor = generate.load(tiny_llava(folder / "first" / "model"))
    rows: list[Row] = []
    for scene in scenes(3, 30, "heldout"):
        (folder / f"{scene.id}.png").write_bytes(scene.png)
        with Image.open(folder / f"{scene.id}.png") as picture:
            (own,) = generate.answer(model, processor, ["Which?"], [picture], 5)
        rows.append({
            "id": scene.id, "image": {"bytes": scene.png, "path": "x.png"}, "width": 64, "height": 64,
            "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": own or "-"}],
        })  # fmt: skip
    (folder / "exam" / "heldout").mkdir(parents=True)
    write_rows(folder / "exam" / "heldout" / "part-00000.parquet", rows)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(-1.5)
    save(model, processor, folder / "second" / "model", "chatml")
    first, second = given("finetune", folder / "first"), given("finetune", folder / "second")
    settings = EvaluateSettings(
        max_new_tokens=5, benchmarks=[ExamSettings(**one) for one in shapes.write(folder / "shapes", 6)[:1]]
    )
    inputs = {"model": first, "questions": given("instruct", folder / "exam")}
    evaluation = run_component(Evaluate(), settings, inputs, workspace).artifact
    yield World(folder / "root", workspace, first, second, evaluation)


def test_models_are_compared_on_the_same_questions_with_what_changed_side_by_side(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [world.second.uri, world.first.uri]
    models.command(names, str(world.root), RULE, tmp_path / "out", True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["evaluations"][world.first.uri] == world.evaluation.uri
    assert found["scores"][world.first.uri]["vqa"]["exact_match"] > 90
    (duel,) = found["comparisons"]
    assert (duel["base"], duel["new"]) == tuple(names)
    vqa = duel["benchmarks"]["vqa"]
    assert (vqa["n"], vqa["losses"]) == (30, 0)
    assert vqa["wins"] + vqa["ties"] == 30
    assert vqa["wins"] > 10
    assert vqa["differences"]["exact_match"]["interval"][0] > 0
    assert duel["benchmarks"]["pope"]["n"] == 24
    assert "vqa/exact_match" in duel["reason"]
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "| score | questions |" in page
    assert f"### vqa: {vqa['wins']} better" in page
    shown = [line for line in page.splitlines() if line.startswith("| ![](pictures/vqa-")]
    assert len(shown) == 10
    for line in shown:
        with Image.open(tmp_path / "out" / line.split("(")[1].split(")")[0]) as picture:
            assert picture.size == (64, 64)

    # Nobody is asked twice, and the rule may be one's own.
    models.command(names, str(world.root), Rule(["vqa/exact_match"], 0.0, 0.95, []), None, False)
    said = capsys.readouterr()
    assert said.out.rstrip().endswith("better")
    assert "promote: vqa/exact_match" in said.out
    assert "questions answered" not in said.err


def test_what_cannot_be_compared_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="two models or more, each once"):
        models.evaluations([world.first.uri, world.first.uri], world.workspace)
    with pytest.raises(RefusedInput, match=r"was evaluated in .*run `llava evaluate PRESET` first"):
        models.evaluations(
            [world.first.uri, world.second.uri], open_workspace("compare", str(tmp_path / "empty"))
        )
    world.evaluation.manifest.notes["exams"]["vqa"]["digest"] += "0"
    try:
        evaluations = {"a": world.evaluation, "b": models.evaluations(
            [world.second.uri, world.first.uri], world.workspace)[world.second.uri]}  # fmt: skip
        with pytest.raises(RefusedInput, match="vqa: the two answered other questions"):
            models.compare(evaluations, RULE)
    finally:
        world.evaluation.manifest.notes["exams"]["vqa"]["digest"] = world.evaluation.manifest.notes[
            "questions"
        ]
