"""The workflow's configuration: presets and files in YAML, `--set` on top, every mistake one clear line."""

import difflib
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import pydantic
from pydantic import BaseModel, Field, create_model, field_validator

from components.contract import Settings, refuse_secrets
from llava.errors import RefusedInput
from llava.estimate import Corpus
from workflows import config_files
from workflows.stages import STAGES, training_stages

PRESETS = resources.files("workflows") / "presets"
_SECRET = re.compile(
    r"(pass(word|phrase)?|secret|credential|api[_-]?key|access[_-]?key|private[_-]?key)s?$|[_-]token$",
    re.I,
)

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class Expected(Settings):
    """What a stage's data will hold, as means over its samples: for `llava estimate`, before the data is sharded."""

    samples: int = Field(gt=0, description="How many there are")
    text_tokens: float = Field(gt=0, description="Tokens of a sample, those of its picture left out")
    supervised_tokens: float = Field(gt=0, description="Tokens of a sample that carry loss")
    images: float = Field(1.0, ge=0, description="Pictures per sample; text-only samples have none")

    def corpus(self, epochs: float) -> Corpus:
        """For the arithmetic."""
        return Corpus(self.samples, self.text_tokens, self.supervised_tokens, self.images, epochs)


class RetrainSettings(Settings):
    """How new data is taken in; read by `llava retrain` alone."""

    start: Literal["pretrain", "champion"] = Field(
        "pretrain",
        description="What is fine-tuned: stage 1's model, on old and new data; or the champion, on the new data and "
        "`replay` of the old",
    )
    replay: float = Field(
        0.2,
        ge=0,
        description="start=champion: times that each old sample is seen in an epoch; 0.2: every fifth",
    )
    max_bad: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of a drop's records set aside over which nothing is trained (status 2)",
    )
    settle: float = Field(
        2.0, ge=0, description="Seconds between two looks at a drop: one that changes in them waits"
    )


class WorkflowConfig(Settings):
    """What the workflow itself is told; beside it stands a section per stage (`sections`), as `finetune.epochs`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Of the MLflow experiment")
    retrain: RetrainSettings = Field(RetrainSettings(), description="How `llava retrain` takes new data in")
    estimate: dict[str, Expected] = Field(
        {}, description="What `llava estimate` expects of the data of each training stage"
    )

    if TYPE_CHECKING:
        # The sections: which there are is known when the table of stages is read.
        def __getattr__(self, name: str) -> Any: ...

    @field_validator("estimate")
    @classmethod
    def _of_stages_that_train(cls, expected: dict[str, Expected]) -> dict[str, Expected]:
        known = [stage.name for stage in training_stages()]
        if unknown := [name for name in expected if name not in known]:
            raise ValueError(f"{unknown[0]}: no stage that trains; known: {', '.join(known)}")
        return expected

    def section(self, stage: str) -> Any:
        """The settings of a stage of the table; None where the config does without it."""
        return getattr(self, _attribute(stage))


@cache
def config_model() -> type[WorkflowConfig]:
    """`WorkflowConfig` with a section for each stage of the table."""
    fields: dict[str, Any] = {}
    for stage in STAGES:
        settings = stage.component.Settings
        told = stage.does or f"Of {stage.name}"
        kind: Any = settings if stage.section != "absent" else settings | None
        default: Any = {"required": ..., "absent": None}.get(stage.section)
        given = {"default_factory": settings} if stage.section == "default" else {"default": default}
        fields[_attribute(stage.name)] = (kind, Field(**given, alias=stage.name, description=told))
    return create_model("WorkflowConfig", __base__=WorkflowConfig, **fields)


def _attribute(stage: str) -> str:
    """A section's attribute: some names are pydantic's own."""
    return f"{stage}_" if hasattr(BaseModel, stage) else stage


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml")
    )


def load(preset: str, overrides: Sequence[str] = ()) -> WorkflowConfig:
    """The config of a preset or a YAML file, with `KEY=VALUE` overrides; `RefusedInput` names every key at fault."""
    return _validated(_tree(preset, overrides))


def load_without_data(preset: str, overrides: Sequence[str] = ()) -> WorkflowConfig:
    """`load` for a look ahead: the sections of `shard` are left out, so that no path need exist yet."""
    tree = _tree(preset, overrides)
    for stage in STAGES:
        if stage.component.name == "shard":
            tree[stage.name] = {"source": "shapes"} if stage.section == "required" else None
    return _validated(tree)


def _validated(tree: dict[str, Any]) -> WorkflowConfig:
    try:
        return config_model().model_validate(tree)
    except pydantic.ValidationError as error:
        told: dict[str, list[str]] = {}
        for mistake in error.errors(include_url=False):
            key, says = _told(mistake)
            told.setdefault(key, []).append(says)
        # What may be one of two kinds and is neither is one mistake.
        raise RefusedInput(
            together([f"{key}: {', or '.join(dict.fromkeys(says))}" for key, says in told.items()])
        ) from None


def _tree(preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    tree = _read(preset)
    _refuse_secrets(tree, preset)
    mistakes: list[str] = []
    for override in overrides:
        try:
            _apply(tree, override)
        except RefusedInput as error:
            mistakes.append(str(error))
    if mistakes:
        raise RefusedInput(together(mistakes))
    return tree


def _refuse_secrets(node: Any, file: str, *keys: str | int) -> None:
    """Raise RefusedInput for a text anywhere in a file's tree that carries a secret, or a key that names one."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _refuse_secrets(value, file, *keys, key if isinstance(key, int) else str(key))
        return
    where = f"{file}: {_key(keys)}"
    if node is not None and _SECRET.search(str(keys[-1])):
        raise RefusedInput(f"{where}: secrets are read from the environment or mounted files only")
    if isinstance(node, str):
        refuse_secrets(node, where)


