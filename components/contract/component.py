"""What a component is: a name, a version, settings in two halves, and one method that makes one artifact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

import pydantic
from pydantic.fields import FieldInfo

from components.contract.lease import Lease
from components.contract.manifest import Artifact
from components.contract.store import Folder
from components.contract.tracking import TrackedRun
from components.contract.workspace import Workspace
from llava.errors import RefusedInput


class Settings(pydantic.BaseModel):
    """The base of every component's settings: frozen, no unknown keys, finite numbers, every field described.

    A field made with `run_field` belongs to the run; all others are the recipe and enter the digest.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        bare = [name for name, info in cls.model_fields.items() if not info.description]
        if bare:
            raise TypeError(f"{cls.__name__}: fields without a description: {', '.join(bare)}")


def run_field(default: Any, **kw: Any) -> Any:
    """A pydantic Field for what does not change the result: workers, micro-batch, budget, intervals."""
    return pydantic.Field(default, json_schema_extra={"run": True}, **kw)


def recipe(settings: Settings) -> dict[str, Any]:
    """The half of the settings that changes the result, as JSON values; nested settings are split too."""
    return _half(settings, run=False)


def run_part(settings: Settings) -> dict[str, Any]:
    """The half of the settings that only says how to run, as JSON values."""
    return _half(settings, run=True)


def _half(settings: Settings, run: bool) -> dict[str, Any]:
    half: dict[str, Any] = {}
    values = settings.model_dump(mode="json")
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if _is_run(info):
            if run:
                half[name] = values[name]
        elif isinstance(value, Settings):
            inner = _half(value, run)
            if inner or not run:
                half[name] = inner
        elif isinstance(value, list | tuple) and value and all(isinstance(one, Settings) for one in value):
            half[name] = [_half(one, run) for one in value]
        elif not run:
            half[name] = values[name]
    return half


def _is_run(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return isinstance(extra, dict) and extra.get("run") is True


S = TypeVar("S", bound=Settings)


@dataclass
class Job(Generic[S]):
    """What `Component.run` works with; `Job[PretrainSettings]` is one whose settings are those of `pretrain`."""

    settings: S
    inputs: dict[str, Artifact]
    folder: Folder
    """Files written here become the artifact; what an earlier try left lies in it. Nobody else writes here."""
    scratch: Path
    """An empty local folder, gone when the run ends."""
    run: TrackedRun
    lease: Lease
    workspace: Workspace
    metrics: dict[str, float] = field(default_factory=dict)
    """Final metrics, for the manifest and for MLflow."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Free JSON for the manifest, such as dropped samples by reason."""
    component: str = ""
    """The name of the component, which begins every line that is said."""
    declared: dict[str, tuple[int, str]] = field(default_factory=dict)
    earlier: tuple[Folder, ...] = ()
    """The folders of earlier tries, the newest first, with what `Component.takes_over` leaves where it is."""

    def add_file(self, key: str, size: int, sha256: str) -> None:
        """Declare a file of known size in bytes and hex sha256, so that commit need not read it back."""
        self.declared[key] = (size, sha256)

    def say(self, text: str) -> None:
        """One plain line for the user."""
        self.workspace.console.say(text, self.component)


class Component(ABC):
    """One stage: takes artifacts and settings, makes one artifact."""

    name: ClassVar[str]
    version: ClassVar[str]
    """Raised whenever the same recipe would give another result."""
    Settings: ClassVar[type[Settings]] = Settings
    takes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The inputs by name, and of which kind each is: the table of stages finds who gives it."""
    gives: ClassVar[tuple[str, ...]] = ()
    """What kinds of input the artifact can be to a later stage: model, dataset, captions, conversations, evaluation."""
    trains: ClassVar[tuple[str, ...]] = ()
    """What learns: keys of `llava.model.PARTS`; empty for a component that trains nothing."""
    on_ray: ClassVar[bool] = True
    """Whether `run` needs a Ray cluster."""

    def preflight(self, settings: Any, workspace: Workspace) -> list[str]:
        """What would be refused, one line each, found before anything is made and without any input artifact.

        All stages of a workflow are asked before the first of them runs. By default: what `external` refuses.
        """
        return refusals(lambda: self.external(settings))

    def check_input(self, settings: Any, name: str, artifact: Artifact) -> None:  # noqa: B027 - optional by design
        """Raise RefusedInput for an input that cannot serve; asked as soon as it is made, the others may be missing."""

    def check(self, settings: Any, inputs: dict[str, Artifact]) -> None:  # noqa: B027 - optional by design
        """Raise RefusedInput for what cannot work, with all inputs at hand, before the component's own work starts."""

    def external(self, settings: Any) -> dict[str, str]:
        """Fingerprints, by name, of what enters from outside the root (see `digest.fingerprint`)."""
        return {}

    @abstractmethod
    def run(self, job: Job[Any]) -> None:
        """Make the artifact's files in `job.folder`, going on from what an earlier try left there."""

    def takes_over(self, key: str) -> bool:
        """Whether the file `key` of an earlier try comes into the new one's folder before `run`; by default all do."""
        return True

    def check_found(self, settings: Any, artifact: Artifact) -> None:  # noqa: B027 - optional by design
        """Raise RefusedInput where the run half of the settings does not allow this finished artifact."""

    def still_stands(self, artifact: Artifact, workspace: Workspace) -> bool:
        """Whether a finished artifact still counts; one that needs an entry elsewhere looks for it."""
        return True


def refusals(*checks: Callable[[], object]) -> list[str]:
    """The messages of those checks that raise RefusedInput; for `Component.preflight`."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except RefusedInput as error:
            found.append(str(error))
    return found
