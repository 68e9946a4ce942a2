"""Evaluation with a real small model, real Parquet, Ray and MLflow: scores, resumption, refusals, the report."""

import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from benchmarks.evaluation import shapes
from components.contract import Artifact, Component, Job, Settings, open_store, sha256_of
from components.evaluate import Evaluate, EvaluateSettings, ExamSettings, exams, report
from components.evaluate.answering import RIGHT, Answerer, Ask, answer_all, batches
from components.evaluate.heldout_scores import Answered, metrics
from components.evaluate.report import Sample
from components.pages.markdown import escape
from components.register import RegisterSettings
from components.scoring import science_data
from components.scoring.base import read_rows
from components.scoring.benchmarks import Files, find
from components.scoring.benchmarks.letters import letter
from components.scoring.benchmarks.vqa import is_match
from components.scoring.outcomes import comparable, outcomes
from components.scoring.paired import OtherQuestions
from components.scoring.pictures import Picture, blank
from components.scoring.questions import (
    HeldOutQuestion,
    exam_digest,
    read_questions,
    two_pictures,
    wrong_pictures,
)
from components.shard.settings import ShardSettings
from components.shard.sources import llava as llava_source
from components.tiny_world import scenes
from llava import generate
from llava.data.jsonl import to_jsonl
from llava.data.schema import write_rows
from llava.errors import LlavaError, RefusedInput
from tests.support.judge_endpoint import Endpoint, said
from tests.support.repository import REPOSITORY
from tests.support.tiny_llava import tiny_llava

QUESTIONS = 40
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


def dataset(folder: Path, rows: list[Row], train: list[Row] | None = None) -> Path:
    (folder / "heldout").mkdir(parents=True)
    if train:
        (folder / "train").mkdir()
        write_rows(folder / "train" / "part-00000.parquet", train)
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
    """40 questions; to every other one the model's own answer is the expected one."""
    model, processor = generate.load(model_folder / "model")
    rows = []
    for number in range(QUESTIONS):
        colour, question = COLOURS[number % len(COLOURS)], f"Which is number {number}?"
        with Image.open(io.BytesIO(picture(colour))) as image:
            (own,) = generate.answer(model, processor, [question], [image], 6)
        expected = f" {own.upper()}. " if number % 2 == 0 else "no answer of this model"
        rows.append(row(f"q{number:03d}", colour, question, expected, "even" if number % 2 == 0 else "odd"))
    return rows


@pytest.fixture
def inputs(run_in: Callable[..., Any], model_folder: Path, known_rows: list[Row], tmp_path: Path) -> Any:
    """A model that was trained on nine pictures, of which the exam shows one too; and the exam."""
    train = [row(f"t{number}", "orange", "?", "!") for number in range(8)] + [row("t8", "red", "?", "!")]
    questions = run_in(
        Given("instruct", dataset(tmp_path / "questions", known_rows, train)), GivenSettings()
    ).artifact
    model = run_in(Given("finetune", model_folder), GivenSettings(), {"dataset": questions}).artifact
    return {"model": model, "questions": questions}


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Six scenes of the tiny world in each benchmark's format."""
    return shapes.write(tmp_path_factory.mktemp("exams") / "shapes", 6)


