"""An exam: a benchmark's questions as they are asked, and the answers files that are scored.

An exam keeps copies of the files it was made from beside the answers, in the formats of `llava score`: whoever has the
artifact can score it again, to the same digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from components.chat import require_openai
from components.contract import (
    Store,
    fingerprint,
    links_of,
    open_store,
    read_artifact,
    recipe,
    refusals,
    sha256_of,
)
from components.evaluate.answering import BLANK, RIGHT
from components.evaluate.settings import ExamSettings
from components.scoring.base import Files, Record, Scored, Unit, read_text
from components.scoring.benchmarks import Benchmark, find
from components.scoring.benchmarks.reading import READ_IN_PLACE, Item, Paper, copy, dataset
from components.scoring.judge import read_key
from components.scoring.pictures import Picture
from llava.errors import RefusedInput

Called = Callable[[str], str]


@dataclass(frozen=True)
class Exam:
    """A benchmark with its questions; `files` are the copies that are scored."""

    title: str
    benchmark: Benchmark
    items: Sequence[Item]
    files: Files
    digest: str
    """Equal for two exams exactly when their scores may be compared."""
    answer_length: int
    """Tokens after which an answer is cut."""
    conditions: tuple[str, ...]
    """What is shown with each question, one after the other: `answering.RIGHT`, `BLANK`, `WRONG`."""
    local: Path
    """Its files here."""
    folder: str
    """Its files in the artifact; empty: at its top."""
    own: Mapping[str, str]
    """What a copy is of: a message names the user's own file."""
    settings: ExamSettings | None = None
    """None for the held-out questions, which no entry of the config asks for."""


def called(number: int) -> Called:
    """How the config calls the fields of an exam."""
    return lambda field: f"evaluate.benchmarks[{number}].{field.replace(' ', '.')}"


def external(settings: ExamSettings, called: Called) -> dict[str, str]:
    """Fingerprints of the exam's files, by `benchmarks.NAME.WHAT`."""
    found = {}
    for what, path in settings.paths.items():
        with _naming({}, called(what)):
            artifact = read_artifact(open_store(path)) if what == "data" and dataset(path) else None
            key = f"benchmarks.{settings.title}.{what.replace(' ', '.')}"
            found[key] = artifact.digest if artifact else fingerprint(path, links_of(settings.follow_links))
    return found


def preflight(settings: ExamSettings, called: Called) -> list[str]:
    """What is wrong with the exam's files: what is missing, what does not fit together; and a judge without a key."""
    missing = [] if settings.judge is None else refusals(read_key, require_openai)
    for what, path in settings.paths.items():
        try:
            external(settings.model_copy(update=_only(what, path)), called)
        except RefusedInput as error:
            missing.append(str(error))
    if missing or (settings.data is not None and _is_artifact(settings.data)):
        # The rows of a dataset are what `shard` and `instruct` checked.
        return missing
    with TemporaryDirectory(prefix="llava-exam-") as folder:
        try:
            open_exam(settings, Path(folder) / "exam", called, _listed())
        except RefusedInput as error:
            return [str(error)]
    return []


