"""From a benchmark's files to what the model is asked, and from its answers to the files that are scored.

An exam keeps copies of the files it was made from beside the answers, in the formats of `llava score`: whoever has the
artifact can score it again, to the same digit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.contract import MANIFEST, Store, fingerprint, open_store, read_artifact, recipe, sha256_of
from components.evaluate.pictures import Picture
from components.evaluate.questions import captioned, read_questions
from components.evaluate.settings import ExamSettings
from components.scoring.benchmarks import Files, Scored, Unit, find
from components.scoring.benchmarks.base import (
    Record,
    by_id,
    get,
    read_json,
    read_object,
    read_rows,
    read_text,
    text_of,
)
from components.scoring.benchmarks.captions import read_references
from components.scoring.benchmarks.scienceqa import prompt as science_prompt
from components.scoring.benchmarks.scienceqa import read_problems
from components.scoring.outcomes import unit_name
from llava.conversation import IMAGE
from llava.errors import RefusedInput


@dataclass(frozen=True)
class Item:
    """One question as the model gets it."""

    prompt: str
    picture: Picture | None
    row: Record
    """The line of the answers file, without what the model says."""
    unit: str
    """What the scored unit is known by: its picture (pope) or its id (the others)."""


@dataclass(frozen=True)
class Exam:
    """A benchmark with its questions; `files` are the copies that are scored."""

    settings: ExamSettings
    items: Sequence[Item]
    files: Files
    digest: str
    """Equal for two exams exactly when their scores may be compared."""


def external(settings: ExamSettings) -> dict[str, str]:
    """Fingerprints of the exam's files, by `benchmarks.NAME.WHAT`."""
    found = {}
    for what, path in settings.paths.items():
        artifact = read_artifact(open_store(path)) if what == "data" and _dataset(path) else None
        found[f"benchmarks.{settings.title}.{what.replace(' ', '.')}"] = (
            artifact.digest if artifact else fingerprint(path)
        )
    return found


def open_exam(settings: ExamSettings, folder: Path) -> Exam:
    """Copy the files into `folder` (an empty local one) and read the questions; nothing is asked yet."""
    folder.mkdir(parents=True)
    copies = {
        what: _copy(path, what, folder) for what, path in settings.paths.items() if what not in _READ_IN_PLACE
    }
    items, files = _READERS[settings.benchmark](settings, copies, folder)
    if not items:
        raise RefusedInput(f"benchmarks: {settings.title}: its files hold no question")
    asked = [[item.prompt, None if item.picture is None else item.picture.sha256, item.row] for item in items]
    labels = {path.name: sha256_of(read_text(path)) for path in folder.iterdir()}
    terms: Record = {"benchmark": settings.benchmark, "max_new_tokens": settings.answer_length}
    if settings.judge is not None:
        judged = {"runs": settings.judge_runs, "swap": settings.judge_swap}
        terms["judge"] = recipe(settings.judge) | judged
    exam = Exam(settings, items, files, sha256_of({"asked": asked, "labels": labels, "terms": terms}))
    if settings.benchmark in ("vqa", "pope", "scienceqa"):
        # Labels that do not fit are refused now, and not when everything is answered.
        find(settings.benchmark).score(answered(exam, [""] * len(items), "", folder))
    return exam


def answered(exam: Exam, texts: Sequence[str], model: str, folder: Path, prefix: str = "") -> Files:
    """Write the answers file, a line per item, into the folder of `open_exam`; gives the files to score.

    A line is `question_id, prompt, text, answer_id, model_id, metadata`; captions are COCO's `image_id, caption`.
    """
    captions = exam.settings.benchmark == "captions"
    path = folder / f"{prefix}answers.{'json' if captions else 'jsonl'}"
    rows = []
    for item, text in zip(exam.items, texts, strict=True):
        if captions:
            rows.append(item.row | {"caption": text})
            continue
        row = {"question_id": item.row["question_id"], "prompt": item.prompt, "text": text}
        row |= {"answer_id": sha256_of([exam.digest, model, item.row])[:22], "model_id": model}
        rows.append(row | {"metadata": item.row["metadata"]})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    body = "[" + ",\n".join(lines) + "]" if captions else "\n".join(lines)
    path.write_text(body + "\n", encoding="utf-8")
    return replace(exam.files, answers=path)