def test_an_evaluation_scores_every_benchmark_from_files_that_anybody_can_score_again(
    run_in: Callable[..., Any],
    inputs: dict[str, Artifact],
    entries: list[dict[str, Any]],
    mlflow_db: str,
    known_rows: list[Row],
) -> None:
    settings = EvaluateSettings(
        max_new_tokens=6, batch_size=8, workers=2, benchmarks=[one | {"max_new_tokens": 8} for one in entries]
    )
    artifact = run_in(Evaluate(), settings, inputs).artifact
    found, folder = artifact.manifest.metrics, artifact.local()
    assert found["eval/n"] == len(known_rows)
    assert found["eval/vqa/even/exact_match"] == 100
    assert found["eval/vqa/odd/exact_match"] == 0
    assert found["eval/vqa/exact_match"] == 50
    assert found["eval/vqa/even/wrong_image"] < 50
    assert found["eval/loss"] > 0
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in known_rows]
    shown = {row["id"]: row["image"]["bytes"] for row in known_rows}
    assert all(shown[line["id"]] != shown[line["wrong_image_of"]] for line in lines)

    notes = artifact.manifest.notes["exams"]
    assert list(notes) == ["vqa", "pope", "scienceqa", "vqa-ten", "own", "captions", "llava-bench"]
    # Without a judge it is answered, with its pictures and with blank ones, and not scored.
    assert notes.pop("llava-bench")["scores"] == {}
    said_ = [
        {
            row["question_id"]: row["text"]
            for row in read_rows(folder / "exams" / "llava-bench" / f"{name}.jsonl")
        }
        for name in ("answers", "blank-answers")
    ]
    assert len(said_[0]) == 6 and said_[0].keys() == said_[1].keys() and said_[0] != said_[1]
    again = outcomes(artifact)
    for name, note in notes.items():
        told = {score: value for score, value in again[name].scores.items() if math.isfinite(value)}
        assert {score: value for score, value in note["scores"].items() if value is not None} == told
        if name != "vqa":
            assert {found[f"eval/{name}/{score}"] for score in told} == set(told.values())
            assert f"eval/{name}/blank_image/{find(note['benchmark']).headline}" in found or not told
    assert (notes["pope"]["n"], notes["vqa-ten"]["n"], notes["captions"]["n"]) == (24, 6, 6)
    # A model of random weights names no option: that is reported, and wrong.
    assert notes["scienceqa"]["failed"] == notes["scienceqa"]["n"] > 0
    pope = folder / "exams" / "pope"
    labels = {split: pope / f"labels-{split}.jsonl" for split in ("random", "adversarial")}
    files = Files(pope / "answers.jsonl", pope / "questions.jsonl", labels)
    assert find("pope").score(files).scores["random/yes_ratio"] == notes["pope"]["scores"]["random/yes_ratio"]

    text = (folder / "report.md").read_text()
    assert "| vqa/exact\\_match | 40 | 50.0 (" in text
    assert "| all | 40 | 50.0 |" in text
    assert "1 of 7 pictures" not in text
    assert re.search(
        r"contamination: 1 of 13 pictures are in the training data; their questions \(6 of vqa\) count", text
    )
    sampled = [
        line
        for line in text.splitlines()
        if re.match(r"\| (even|odd|pope|scienceqa|vqa-ten|own|captions|llava-bench) \|", line)
    ]
    assert len(sampled[-report.SAMPLES :]) == 20
    client = MlflowClient(mlflow_db)
    run = client.get_run(artifact.manifest.mlflow_run_id)
    assert run.data.metrics["eval/vqa/exact_match"] == 50
    published = {file.path for file in client.list_artifacts(run.info.run_id, "eval")}
    pages = ("report.md", "samples.png", "benchmarks.png", "by_kind.png", "answers.json", "benchmarks.json")
    assert {f"eval/{name}" for name in pages} <= published


def test_pictures_that_were_trained_on_can_be_left_out(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], known_rows: list[Row]
) -> None:
    settings = EvaluateSettings(max_new_tokens=2, contamination="exclude")
    artifact = run_in(Evaluate(), settings, inputs).artifact
    red = [row["id"] for row in known_rows if row["image"]["path"] == "red.png"]
    told = json.loads(artifact.folder.read("contamination.json"))
    assert told["questions"] == {"vqa": red}
    assert told["looked_through"] == [inputs["questions"].uri]
    assert artifact.manifest.metrics["eval/n"] == QUESTIONS - len(red)
    assert outcomes(artifact)["vqa"].n == artifact.manifest.notes["exams"]["vqa"]["n"] == QUESTIONS - len(red)
    inputs["questions"].folder.delete("manifest.json")
    with pytest.raises(RefusedInput, match=r"exclude: 1 of the artifacts that .* comes from are gone"):
        run_in(Evaluate(), EvaluateSettings(max_new_tokens=3, contamination="exclude"), inputs)


def asks(rows: list[Row]) -> list[Ask]:
    return [
        Ask(f"vqa/{number:07d}", row["conversations"][0]["value"][8:], 6, Picture.of(row["image"]["bytes"]),
            blank=True, expected="red")
        for number, row in enumerate(rows)
    ]  # fmt: skip


