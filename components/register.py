"""Registration: the model becomes a version in MLflow, and the champion only if the gate lets it.

A version points to the artifact's own `model/` folder. Its tags tell where it comes from; the tag `promoted` says
whether it became champion, and `decision` why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from pydantic import Field

from components.contract import (
    Artifact,
    Component,
    Job,
    Manifest,
    Settings,
    Workspace,
    sha256_of,
)
from components.pages.markdown import escape
from components.pages.markdown import table as markdown
from components.registry import (
    BEFORE,
    CHALLENGER,
    CHAMPION,
    EVALUATION_DIGEST,
    EVALUATION_URI,
    MODEL,
    MODEL_DIGEST,
    MODEL_URI,
    Registry,
    Version,
    artifact_named,
    model_folder,
)
from components.scoring.gate import GateSettings, under_floors
from components.scoring.gate import decide as gate
from components.scoring.outcomes import comparable, exams_of, outcomes
from components.scoring.paired import Comparison, OtherQuestions
from components.scoring.table import scores_table
from llava.errors import RefusedInput

_EXAM = "questions_digest"


class RegisterSettings(GateSettings):
    """Under which name, and what it takes to become champion."""

    name: str = Field(pattern=r"^[\w.-]+$", description="Name of the registered model in MLflow")


@dataclass(frozen=True)
class Decision:
    """Which alias a version gets, why, and what was compared."""

    alias: str
    reason: str
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)


class Register(Component):
    """Inputs: `model`, its `evaluation`, and `champion_evaluation` where the champion sat the same exam.

    Finished only while the version exists in this registry and points to the same folder.
    """

    name: ClassVar[str] = "register"
    version: ClassVar[str] = "2"
    Settings: ClassVar[type[Settings]] = RegisterSettings
    takes = MappingProxyType({"model": "model", "evaluation": "evaluation"})
    on_ray: ClassVar[bool] = False

    def check(self, settings: RegisterSettings, inputs: Mapping[str, Artifact]) -> None:
        """Refuse an evaluation of another model, or one without a score that the rule names."""
        model, evaluation = inputs["model"], inputs["evaluation"]
        if evaluation.manifest.inputs.get("model") != model.digest:
            raise RefusedInput(
                f"{evaluation.uri} does not evaluate {model.uri}: run `llava evaluate` on that model"
            )
        measured = [f"{name}/{score}" for name, exam in exams_of(evaluation).items() for score in exam.scores]
        for name in (*settings.benchmarks, *settings.floors):
            if name not in measured:
                key = "benchmarks" if name in settings.benchmarks else "floors"
                raise RefusedInput(
                    f"register.{key} names {name!r}, which {evaluation.uri} did not measure; it measured "
                    f"{', '.join(measured) or 'nothing'}"
                )

    def run(self, job: Job[RegisterSettings]) -> None:
        """Check the files, make or find the version, decide, set tags and alias."""
        settings: RegisterSettings = job.settings
        model, evaluation = job.inputs["model"], job.inputs["evaluation"]
        job.say(f"checking the files of {model.folder.uri}/{MODEL}")
        check_files(model)
        registry = Registry(job.workspace.tracking.uri)
        champion = registry.by_alias(settings.name, CHAMPION)
        job.lease.check()
        version = _find_or_add(registry, settings.name, model, evaluation, champion)
        decision = decide(settings, version, champion, evaluation, job.inputs.get("champion_evaluation"))
        promoted = "yes" if decision.alias == CHAMPION else "no"
        told = {"decision": decision.reason, "promoted": promoted}
        takes_over = decision.alias == CHAMPION and (champion is None or champion.version != version.version)
        before = {BEFORE: champion.version if champion else ""} if takes_over else {}
        registry.tag(version, _scores(evaluation) | told | before)
        registry.name_as(version, decision.alias)
        challenger = registry.by_alias(settings.name, CHALLENGER)
        if decision.alias == CHAMPION and challenger and challenger.version == version.version:
            registry.drop_alias(settings.name, CHALLENGER)
        _log(job, decision, evaluation, job.inputs.get("champion_evaluation"))
        uri = f"models:/{version.name}/{version.version}"
        job.notes["model"] = {
            "name": version.name,
            "version": version.version,
            "uri": uri,
            "source": version.source,
            "alias": decision.alias,
            "decision": decision.reason,
        }
        job.notes["registry"] = registry.uri
        job.run.tags({"registered_model": uri, **told})
        job.say(f"{uri} is {decision.alias}: {decision.reason}")

    def still_stands(self, artifact: Artifact, workspace: Workspace) -> bool:
        """Whether the version exists in the workspace's registry and points to the folder that it pointed to."""
        model: dict[str, str] = artifact.note("model", dict[str, str])
        found = Registry(workspace.tracking.uri).by_version(model.get("name", ""), model.get("version", ""))
        return found is not None and found.source == model.get("source")