def flat(config: WorkflowConfig) -> dict[str, Any]:
    """`component.key` -> value, for MLflow's parameters."""
    out: dict[str, Any] = {"name": config.name}
    for section, values in config.model_dump(mode="json", by_alias=True).items():
        if isinstance(values, dict):
            out |= {f"{section}.{key}": value for key, value in values.items()}
    return out


def _read(preset: str) -> dict[str, Any]:
    if preset in preset_names():
        tree = config_files.parse((PRESETS / f"{preset}.yaml").read_text(), preset)
    elif Path(preset).is_file():
        tree = config_files.read(Path(preset))
    else:
        near = difflib.get_close_matches(preset, preset_names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RefusedInput(
            f"{preset!r} is neither a preset ({', '.join(preset_names())}) nor a YAML file{hint}"
        )
    if not isinstance(tree, dict):
        raise RefusedInput(f"{preset}: expected sections such as `finetune:`, found {type(tree).__name__}")
    if strange := [key for key in tree if not isinstance(key, str)]:
        raise RefusedInput(f"{preset}: expected names of sections, found {_shortened(strange[0])}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RefusedInput(f"--set {key!r}: write KEY=VALUE, such as finetune.learning_rate=2e-5")
    if _SECRET.search(parts[-1]):
        raise RefusedInput(
            f"--set {key}: secrets are read from the environment or mounted files only; "
            "a command line is shown by dashboards and job specs"
        )
    refuse_secrets(text, f"--set {key}")
    try:
        value = config_files.parse(text, f"--set {key}")
    except config_files.NoYaml:
        value = text
    if isinstance(value, str):
        # YAML 1.1 reads 2e-5 as text.
        value = float(value) if _EXPONENT.fullmatch(value) else value
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RefusedInput(f"--set {key}: {part!r} is a value, not a section")
    node[parts[-1]] = value


_KINDS = re.compile(r"(str|int|float|bool|none)|(list|tuple|dict|literal)\[.*\]|function-.*|[A-Z]\w*Settings")
"""How a place in the config is continued by the kind that a value was tried as, where several are allowed."""


def _key(parts: Sequence[str | int]) -> str:
    """A place in the config as the components name it, such as `evaluate.benchmarks[0].labels`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _told(mistake: Any) -> tuple[str, str]:
    """A mistake by its key, with the nearest known one where it is unknown."""
    parts = list(mistake["loc"])
    if any(isinstance(part, str) and _KINDS.fullmatch(part) for part in parts):
        parts = parts[: next(at for at, part in enumerate(parts) if _KINDS.fullmatch(str(part)))]
    key, where = _key(parts) or "the config", [str(part) for part in parts]
    if mistake["type"] == "extra_forbidden":
        known = _known(where[:-1])
        near = difflib.get_close_matches(where[-1], known, 1)
        return key, "unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    if mistake["type"] == "missing":
        return key, "missing"
    message = mistake["msg"].removeprefix("Value error, ")
    return key, f"{message}, got {_shortened(mistake['input'])}" if len(where) > 1 else message


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _known(where: list[str]) -> list[str]:
    """The keys of the section that `where` leads to."""
    model: Any = config_model()
    for part in where:
        if get_origin(model) is dict:
            model = get_args(model)[1]
        elif not part.isdigit():
            found = next(
                info.annotation for name, info in model.model_fields.items() if part in (name, info.alias)
            )
            # A section that may be left out is a union with None, a list one of its entries.
            entries = () if get_origin(found) is dict else get_args(found)
            model = next((each for each in entries if each is not type(None)), found)
    return sorted(info.alias or name for name, info in model.model_fields.items())


def together(mistakes: Sequence[str]) -> str:
    """Several mistakes in one line."""
    if len(mistakes) == 1:
        return mistakes[0]
    return f"{len(mistakes)} mistakes: " + " ".join(
        f"({number}) {mistake};" for number, mistake in enumerate(mistakes, start=1)
    ).rstrip(";")