def test_batched_and_single_answers_are_the_same(
    run_in: Callable[..., Any], model_folder: Path, entries: list[dict[str, Any]], tmp_path: Path
) -> None:
    worker = Answerer(run_in(Given("finetune", model_folder), GivenSettings()).artifact, gpu=False)
    waiting = []
    for number, entry in enumerate(entries):
        settings = ExamSettings(**entry | {"max_new_tokens": 8})
        exam = exams.open_exam(settings, tmp_path / str(number))
        waiting += [
            Ask(f"{settings.title}/{place}", item.prompt, 8, item.picture)
            for place, item in enumerate(exam.items)
        ]
    together = {one["key"]: one["answers"] for batch in batches(waiting, 32) for one in worker.answer(batch)}
    alone = {ask.key: worker.answer([ask])[0]["answers"] for ask in waiting}
    assert len(alone) > 40
    assert together == alone
    assert len({answers[RIGHT] for answers in alone.values()}) > 10


@pytest.mark.drill
def test_a_killed_evaluation_goes_on_with_the_unfinished_batches_alone(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], known_rows: list[Row], tmp_path: Path
) -> None:
    written: list[str] = []

    def run(name: str, stop_after: int | None = None) -> dict[str, Any]:
        folder = open_store(tmp_path / name)
        before = {entry.key for entry in folder.list()}

        def before_write() -> None:
            if stop_after is not None and len(list(folder.list())) == stop_after:
                raise KeyboardInterrupt

        found = answer_all(
            inputs["model"], asks(known_rows), folder, batch_size=8, workers=1, before_write=before_write,
            say=written.append,
        )  # fmt: skip
        assert len(list(folder.list())) == 5
        assert before <= {entry.key for entry in folder.list()}
        lines = [json.loads(line) for entry in folder.list() for line in folder.read(entry.key).splitlines()]
        assert sorted(line["key"] for line in lines) == [ask.key for ask in asks(known_rows)]
        return found

    with pytest.raises(KeyboardInterrupt):
        run("killed", stop_after=2)
    kept = {
        entry.key: open_store(tmp_path / "killed").stat(entry.key)
        for entry in open_store(tmp_path / "killed").list()
    }
    resumed = run("killed")
    assert "16 of 40 questions are answered already" in written
    assert {key: open_store(tmp_path / "killed").stat(key) for key in kept} == kept
    assert resumed == run("undisturbed")