def champion_model(settings: RegisterSettings, workspace: Workspace, evaluation: Artifact) -> Artifact | None:
    """The model that the one in `evaluation` has to beat, to be evaluated on the same questions; None without one.

    For a model that is registered already it is the champion of that time, so that running again gives the
    same inputs and finds the finished registration.
    """
    registry, digest = Registry(workspace.tracking.uri), evaluation.manifest.inputs["model"]
    known = registry.with_tag(settings.name, MODEL_DIGEST, digest)
    if known:
        parent = known[0].tags.get("parent_version")
        champion = registry.by_version(settings.name, parent) if parent else None
    else:
        champion = registry.by_alias(settings.name, CHAMPION)
    if champion is None:
        return None
    found = artifact_named(champion, MODEL_URI, MODEL_DIGEST)
    if found is None:
        # Its score on its own exam stands in its tags; `decide` says whether that can be compared.
        uri = champion.tags.get(MODEL_URI, "an artifact")
        workspace.console.say(f"champion version {champion.version} lies no more at {uri}", "register")
    return found


def check_files(model: Artifact) -> None:
    """Read every file of `model/` and compare it with the manifest: MLflow takes a URI that holds nothing.

    Raises `RefusedInput` that names the first file that is missing or differs.
    """
    files = [file for file in model.manifest.files if file.path.startswith(f"{MODEL}/")]
    if not any(file.path == f"{MODEL}/config.json" for file in files):
        raise RefusedInput(f"{model.uri}: holds no {MODEL}/config.json, so there is no model to register")
    for file in files:
        try:
            found = model.folder.sha256(file.path)
        except FileNotFoundError:
            raise RefusedInput(f"{model.uri}: {file.path} is missing; the model is not registered") from None
        if found != file.sha256:
            raise RefusedInput(
                f"{model.uri}: {file.path} has sha256 {found}, the manifest says {file.sha256}: it changed after "
                "training; delete the artifact and train again"
            )


def decide(
    settings: RegisterSettings,
    version: Version,
    champion: Version | None,
    evaluation: Artifact,
    champion_evaluation: Artifact | None = None,
) -> Decision:
    """Champion if the gate lets `version` through: no floor is undercut, and it surely beats the champion, if any.

    The champion's answers come from `champion_evaluation`, or else from the evaluation that its own tags name.
    """
    if champion is not None and champion.version == version.version:
        # A crash after the alias was set: the reason stands in the tag already.
        return Decision(CHAMPION, version.tags.get("decision", "it was the champion already"))
    if champion is None:
        under = under_floors(
            settings, outcomes(evaluation, {name.partition("/")[0] for name in settings.floors})
        )
        if under:
            return Decision(CHALLENGER, f"floor undercut: {'; '.join(under)}; there is no champion")
        return Decision(CHAMPION, "the first: there was no champion")
    against = f"against champion version {champion.version}"
    other = _evaluation_of(champion, champion_evaluation)
    if other is None:
        return Decision(
            CHALLENGER,
            f"{against}: refused: not comparable: its answers are gone; evaluate it on these questions",
        )
    names = [name.partition("/")[0] for name in settings.benchmarks]
    try:
        base, new = comparable(other, evaluation, names)
    except OtherQuestions as error:
        return Decision(CHALLENGER, f"{against}: refused: not comparable: {error}")
    floors = outcomes(evaluation, {name.partition("/")[0] for name in settings.floors} - set(names))
    verdict = gate(settings, base, floors | new)
    return Decision(
        CHAMPION if verdict.promote else CHALLENGER, f"{against}: {verdict.reason}", verdict.comparisons
    )


