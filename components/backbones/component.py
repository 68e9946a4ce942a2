"""The model that stage 1 starts from: a vision tower and a language model with a fresh projector between them."""

import hashlib
import json
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from components.backbones import tiny
from components.contract import Component, Job, Settings
from llava import model as models

RECORD = "record.json"


class BackbonesSettings(Settings):
    """Where the towers come from, and the projector's first weights."""

    kind: Literal["tiny"] = Field("tiny", description="tiny: small towers that live on a laptop")
    retrain: bool = Field(False, description="Train the tiny towers anew instead of taking the shipped ones")
    template: str = Field("chatml", description="Template that the model's own chat template renders")
    seed: int = Field(0, ge=0, description="Of the projector's first weights, and of the towers with retrain")


class Backbones(Component):
    """Takes nothing from the root, gives a stock LLaVA folder in `model/`."""

    name: ClassVar[str] = "backbones"
    version: ClassVar[str] = "1"
    Settings = BackbonesSettings
    on_ray = False

    def external(self, settings: BackbonesSettings) -> dict[str, str]:
        """The shipped towers by their contents: an upgrade of the package may bring others."""
        if settings.retrain:
            return {}
        digest = hashlib.sha256()
        for path in sorted(tiny.TOWERS.rglob("*")):
            if path.is_file():
                digest.update(path.relative_to(tiny.TOWERS).as_posix().encode() + b"\0" + path.read_bytes())
        return {"towers": digest.hexdigest()}

    def run(self, job: Job) -> None:
        settings: BackbonesSettings = job.settings
        towers = tiny.TOWERS
        if settings.retrain:
            towers = job.scratch / "towers"
            gates = tiny.train_towers(towers, settings.seed, job.say)
        else:
            gates = json.loads((towers / RECORD).read_text())["gates"]
        job.metrics.update({f"gate/{name}": float(value) for name, value in gates.items()})
        measured = "measured now" if settings.retrain else "as recorded when they were made"
        figures = ", ".join(f"{name} {gates[name]:.1f} %" for name in tiny.GATED)
        job.say(f"tiny towers, held-out scenes ({measured}): {figures}")
        _join(job, towers, settings)


def _join(job: Job, towers: Path, settings: BackbonesSettings) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

    models.quiet()
    language = LlamaForCausalLM.from_pretrained(towers / "language", dtype="float32", local_files_only=True)
    vision = CLIPVisionModel.from_pretrained(towers / "vision", dtype="float32", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(towers / "language", local_files_only=True)
    pictures = AutoImageProcessor.from_pretrained(towers / "vision", local_files_only=True, backend="pil")
    model, processor = models.join(vision, language, tokenizer, pictures, settings.template, settings.seed)
    folder = job.scratch / "model"
    models.save(model, processor, folder, settings.template)
    for path in sorted(folder.iterdir()):
        job.folder.upload(path, f"model/{path.name}")
    sizes = {part: sum(p.numel() for p in getattr(model.model, part).parameters()) for part in _PARTS}
    job.metrics.update({f"parameters/{part}": float(count) for part, count in sizes.items()})
    job.say(", ".join(f"{part.replace('_', ' ')} {count:,} parameters" for part, count in sizes.items()))


_PARTS = ("vision_tower", "multi_modal_projector", "language_model")
