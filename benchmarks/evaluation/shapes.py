"""The tiny world in the formats of the field's benchmarks: what `evaluate.benchmarks` reads, written by a command.

Questions are worded as the tiny world's own training data words them, so that a tiny model can understand them. Only
ScienceQA's options are new to it: `python -m benchmarks.evaluation.shapes FOLDER` writes problems to train on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.tiny_world import COLOURS, SHAPES, Scene, scenes

Entry = dict[str, Any]
_LETTERS = "ABCD"
_CAPTION = "Say briefly what this picture shows."


def write(folder: Path, count: int, seed: int = 11) -> list[Entry]:
    """Write `count` held-out scenes in six formats; gives the entries of `evaluate.benchmarks`."""
    drawn = list(scenes(seed, count, "heldout"))
    images = folder / "images"
    images.mkdir(parents=True)
    for scene in drawn:
        (images / f"{scene.id}.png").write_bytes(scene.png)
    rng = random.Random(seed)
    return [
        _pope(folder / "pope", images, drawn, rng),
        _scienceqa(folder / "scienceqa", drawn, rng),
        _vqa(folder / "vqa", images, drawn, rng),
        _own(folder / "own", images, drawn, rng),
        _captions(folder / "captions", images, drawn),
        _llava_bench(folder / "llava-bench", images, drawn, rng),
    ]


def science_problems(drawn: Sequence[Scene], rng: random.Random) -> dict[str, Any]:
    """ScienceQA's `problems.json` about scenes: every fourth problem tells the picture as a hint instead."""
    problems = {}
    for number, scene in enumerate(drawn):
        thing = rng.choice(scene.objects)[0]
        colour, shape = thing.split()
        if sum(other.endswith(shape) for other, _ in scene.objects) > 1:
            continue
        choices = [colour, *rng.sample([one for one in COLOURS if one != colour], 2)]
        rng.shuffle(choices)
        told = number % 4 == 3
        problems[scene.id] = {
            "question": f"Which colour does the {shape} have?",
            "choices": choices,
            "answer": choices.index(colour),
            "hint": f"{scene.captions[1].capitalize()}." if told else "",
            "image": None if told else "image.png",
            "subject": ("natural science", "social science", "language science")[number % 3],
            "grade": f"grade{number % 12 + 1}",
            "lecture": "Things have colours.",
            "solution": f"The {shape} is {colour}.",
        }
    return problems


def write_science(folder: Path, drawn: Sequence[Scene], rng: random.Random, split: str) -> None:
    """`problems.json`, `pid_splits.json` and `ID/image.png`."""
    problems = science_problems(drawn, rng)
    folder.mkdir(parents=True)
    for scene in drawn:
        if scene.id in problems and problems[scene.id]["image"]:
            (folder / scene.id).mkdir()
            (folder / scene.id / "image.png").write_bytes(scene.png)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({split: list(problems)}))


def _scienceqa(folder: Path, drawn: Sequence[Scene], rng: random.Random) -> Entry:
    write_science(folder, drawn, rng, "test")
    return {
        "benchmark": "scienceqa",
        "labels": str(folder / "problems.json"),
        "splits": str(folder / "pid_splits.json"),
        "style": "QCM-LEA",
        "max_new_tokens": 32,
        "blank_images": True,
    }


def _pope(folder: Path, images: Path, drawn: Sequence[Scene], rng: random.Random) -> Entry:
    """Yes questions about what is there; no questions about any thing, or one that is nearly there."""
    folder.mkdir()
    questions, labels = [], {}
    every = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for split in ("random", "adversarial"):
        rows = []
        for scene in drawn:
            there = [thing for thing, _ in scene.objects]
            near = [
                one for one in every
                if one not in there and set(one.split()) & {word for thing in there for word in thing.split()}
            ]  # fmt: skip
            absent = rng.choice(
                near if split == "adversarial" else [one for one in every if one not in there]
            )
            for thing, label in ((rng.choice(there), "yes"), (absent, "no")):
                text = f"Is there a {thing} in the picture?"
                row = {"question_id": len(rows) + 1, "image": f"{scene.id}.png", "text": text}
                rows.append(row | {"label": label})
                questions.append(row | {"category": split})
        _jsonl(folder / f"{split}.jsonl", rows)
        labels[split] = str(folder / f"{split}.jsonl")
    _jsonl(folder / "questions.jsonl", questions)
    return {
        "benchmark": "pope",
        "questions": str(folder / "questions.jsonl"),
        "labels": labels,
        "images": str(images),
        "instruction": "",
        "blank_images": True,
    }