@pytest.mark.drill
def test_a_crash_before_the_commit_gives_the_same_answers_file(
    run_in: Callable[..., Any],
    inputs: dict[str, Artifact],
    lines: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    say = type(lines).say

    def crash(text: str, prefix: str = "") -> None:
        say(lines, text, prefix)
        if "questions answered" in text:
            raise KeyboardInterrupt

    settings = EvaluateSettings(max_new_tokens=5, workers=1, batch_size=16)
    monkeypatch.setattr(lines, "say", crash)
    with pytest.raises(KeyboardInterrupt):
        run_in(Evaluate(), settings, inputs)
    monkeypatch.undo()
    artifact = run_in(Evaluate(), settings, inputs).artifact
    assert "16 of 40 questions are answered already" in lines.said
    whole = run_in(Evaluate(), settings, inputs, tmp_path / "elsewhere").artifact
    assert artifact.folder.read("answers.jsonl") == whole.folder.read("answers.jsonl")


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
    settings = EvaluateSettings(max_new_tokens=4, workers=1, batch_size=16)
    artifact = run_in(Evaluate(), settings, inputs).artifact
    assert len(killed) == 1
    assert artifact.manifest.metrics["eval/n"] == QUESTIONS


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        (0, {"labels": {"random": "LABELS"}}, r"questions without a label file: 12 of adversarial"),
        (0, {"images": "."}, r"images: no picture shapes-.*png in .*; name the folder that has it"),
        (0, {"questions": "nowhere.jsonl"}, r"nowhere\.jsonl: .*give the path of a file"),
        (2, {"labels": "OTHER"}, r"answers belong to none of the questions|questions have no answers"),
        (3, {"data": "."}, r"neither a LLaVA-format JSON or JSONL nor a finished dataset artifact"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_asked(
    entries: list[dict[str, Any]], entry: int, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    known = {"LABELS": entries[0]["labels"]["random"], "OTHER": entries[3]["data"]}
    if "labels" in change:
        labels = change["labels"]
        change = {"labels": known[labels] if isinstance(labels, str) else {"random": known[labels["random"]]}}
    with pytest.raises(RefusedInput, match=message):
        exams.open_exam(ExamSettings(**entries[entry] | change), tmp_path / "exam")


def test_another_judge_is_another_exam_and_without_one_the_exam_is_what_it_always_was(tmp_path: Path) -> None:
    row = {"question_id": 1, "text": "What?", "category": "conv"}
    (tmp_path / "rows.jsonl").write_bytes(to_jsonl([row]))
    files = dict.fromkeys(("questions", "reference", "context"), str(tmp_path / "rows.jsonl"))
    places = iter(range(99))

    def digest(**given: Any) -> str:
        settings = ExamSettings(benchmark="llava-bench", **files, **given)
        return exams.open_exam(settings, tmp_path / f"{next(places)}").digest

    judge = {"model": "j", "url": "http://127.0.0.1/v1"}
    asked = [["What?", None, {"question_id": 1, "metadata": {"category": "conv"}}]]
    labels = {f"{name}.jsonl": sha256_of(json.dumps(row) + "\n") for name in files}
    terms = {"benchmark": "llava-bench", "max_new_tokens": 1024}
    assert digest() == sha256_of({"asked": asked, "labels": labels, "terms": terms})
    judged = [
        digest(judge=judge | changed, **others)
        for changed, others in (
            ({}, {}), ({"model": "k"}, {}), ({"temperature": 1.0}, {}), ({"max_tokens": 9}, {}),
            ({}, {"judge_runs": 2}), ({}, {"judge_runs": 2, "judge_swap": True}),
        )
    ]  # fmt: skip
    assert len({digest(), *judged}) == 7
    assert digest(judge=judge | {"seconds": 1.0, "concurrency": 1}) == judged[0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"benchmark": "pope", "questions": "q"}, "pope: give questions and labels"),
        ({"benchmark": "pope", "questions": "q", "labels": "l"}, "give labels by split"),
        ({"benchmark": "vqa", "name": "mine"}, r"mine \(vqa\): give data, or questions and labels"),
        ({"benchmark": "vqa", "data": "d"}, "benchmarks: 'vqa' is taken"),
        ({"benchmark": "mme"}, "mme: give questions and labels"),
        ({"benchmark": "vqa2", "data": "d"}, "no such benchmark; known: vqa, pope, "),
        ({"benchmark": "captions", "data": "s3://key:secret@host/x"}, "credentials|password"),
        (
            {"benchmark": "llava-bench", "questions": "q", "judge": {"model": "m"}},
            "a judge needs reference and context",
        ),
        (
            {
                "benchmark": "llava-bench",
                "questions": "q",
                "reference": "r",
                "context": "c",
                "judge": {"model": "m", "url": "http://me:secret@host/v1"},
            },
            "the judge's URL holds a URI with a password",
        ),
    ],
)
def test_an_entry_that_cannot_work_is_refused_by_name(entry: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LlavaError), match=message):
        EvaluateSettings(benchmarks=[entry])


