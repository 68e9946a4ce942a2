"""The model that stage 1 starts from: a vision tower and a language model with a fresh projector between them."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from components.backbones.shipped import GATED, LANGUAGE, RECORD, TOWERS, VISION
from components.backbones.sources import WeightsSource, load_language, load_vision
from components.contract import Component, Job, Settings, Workspace, refusals
from llava import sizes
from llava.choices import Fit
from llava.errors import RefusedInput
from llava.templates import NAMES
from llava.towers import FAMILIES
from llava.towers.base import VisionSizes

if TYPE_CHECKING:
    from llava.model import Reading

_PARTS = ("vision_tower", "multi_modal_projector", "language_model")


class BackbonesSettings(Settings):
    """Where the towers come from, how one is read into the other, and the projector's first weights."""

    kind: Literal["tiny", "hub"] = Field(
        "tiny", description="tiny: small towers that live on a laptop; hub: two pretrained models"
    )
    retrain: bool = Field(False, description="tiny: train the towers anew instead of taking the shipped ones")
    vision: str | None = Field(
        None,
        description=f"hub: a vision tower ({', '.join(FAMILIES)}) as OWNER/NAME on the hub, or a folder as /PATH or "
        "./PATH",
    )
    vision_revision: str | None = Field(None, description="Its commit on the hub, 40 hexadecimal digits")
    language: str | None = Field(None, description="hub: a causal language model, named like vision")
    language_revision: str | None = Field(None, description="Its commit on the hub, 40 hexadecimal digits")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision on disk; auto: what the language model is stored in"
    )
    projector: Literal["mlp2x_gelu", "linear"] = Field(
        "mlp2x_gelu", description="linear: one layer (LLaVA v1); mlp2x_gelu: two with a GELU (v1.5)"
    )
    feature_layer: int = Field(-2, description="Hidden state of the tower that is read; -1 is the last")
    keep_cls: bool = Field(False, description="Whether CLIP's CLS position is read as well")
    image_fit: Fit = Field(
        "model",
        description="How a picture becomes a square: model: as the tower's own folder says; pad; crop",
    )
    pad_vocabulary_to: int | None = Field(
        None, gt=0, description="Rows of the embedding become a multiple of this, such as 64"
    )
    template: str = Field("chatml", description="Template that the model's own chat template renders")
    seed: int = Field(0, ge=0, description="Of the projector's first weights, and of the towers with retrain")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.template not in NAMES:
            raise ValueError(f"template {self.template!r} is unknown; known: {', '.join(sorted(NAMES))}")
        if self.feature_layer == 0:
            raise ValueError(
                "feature_layer=0: stock transformers cannot read what the tower's layers get; 1 is what the first "
                "gives"
            )
        named = {name for name in ("vision", "language") if getattr(self, name) is not None}
        if self.kind == "tiny":
            if named:
                raise ValueError(f"{sorted(named)[0]} is for kind=hub; the tiny towers come with the package")
            return self
        if missing := {"vision", "language"} - named:
            raise ValueError(f"kind=hub needs {' and '.join(sorted(missing))}")
        if self.retrain:
            raise ValueError("retrain is for kind=tiny")
        for source in self.sources:
            if wrong := source.malformed():
                raise ValueError(wrong)
        return self

    @property
    def sources(self) -> tuple[WeightsSource, ...]:
        """Tower and language model of kind=hub."""
        if self.vision is None or self.language is None:
            return ()
        return (
            WeightsSource("vision", self.vision, self.vision_revision),
            WeightsSource("language", self.language, self.language_revision),
        )

    @property
    def reading(self) -> "Reading":
        """How the tower is read."""
        from llava.model import Reading

        return Reading(self.projector, self.feature_layer, self.keep_cls)


