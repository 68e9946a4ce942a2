"""Drops for the retraining drills: scenes of the tiny world with questions and answers, as LLaVA-format JSON."""

import json
import random
from collections.abc import Sequence
from typing import Any

from components.contract import Store
from components.instruct.samples import samples
from components.instruct.settings import InstructSettings
from components.tiny_world import scenes
from llava.data.schema import ObjectCell, Row
from workflows.retraining.drops import READY

SETTINGS = InstructSettings(
    kinds=("colour", "shape", "what", "where", "count", "exists"), per_photo=1, turns=6, image_position="first",
    conversation_share=1, detail_share=0, reasoning_share=0,
)  # fmt: skip


def records(seed: int, count: int, wrong: bool = False) -> list[tuple[dict[str, Any], bytes]]:
    """Records and their pictures; `wrong`: every answer is one that was given to another question."""
    made = []
    for number, scene in enumerate(scenes(seed, count, "train")):
        objects: list[ObjectCell] = [{"category": name, "bbox": list(box)} for name, box in scene.objects]
        row: Row = {
            "id": scene.id, "width": scene.width, "height": scene.height, "captions": list(scene.captions),
            "objects": objects, "conversations": None, "kinds": None, "type": None,
        }  # fmt: skip
        (sample,) = samples(row, SETTINGS)
        turns = sample["conversations"] or []
        record: dict[str, Any] = {
            "id": f"{seed}-{number}",
            "image": f"{number}.png",
            "conversations": [dict(t) for t in turns],
        }
        made.append((record, scene.png))
    if wrong:
        answers = [turn for record, _ in made for turn in record["conversations"] if turn["from"] == "gpt"]
        values = [turn["value"] for turn in answers]
        random.Random(seed).shuffle(values)
        for turn, value in zip(answers, values, strict=True):
            turn["value"] = value
    return made


def arrive(
    place: Store, made: list[tuple[dict[str, Any], bytes]], bad: Sequence[Any] = (), ready: bool = True
) -> None:
    """Write a drop; `bad`: further records (a text: a line as it is)."""
    lines = [json.dumps(record) for record, _ in made]
    lines += [one if isinstance(one, str) else json.dumps(one) for one in bad]
    place.write("data.jsonl", "\n".join(lines).encode() + b"\n")
    for record, png in made:
        place.write(f"images/{record['image']}", png)
    if ready:
        place.write(READY, b"")