def _evaluation_of(champion: Version, given: Artifact | None) -> Artifact | None:
    """The champion's evaluation: `given` if it is of that model, else the one it was registered with."""
    if given is not None and given.manifest.inputs.get("model") == champion.tags.get(MODEL_DIGEST):
        return given
    return artifact_named(champion, EVALUATION_URI, EVALUATION_DIGEST)


def _log(
    job: Job[RegisterSettings], decision: Decision, evaluation: Artifact, champion: Artifact | None
) -> None:
    """What was compared, as metrics and as a table over benchmarks and models."""
    for name, comparison in decision.comparisons.items():
        for score, found in comparison.differences.items():
            values = {"gain": found.gain, "low": found.low, "high": found.high}
            job.metrics.update(
                {f"gate/{name}/{score}/{key}": value for key, value in values.items() if math.isfinite(value)}
            )
    models = {"this version": outcomes(evaluation)}
    if champion is not None:
        models["champion before"] = outcomes(champion)
    job.run.table(scores_table(models), "eval/models.json")
    job.run.text("\n".join(["# Models", "", escape(decision.reason), "", *markdown(scores_table(models)), ""]),
                 "eval/models.md")  # fmt: skip


def _find_or_add(
    registry: Registry, name: str, model: Artifact, evaluation: Artifact, champion: Version | None
) -> Version:
    """The version of this model; a crash before the manifest must not make a second one."""
    source = model.folder.sub(MODEL).uri
    for found in registry.with_tag(name, MODEL_DIGEST, model.digest):
        if found.source == source:
            return found
    manifest = model.manifest
    run_id = manifest.mlflow_run_id
    tags = {
        MODEL_DIGEST: model.digest,
        MODEL_URI: model.uri,
        "dataset_digest": dataset_digest(manifest),
        "config_digest": sha256_of([manifest.recipe, manifest.external]),
        "code": manifest.code,
        "parent_version": champion.version if champion else "",
    }
    # A root may be used with another MLflow store than the one that saw the training.
    known = run_id if run_id is not None and registry.has_run(run_id) else None
    return registry.add(name, source, known, tags | _scores(evaluation))


def dataset_digest(manifest: Manifest) -> str:
    """Digest of all that the last training saw: the dataset's own, or, where others stood beside it, of all of them."""
    first = manifest.inputs.get("dataset", "")
    beside = {name: digest for name, digest in manifest.external.items() if name.startswith("extra ")}
    if not beside:
        return first
    extra = manifest.recipe.get("extra", [])
    weights = (
        [one.get("weight", 1.0) for one in extra if isinstance(one, dict)] if isinstance(extra, list) else []
    )
    return sha256_of(
        [first, sorted([digest, weight] for digest, weight in zip(beside.values(), weights, strict=False))]
    )


def _scores(evaluation: Artifact) -> dict[str, str]:
    scores = {f"score.{metric}": repr(value) for metric, value in evaluation.manifest.metrics.items()}
    exam = {_EXAM: str(evaluation.manifest.notes.get("questions", ""))}
    return exam | {EVALUATION_DIGEST: evaluation.digest, EVALUATION_URI: evaluation.uri} | scores


__all__ = [
    "Decision",
    "Register",
    "RegisterSettings",
    "champion_model",
    "check_files",
    "decide",
    "model_folder",
]
