"""Rows that are missing, doubled, unknown or reordered: the same number, or a refusal that says how many."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.scoring.benchmarks import Files, find
from llava.errors import RefusedInput

GOLDEN = Path(__file__).parent / "golden"
Lines = list[str]
POPE = ("answers.jsonl", "questions.jsonl", "random.jsonl", "adversarial.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden files that a test may spoil."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def pope(folder: Path) -> dict[str, float]:
    labels = {split: folder / "pope" / f"{split}.jsonl" for split in ("random", "adversarial")}
    return (
        find("pope")
        .score(Files(folder / "pope" / "answers.jsonl", folder / "pope" / "questions.jsonl", labels))
        .scores
    )


def change(path: Path, how: Callable[[Lines], Lines]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(how(lines)))


def without_first(lines: Lines) -> Lines:
    return lines[1:]


def doubled_first(lines: Lines) -> Lines:
    return [lines[0], *lines]


def replaced_first(lines: Lines) -> Lines:
    """The second row in place of the first: one is missing, one doubled, and the number of rows is right."""
    return [lines[1], *lines[1:]]


@pytest.mark.parametrize("name", POPE)
def test_pope_rows_may_stand_in_any_order(folder: Path, name: str) -> None:
    expected = pope(folder)
    change(folder / "pope" / name, lambda lines: random.Random(1).sample(lines, len(lines)))
    assert pope(folder) == expected


@pytest.mark.parametrize("name", POPE)
@pytest.mark.parametrize("how", [without_first, doubled_first, replaced_first])
def test_pope_rows_that_are_missing_or_doubled_are_refused_with_their_number(
    folder: Path, name: str, how: Callable[[Lines], Lines]
) -> None:
    change(folder / "pope" / name, how)
    with pytest.raises(RefusedInput, match=r"\b1 (of \d+ )?(questions?|label rows|answers)"):
        pope(folder)


def test_pope_labels_of_another_picture_are_refused(folder: Path) -> None:
    change(folder / "pope" / "random.jsonl", lambda lines: [line.replace("1.jpg", "9.jpg") for line in lines])
    with pytest.raises(
        RefusedInput, match="2 of 4 questions have no label; 2 of 4 label rows belong to no question"
    ):
        pope(folder)


def test_pope_answers_that_fit_two_questions_and_differ_are_refused_unless_metadata_tells(
    folder: Path,
) -> None:
    path = folder / "pope" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # dog/1.jpg is question 1 of both splits; the answers are Yes and "There is a dog in the image."
    alike = [row for row in rows if row["question_id"] == 1]
    assert len(alike) == 2
    alike[0]["text"], alike[1]["text"] = "Yes", "No"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RefusedInput, match="2 answers could be to several questions"):
        pope(folder)
    alike[0]["metadata"], alike[1]["metadata"] = {"category": "random"}, {"category": "adversarial"}
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    found = pope(folder)
    assert (found["random/recall"], found["adversarial/recall"]) == (50.0, 0.0)


def test_a_pope_split_without_labels_is_refused(folder: Path) -> None:
    labels = {"random": folder / "pope" / "random.jsonl"}
    with pytest.raises(RefusedInput, match="3 of adversarial"):
        find("pope").score(
            Files(folder / "pope" / "answers.jsonl", folder / "pope" / "questions.jsonl", labels)
        )


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vqa": ("vqa/answers.jsonl", "answers", {"labels": {"": "vqa/annotations.json"}}),
    "scienceqa": (
        "scienceqa/answers.jsonl",
        "answers",
        {"labels": {"": "scienceqa/problems.json"}, "splits": "scienceqa/pid_splits.json"},
    ),
    "mme": ("mme/answers.jsonl", "answers", {"labels": {"": "mme"}}),
    "mmbench": ("mmbench/answers.jsonl", "answers", {"labels": {"": "mmbench/table.tsv"}}),
}


@pytest.mark.parametrize("benchmark", CASES)
def test_answers_in_another_order_give_the_same_scores_and_missing_doubled_or_unknown_ones_are_refused(
    folder: Path, benchmark: str
) -> None:
    name, option, others = CASES[benchmark]
    path = folder / name
    given = {
        key: {split: folder / one for split, one in value.items()}
        if isinstance(value, dict)
        else folder / value
        for key, value in others.items()
    }

    def scores() -> str:
        return repr(find(benchmark).score(Files(**{option: path}, **given)).scores)

    expected, lines = scores(), path.read_text()
    change(path, lambda rows: random.Random(2).sample(rows, len(rows)))
    assert scores() == expected
    unknown = (
        lines.replace('"question_id": 3', '"question_id": 77')
        .replace('"15"', '"77"')
        .replace("a cat", "a cow")
    )
    for spoiled in (unknown, *("".join(how(lines.splitlines(keepends=True)))
                               for how in (without_first, doubled_first, replaced_first))):  # fmt: skip
        path.write_text(spoiled)
        with pytest.raises(RefusedInput, match=r"\d"):
            scores()


def written(folder: Path, benchmark: str) -> Files:
    """Golden answers to one benchmark, beside labels in the form that `LABELS` names."""
    if benchmark == "captions":
        rows = [
            {"image_id": image, "id": image, "caption": f"a picture of thing {image}"} for image in (1, 2, 3)
        ]
        (folder / "labels.json").write_text(json.dumps({"annotations": rows}))
        (folder / "results.json").write_text(json.dumps(rows))
        return Files(folder / "results.json", labels={"": folder / "labels.json"})
    if benchmark == "mm-vet":
        return Files(
            reviews=[folder / "mm-vet" / "grades.json"], labels={"": folder / "mm-vet" / "mm-vet.json"}
        )
    name, _, given = CASES[benchmark.partition(" ")[0]]
    labels, mme = folder / given["labels"][""], folder / "mme"
    if benchmark == "mme rows":
        labels = folder / "labels.jsonl"
    for path in sorted(mme.glob("*.txt")):
        for line in path.read_text().splitlines():
            picture, question, truth, _ = line.split("\t")
            if benchmark == "mme folder":
                labels = folder / "labels"
                one = labels / path.stem / "questions_answers_YN" / f"{Path(picture).stem}.txt"
                one.parent.mkdir(parents=True, exist_ok=True)
                one.open("a").write(f"{question}\t{truth}\n")
            elif benchmark == "mme rows":
                row = {"question_id": f"{path.stem}/{picture}", "text": question, "label": truth}
                labels.open("a").write(json.dumps(row) + "\n")
    splits = folder / given["splits"] if "splits" in given else None
    if splits:
        splits.write_text(json.dumps({"test": json.loads(splits.read_text())["test"]}))
    return Files(folder / name, labels={"": labels}, splits=splits)


LABELS = {
    "vqa": "vqa/annotations.json",
    "scienceqa": "scienceqa/problems.json",
    "scienceqa splits": "scienceqa/pid_splits.json",
    "mme": "mme/existence.txt",
    "mme folder": "labels/existence/questions_answers_YN/1.txt",
    "mme rows": "labels.jsonl",
    "mmbench": "mmbench/table.tsv",
    "captions": "labels.json",
    "mm-vet": "mm-vet/mm-vet.json",
    "mm-vet grades": "mm-vet/grades.json",
}


def change_rows(path: Path, how: Callable[[Lines], Lines]) -> None:
    """As `change`, for what is a row in the file's own form: an entry, an item of its list, a line under the head."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        ((name, rows),) = value.items() if len(value) == 1 else [("", value)]
        if isinstance(rows, dict):  # an entry may be there twice, which no dict can hold
            parts = [f"{json.dumps(key)}: {json.dumps(one)}" for key, one in rows.items()]
            path.write_text("{" + ", ".join(how(parts)) + "}")
        else:
            path.write_text(f'{{"{name}": [{", ".join(how([json.dumps(row) for row in rows]))}]}}')
    else:
        head = 1 if path.suffix == ".tsv" else 0
        change(path, lambda lines: [*lines[:head], *how(lines[head:])])


