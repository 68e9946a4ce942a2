"""Registration: the model becomes a version in MLflow, and the champion only if it beats the champion.

A version points to the artifact's own `model/` folder. Its tags tell where it comes from; the tag `decision`
says why it is champion or challenger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from components.contract import (
    Artifact,
    Component,
    Job,
    Settings,
    Workspace,
    open_store,
    read_artifact,
    sha256_of,
)
from components.models import (
    CHALLENGER,
    CHAMPION,
    EVALUATION_DIGEST,
    MODEL,
    MODEL_DIGEST,
    Registry,
    Version,
    model_folder,
)
from llava.errors import RefusedInput

_EXAM = "questions_digest"


class RegisterSettings(Settings):
    """Under which name, and what it takes to become champion."""

    name: str = Field(pattern=r"^[\w.-]+$", description="Name of the registered model in MLflow")
    metric: str = Field(
        "eval/vqa/exact_match", description="The evaluation's metric that decides; greater is better"
    )
    minimum_gain: float = Field(
        0.0, ge=0, description="The champion is beaten by more than so much, in the metric's unit"
    )


@dataclass(frozen=True)
class Decision:
    """Which alias a version gets, and why."""

    alias: str
    reason: str


class Register(Component):
    """Inputs: `model`, its `evaluation`, and `champion_evaluation` where the champion sat the same exam.

    Finished only while the version exists in this registry and points to the same folder.
    """

    name: ClassVar[str] = "register"
    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = RegisterSettings
    on_ray: ClassVar[bool] = False

    def check(self, settings: RegisterSettings, inputs: Mapping[str, Artifact]) -> None:
        """Refuse an evaluation of another model, or one without the deciding metric."""
        model, evaluation = inputs["model"], inputs["evaluation"]
        if evaluation.manifest.inputs.get("model") != model.digest:
            raise RefusedInput(
                f"{evaluation.uri} does not evaluate {model.uri}: run `llava evaluate` on that model"
            )
        if settings.metric not in evaluation.manifest.metrics:
            known = ", ".join(sorted(evaluation.manifest.metrics))
            raise RefusedInput(f"register.metric {settings.metric!r}: {evaluation.uri} measured {known}")
        if settings.metric.endswith("loss"):
            raise RefusedInput(f"register.metric {settings.metric!r}: greater must be better; choose a score")

    def run(self, job: Job) -> None:
        """Check the files, make or find the version, decide, set tags and alias."""
        settings: RegisterSettings = job.settings
        model, evaluation = job.inputs["model"], job.inputs["evaluation"]
        job.say(f"checking the files of {model.uri}/{MODEL}")
        check_files(model)
        registry = Registry(job.workspace.tracking.uri)
        champion = registry.by_alias(settings.name, CHAMPION)
        job.lease.check()
        version = _find_or_add(registry, settings.name, model, evaluation, champion)
        decision = decide(settings, version, champion, evaluation, job.inputs.get("champion_evaluation"))
        registry.tag(version, _scores(evaluation) | {"decision": decision.reason})
        registry.name_as(version, decision.alias)
        challenger = registry.by_alias(settings.name, CHALLENGER)
        if decision.alias == CHAMPION and challenger and challenger.version == version.version:
            registry.drop_alias(settings.name, CHALLENGER)
        score = evaluation.manifest.metrics[settings.metric]
        job.metrics["register/score"] = score
        uri = f"models:/{version.name}/{version.version}"
        job.notes["model"] = {
            "name": version.name,
            "version": version.version,
            "uri": uri,
            "source": version.source,
            "alias": decision.alias,
            "decision": decision.reason,
        }
        job.run.tags({"registered_model": uri, "decision": decision.reason})
        job.say(f"{uri} is {decision.alias}: {decision.reason}")

    def still_stands(self, artifact: Artifact, workspace: Workspace) -> bool:
        """Whether the version exists in the workspace's registry and points to the folder that it pointed to."""
        model = artifact.manifest.notes["model"]
        found = Registry(workspace.tracking.uri).by_version(model["name"], model["version"])
        return found is not None and found.source == model["source"]


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
    uri = champion.tags.get("artifact_uri")
    found = read_artifact(open_store(uri)) if uri else None
    if found is None:
        # Its score on its own exam stands in its tags; `decide` says whether that can be compared.
        workspace.console.say(
            f"champion version {champion.version} lies no more at {uri or 'an artifact'}", "register"
        )
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
    """Champion if there is none, or if `version` beats it on the same questions; otherwise challenger.

    The champion's score comes from `champion_evaluation`, or else from the tags that its own registration left.
    """
    if champion is None:
        return Decision(CHAMPION, "the first: there was no champion")
    if champion.version == version.version:
        # A crash after the alias was set: the reason stands in the tag already.
        return Decision(CHAMPION, version.tags.get("decision", "it was the champion already"))
    exam, score = evaluation.manifest.notes.get("questions"), evaluation.manifest.metrics[settings.metric]
    other_exam, other = _champion_score(settings.metric, champion, champion_evaluation)
    against = f"champion version {champion.version}"
    if other is None:
        return Decision(CHALLENGER, f"not comparable: {against} has no known {settings.metric}")
    if exam is None or exam != other_exam:
        return Decision(
            CHALLENGER,
            f"not comparable: {against} answered other questions ({_short(other_exam)}, here {_short(exam)}); "
            "evaluate it on these",
        )
    gain = f"{settings.metric} {score:.2f} against {other:.2f} of {against}, a gain of {score - other:+.2f}"
    if score - other > settings.minimum_gain:
        return Decision(CHAMPION, gain)
    return Decision(CHALLENGER, f"{gain}; it takes more than {settings.minimum_gain:g}")


def _champion_score(
    metric: str, champion: Version, evaluation: Artifact | None
) -> tuple[str | None, float | None]:
    """The champion's exam and score; an evaluation of some other model says nothing about it."""
    if evaluation is not None and evaluation.manifest.inputs.get("model") == champion.tags.get(MODEL_DIGEST):
        return evaluation.manifest.notes.get("questions"), evaluation.manifest.metrics.get(metric)
    tag = champion.tags.get(f"score.{metric}")
    return champion.tags.get(_EXAM), None if tag is None else float(tag)


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
        "artifact_uri": model.uri,
        "dataset_digest": manifest.inputs.get("dataset", ""),
        "config_digest": sha256_of(manifest.recipe),
        "code": manifest.code,
        "parent_version": champion.version if champion else "",
    }
    # A root may be used with another MLflow store than the one that saw the training.
    known = run_id if run_id is not None and registry.has_run(run_id) else None
    return registry.add(name, source, known, tags | _scores(evaluation))


def _scores(evaluation: Artifact) -> dict[str, str]:
    scores = {f"score.{metric}": repr(value) for metric, value in evaluation.manifest.metrics.items()}
    exam = {_EXAM: str(evaluation.manifest.notes.get("questions", ""))}
    return exam | {EVALUATION_DIGEST: evaluation.digest, "evaluation_uri": evaluation.uri} | scores


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "unknown"


__all__ = [
    "Decision",
    "Register",
    "RegisterSettings",
    "champion_model",
    "check_files",
    "decide",
    "model_folder",
]