def test_a_judge_is_asked_again_for_what_failed_and_for_nothing_else(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], tmp_path: Path, lines: Any, endpoint: Endpoint
) -> None:
    pytest.importorskip("openai")
    folder = tmp_path / "bench"
    folder.mkdir()
    rows = [
        {"question_id": number, "image": f"{number}.png", "text": f"[q{number}] What?", "category": "conv"}
        for number in range(4)
    ]
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture("red"))
    notes = [{"image": f"{number}.png", "caption": "a red picture"} for number in range(4)]
    reference = [row | {"text": "Red.", "answer_id": f"r{row['question_id']}"} for row in rows]
    for name, lines_ in (("questions", rows), ("context", notes), ("reference", reference)):
        (folder / f"{name}.jsonl").write_bytes(to_jsonl(lines_))
    entry = {
        "benchmark": "llava-bench", "questions": str(folder / "questions.jsonl"), "images": str(folder),
        "max_new_tokens": 4,
    }  # fmt: skip
    judge = {"model": "j", "url": endpoint.url, "tries": 1, "pause": 0.01}
    judged = entry | {
        "reference": str(folder / "reference.jsonl"), "context": str(folder / "context.jsonl"),
        "judge": judge, "judge_runs": 2, "judge_swap": True, "max_failed": 0.2,
    }  # fmt: skip
    endpoint.replies = {f"q{number}": said("8 4") for number in range(3)} | {
        "q3": said("none", "none", "8 4")
    }
    settings = EvaluateSettings(max_new_tokens=2, limit=6, benchmarks=[judged])
    with pytest.raises(RefusedInput, match=r"2 of 8 judgements failed .* is 20 %: there is no score"):
        run_in(Evaluate(), settings, inputs)
    assert dict(endpoint.asked) == {"q0": 2, "q1": 2, "q2": 2, "q3": 2}
    artifact = run_in(Evaluate(), settings, inputs).artifact
    assert dict(endpoint.asked) == {"q0": 2, "q1": 2, "q2": 2, "q3": 4}
    note = artifact.manifest.notes["exams"]["llava-bench"]
    # First run 100 x 4 / 8, in the swapped one the candidate stands first: 100 x 8 / 4.
    assert note["scores"]["conversation"] == pytest.approx((50 + 200) / 2)
    assert outcomes(artifact)["llava-bench"].scores["all"] == note["scores"]["all"]
    other = judged | {"judge": judge | {"model": "k"}}
    again = run_in(
        Evaluate(), EvaluateSettings(max_new_tokens=2, limit=6, benchmarks=[other]), inputs
    ).artifact
    assert comparable(artifact, again, ["vqa"])
    with pytest.raises(
        OtherQuestions, match="llava-bench: the two answered other questions, or were judged otherwise"
    ):
        comparable(artifact, again, ["llava-bench"])
    unjudged = run_in(
        Evaluate(), EvaluateSettings(max_new_tokens=2, limit=6, benchmarks=[entry]), inputs
    ).artifact
    assert unjudged.manifest.notes["exams"]["llava-bench"]["scores"] == {}
    assert any("answered and not scored" in line for line in lines.said)
    answers = (unjudged.local() / "exams" / "llava-bench" / "answers.jsonl").read_text().splitlines()
    first = json.loads(answers[0])
    assert list(first) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


def test_scienceqa_is_written_as_training_data_that_shard_reads(tmp_path: Path) -> None:
    shapes.write_science(tmp_path / "data", list(scenes(5, 12, "train")), random.Random(1), "train")
    problems, splits = (tmp_path / "data" / f"{name}.json" for name in ("problems", "pid_splits"))
    count = science_data.write(problems, splits, "train", "QCM-LEA", tmp_path / "data" / "train.json")
    settings = ShardSettings(
        source="llava", path=str(tmp_path / "data"), conversations="train.json", heldout=0
    )
    listed = llava_source.listing(settings)
    rows = [llava_source.load(settings, listed.shared, item).row for item in listed.items]
    assert count == len(rows) > 6
    known = json.loads(problems.read_text())
    for row in rows:
        asked, told = (turn["value"] for turn in row["conversations"])
        problem = known[row["id"]]
        assert ("<image>" in asked) is (row.get("image") is not None) is (problem["image"] is not None)
        assert told.startswith("Things have colours.\n")
        assert letter(told) == "ABC"[problem["answer"]]


def test_the_configs_of_the_documentation_are_valid() -> None:
    text = (REPOSITORY / "docs" / "evaluation.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    evaluate, register = (
        next(block[key] for block in blocks if key in block) for key in ("evaluate", "register")
    )
    assert [one.title for one in EvaluateSettings(**evaluate).benchmarks] == [
        "pope", "scienceqa", "receipts", "captions", "llava-bench"
    ]  # fmt: skip
    assert RegisterSettings(**register).floors == {"scienceqa/IMG": 60}


