"""The table of stages: which there are, in which order, under which names.

This is the one list of stages. Sections of the config, commands, plans, estimates and what a person reads at the end
come from it; what a stage takes, gives and trains it says itself (`components.contract.Component`). A further stage is
a component in a file of its own and a line here (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from components.contract import Component


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
    step: str = "workflows.plan:Step"
    """MODULE:CLASS of its step in a plan."""

    @cached_property
    def component(self) -> Component:
        """The component, made once."""
        return cast("Component", load(self.component_at)())

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
        step="workflows.plan:RegisterStep",
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


def load(address: str) -> Any:
    """What MODULE:NAME names."""
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)