def open_exam(
    settings: ExamSettings,
    folder: Path,
    called: Called = str,
    look: Callable[[Store, str], Picture] = Picture.at,
) -> Exam:
    """Copy the files into `folder` (which it makes) and read the questions; nothing is asked yet."""
    folder.mkdir(parents=True)
    copies = {}
    for what, path in settings.paths.items():
        if what not in READ_IN_PLACE:
            with _naming({}, called(what)):
                copies[what] = copy(path, what, folder, settings.follow_links)
    own = {str(copies[what]): path for what, path in settings.paths.items() if what in copies}
    benchmark = find(settings.benchmark)
    with _naming(own):
        items, files = benchmark.gather(Paper(settings, copies, folder, look, called, own))
    if not items:
        raise RefusedInput(
            f"{settings.title}: its files hold no question: {', '.join(settings.paths.values())}"
        )
    asked = [[item.prompt, None if item.picture is None else item.picture.sha256, item.row] for item in items]
    with _naming(own):
        labels = {
            path.relative_to(folder).as_posix(): sha256_of(read_text(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    terms: Record = {"benchmark": settings.benchmark, "max_new_tokens": settings.answer_length}
    if settings.judge is not None:
        judged = {"runs": settings.judge_runs, "swap": settings.judge_swap}
        terms["judge"] = recipe(settings.judge) | judged
    exam = Exam(
        settings.title,
        benchmark,
        items,
        files,
        sha256_of({"asked": asked, "labels": labels, "terms": terms}),
        settings.answer_length,
        (RIGHT, BLANK) if settings.blank_images else (RIGHT,),
        folder,
        f"exams/{settings.title}",
        own,
        settings,
    )
    tried = answered(exam, [""] * len(items), "", "tried-")
    if benchmark.unscored(tried) is None:
        # Labels that do not fit are refused now, and not when everything is answered.
        score(exam, tried)
    assert tried.answers is not None
    tried.answers.unlink()
    return exam


def answered(exam: Exam, texts: Sequence[str], model: str, prefix: str = "") -> Files:
    """Write the answers file, a line per item, into the exam's folder; gives the files to score.

    A line is `question_id, prompt, text, answer_id, model_id, metadata`, and what else the item's row holds; a
    benchmark may write another format.
    """
    rows = []
    for item, text in zip(exam.items, texts, strict=True):
        row = {"question_id": item.row.get("question_id"), "prompt": item.prompt, "text": text}
        row |= {"answer_id": sha256_of([exam.digest, model, item.row])[:22], "model_id": model}
        rows.append(row | {name: value for name, value in item.row.items() if name != "question_id"})
    ending, body = exam.benchmark.write(exam.items, rows)
    path = exam.local / f"{prefix}answers{ending}"
    path.write_text(body, encoding="utf-8")
    return replace(exam.files, answers=path)


def score(exam: Exam, files: Files) -> Scored:
    """The benchmark's score of an exam's files; a message names the user's own files."""
    with naming(exam, files):
        return exam.benchmark.score(files)


def naming(exam: Exam, files: Files) -> AbstractContextManager[None]:
    """A refusal inside names the user's own files, and the exam's by their place in the artifact."""
    names = dict(exam.own)
    if exam.settings is not None:
        names[str(files.answers)] = f"the answers to {next(iter(exam.settings.paths.values()))}"
    return _naming(names | {f"{exam.local}/": f"{exam.folder}/".lstrip("/")})


def units(exam: Exam, scored: Scored) -> list[Unit]:
    """The scored unit of each item (over all questions: none may be left out)."""
    if exam.benchmark.units_in_order:
        return list(scored.units)
    by_name = {exam.benchmark.unit_name(unit): unit for unit in scored.units}
    return [by_name[item.unit] for item in exam.items]


@contextmanager
def _naming(own: Mapping[str, str], field: str = "") -> Iterator[None]:
    """A refusal inside names the user's own files in the place of copies, and begins with `field`."""
    try:
        yield
    except RefusedInput as error:
        told = str(error)
        # The longest first: a copy's name may begin as another's.
        for copied in sorted(own, key=len, reverse=True):
            told = told.replace(copied, own[copied])
        error.args = (f"{field}: {told}" if field else told,)
        raise


def _only(what: str, path: str) -> dict[str, object]:
    """Changes to settings that leave one of their paths."""
    field, _, split = what.partition(" ")
    none: dict[str, object] = dict.fromkeys(
        ("data", "questions", "labels", "splits", "images", "reference", "context")
    )
    return none | {field: {split: path} if split else path}


def _is_artifact(uri: str) -> bool:
    return dataset(uri) is not None


def _listed() -> Callable[[Store, str], Picture]:
    """Looks for pictures in a listing of their folder, and reads none of them."""
    known: dict[str, set[str]] = {}

    def look(store: Store, key: str) -> Picture:
        if store.uri not in known:
            known[store.uri] = {entry.key for entry in store.list()}
        if key not in known[store.uri] and store.stat(key) is None:
            raise FileNotFoundError(key)
        return Picture("", None, store, key)

    return look
