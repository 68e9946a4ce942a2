"""Evaluation with a real small model, real Parquet, Ray and MLflow: scores, resumption, refusals, the report."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image

from components.contract import Artifact, Component, Job, Settings, open_store
from components.evaluate import Evaluate, EvaluateSettings, report
from components.evaluate.answering import CHUNK, blank
from components.evaluate.questions import Question, exam_digest, read_questions, wrong_pictures
from components.evaluate.scores import Answered, is_match, metrics
from llava import generate
from llava.data.schema import write_rows
from llava.errors import RefusedInput
from tests.tiny_llava import tiny_llava

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple")
Row = dict[str, Any]


class GivenSettings(Settings):
    """Nothing to set."""


class Given(Component):
    """An artifact that holds a copy of a folder."""

    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = GivenSettings

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.source = name, folder  # type: ignore[misc]

    def run(self, job: Job) -> None:
        for path in sorted(self.source.rglob("*")):
            if path.is_file():
                job.folder.upload(path, path.relative_to(self.source).as_posix())


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 40), colour).save(file, "PNG")
    return file.getvalue()


def row(name: str, colour: str, question: str, expected: str, kind: str | None = "colour") -> Row:
    return {
        "id": name,
        "image": {"bytes": picture(colour), "path": f"{colour}.png"},
        "width": 48,
        "height": 40,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": expected},
        ],
        "kinds": None if kind is None else [kind],
    }


def dataset(folder: Path, rows: list[Row]) -> Path:
    (folder / "heldout").mkdir(parents=True)
    write_rows(folder / "heldout" / "part-00000.parquet", rows[: len(rows) // 2])
    write_rows(folder / "heldout" / "part-00001.parquet", rows[len(rows) // 2 :])
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    tiny_llava(folder / "model")
    return folder


@pytest.fixture(scope="module")
def known_rows(model_folder: Path) -> list[Row]:
    """70 questions; to every other one the model's own answer is the expected one."""
    model, processor = generate.load(model_folder / "model")
    rows = []
    for number in range(CHUNK + 6):
        colour, question = COLOURS[number % len(COLOURS)], f"Which is number {number}?"
        with Image.open(io.BytesIO(picture(colour))) as image:
            (own,) = generate.answer(model, processor, [question], [image], 6)
        expected = f" {own.upper()}. " if number % 2 == 0 else "no answer of this model"
        rows.append(row(f"q{number:03d}", colour, question, expected, "even" if number % 2 == 0 else "odd"))
    return rows


@pytest.fixture
def inputs(run_in: Callable[..., Any], model_folder: Path, known_rows: list[Row], tmp_path: Path) -> Any:
    questions = dataset(tmp_path / "questions", known_rows)
    return {
        "model": run_in(Given("finetune", model_folder), GivenSettings()).artifact,
        "questions": run_in(Given("instruct", questions), GivenSettings()).artifact,
    }