@pytest.mark.parametrize("benchmark", LABELS)
def test_label_rows_in_another_order_give_the_same_scores_and_missing_or_doubled_ones_are_refused(
    folder: Path, benchmark: str
) -> None:
    if benchmark == "captions":
        pytest.importorskip("pycocoevalcap")
    about = "mm-vet" if benchmark.startswith("mm-vet") else benchmark.replace(" splits", "")
    files, path = written(folder, about), folder / LABELS[benchmark]

    def scores() -> str:
        return repr(find(about.partition(" ")[0]).score(files).scores)

    expected, whole = scores(), path.read_text()
    change_rows(path, lambda rows: rows[::-1])
    assert path.read_text() != whole
    assert scores() == expected
    for how in (without_first, doubled_first, replaced_first):
        path.write_text(whole)
        change_rows(path, how)
        with pytest.raises(RefusedInput, match=r"\b1 "):
            scores()


def test_a_key_that_stands_twice_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"question_id": 1, "text": "2", "text": "3"}\n')
    with pytest.raises(RefusedInput, match=r"answers\.jsonl: 1 keys have entries more than once \(text\)"):
        find("vqa").score(Files(tmp_path / "answers.jsonl", labels={"": GOLDEN / "vqa" / "annotations.json"}))


@pytest.mark.parametrize(
    ("benchmark", "name", "how", "message"),
    [
        ("mmbench", "mmbench/table.tsv", None, r"table\.tsv: No such file"),
        ("mmbench", "mmbench/table.tsv", lambda text: text.replace("\n2\t", "\ntwo\t"),
         r"1 of 3 rows have no number as index \('two'\)"),
        ("mmbench", "mmbench/table.tsv", lambda text: text.replace("index", "number"), "3 of 3|rows more than once"),
        ("mme", "mme/answers.jsonl", None, r"answers\.jsonl: No such file"),
    ],
)  # fmt: skip
def test_files_that_are_not_there_or_not_what_they_should_be_are_refused_in_one_line(
    folder: Path, benchmark: str, name: str, how: Callable[[str], str] | None, message: str
) -> None:
    files, path = written(folder, benchmark), folder / name
    text = path.read_text()
    path.unlink()
    if how is not None:
        path.write_text(how(text))
    with pytest.raises(RefusedInput, match=message):
        find(benchmark).score(files)


