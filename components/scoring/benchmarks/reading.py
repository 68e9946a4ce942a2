"""What benchmarks share when a model is asked: from files to questions with their pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components.contract import MANIFEST, Store, open_data_store, open_store, read_artifact
from components.contract.store import check_key
from components.scoring.base import Files, Record, by_id, get, read_json, read_rows, text_of
from components.scoring.pictures import Picture
from llava.errors import RefusedInput
from llava.text_tokenizer import IMAGE

READ_IN_PLACE = ("images", "data")
"""What is not copied: folders, and datasets."""
TEXTS = (".txt", ".json", ".jsonl", ".tsv", ".csv")
"""What is copied of a folder of labels, beside which pictures may lie."""


class Asked(Protocol):
    """The settings of an exam, as far as a benchmark reads them."""

    @property
    def title(self) -> str: ...
    @property
    def data(self) -> str | None: ...
    @property
    def questions(self) -> str | None: ...
    @property
    def labels(self) -> str | dict[str, str] | None: ...
    @property
    def images(self) -> str | None: ...
    @property
    def follow_links(self) -> bool | None: ...
    @property
    def split(self) -> str: ...
    @property
    def instruction(self) -> str | None: ...
    @property
    def style(self) -> Any: ...
    @property
    def max_failed(self) -> float: ...
    @property
    def paths(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Item:
    """One question as the model gets it."""

    prompt: str
    picture: Picture | None
    row: Record
    """The line of the answers file, without what the model says."""
    unit: str
    """What the scored unit is known by (`Benchmark.unit_name`)."""
    wrong: Picture | None = None
    """Another question's picture."""
    expected: str | None = None
    """An answer whose loss is measured."""


@dataclass(frozen=True)
class Paper:
    """What an exam is made from: its settings, copies of its files, and where pictures lie."""

    settings: Asked
    copies: Mapping[str, Path]
    """By what they are: `questions`, `labels`, `labels SPLIT`, ..."""
    folder: Path
    """Of the copies; a benchmark may write its own files there."""
    look: Callable[[Store, str], Picture] = Picture.at
    """How a picture is opened; a look ahead only asks whether it is there."""
    called: Callable[[str], str] = str
    """See `Files.called`."""
    own: dict[str, str] = field(default_factory=dict)
    """Of each file in `folder`, the user's own that it was made from: a message names that one."""

    def copy(self, uri: str, what: str) -> Path:
        """A copy of the file at `uri` in `folder`."""
        goal = copy(uri, what, self.folder, self.settings.follow_links)
        self.own[str(goal)] = uri
        return goal

    def file(self, name: str, of: str) -> Path:
        """Where a benchmark writes a file of its own, made from what lies at `of`."""
        self.own[str(self.folder / name)] = of
        return self.folder / name

    @property
    def labels(self) -> dict[str, Path]:
        """The copies of the label files, by split."""
        found = {what.partition(" ")[2]: path for what, path in self.copies.items()
                 if what.partition(" ")[0] == "labels"}  # fmt: skip
        return found

    def pictures(self, beside: str) -> Callable[[str | None], Picture | None]:
        """From a picture's name in the files to the picture; each is looked at once.

        `beside`: the file in whose folder they lie where `images` names none.
        """
        place = self.settings.images or beside.rpartition("/")[0] or "."
        store = open_data_store(place, self.settings.follow_links)
        known: dict[str, Picture] = {}

        def find(name: str | None) -> Picture | None:
            if name is None:
                return None
            if name not in known:
                try:
                    known[name] = self.look(store, str(name))
                except FileNotFoundError:
                    raise RefusedInput(
                        f"{self.called('images')}: no picture {name} in {store.uri}; name the folder that has it"
                    ) from None
            return known[name]

        return find

    def put(self, text: str, with_wish: str) -> str:
        """The question and the wish for its format; a text of several lines has one already."""
        wish = self.settings.instruction
        if wish is not None:
            return f"{text}\n{wish}" if wish else text
        return text if "\n" in text else with_wish

    def files(self, **more: Any) -> Files:
        """The files to score, called as the exam calls them."""
        return Files(called=self.called, **more)


def answer_row(id_: Any, image: str | None) -> Record:
    """The line of an answer, without what the model says."""
    return {"question_id": id_, "metadata": {} if image is None else {"image": image}}