def units(exam: Exam, scored: Scored) -> list[Unit]:
    """The scored unit of each item (over all questions: none may be left out)."""
    if exam.settings.benchmark == "pope":
        # A picture stands in several splits; the units stand in the order of the questions.
        return list(scored.units)
    by_name = {unit_name(scored.benchmark, unit): unit for unit in scored.units}
    return [by_name[item.unit] for item in exam.items]


_READ_IN_PLACE = ("images", "data")
_Read = tuple[list[Item], Files]


def _vqa(settings: ExamSettings, copies: Mapping[str, Path], folder: Path) -> _Read:
    if settings.data is not None:
        if (artifact := _dataset(settings.data)) is not None:
            questions, _ = read_questions(artifact, None, 0)
            return _own(settings, folder, [
                (question.id, question.question, question.expected, Picture(question.picture, question.image))
                for question in questions
            ])  # fmt: skip
        labels = _copy(settings.data, "labels", folder)
        pictures = _pictures(settings, settings.data)
        rows = read_json(labels) if labels.suffix == ".json" else read_rows(labels)
        items = []
        for sample in rows:
            turns = get(sample, "conversations", labels)[::2]
            for number, turn in enumerate(turns, 1):
                id_ = f"{sample['id']}" if len(turns) == 1 else f"{sample['id']}-{number}"
                asked = str(turn["value"]).replace(IMAGE, "").strip()
                picture = pictures(sample.get("image"))
                items.append(Item(_ask(settings, asked, asked), picture, _row(id_, sample.get("image")), id_))
        return items, Files(labels={"": labels})
    items = _from_questions(settings, copies["questions"])
    return items, Files(labels={"": copies["labels"]})


def _pope(settings: ExamSettings, copies: Mapping[str, Path], folder: Path) -> _Read:
    items = _from_questions(settings, copies["questions"], unique=False)
    labels = {what.partition(" ")[2]: path for what, path in copies.items() if what.startswith("labels")}
    return items, Files(questions=copies["questions"], labels=labels)


def _llava_bench(settings: ExamSettings, copies: Mapping[str, Path], folder: Path) -> _Read:
    items = _from_questions(settings, copies["questions"])
    return items, Files(questions=copies["questions"], reference=copies.get("reference"),
                        max_failed=settings.max_failed)  # fmt: skip


def _scienceqa(settings: ExamSettings, copies: Mapping[str, Path], folder: Path) -> _Read:
    labels, splits = copies["labels"], copies.get("splits")
    pictures, rows = _pictures(settings, str(settings.labels)), read_object(labels)
    items = []
    for problem in read_problems(labels, splits, settings.split):
        text = science_prompt(rows[problem.id], settings.style)
        text = f"{text}\n{settings.instruction}" if settings.instruction else text
        items.append(Item(text, pictures(problem.image), _row(problem.id, problem.image), problem.id))
    return items, Files(labels={"": labels}, splits=splits, split=settings.split)


def _captions(settings: ExamSettings, copies: Mapping[str, Path], folder: Path) -> _Read:
    own, wish = find("captions").prompt, settings.instruction
    if settings.data is not None and (artifact := _dataset(settings.data)) is not None:
        rows = captioned(artifact)
        labels = folder / "labels.json"
        labels.write_text(json.dumps({
            "images": [{"id": row["id"]} for row in rows],
            "annotations": [{"image_id": row["id"], "caption": text} for row in rows for text in row["captions"]],
        }, ensure_ascii=False), encoding="utf-8")  # fmt: skip
        items = [
            Item(wish or own({}), Picture.of(row["image"]["bytes"]), {"image_id": row["id"]}, row["id"])
            for row in rows
        ]
        return items, Files(labels={"": labels})
    source = settings.data or str(settings.labels)
    labels = _copy(settings.data, "labels", folder) if settings.data else copies["labels"]
    pictures, asked = _pictures(settings, source), {}
    if isinstance(value := read_json(labels) if labels.suffix == ".json" else read_rows(labels), list):
        names = {str(sample["id"]): sample.get("image") for sample in value}
        asked = {
            str(sample["id"]): str(sample["conversations"][0]["value"]).replace(IMAGE, "").strip()
            for sample in value
        }
        ids: dict[str, Any] = {str(sample["id"]): sample["id"] for sample in value}
    else:
        names = {str(image["id"]): image.get("file_name") for image in value.get("images", [])}
        ids = {str(row["image_id"]): row["image_id"] for row in value.get("annotations", [])}
    items = [
        Item(wish or asked.get(id_) or own({}), pictures(names.get(id_)), {"image_id": ids[id_]}, id_)
        for id_ in read_references(labels)
    ]
    return items, Files(labels={"": labels})


