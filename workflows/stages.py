"""The table of stages, and the plan that it makes of a config: which stages run, on what.

This is the one list of stages. Sections of the config, commands, plans, estimates and what a person reads at the end
come from it; what a stage takes, gives and trains it says itself (`components.contract.Component`). A further stage is
a component in a file of its own and a line here (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

from llava.errors import RefusedInput

if TYPE_CHECKING:
    from components.contract import Artifact, Component, Settings, Workspace
    from components.contract.runner import Outcome
    from workflows.config import WorkflowConfig

MODEL = "model"


@dataclass(frozen=True)
class Stage:
    """One line of the table. The component is imported when it is asked for: `llava --help` must not take seconds."""

    name: str
    """Of its section in the config, of its command, and what the summary calls it."""
    component_at: str
    """MODULE:CLASS"""
    does: str = ""
    """The command's help; a stage without it has no command."""
    section: Literal["required", "default", "absent"] = "required"
    """What a config means that leaves its section out."""
    gives: tuple[str, ...] | None = None
    """Where it is not all that the component gives."""
    step: str = "workflows.stages:Step"
    """MODULE:CLASS of its step in a plan."""

    @cached_property
    def component(self) -> Component:
        """The component, made once."""
        return cast("Component", _load(self.component_at)())

    @property
    def given(self) -> tuple[str, ...]:
        """The kinds of input that it can be to a later stage."""
        return self.component.gives if self.gives is None else self.gives


STAGES = (
    Stage(
        "backbones",
        "components.backbones.component:Backbones",
        "Join a vision tower and a language model into a stock LLaVA folder.",
    ),
    Stage("shard", "components.shard:Shard", "Turn photos, captions and boxes into Parquet shards."),
    Stage("instruct", "components.instruct:Instruct", "Write conversations from captions and boxes."),
    Stage("shard_captions", "components.shard:Shard", section="absent", gives=("captions",)),
    Stage(
        "filter",
        "components.filter:Filter",
        "Choose stage 1's captions so that rare concepts count.",
        section="default",
    ),
    Stage("pretrain", "components.pretrain:Pretrain", "Stage 1: train the projector."),
    Stage("finetune", "components.finetune:Finetune", "Stage 2: train the projector and the language model."),
    Stage("evaluate", "components.evaluate:Evaluate", "Answer held-out questions and score the answers."),
    Stage(
        "register",
        "components.register:Register",
        "Register the model, as champion or challenger.",
        step="workflows.stages:RegisterStep",
    ),
)
"""In the order in which they run; each takes what the last one before it gives."""


def training_stages() -> list[Stage]:
    """Those that train something."""
    return [stage for stage in STAGES if stage.component.trains]


def last_giving(kind: str, names: Iterable[str]) -> str | None:
    """The last of the stages `names` that gives `kind`, or None."""
    found = [stage.name for stage in STAGES if kind in stage.given and stage.name in set(names)]
    return found[-1] if found else None


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

    def artifacts(self, steps: Mapping[str, Step], made: Mapping[str, Artifact], workspace: Workspace) -> Any:
        """The inputs, out of what the plan's steps have made so far."""
        return {name: made[one] if isinstance(one, str) else one for name, one in self.inputs.items()}

    def run(self, inputs: dict[str, Artifact], workspace: Workspace) -> Outcome:
        """Find or make the artifact."""
        from components.contract import run_component

        return run_component(self.component, self.settings, inputs, workspace)


class StartFrom(Step):
    """A model that is there already, such as `finetune.from` names, in the place of those that the stages make."""

    def preflight(self, workspace: Workspace) -> list[str]:
        """A model that cannot be found."""
        from components.backbones.given import find
        from components.contract import refusals

        return refusals(lambda: find(self.settings.uri, workspace))

    def run(self, inputs: dict[str, Artifact], workspace: Workspace) -> Outcome:
        """The artifact that it is, or the folder mirrored into the root."""
        from components.backbones.given import start_from

        return start_from(self.settings.uri, self.settings.template, workspace)


class RegisterStep(Step):
    """Registration, for which the champion sits the same exam as the model."""

    def artifacts(self, steps: Mapping[str, Step], made: Mapping[str, Artifact], workspace: Workspace) -> Any:
        """The champion's evaluation beside the plan's own inputs, where there is a champion."""
        from components.contract import run_component
        from components.register import champion_model

        inputs = super().artifacts(steps, made, workspace)
        if champion := champion_model(self.settings, workspace, inputs["evaluation"]):
            exam = steps[str(self.inputs["evaluation"])]
            # The same questions for both, or the comparison means nothing.
            asked = {**exam.artifacts(steps, made, workspace), MODEL: champion}
            inputs["champion_evaluation"] = run_component(
                exam.component, exam.settings, asked, workspace
            ).artifact
        return inputs


def plan(config: WorkflowConfig, until: str = "", start: Mapping[str, Artifact] | None = None) -> list[Step]:
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
    found = [mistake for step in steps for mistake in step.preflight(workspace)]
    if found:
        raise RefusedInput(together(list(dict.fromkeys(found))))


def together(mistakes: Sequence[str]) -> str:
    """Several mistakes in one line."""
    if len(mistakes) == 1:
        return mistakes[0]
    return f"{len(mistakes)} mistakes: " + " ".join(
        f"({number}) {mistake};" for number, mistake in enumerate(mistakes, start=1)
    ).rstrip(";")


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
            inputs[MODEL] = (given := _given(begun, settings)).name
            steps[given.name] = given
        if stage.name in start:
            inputs[MODEL] = start[stage.name]
        step: type[Step] = _load(stage.step)
        steps[stage.name] = step(stage.name, stage.component, settings, inputs)
        givers |= dict.fromkeys(stage.given, stage.name)
    return steps


def _is_on(settings: Settings | None) -> bool:
    return settings is not None and getattr(settings, "enabled", True)


def _given(uri: str, settings: Settings) -> Step:
    from components.backbones.given import Given, GivenSettings

    # A folder that does not say what it was trained with is told by a template that somebody wrote down.
    template = getattr(settings, "template") if "template" in settings.model_fields_set else None  # noqa: B009
    return StartFrom("backbones", Given(), GivenSettings(uri=uri, template=template))


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


def _load(address: str) -> Any:
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)