def _vqa(folder: Path, images: Path, drawn: Sequence[Scene], rng: random.Random) -> Entry:
    """VQA's annotations with ten answers each: one of ten people is wrong."""
    folder.mkdir()
    questions, annotations = [], []
    for number, scene in enumerate(drawn):
        shape = rng.choice(SHAPES)
        count = sum(thing.endswith(shape) for thing, _ in scene.objects)
        answer = ("none", "one", "two")[count]
        people = [{"answer": answer, "answer_id": person} for person in range(9)]
        questions.append(
            {
                "question_id": number,
                "image": f"{scene.id}.png",
                "text": f"How many {_plural(shape)} are there?",
            }
        )
        annotations.append(
            {"question_id": number, "image_id": scene.id, "multiple_choice_answer": answer,
             "answers": [*people, {"answer": "three", "answer_id": 9}]}
        )  # fmt: skip
    _jsonl(folder / "questions.jsonl", questions)
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return {
        "benchmark": "vqa",
        "name": "vqa-ten",
        "questions": str(folder / "questions.jsonl"),
        "labels": str(folder / "annotations.json"),
        "images": str(images),
        "instruction": "",
        "blank_images": True,
    }


def _own(folder: Path, images: Path, drawn: Sequence[Scene], rng: random.Random) -> Entry:
    """A held-out set of one's own in LLaVA's format."""
    folder.mkdir()
    samples = []
    for scene in drawn:
        colour, shape = rng.choice(scene.objects)[0].split()
        if sum(thing.startswith(colour) for thing, _ in scene.objects) == 1:
            samples.append({"id": scene.id, "image": f"{scene.id}.png", "conversations": [
                {"from": "human", "value": f"<image>\nWhich shape does the {colour} thing have?"},
                {"from": "gpt", "value": f"{shape.capitalize()}."},
            ]})  # fmt: skip
    (folder / "own.json").write_text(json.dumps(samples))
    return {
        "benchmark": "vqa",
        "name": "own",
        "data": str(folder / "own.json"),
        "images": str(images),
        "blank_images": True,
    }


def _captions(folder: Path, images: Path, drawn: Sequence[Scene]) -> Entry:
    """COCO's caption annotations."""
    folder.mkdir()
    (folder / "captions.json").write_text(json.dumps({
        "images": [{"id": scene.id, "file_name": f"{scene.id}.png"} for scene in drawn],
        "annotations": [
            {"id": f"{scene.id}-{place}", "image_id": scene.id, "caption": caption}
            for scene in drawn for place, caption in enumerate(scene.captions)
        ],
    }))  # fmt: skip
    return {
        "benchmark": "captions",
        "labels": str(folder / "captions.json"),
        "images": str(images),
        "instruction": _CAPTION,
        "blank_images": True,
    }


def _llava_bench(folder: Path, images: Path, drawn: Sequence[Scene], rng: random.Random) -> Entry:
    """Open questions with a reference answer, and notes for a judge, which the caller names."""
    folder.mkdir()
    files: dict[str, list[dict[str, Any]]] = {"questions": [], "reference": [], "context": []}
    for number, scene in enumerate(drawn):
        thing = rng.choice(scene.objects)[0]
        category, text, answer = (
            ("conv", f"Where is the {thing}?", scene.captions[0]),
            ("detail", _CAPTION, scene.captions[1]),
            ("complex", f"What else is there besides the {thing}?", scene.captions[0]),
        )[number % 3]
        row = {"question_id": number, "image": f"{scene.id}.png", "category": category}
        files["questions"].append(row | {"text": text})
        files["reference"].append(row | {"text": f"{answer.capitalize()}.", "answer_id": f"r{number}"})
        boxes = [{"category": name, "bbox": list(box)} for name, box in scene.objects]
        files["context"].append({"image": row["image"], "captions": scene.captions, "instances": boxes})
    for name, rows in files.items():
        _jsonl(folder / f"{name}.jsonl", rows)
    return {
        "benchmark": "llava-bench",
        **{name: str(folder / f"{name}.jsonl") for name in files},
        "images": str(images),
        "instruction": "",
        "blank_images": True,
    }


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """ScienceQA's problems about training scenes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation.shapes")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=2500)
    options = parser.parse_args()
    write_science(options.folder, list(scenes(5, options.scenes, "train")), random.Random(5), "train")


if __name__ == "__main__":
    main()