_READERS: dict[str, Callable[[ExamSettings, Mapping[str, Path], Path], _Read]] = {
    "vqa": _vqa,
    "pope": _pope,
    "scienceqa": _scienceqa,
    "llava-bench": _llava_bench,
    "captions": _captions,
}


def _own(
    settings: ExamSettings, folder: Path, asked: Sequence[tuple[str, str, str, Picture]]
) -> tuple[list[Item], Files]:
    """Questions that lie in a dataset: their labels are written in LLaVA's format."""
    labels = folder / "labels.json"
    samples = [
        {"id": id_, "image": picture.sha256, "conversations": [
            {"from": "human", "value": f"{IMAGE}\n{question}"}, {"from": "gpt", "value": expected},
        ]} for id_, question, expected, picture in asked
    ]  # fmt: skip
    labels.write_text(json.dumps(samples, ensure_ascii=False, indent=0), encoding="utf-8")
    items = [
        Item(_ask(settings, question, question), picture, _row(id_, picture.sha256), id_)
        for id_, question, _, picture in asked
    ]
    return items, Files(labels={"": labels})


def _from_questions(settings: ExamSettings, path: Path, unique: bool = True) -> list[Item]:
    rows, pictures = read_rows(path), _pictures(settings, str(settings.questions))
    if unique:
        by_id(rows, path)
    prompt = find(settings.benchmark).prompt
    items = []
    for row in rows:
        text = text_of(row, path).replace(IMAGE, "").strip()
        name = row.get("image")
        stored = _row(get(row, "question_id", path), name)
        if row.get("category") is not None:
            stored["metadata"]["category"] = row["category"]
        unit = str(name) if settings.benchmark == "pope" else str(row["question_id"])
        items.append(Item(_ask(settings, text, prompt(row | {"text": text})), pictures(name), stored, unit))
    return items


def _ask(settings: ExamSettings, text: str, with_wish: str) -> str:
    """The question and the wish for its format; a text of several lines has one already."""
    if settings.instruction is not None:
        return f"{text}\n{settings.instruction}" if settings.instruction else text
    return text if "\n" in text else with_wish


def _row(id_: Any, image: str | None) -> Record:
    return {"question_id": id_, "metadata": {} if image is None else {"image": image}}


def _pictures(settings: ExamSettings, beside: str) -> Callable[[str | None], Picture | None]:
    """From a picture's name in the files to the picture; each is read once, for its hash."""
    store = open_store(settings.images or beside.rpartition("/")[0] or ".")
    known: dict[str, Picture] = {}

    def find_picture(name: str | None) -> Picture | None:
        if name is None:
            return None
        if name not in known:
            try:
                known[name] = Picture.at(store, str(name))
            except FileNotFoundError:
                raise RefusedInput(
                    f"benchmarks: {settings.title}: no picture {name} in {store.uri}; name the folder: images"
                ) from None
        return known[name]

    return find_picture


def _dataset(uri: str) -> Store | None:
    """The dataset artifact at `uri`; None where a file lies there."""
    store = open_store(uri)
    if store.local_path is not None and store.local_path.is_file():
        return None
    if store.stat(MANIFEST) is None or read_artifact(store) is None:
        if Path(uri).suffix in (".json", ".jsonl"):
            return None
        raise RefusedInput(f"{uri}: neither a LLaVA-format JSON or JSONL nor a finished dataset artifact")
    return store


def _copy(uri: str, what: str, folder: Path) -> Path:
    """The file at `uri` as `folder/WHAT.SUFFIX`."""
    goal = folder / f"{what.replace(' ', '-')}{Path(uri).suffix}"
    if uri.startswith("s3://"):
        above, _, name = uri.rpartition("/")
        open_store(above).download(name, goal)
        return goal
    try:
        shutil.copyfile(Path(uri).expanduser(), goal)
    except OSError as error:
        raise RefusedInput(f"{uri}: {error.strerror or error}; give the path of a file") from None
    return goal
