"""docs/extending.md, "A benchmark": it is asked, scored, reported, and decides the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.recipes import Recipe, copied, lint, run

pytestmark = pytest.mark.services

RECIPE = Recipe.read("A benchmark")
LLAVA = "import sys; from workflows.cli import main; sys.exit(main())"
EVALUATE = """
import json, sys
from pathlib import Path
from PIL import Image
from components.contract import Component, Tracking, Workspace, open_store, run_component, Settings
from components.evaluate import Evaluate, EvaluateSettings
from components.ray_cluster import connection
from components.scoring.gate import GateSettings, decide
from components.scoring.outcomes import outcomes
from tests.support.tiny_llava import tiny_llava

folder = Path(sys.argv[1])
tiny_llava(folder / "made" / "model")


class Model(Component):
    name, version, on_ray = "finetune", "1", False

    def run(self, job):
        for path in sorted((folder / "made").rglob("*")):
            if path.is_file():
                job.folder.upload(path, path.relative_to(folder / "made").as_posix())


class Nothing(Component):
    name, version, on_ray = "instruct", "1", False

    def run(self, job):
        job.folder.write("empty", b"")


for name in ("red", "blue"):
    Image.new("RGB", (40, 30), name).save(folder / f"{name}.png")
questions = [{"question_id": n, "image": f"{n}.png", "text": "Which colour?"} for n in ("red", "blue")]
labels = [{"question_id": n, "answer": n} for n in ("red", "blue")]
for what, rows in (("questions", questions), ("labels", labels)):
    (folder / f"{what}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
workspace = Workspace(
    open_store(str(folder / "root")), Tracking(f"sqlite:///{folder}/mlflow.db", "x", f"{folder}/mlflow"),
    cluster=connection.connect,
)
files = {what: str(folder / f"{what}.jsonl") for what in ("questions", "labels")}
settings = EvaluateSettings(benchmarks=[{"benchmark": "contains", **files}], contamination="off")
assert Evaluate().preflight(settings, workspace) == []
with connection.disconnecting():
    model = run_component(Model(), Settings(), {}, workspace).artifact
    nothing = run_component(Nothing(), Settings(), {}, workspace).artifact
    made = run_component(Evaluate(), settings, {"model": model, "questions": nothing}, workspace).artifact
found = outcomes(made)
verdict = decide(GateSettings(benchmarks=["contains/accuracy"]), found, found)
print(json.dumps({
    "metrics": made.manifest.metrics, "report": made.folder.read("report.md").decode(),
    "n": found["contains"].n, "promote": verdict.promote, "reason": verdict.reason,
}))
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copied(tmp_path_factory.mktemp("benchmark"))
    RECIPE.follow(copy)
    return copy


def test_it_takes_one_new_file_and_its_line_in_the_table() -> None:
    assert list(RECIPE.new) == ["components/scoring/benchmarks/contains.py"]
    assert list(RECIPE.changes) == ["components/scoring/benchmarks/__init__.py"]


def test_its_code_is_clean(followed: Path) -> None:
    lint(followed, *RECIPE.new, *RECIPE.changes)


def test_answers_of_others_are_scored(followed: Path, tmp_path: Path) -> None:
    answers = [{"question_id": 1, "text": "It is RED."}, {"question_id": 2, "text": "green"}]
    labels = [{"question_id": 1, "answer": "red"}, {"question_id": 2, "answer": "blue"}]
    for what, rows in (("answers", answers), ("labels", labels)):
        (tmp_path / f"{what}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--{what}={tmp_path / what}.jsonl" for what in ("answers", "labels")]
    done = run(followed, "-c", LLAVA, "score", "contains", *files, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"] == {"accuracy": 50.0}
    done = run(followed, "-c", LLAVA, "score", "contains", *files, "--judge-swap")
    assert (done.returncode, "contains takes no --judge-swap" in done.stderr) == (2, True)


def test_a_model_is_asked_and_the_score_is_reported_and_decides_the_gate(
    followed: Path, tmp_path: Path
) -> None:
    done = run(followed, "-c", EVALUATE, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["n"] == 2 and "eval/contains/accuracy" in found["metrics"]
    assert "contains/accuracy" in found["report"]
    # Two equal models: the score was compared, and nothing was gained.
    assert found["promote"] is False and "contains/accuracy" in found["reason"]