def test_a_dataset_is_a_benchmark_of_its_held_out_rows(
    run_in: Callable[..., Any], known_rows: list[Row], tmp_path: Path
) -> None:
    rows = [
        one | {"captions": ["a picture", f"a {one['image']['path'][:-4]} picture"]} for one in known_rows[:6]
    ]
    uri = run_in(Given("shard", dataset(tmp_path / "rows", rows)), GivenSettings()).artifact.uri
    asked = exams.open_exam(ExamSettings(benchmark="vqa", data=uri), tmp_path / "vqa")
    assert [item.prompt for item in asked.items] == [f"Which is number {number}?" for number in range(6)]
    told = exams.open_exam(ExamSettings(benchmark="captions", data=uri), tmp_path / "captions")
    scored = find("captions").score(exams.answered(told, ["a red picture"] * 6, "m"))
    assert scored.n == 6
    assert scored.units[0].expected == "a picture / a red picture"
    assert [item.picture.sha256 for item in told.items if item.picture] == [
        item.picture.sha256 for item in asked.items if item.picture
    ]


def test_a_dataset_without_held_out_rows_is_refused(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    empty = run_in(Given("no-rows", dataset(tmp_path / "empty", [])), GivenSettings()).artifact
    with pytest.raises(RefusedInput, match="no held-out rows"):
        run_in(Evaluate(), EvaluateSettings(), inputs | {"questions": empty})


def test_held_out_rows_about_one_picture_are_refused_whatever_its_names(tmp_path: Path) -> None:
    rows = [row(name, colour, "Which?", "red", None) for name, colour in (("a", "red"), ("b", "red"))]
    with pytest.raises(
        RefusedInput, match=r"its 2 held-out questions show one picture.*raise shard\.heldout"
    ):
        two_pictures(open_store(dataset(tmp_path / "one", rows)))
    rows.append(row("c", "blue", "Which?", "blue", None))
    two_pictures(open_store(dataset(tmp_path / "two", rows)))


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
    questions = [HeldOutQuestion(f"{n}", "k", "q", "e", image.encode()) for n, image in enumerate(shown)]
    wrong = wrong_pictures(questions, seed)
    assert all(shown[other] != own for own, other in zip(shown, wrong, strict=True))
    assert {shown[other] for other in wrong} == set(shown)


def test_one_picture_cannot_be_deranged() -> None:
    with pytest.raises(RefusedInput, match="needs two"):
        wrong_pictures([HeldOutQuestion(name, "k", "q", "e", b"same") for name in "ab"], 0)


def test_the_exam_is_another_one_when_anything_that_was_asked_differs() -> None:
    def exam(image: bytes = b"a", text: str = "q", order: int = 0, tokens: int = 6) -> str:
        questions = [
            HeldOutQuestion("1", "k", text, "e", image),
            *(HeldOutQuestion(n, "k", "q", "e", n.encode()) for n in "xyz"),
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
        ("two", "2", True),
        ("The red one!", "red one.", True),
        ("red", "red.", True),
        ("red apple", "red", False),
        ("", "", False),
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


def test_the_report_survives_any_text_and_shows_it_as_text() -> None:
    odd = "a $x_{1 | b\nc \x00 日本 \\frac <image> <script>alert(1)</script> [x](javascript:y) https://z.w **b** `c`"
    heldout = [answered("$k_{", index % 2 == 0, odd) for index in range(18)]
    samples = [
        Sample("$k_{", odd, odd, {RIGHT: (odd, index % 2 == 0)}, ("vqa", index)) for index in range(30)
    ]
    picked = report.pick(samples)
    assert len(picked) == 20
    image = Image.new("RGB", (30, 20), "teal")
    for figure in (report.samples_figure(picked, [image] * 19 + [None]), report.bar_chart(heldout)):
        file = io.BytesIO()
        figure.savefig(file, dpi=20)
        assert file.getvalue().startswith(b"\x89PNG")
    lines = report.page({"model": "m"}, {}, heldout, [], picked).splitlines()
    assert sum(line.count(" | ") for line in lines if "frac" in line) == 20 * 3
    text = "\n".join(line for line in lines if "frac" in line)
    # Every character that could begin markup stands behind a backslash.
    assert not re.search(r"[<>`*\[\]$_]|://", re.sub(r"\\.", "", text))
    assert escape("a | b") == "a \\| b"


def test_a_blank_picture_has_the_size_of_its_picture_and_the_processors_mean_colour(
    model_folder: Path,
) -> None:
    _, processor = generate.load(model_folder / "model")
    empty = blank(processor.image_processor, (48, 40))
    assert empty.size == (48, 40)
    assert generate.pixel_values(processor, empty).abs().max() < 0.02