def test_an_evaluation_scores_every_question_under_three_conditions_and_reports_it(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], mlflow_db: str, known_rows: list[Row]
) -> None:
    settings = EvaluateSettings(max_new_tokens=6, batch_size=8, workers=2)
    artifact = run_in(Evaluate(), settings, inputs).artifact
    found = artifact.manifest.metrics
    assert found["eval/n"] == len(known_rows)
    assert found["eval/vqa/even/exact_match"] == 100
    assert found["eval/vqa/odd/exact_match"] == 0
    assert found["eval/vqa/exact_match"] == 50
    assert found["eval/vqa/even/wrong_image"] < 50
    assert found["eval/loss"] > 0

    lines = [json.loads(line) for line in (artifact.local() / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in known_rows]
    shown = {row["id"]: row["image"]["bytes"] for row in known_rows}
    assert all(shown[line["id"]] != shown[line["wrong_image_of"]] for line in lines)
    assert {file.path for file in artifact.manifest.files} == {
        "answers.jsonl", "by_kind.png", "example.png", "report.md", "samples.png"
    }  # fmt: skip
    assert "| all | 70 | 50.0 |" in (artifact.local() / "report.md").read_text()

    client = MlflowClient(mlflow_db)
    run = client.get_run(artifact.manifest.mlflow_run_id)
    assert run.data.metrics["eval/vqa/exact_match"] == 50
    published = {file.path for file in client.list_artifacts(run.info.run_id, "eval")}
    assert {"eval/report.md", "eval/samples.png", "eval/by_kind.png", "eval/answers.json"} <= published


def test_after_a_crash_answered_chunks_are_found_again(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = type(lines).say

    def crash(text: str, prefix: str = "") -> None:
        say(lines, text, prefix)
        if "questions answered" in text:
            raise KeyboardInterrupt

    settings = EvaluateSettings(max_new_tokens=5, workers=1)
    monkeypatch.setattr(lines, "say", crash)
    with pytest.raises(KeyboardInterrupt):
        run_in(Evaluate(), settings, inputs)
    monkeypatch.undo()
    artifact = run_in(Evaluate(), settings, inputs).artifact
    assert "1 of 2 chunks of answers are there already" in lines.said
    assert artifact.manifest.metrics["eval/n"] == CHUNK + 6


def test_a_killed_worker_is_replaced_and_every_question_is_answered(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    say, killed = type(lines).say, []

    def kill_worker(text: str, prefix: str = "") -> None:
        say(lines, text, prefix)
        if not killed and "questions answered" in text:
            own = psutil.Process().children(recursive=True)
            killed.extend(child for child in own if "".join(child.cmdline()).startswith("ray::Answerer"))
            for worker in killed:
                worker.kill()

    monkeypatch.setattr(lines, "say", kill_worker)
    artifact = run_in(Evaluate(), EvaluateSettings(max_new_tokens=4, workers=1), inputs).artifact
    assert len(killed) == 1
    assert artifact.manifest.metrics["eval/n"] == CHUNK + 6


def test_a_dataset_without_held_out_rows_is_refused(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    empty = run_in(Given("no-rows", dataset(tmp_path / "empty", [])), GivenSettings()).artifact
    with pytest.raises(RefusedInput, match="no held-out rows"):
        run_in(Evaluate(), EvaluateSettings(), inputs | {"questions": empty})


def test_an_artifact_without_a_model_is_refused(
    run_in: Callable[..., Any], inputs: dict[str, Artifact]
) -> None:
    with pytest.raises(RefusedInput, match=r"holds no model/config\.json"):
        run_in(Evaluate(), EvaluateSettings(), inputs | {"model": inputs["questions"]})


def test_rows_that_are_no_question_are_counted_by_reason(tmp_path: Path) -> None:
    good = row("good", "red", "Which?", "red", None)
    talk = row("talk", "red", "Which?", "red")
    talk["conversations"] = talk["conversations"] * 2
    text = row("text", "red", "Which?", "red") | {"image": None, "width": 0, "height": 0}
    folder = open_store(dataset(tmp_path / "mixed", [text, good, talk]))
    questions, skipped = read_questions(folder, None, 0)
    assert [(q.id, q.kind, q.question, q.expected) for q in questions] == [("good", "any", "Which?", "red")]
    assert questions[0].image == picture("red")
    assert skipped == {"no picture": 1, "not one question and its answer": 1}
    with pytest.raises(RefusedInput, match="1 x no picture"):
        read_questions(open_store(dataset(tmp_path / "texts", [text])), None, 0)


def test_a_limit_draws_the_same_questions_with_their_own_pictures_each_time(
    tmp_path: Path, known_rows: list[Row]
) -> None:
    folder = open_store(dataset(tmp_path / "questions", known_rows))
    first, _ = read_questions(folder, 20, 5)
    again, _ = read_questions(folder, 20, 5)
    other, _ = read_questions(folder, 20, 6)
    assert first == again != other
    assert len(first) == 20
    own = {row["id"]: row["image"]["bytes"] for row in known_rows}
    assert all(question.image == own[question.id] for question in first)


@pytest.mark.parametrize("seed", range(20))
def test_the_wrong_picture_is_never_the_same_picture(seed: int) -> None:
    shown = ["a", "b", "a", "c", "b", "a", "d", "d"]
    questions = [Question(f"{n}", "k", "q", "e", image.encode()) for n, image in enumerate(shown)]
    wrong = wrong_pictures(questions, seed)
    assert all(shown[other] != own for own, other in zip(shown, wrong, strict=True))
    assert {shown[other] for other in wrong} == set(shown)


def test_one_picture_cannot_be_deranged() -> None:
    with pytest.raises(RefusedInput, match="needs two"):
        wrong_pictures([Question(name, "k", "q", "e", b"same") for name in "ab"], 0)


def test_the_exam_is_another_one_when_anything_that_was_asked_differs() -> None:
    def exam(image: bytes = b"a", text: str = "q", order: int = 0, tokens: int = 6) -> str:
        questions = [
            Question("1", "k", text, "e", image),
            *(Question(n, "k", "q", "e", n.encode()) for n in "xyz"),
        ]
        wrong = wrong_pictures(questions, order)
        return exam_digest(questions, wrong, {"max_new_tokens": tokens})

    assert exam() == exam()
    orders = {exam(order=seed) for seed in range(12)}
    assert len(orders) > 1
    assert len({exam(), exam(image=b"b"), exam(text="p"), exam(tokens=7)}) == 4


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (" Red. ", "red", True),
        ("STRASSE", "straße", True),
        ("red", "red.", True),
        ("red..", "red", False),
        ("red apple", "red", False),
        ("", "", False),
        (".", "", False),
    ],
)
def test_exact_match(answer: str, expected: str, right: bool) -> None:
    assert is_match(answer, expected) is right


def answered(kind: str, right: bool, text: str = "x") -> Answered:
    conditions = ("right_image", "blank_image", "wrong_image")
    return Answered(
        id="1", kind=kind, question=text, expected=text, wrong_image_of="2",
        answers=dict.fromkeys(conditions, text),
        correct={condition: right and condition == "right_image" for condition in conditions},
        loss=3.0, tokens=2 if right else 4,
    )  # fmt: skip


def test_the_loss_is_a_mean_over_tokens_and_not_over_questions() -> None:
    found = metrics([answered("a", True), answered("b", False), answered("b", False)], "vqa")
    assert found["eval/loss"] == pytest.approx(9 / 10)
    assert found["eval/vqa/exact_match"] == pytest.approx(100 / 3)
    assert found["eval/vqa/a/blank_image"] == 0


def test_a_kind_with_odd_characters_gets_a_name_that_mlflow_takes() -> None:
    found = metrics([answered("what's / where?", True)], "vqa")
    assert found["eval/vqa/what_s _ where_/exact_match"] == 100


def test_the_report_survives_any_text() -> None:
    odd = "a $x_{1 | b\nc \x00 日本 \\frac <image>"
    rows = [answered("$k_{", index % 2 == 0, odd) for index in range(18)]
    picked = report.pick_samples(rows)
    assert len(picked) == 16
    image = Image.new("RGB", (30, 20), "teal")
    for figure in (report.samples_figure([rows[i] for i in picked], [image] * 16), report.bar_chart(rows)):
        file = io.BytesIO()
        figure.savefig(file, dpi=20)
        assert file.getvalue().startswith(b"\x89PNG")
    lines = report.page(rows, picked, {"model": "m"}).splitlines()
    assert sum(line.count(" | ") for line in lines if "frac" in line) == 16 * 4


def test_a_blank_picture_has_the_size_of_its_picture_and_the_processors_mean_colour(
    model_folder: Path,
) -> None:
    _, processor = generate.load(model_folder / "model")
    empty = blank(processor.image_processor, (48, 40))
    assert empty.size == (48, 40)
    assert generate.pixel_values(processor, empty).abs().max() < 0.02