def test_a_result_file_of_mme_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"count\.txt: No such file"):
        find("mme").score(Files(tmp_path / "count.txt"))


def test_pope_answers_without_a_text_are_refused(folder: Path) -> None:
    path = folder / "pope" / "answers.jsonl"
    change(path, lambda lines: [line.replace('"text"', '"answer"') for line in lines])
    with pytest.raises(RefusedInput, match="no 'text' in the row"):
        pope(folder)


@pytest.mark.parametrize("name", ["mmbench/table.tsv", "mmbench/answers.jsonl", "mme/existence.txt"])
def test_a_byte_order_mark_changes_nothing(folder: Path, name: str) -> None:
    benchmark = name.partition("/")[0]
    files = written(folder, benchmark)
    expected = repr(find(benchmark).score(files).scores)
    (folder / name).write_text("\ufeff" + (folder / name).read_text())
    assert repr(find(benchmark).score(files).scores) == expected


def test_a_problem_that_is_missing_is_refused_with_its_number(folder: Path) -> None:
    path = folder / "scienceqa" / "problems.json"
    problems = json.loads(path.read_text())
    del problems["12"]
    path.write_text(json.dumps(problems))
    with pytest.raises(RefusedInput, match=r"1 of 8 problems are missing \(12\)"):
        find("scienceqa").score(
            Files(folder / "scienceqa" / "answers.jsonl", labels={"": path},
                  splits=folder / "scienceqa" / "pid_splits.json")
        )  # fmt: skip


