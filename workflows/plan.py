"""The plan that the table of stages makes of a config: which stages run, on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.contract import Artifact, Component, Settings, Workspace, refusals, run_component
from components.contract.runner import Outcome
from components.evaluate.settings import exams_asked
from components.register import champion_model
from llava.errors import RefusedInput
from workflows.config import WorkflowConfig, together
from workflows.stages import STAGES, load

MODEL = "model"


@dataclass(frozen=True)
class Step:
    """One stage of a plan: what makes an artifact of which inputs."""

    name: str
    component: Component
    settings: Any
    inputs: Mapping[str, str | Artifact] = field(default_factory=dict)
    """By the component's own names: the step that makes it, or an artifact that is there."""

    def preflight(self, workspace: Workspace) -> list[str]:
        """What would be refused, before anything runs."""
        return self.component.preflight(self.settings, workspace)

    def disagreements(self, steps: Mapping[str, Step]) -> list[str]:
        """What does not go together with the settings of the other steps, one line each."""
        return []

    def artifacts(self, steps: Mapping[str, Step], made: Mapping[str, Artifact], workspace: Workspace) -> Any:
        """The inputs, out of what the plan's steps have made so far."""
        return {name: made[one] if isinstance(one, str) else one for name, one in self.inputs.items()}

    def run(self, inputs: dict[str, Artifact], workspace: Workspace) -> Outcome:
        """Find or make the artifact."""
        return run_component(self.component, self.settings, inputs, workspace)


@dataclass(frozen=True)
class StartFrom(Step):
    """A model that is there already, such as `finetune.from` names, in the place of those that the stages make."""

    taker: str = ""
    """The stage that starts from it."""

    def preflight(self, workspace: Workspace) -> list[str]:
        """A model that cannot be found, or a folder whose template nobody tells."""
        from components.backbones.given import NoTemplate, find, require_template

        def look() -> None:
            found = find(self.settings.uri, workspace)
            try:
                require_template(found, self.settings.template)
            except NoTemplate as error:
                raise RefusedInput(f"{error}, or name it: {self.taker}.template") from None

        return refusals(look)

    def run(self, inputs: dict[str, Artifact], workspace: Workspace) -> Outcome:
        """The artifact that it is, or the folder mirrored into the root."""
        from components.backbones.given import start_from

        return start_from(self.settings.uri, self.settings.template, workspace)


class RegisterStep(Step):
    """Registration, for which the champion sits the same exam as the model."""

    def disagreements(self, steps: Mapping[str, Step]) -> list[str]:
        """Deciding scores and floors of a benchmark that nobody asks."""
        exam = self.inputs["evaluation"]
        asked = exams_asked(steps[exam].settings) if isinstance(exam, str) else []
        return [
            f"{self.name}.{key} names {score!r}, and {exam} asks {', '.join(asked)}: add it to {exam}.benchmarks"
            for key in ("benchmarks", "floors")
            for score in getattr(self.settings, key)
            if asked and score.partition("/")[0] not in asked
        ]

    def artifacts(self, steps: Mapping[str, Step], made: Mapping[str, Artifact], workspace: Workspace) -> Any:
        """The champion's evaluation beside the plan's own inputs, where there is a champion."""
        inputs = super().artifacts(steps, made, workspace)
        if champion := champion_model(self.settings, workspace, inputs["evaluation"]):
            exam = steps[str(self.inputs["evaluation"])]
            # The same questions for both, or the comparison means nothing.
            asked = {**exam.artifacts(steps, made, workspace), MODEL: champion}
            inputs["champion_evaluation"] = run_component(
                exam.component, exam.settings, asked, workspace
            ).artifact
        return inputs


def make_plan(
    config: WorkflowConfig, until: str = "", start: Mapping[str, Artifact] | None = None
) -> list[Step]:
    """The steps that lead to the stage `until` (default: the last one), in their order.

    A stage takes of each kind what the last stage before it gives, so a stage that is off, or that nobody needs, is
    passed over. `start`: by stage, the model that it starts from in the place of what the stages before it would make.
    Raises RefusedInput where the config leaves `until` out.
    """
    goal = until or STAGES[-1].name
    steps = _all_steps(config, start or {})
    last = next(stage.name for stage in reversed(STAGES) if stage.name in steps)
    if goal not in _needed(steps, last) or isinstance(steps[goal], StartFrom):
        raise RefusedInput(_why_not(config, goal, steps))
    needed = _needed(steps, goal)
    return [step for name, step in steps.items() if name in needed]


def preflight(steps: Sequence[Step], workspace: Workspace) -> None:
    """Raise RefusedInput with everything that the steps would refuse; nothing is made by then."""
    by_name = {step.name: step for step in steps}
    found = [
        mistake for step in steps for mistake in (*step.disagreements(by_name), *step.preflight(workspace))
    ]
    if found:
        raise RefusedInput(together(list(dict.fromkeys(found))))


def _all_steps(config: WorkflowConfig, start: Mapping[str, Artifact]) -> dict[str, Step]:
    """Every stage that is on, each with the last giver of what it takes."""
    steps: dict[str, Step] = {}
    givers: dict[str, str] = {}
    for stage in STAGES:
        settings = config.section(stage.name)
        if not _is_on(settings):
            continue
        inputs: dict[str, str | Artifact] = {
            name: givers[kind] for name, kind in stage.component.takes.items()
        }
        if (begun := getattr(settings, "from_", None)) is not None:
            inputs[MODEL] = (given := _given(begun, stage.name, settings)).name
            steps[given.name] = given
        if stage.name in start:
            inputs[MODEL] = start[stage.name]
        step: type[Step] = load(stage.step)
        steps[stage.name] = step(stage.name, stage.component, settings, inputs)
        givers |= dict.fromkeys(stage.given, stage.name)
    return steps


def _is_on(settings: Settings | None) -> bool:
    return settings is not None and getattr(settings, "enabled", True)


def _given(uri: str, taker: str, settings: Settings) -> Step:
    from components.backbones.given import Given, GivenSettings

    # A folder that does not say what it was trained with is told by a template that somebody wrote down.
    template = getattr(settings, "template") if "template" in settings.model_fields_set else None  # noqa: B009
    return StartFrom("backbones", Given(), GivenSettings(uri=uri, template=template), taker=taker)


def _needed(steps: Mapping[str, Step], goal: str) -> set[str]:
    """`goal` and all that it is made from."""
    needed: set[str] = set()
    waiting = [goal]
    while waiting:
        if (name := waiting.pop()) in steps and name not in needed:
            needed.add(name)
            waiting += [one for one in steps[name].inputs.values() if isinstance(one, str)]
    return needed


def _why_not(config: WorkflowConfig, goal: str, steps: Mapping[str, Step]) -> str:
    """Why the plan leaves the stage `goal` out, and what would put it in."""
    off = [stage for stage in STAGES if not _is_on(config.section(stage.name))]
    stage = next(each for each in STAGES if each.name == goal)
    takers = [each.name for each in off if set(each.component.takes.values()) & set(stage.given)]
    wanted = list(dict.fromkeys([*(each.name for each in off if each is stage), *takers]))
    if wanted:
        return f"{goal}: it is not part of this config: set {' and '.join(f'{name}.enabled=true' for name in wanted)}"
    begun = [name for name, step in steps.items() if getattr(step.settings, "from_", None) is not None]
    origin = f"{begun[0]}.from={steps[begun[0]].settings.from_}" if begun else "the given model"
    return f"{goal}: {origin} replaces it: run {begun[0] if begun else 'finetune'} or train"