class Backbones(Component):
    """Takes nothing from the root, gives a stock LLaVA folder in `model/`."""

    name: ClassVar[str] = "backbones"
    version: ClassVar[str] = "3"
    Settings = BackbonesSettings
    gives = ("model",)
    on_ray = False

    def external(self, settings: BackbonesSettings) -> dict[str, str]:
        """Commits or fingerprints; the shipped towers by their contents: an upgrade may bring others."""
        if settings.kind == "hub":
            return {source.what: source.digest() for source in settings.sources}
        if settings.retrain:
            return {}
        digest = hashlib.sha256()
        for path in sorted(TOWERS.rglob("*")):
            if path.is_file():
                digest.update(path.relative_to(TOWERS).as_posix().encode() + b"\0" + path.read_bytes())
        return {"towers": digest.hexdigest()}

    def preflight(self, settings: BackbonesSettings, workspace: Workspace) -> list[str]:
        """Each part that is not where the settings say."""
        if settings.kind != "hub":
            return super().preflight(settings, workspace)
        return refusals(*(source.digest for source in settings.sources))

    def run(self, job: Job[BackbonesSettings]) -> None:
        settings: BackbonesSettings = job.settings
        if settings.kind == "hub":
            vision, language = (
                source.fetch(job.scratch / source.what, job.say) for source in settings.sources
            )
            _join(job, vision, language)
            return
        towers = TOWERS
        if settings.retrain:
            from components.backbones import tiny

            towers = job.scratch / "towers"
            gates = tiny.train_towers(towers, settings.seed, job.say)
        else:
            gates = json.loads((towers / RECORD).read_text())["gates"]
        job.metrics.update({f"gate/{name}": float(value) for name, value in gates.items()})
        measured = "measured now" if settings.retrain else "as recorded when they were made"
        figures = ", ".join(f"{name} {gates[name]:.1f} %" for name in GATED)
        job.say(f"tiny towers, held-out scenes ({measured}): {figures}")
        _join(job, towers / VISION, towers / LANGUAGE)


def _join(job: Job[BackbonesSettings], vision_folder: Path, language_folder: Path) -> None:
    import torch

    from llava import model as models
    from llava.pixels import fitted

    settings: BackbonesSettings = job.settings
    models.quiet()
    language, tokenizer = load_language(language_folder, _named(settings, "language"))
    vision, pictures = load_vision(vision_folder, _named(settings, "vision"))
    # The tiny towers are kept in half precision to be small, and trained in full.
    stored = "float32" if settings.kind == "tiny" and settings.dtype == "auto" else settings.dtype
    if stored != "auto":
        language = language.to(getattr(torch, stored))
    pictures = fitted(pictures, settings.image_fit, vision.config.image_size)
    for what, model in (("vision", vision), ("language", language)):
        _check_published(getattr(settings, what), model.config.to_dict())
    model, processor = models.join(
        vision,
        language,
        tokenizer,
        pictures,
        settings.template,
        settings.seed,
        settings.reading,
        settings.pad_vocabulary_to,
    )
    folder = job.scratch / "model"
    models.save(model, processor, folder, settings.template)
    for path in sorted(folder.iterdir()):
        job.folder.upload(path, f"model/{path.name}")
    counts = {part: sum(p.numel() for p in getattr(model.model, part).parameters()) for part in _PARTS}
    if not model.config.tie_word_embeddings:
        counts["language_model"] += model.lm_head.weight.numel()
    learning = sum(model.get_parameter(name).numel() for name in models.set_trainable(model, ["projector"]))
    job.metrics.update({f"parameters/{part}": float(count) for part, count in counts.items()})
    job.metrics["parameters/projector_trainable"] = float(learning)
    told = ", ".join(f"{part.replace('_', ' ')} {count:,}" for part, count in counts.items())
    identity = counts["multi_modal_projector"] - learning
    job.say(f"parameters: {told}" + (f" ({identity:,} of it an identity that stays)" if identity else ""))


def _named(settings: BackbonesSettings, what: str) -> str:
    return f"backbones.{what}={getattr(settings, what) or 'tiny'}"


def _check_published(location: str | None, config: dict[str, Any]) -> None:
    """A model that a preset names by heart has the published shape, or it is another one."""
    expected = sizes.PUBLISHED.get(location or "")
    if expected is None:
        return
    read = sizes.vision_sizes if isinstance(expected, VisionSizes) else sizes.language_sizes
    if (found := read(config)) != expected:
        raise RefusedInput(f"{location}: expected the published {expected}, found {found}")