def test_reviews_in_another_order_give_the_same_scores_and_missing_ones_are_failures(folder: Path) -> None:
    paths = [folder / "llava-bench" / f"run{run}.jsonl" for run in (1, 2)]
    given = Files(folder / "llava-bench" / "answers.jsonl", reviews=paths)
    expected = find("llava-bench").score(given)
    change(paths[0], lambda lines: lines[::-1])
    assert find("llava-bench").score(given).scores == expected.scores
    # Question 4 ("8 9 10") is a failure anyway: as a missing row it is one too.
    change(paths[0], lambda lines: [line for line in lines if '"question_id": 4' not in line])
    found = find("llava-bench").score(given)
    assert (found.scores, found.failed) == (expected.scores, expected.failed)
    assert "1 judgements are missing and count as failed" in found.remarks


@pytest.mark.parametrize("how", [doubled_first, replaced_first])
def test_doubled_reviews_are_refused(folder: Path, how: Callable[[Lines], Lines]) -> None:
    path = folder / "llava-bench" / "run1.jsonl"
    change(path, how)
    with pytest.raises(RefusedInput, match="1 questions have rows more than once"):
        find("llava-bench").score(Files(reviews=[path]))


def test_reviews_of_unknown_questions_are_refused(folder: Path) -> None:
    answers = folder / "llava-bench" / "answers.jsonl"
    change(answers, without_first)
    with pytest.raises(RefusedInput, match="1 of 8 reviews belong to no question"):
        find("llava-bench").score(Files(answers, reviews=[folder / "llava-bench" / "run1.jsonl"]))


def test_captions_of_a_part_of_the_pictures_are_refused_unless_partial_is_said(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    rows = [{"image_id": image, "id": image, "caption": f"a picture of thing {image}"} for image in (1, 2, 3)]
    (tmp_path / "labels.json").write_text(json.dumps({"images": [], "annotations": rows}))
    (tmp_path / "results.json").write_text(json.dumps(rows[:2]))
    files = {"answers": tmp_path / "results.json", "labels": {"": tmp_path / "labels.json"}}
    with pytest.raises(RefusedInput, match="1 of 3 annotated images have no caption"):
        find("captions").score(Files(**files))
    found = find("captions").score(Files(**files, partial=True))
    assert found.n == 2
    assert "1 of 3 annotated images have no caption and are left out (partial)" in found.remarks


def test_files_that_are_cut_short_absent_or_no_json_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    labels = {"": GOLDEN / "vqa" / "annotations.json"}
    with pytest.raises(RefusedInput, match="No such file"):
        find("vqa").score(Files(path, labels=labels))
    path.write_text('{"question_id": 1, "text": "2"}\n{"question_id": 2, "te')
    with pytest.raises(RefusedInput, match="line 2 is no JSON"):
        find("vqa").score(Files(path, labels=labels))
    path.write_text('{"question_id": 1}\n')
    with pytest.raises(RefusedInput, match=r"1 .*no answer|4 of 5 questions have no answer"):
        find("vqa").score(Files(path, labels=labels))


def test_own_held_out_sets_in_llava_format_are_labels(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    more = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "one"}]
    samples = [
        {"id": "a", "image": "1.jpg", "conversations": turns},
        {"id": "b", "conversations": turns + more},
    ]
    (tmp_path / "own.json").write_text(json.dumps(samples))
    rows = [
        {"question_id": "b-2", "text": "1"},
        {"question_id": "a", "text": "cat"},
        {"question_id": "b-1", "text": "dog"},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = find("vqa").score(Files(tmp_path / "answers.jsonl", labels={"": tmp_path / "own.json"}))
    assert found.scores["exact_match"] == pytest.approx(200 / 3)
    assert found.units[0].image == "1.jpg"