def from_questions(
    paper: Paper, prompt: Callable[[Record], str], unit: Callable[[Record], str] | None = None
) -> list[Item]:
    """An item per row of the question file (question_id, image, text, category).

    `unit`: what a row's unit is known by, where several rows may have one id; default: its id, which is its own.
    """
    path = paper.copies["questions"]
    rows, pictures = read_rows(path), paper.pictures(str(paper.settings.questions))
    if unit is None:
        by_id(rows, path)
    items = []
    for row in rows:
        text = text_of(row, path).replace(IMAGE, "").strip()
        name = row.get("image")
        stored = answer_row(get(row, "question_id", path), name)
        if row.get("category") is not None:
            stored["metadata"]["category"] = row["category"]
        named = unit(row) if unit else str(row["question_id"])
        items.append(Item(paper.put(text, prompt(row | {"text": text})), pictures(name), stored, named))
    return items


def from_conversations(paper: Paper, uri: str) -> tuple[list[Item], Path]:
    """An item per turn of a LLaVA-format file, which is its own label file."""
    labels = paper.copy(uri, "labels")
    pictures = paper.pictures(uri)
    rows = read_json(labels) if labels.suffix == ".json" else read_rows(labels)
    items = []
    for sample in rows:
        turns, name = get(sample, "conversations", labels)[::2], get(sample, "id", labels)
        for number, turn in enumerate(turns, 1):
            id_ = f"{name}" if len(turns) == 1 else f"{name}-{number}"
            asked = str(get(turn, "value", labels)).replace(IMAGE, "").strip()
            picture = pictures(sample.get("image"))
            row = answer_row(id_, sample.get("image"))
            items.append(Item(paper.put(asked, asked), picture, row, id_))
    return items, labels


def from_dataset(
    paper: Paper, uri: str, asked: Sequence[tuple[str, str, str, Picture]]
) -> tuple[list[Item], Path]:
    """Questions (id, question, expected, picture) of a dataset: their labels are written in LLaVA's format."""
    labels = paper.file("labels.json", uri)
    samples = [
        {"id": id_, "image": picture.sha256, "conversations": [
            {"from": "human", "value": f"{IMAGE}\n{question}"}, {"from": "gpt", "value": expected},
        ]} for id_, question, expected, picture in asked
    ]  # fmt: skip
    labels.write_text(json.dumps(samples, ensure_ascii=False, indent=0), encoding="utf-8")
    items = [
        Item(paper.put(question, question), picture, answer_row(id_, picture.sha256), id_)
        for id_, question, _, picture in asked
    ]
    return items, labels


def dataset(uri: str) -> Store | None:
    """The dataset artifact at `uri`; None where a file lies there."""
    store = open_store(uri)
    if store.local_path is not None and store.local_path.is_file():
        return None
    if store.stat(MANIFEST) is None or read_artifact(store) is None:
        if Path(uri).suffix in (".json", ".jsonl"):
            return None
        raise RefusedInput(f"{uri}: neither a LLaVA-format JSON or JSONL nor a finished dataset artifact")
    return store


def copy(uri: str, what: str, folder: Path, follow_links: bool | None = None) -> Path:
    """The file at `uri` as `folder/WHAT.SUFFIX`; of a folder its texts alone, as `folder/WHAT`.

    RefusedInput for a text in a folder that is no regular file, or a link that is not followed.
    """
    goal = folder / f"{what.replace(' ', '-')}{Path(uri).suffix}"
    above, name = _above(uri)
    try:
        if open_store(above).stat(name) is not None:
            open_store(above).download(name, goal)
            return goal
        inside = open_data_store(uri, follow_links)
        for refused in inside.refused():
            if _is_text(refused.key):
                raise RefusedInput(f"{uri}: {refused.text}")
        for entry in inside.list():
            if _is_text(entry.key):
                inside.download(entry.key, goal / check_key(entry.key))
    except OSError as error:
        raise RefusedInput(f"{uri}: {error.strerror or error}; give the path of a file") from None
    if inside.local_path is not None and not inside.local_path.is_dir():
        raise RefusedInput(f"{uri}: No such file or directory; give the path of a file")
    return goal


def _above(uri: str) -> tuple[str, str]:
    """The folder or prefix that holds `uri`, and its name there."""
    if uri.startswith("s3://"):
        above, _, name = uri.rpartition("/")
        return above, name
    path = Path(uri).expanduser().absolute()
    return str(path.parent), path.name or "."


def _is_text(name: str) -> bool:
    return Path(name).suffix.lower() in TEXTS
