"""From models to their answers on the same questions: who has not sat the exam of the others sits it now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from components.backbones.given import start_from
from components.contract import (
    Artifact,
    Workspace,
    find_artifact,
    open_store,
    read_artifact,
    run_component,
    tell,
)
from components.contract.store import Store
from components.evaluate import Evaluate, EvaluateSettings, exams
from components.evaluate.settings import HELD_OUT_EXAM
from components.ray_cluster import connection
from components.scoring.benchmarks import Scored, Unit, find
from components.scoring.outcomes import comparable, exams_of, outcomes, unit_name
from components.scoring.pictures import Picture
from components.scoring.questions import read_questions
from llava.errors import RefusedInput
from workflows.scores.compare import Duel, Look, Rule, as_json, duel, show, write_page
from workflows.scores.score import print_json
from workflows.train import open_workspace


def command(names: Sequence[str], root: str, rule: Rule, out: Path | None, as_json_: bool) -> None:
    """`llava compare MODEL_A MODEL_B ...`: to standard output, and as a page into the folder `out`."""
    workspace = open_workspace("compare", root)
    found = evaluations(names, workspace)
    models, duels = compare(found, rule)
    if out is not None:
        write_page(models, duels, pictures(next(iter(found.values())), workspace), out)
    if as_json_:
        print_json(to_json(found, models, duels))
        return
    for one in duels:
        tell(f"{one.new} against {one.base}")
        show(one)


def evaluations(models: Sequence[str], workspace: Workspace) -> dict[str, Artifact]:
    """An evaluation of each model on the same questions, by how the model was named.

    A model is `models:/NAME@ALIAS`, an artifact, a LLaVA folder, or an evaluation, which is then taken as it is. The
    exam is that of the first evaluation that is given, or of the newest one of any of the models in this root.
    """
    if len(models) < 2 or len(set(models)) < len(models):
        raise RefusedInput(f"compare: give two models or more, each once, not {', '.join(models) or 'none'}")
    given = {name: _evaluation(name) for name in models}
    artifacts = {
        name: start_from(name, None, workspace).artifact for name, found in given.items() if found is None
    }
    exam = next(
        (found for found in given.values() if found), _newest(workspace.store, list(artifacts.values()))
    )
    if exam is None:
        raise RefusedInput(
            f"none of {', '.join(models)} was evaluated in {workspace.store.uri}: run `llava evaluate PRESET` first, "
            "or name the root with --root"
        )
    with connection.disconnecting():
        return {
            name: found if found is not None else _sit(artifacts[name], exam, workspace)
            for name, found in given.items()
        }


def compare(found: dict[str, Artifact], rule: Rule) -> tuple[dict[str, dict[str, Scored]], list[Duel]]:
    """All scores by model and benchmark, and each further model against the first."""
    (first, base), *others = found.items()
    names = [name for name in outcomes(base) if all(name in _scored(one) for one in found.values())]
    if not names:
        raise RefusedInput(f"compare: {', '.join(found)} have no benchmark in common")
    duels = []
    for name, new in others:
        ours, theirs = comparable(base, new, names)
        gate = rule.gate([_headline(one, ours[one]) for one in names])
        duels.append(duel((first, name), ours, theirs, gate))
    return {name: outcomes(evaluation) for name, evaluation in found.items()}, duels


def pictures(evaluation: Artifact, workspace: Workspace) -> Look:
    """The pictures of its questions, from the dataset and the files that it was made from."""
    shown: dict[str, dict[str, Picture]] = {}
    settings = _settings(evaluation)
    dataset = find_artifact(evaluation.manifest.inputs["questions"], [workspace.store, evaluation.root])
    if dataset is not None and HELD_OUT_EXAM in _scored(evaluation):
        questions, _ = read_questions(dataset.folder, settings.limit, settings.seed)
        shown[HELD_OUT_EXAM] = {one.id: Picture(one.picture, one.image) for one in questions}
    for one in settings.benchmarks:
        with TemporaryDirectory(prefix="llava-compare-") as folder:
            exam = exams.open_exam(one, Path(folder) / "exam")
            shown[one.title] = {item.unit: item.picture for item in exam.items if item.picture is not None}
    kinds = {title: note.benchmark for title, note in exams_of(evaluation).items()}

    def look(benchmark: str, unit: Unit) -> Image.Image | None:
        picture = shown.get(benchmark, {}).get(unit_name(kinds[benchmark], unit))
        return None if picture is None else picture.open()

    return look


def to_json(
    found: dict[str, Artifact], models: dict[str, dict[str, Scored]], duels: list[Duel]
) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "evaluations": {name: evaluation.uri for name, evaluation in found.items()},
        "scores": {
            name: {benchmark: scored.scores for benchmark, scored in each.items()}
            for name, each in models.items()
        },
        "comparisons": [
            {
                "base": one.base,
                "new": one.new,
                "benchmarks": {name: as_json(each, one.verdict) for name, each in one.comparisons.items()},
                "promote": one.verdict.promote,
                "reason": one.verdict.reason,
            }
            for one in duels
        ],
    }


def _evaluation(uri: str) -> Artifact | None:
    """The finished evaluation at `uri`, None where something else lies there."""
    if uri.startswith("models:"):
        return None
    found = read_artifact(open_store(uri))
    return found if found is not None and found.manifest.component == Evaluate.name else None


def _newest(store: Store, models: Sequence[Artifact]) -> Artifact | None:
    """The newest evaluation of any of the models in the root that this version can read."""
    digests = {model.digest for model in models}
    folders = {entry.key.split("/")[1] for entry in store.list(f"{Evaluate.name}/")}
    made = [read_artifact(store.sub(f"{Evaluate.name}/{folder}")) for folder in sorted(folders)]
    fitting = [
        one for one in made
        if one and one.manifest.inputs.get("model") in digests and one.manifest.version == Evaluate.version
    ]  # fmt: skip
    return max(fitting, key=lambda one: one.manifest.created, default=None)


def _sit(model: Artifact, exam: Artifact, workspace: Workspace) -> Artifact:
    if exam.manifest.inputs["model"] == model.digest:
        return exam
    digest = exam.manifest.inputs["questions"]
    questions = find_artifact(digest, [workspace.store, exam.root])
    if questions is None:
        raise RefusedInput(
            f"{exam.uri}: the questions it was asked ({digest[:16]}) lie no more in {workspace.store.uri}; evaluate "
            "the models again"
        )
    settings = _settings(exam)
    judged = [one.judge.url for one in settings.benchmarks if one.judge is not None]
    if judged and exam.root != workspace.store:
        # An artifact from elsewhere must not choose who gets this machine's key.
        raise RefusedInput(
            f"{exam.uri}: it comes from another root and names a judge at {judged[0]}: evaluate your models with "
            "`llava evaluate` and a judge of your own"
        )
    return run_component(Evaluate(), settings, {"model": model, "questions": questions}, workspace).artifact


def _settings(evaluation: Artifact) -> EvaluateSettings:
    try:
        return EvaluateSettings.model_validate(_merged(evaluation.manifest.recipe, evaluation.manifest.run))
    except ValueError as error:
        first = " ".join(str(error).split())[:300]
        raise RefusedInput(
            f"{evaluation.uri}: its manifest holds no settings of an evaluation: {first}"
        ) from None


def _merged(recipe: Any, run: Any) -> Any:
    """The two halves of settings, which a manifest keeps apart, as one."""
    if isinstance(recipe, dict) and isinstance(run, dict):
        return {key: _merged(recipe.get(key), run.get(key)) for key in recipe | run}
    if isinstance(recipe, list) and isinstance(run, list):
        return [_merged(*pair) for pair in zip(recipe, run, strict=True)]
    return run if recipe is None else recipe


def _scored(evaluation: Artifact) -> set[str]:
    return {name for name, exam in exams_of(evaluation).items() if exam.scores}


def _headline(name: str, scored: Scored) -> str:
    return f"{name}/{find(scored.benchmark).headline}"
