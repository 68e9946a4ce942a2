"""Scores of small files made by hand; each expected number carries its arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from components.scoring.benchmarks import (
    BENCHMARKS,
    Files,
    Scored,
    find,
    llava_bench,
    mm_vet,
    mmbench,
    mme,
    pope,
    scienceqa,
    vqa,
)
from components.scoring.benchmarks import captions as captions_
from components.scoring.benchmarks.letters import letter
from components.scoring.benchmarks.ptb import tokens
from llava.errors import RefusedInput
from workflows.scores.score import as_json

GOLDEN = Path(__file__).parent / "golden"


def files(name: str, **given: Any) -> Files:
    folder = GOLDEN / name
    known: dict[str, Any] = {
        "vqa": {"answers": folder / "answers.jsonl", "labels": {"": folder / "annotations.json"}},
        "pope": {
            "answers": folder / "answers.jsonl",
            "questions": folder / "questions.jsonl",
            "labels": {split: folder / f"{split}.jsonl" for split in ("random", "adversarial")},
        },
        "scienceqa": {
            "answers": folder / "answers.jsonl",
            "labels": {"": folder / "problems.json"},
            "splits": folder / "pid_splits.json",
        },
        "llava-bench": {
            "answers": folder / "answers.jsonl",
            "reviews": [folder / "run1.jsonl", folder / "run2.jsonl"],
        },
        "mme": {"answers": folder},
        "mmbench": {"answers": folder / "answers.jsonl", "labels": {"": folder / "table.tsv"}},
        "mm-vet": {"reviews": [folder / "grades.json"], "labels": {"": folder / "mm-vet.json"}},
    }
    return Files(**(known[name] | given))


def scored(name: str, **given: Any) -> Scored:
    return find(name).score(files(name, **given))


def test_vqa_scores_agree_with_the_arithmetic() -> None:
    found = scored("vqa")
    # Exact match with the majority: "Two" = 2 is right; red (not pink), on table (not table), 1000 (not many)
    # and the empty answer are wrong: 1 of 5.
    # Soft accuracy, k of 10 agree: (k min(1, (k-1)/3) + (10-k) min(1, k/3)) / 10
    #   2: k=10 -> 1;  red: k=3 -> (3 x 2/3 + 7 x 1)/10 = 0.9;  on table: k=1 -> (0 + 9 x 1/3)/10 = 0.3
    #   1,000 = 1000: k=2 -> (2 x 1/3 + 8 x 2/3)/10 = 0.6;  empty: 0     sum 2.8, mean 0.56
    assert found.scores == pytest.approx({"exact_match": 20.0, "soft_accuracy": 56.0}, abs=1e-12)
    assert (found.n, found.failed) == (5, 1)


def test_pope_scores_agree_with_the_arithmetic() -> None:
    # Ids restart in each split, rows are shuffled, and one question is asked about two pictures.
    # random: dog/1 yes-Yes, car/1 no-No, dog/2 no-"Yes, there is. No other ..." (first sentence: yes),
    #   cup/2 yes-"There is not a cup" (no): TP 1, TN 1, FP 1, FN 1.
    # adversarial: dog/1 yes-"There is a dog" (yes), leash/1 no-"" (failed: wrong, neither), fork/2 no-NO:
    #   accuracy 2/3, yes said 1, precision 1/1, recall 1/1, F1 2 x 1/(1 + 1) = 1, yes-ratio 1/3.
    found = as_json(scored("pope"))
    assert found["scores"] == {
        "random": {"accuracy": 50.0, "precision": 50.0, "recall": 50.0, "f1": 50.0, "yes_ratio": 50.0},
        "adversarial": {
            "accuracy": pytest.approx(200 / 3, abs=1e-12),
            "precision": 100.0,
            "recall": 100.0,
            "f1": 100.0,
            "yes_ratio": pytest.approx(100 / 3, abs=1e-12),
        },
        "mean_f1": 75.0,
    }
    assert (found["n"], found["failed"]) == (7, 1)


def test_scienceqa_columns_agree_with_the_arithmetic() -> None:
    found = scored("scienceqa")
    # id  subject grade text picture  truth  answer                                  read
    # 11  NAT     2          x        B      B                                       right
    # 12  NAT     8     x             A      A. one                                  right
    # 13  SOC     6     x    x        B      ... The answer is B.                    right
    # 14  LAN     7                   A      A.  (neither A nor "A. ")               failed
    # 15  LAN     3                   B      The answer is A. ... The answer is B.   failed (two)
    # 16  SOC     12         x        C      D   (three choices)                     beyond the choices
    # 17  NAT     1     x             A      (empty)                                 failed
    # 18  LAN     9                   B      The answer is B   (no full stop)        failed
    third = 100 / 3
    assert found.scores == pytest.approx(
        {
            "average": 37.5,  # 3 of 8
            "NAT": 2 * third,  # 11, 12 of 11, 12, 17
            "SOC": 50.0,  # 13 of 13, 16
            "LAN": 0.0,
            "TXT": 2 * third,  # 12, 13 of 12, 13, 17
            "IMG": 2 * third,  # 11, 13 of 11, 13, 16
            "NO": 0.0,  # of 14, 15, 18
            "G1-6": 50.0,  # 11, 13 of 11, 13, 15, 17
            "G7-12": 25.0,  # 12 of 12, 14, 16, 18
        },
        abs=1e-12,
    )
    assert (found.n, found.failed) == (8, 5)
    assert found.extra["failures"] == {"no letter": 4, "letter beyond the choices": 1}


def test_scienceqa_ensembles_agree_with_the_arithmetic() -> None:
    folder = GOLDEN / "scienceqa"
    found = scored("scienceqa", reference=folder / "gpt4.jsonl", reviews=[folder / "verdicts.jsonl"])
    # GPT-4:      11 A  12 -  13 B  14 A  15 B  16 -  17 A  18 C
    # complement: 11 A  12 A  13 B  14 A  15 B  16 D  17 A  18 C    right: 12 13 14 15 17 = 5 of 8
    assert found.extra["ensembles"]["complement"]["average"] == 62.5
    # Both give the same letter on 13 only. Verdicts: 11 B, 12 A, 14 A, 15 -, 16 C, 17 B, 18 B
    # right: 11 12 13 14 16 18 = 6 of 8; 15 has no letter and is wrong.
    judged = found.extra["ensembles"]["judge"]
    assert (judged["average"], judged["failed"], judged["disagreements"]) == (75.0, 1, 7)


def test_a_verdict_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder = GOLDEN / "scienceqa"
    lines = (folder / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "verdicts.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(RefusedInput, match="1 of 7 disagreements have no verdict"):
        scored("scienceqa", reference=folder / "gpt4.jsonl", reviews=[tmp_path / "verdicts.jsonl"])


def test_llava_bench_scores_agree_with_the_arithmetic() -> None:
    found = scored("llava-bench")
    # run 1: 1 (8, 6)  2 "8, 9"  3 (10, 7.5)  5 (9, 9); failed: 4 "8 9 10", 6 prose first, 7 "8/10 and ...", 8 "4 -2"
    #   conversation 15/16 = 93.75; detail 75; complex 100; all 31.5/35 = 90
    # run 2: 1 (8, 4)  2 (8, 8)  3 (10, 5)  4 (10, 10)  5 (9, 9)  6 (9, 6); failed: 7 "11 9", 8 empty
    #   conversation 12/16 = 75; detail 15/20 = 75; complex 15/18 = 83.3; all 42/54 = 77.7
    assert found.scores == pytest.approx(
        {
            "all": (90 + 100 * 42 / 54) / 2,
            "conversation": (93.75 + 75) / 2,
            "detail": 75.0,
            "complex": (100 + 100 * 15 / 18) / 2,
        },
        abs=1e-12,
    )
    assert (found.n, found.failed) == (8, 6)
    assert found.extra["spread"]["all"] == pytest.approx((90 - 100 * 42 / 54) / math.sqrt(2))


def test_a_stored_tuple_that_disagrees_with_its_text_is_reported_and_does_not_count() -> None:
    remark = next(text for text in scored("llava-bench").remarks if "disagree" in text)
    assert "2 stored scores" in remark
    assert "8 ([4, -2] stored, a failure in its text)" in remark
    assert "2 ([-1, -1] stored, [8.0, 9.0] in its text)" in remark


def test_over_the_failure_threshold_there_is_no_score() -> None:
    with pytest.raises(RefusedInput, match=r"6 of 16 judgements failed \(37.5 %\), the limit is 30 %"):
        scored("llava-bench", max_failed=0.3)


def test_a_swapped_review_gives_its_marks_to_the_right_answers(tmp_path: Path) -> None:
    row = {"question_id": 1, "answer1_id": "a0", "answer2_id": "r1", "category": "conv", "content": "6 8"}
    path = tmp_path / "swapped.jsonl"
    path.write_text(json.dumps(row | {"swapped": True}) + "\n")
    found = find("llava-bench").score(Files(reviews=[path]))
    assert found.scores["all"] == 100 * 6 / 8  # the candidate stood first and has 6


def test_reviews_of_another_models_answers_are_reported(tmp_path: Path) -> None:
    row = {"question_id": 1, "answer1_id": "r", "answer2_id": "other", "category": "conv", "content": "8 8"}
    (tmp_path / "reviews.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({"question_id": 1, "text": "x", "answer_id": "mine"}) + "\n"
    )
    found = find("llava-bench").score(Files(tmp_path / "answers.jsonl", reviews=[tmp_path / "reviews.jsonl"]))
    assert any("1 reviews name none of the answers" in remark for remark in found.remarks)


@pytest.mark.parametrize("answers", [GOLDEN / "mme", GOLDEN / "mme" / "answers.jsonl"])
def test_mme_points_agree_with_the_arithmetic(answers: Path) -> None:
    found = scored("mme", answers=answers, labels={"": GOLDEN / "mme"})
    # existence: 1.jpg yes-Yes, no-no: both right. 2.jpg yes-no, no-No: one right. 100 x 3/4 + 100 x 1/2 = 125
    # count: "There is one." is neither yes nor no, and yes for no: 0 + 0.  code_reasoning: 100 + 100
    scores = found.scores
    assert (scores["existence"], scores["count"], scores["code_reasoning"]) == (125.0, 0.0, 200.0)
    assert (scores["perception"], scores["cognition"]) == (125.0, 200.0)
    assert math.isnan(scores["OCR"])
    assert (found.n, found.failed) == (8, 1)


def test_mmbench_scores_agree_with_the_arithmetic() -> None:
    found = scored("mmbench")
    # 1 (dog): B | dog cup car cat: A | cup car cat dog: (D) | car cat dog cup: C. dog   all right
    # 2 (red): A. | blue red: B   all right.   3 (dog): E (failed) | girl dog man: "dog" | A   first wrong
    assert found.scores == pytest.approx({"accuracy": 200 / 3, "circular": 200 / 3}, abs=1e-12)
    assert (found.n, found.failed) == (3, 1)


def test_mm_vet_scores_agree_with_the_arithmetic() -> None:
    found = scored("mm-vet")
    # run 1: 1.0 (ocr math), 0.4 (rec), 0.0 (rec spat), "Sure, 0.9" failed   total 1.4/3, rec 0.4/2
    # run 2: 0.5, 0.2, 0.5 (0.6 is stored beside it), 0.3                    total 1.5/4, rec 1.0/3
    scores = found.scores
    assert scores["total"] == pytest.approx(50 * (1.4 / 3 + 1.5 / 4))
    assert scores["rec"] == pytest.approx(50 * (0.2 + 1 / 3))
    assert (scores["ocr"], scores["math"], scores["spat"]) == (75.0, 75.0, 25.0)
    assert math.isnan(scores["know"])
    assert (found.n, found.failed) == (4, 1)
    assert any("0.6 is stored, its text says 0.5" in remark for remark in found.remarks)


def test_caption_scores_agree_with_the_arithmetic(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    results = [{"image_id": 2, "caption": "Two cats."}, {"image_id": 1, "caption": "A dog runs on grass."}]
    references = {1: ["A dog runs on the grass.", "The dog plays."], 2: ["Two cats sleep"]}
    rows = [{"image_id": image, "caption": text} for image, texts in references.items() for text in texts]
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "labels.json").write_text(json.dumps({"annotations": rows}))
    found = find("captions").score(Files(tmp_path / "results.json", labels={"": tmp_path / "labels.json"}))
    # n-grams that match: 1: 5/5 + 2/2   2: 3/4 + 1/1   3: 2/3   4: 1/2;   lengths 5 + 2 = 7 against 6 + 3 = 9
    bleu4 = (7 / 7 * 4 / 5 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 9 / 7)
    # ROUGE-L, F with beta 1.2: image 1 P 5/5, R 5/6; image 2 P 2/2, R 2/3
    rouge = [(1 + 1.44) * recall / (recall + 1.44) for recall in (5 / 6, 2 / 3)]
    assert found.scores["bleu4"] == pytest.approx(bleu4, abs=1e-6)
    assert found.scores["rouge_l"] == pytest.approx(sum(rouge) / 2, abs=1e-9)


@pytest.mark.parametrize(
    ("review", "marks"),
    [
        ("8 9", (8, 9)), ("8, 9", (8, 9)), ("8,9\nwhy", (8, 9)), ("\n8.5 10\nwhy", (8.5, 10)), ("1\t10", (1, 10)),
        ("8 9 10", None), ("8/10 and 9/10", None), ("Here you go:\n8 9", None), ("-1 8", None), ("11 9", None),
        ("0 5", None), ("8", None), ("8\n9", None), ("", None), (None, None), ("I cannot judge that.", None),
        ("8,5 9,0", None), ("nan 8", None), ("Assistant 1: 8 9", None),
    ],
)  # fmt: skip
def test_a_review_gives_two_marks_from_one_to_ten_or_fails(
    review: str | None, marks: tuple[float, float] | None
) -> None:
    assert llava_bench.parse(review) == marks


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("A", "A"), ("B. two", "B"), ("Because. The answer is C.", "C"), ("The answer is Z.", "Z"), ("A.", None),
        ("a", None), (" A", None), ("", None), ("A.B", None), ("The answer is B", None), ("The answer is b.", None),
        ("The answer is A. The answer is A.", None), ("I think A", None), ("The answer is A or B.", None),
    ],
)  # fmt: skip
def test_a_letter_is_read_by_the_rule_or_not_at_all(answer: str, found: str | None) -> None:
    assert letter(answer) == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Yes", "yes"), ("no", "no"), ("NO!", "no"), ("No, it is a cat", "no"), ("There is not one. Yes?", "no"),
        ("Yes. There is no other", "yes"), ("There is a dog", "yes"), ("Another one", "yes"), ("Yes\nno", "yes"),
        ("Nothing", "yes"), ("", None), (" ... ", None),
    ],
)  # fmt: skip
def test_pope_answers_are_read_from_the_first_sentence(answer: str, found: str | None) -> None:
    assert pope.parse(answer) == found


def test_mme_answers_must_begin_with_yes_or_no() -> None:
    assert [mme.parse(text) for text in ("Yes", " no.", "NOT", "It is", "", "A yes")] == [
        "yes", "no", "no", None, None, None,
    ]  # fmt: skip


def test_mmbench_answers_name_an_option_by_letter_or_by_its_text() -> None:
    options = ["red", "blue", "dark red"]
    given = ["B", "(b)", "C. dark red", "Blue.", "red", "D", "blue or red", "", "The answer is A."]
    assert [mmbench.parse(text, options) for text in given] == [
        "B",
        "B",
        "C",
        "B",
        "A",
        None,
        None,
        None,
        "A",
    ]


def test_mm_vet_grades_lie_between_zero_and_one() -> None:
    given = ["0.5", "1.0\nGood", "0, wrong", ".3", "1.5", "-0.5", "10", "", None, "Score: 0.5"]
    assert [mm_vet.parse(text) for text in given] == [0.5, 1.0, 0.0, 0.3, None, None, None, None, None, None]


def test_vqa_answers_are_normalised_as_usual() -> None:
    given = {"The Cat.": "cat", "two": "2", "1,000": "1000", "black/white": "black white", "3.5": "3.5",
             "Don't": "dont", "a  an\nthe": "", "T-shirt": "t shirt"}  # fmt: skip
    assert {text: vqa.normalise(text) for text in given} == given


def test_captions_are_cut_into_the_tokens_that_count() -> None:
    text = "A man (young) isn't here; he's \"fun\" and they're 5'10\" tall, Mr. Smith's T-shirt..."
    expected = "a man -lrb- young -rrb- is n't here he 's fun and they 're 5 10 tall mr. smith 's t-shirt"
    assert tokens(text) == expected.split()


def test_every_benchmark_has_a_prompt_that_holds_its_question() -> None:
    row = {
        "text": "What is it?",
        "question": "What is it?",
        "choices": ["cat", "dog"],
        "A": "cat",
        "B": "dog",
    }
    silent = {captions_.BENCHMARK.name}
    assert {
        name for name, benchmark in BENCHMARKS.items() if "What is it?" not in benchmark.prompt(row)
    } == silent


def test_scienceqa_prompts_stand_in_the_order_of_their_name() -> None:
    row = {
        "question": "Which?",
        "choices": ["cat", "dog"],
        "answer": 1,
        "hint": "Look.",
        "lecture": "L.",
        "solution": "E.",
    }
    assert scienceqa.prompt(row, "CQM-A").split("\n") == [
        "Context: Look.",
        "Question: Which?",
        "Options: (A) cat (B) dog",
    ]
    assert scienceqa.prompt(row, "QCM-LEA").startswith("Question: Which?\nContext: Look.")
    assert scienceqa.reply(row, "CQM-A") == "The answer is B."
    assert scienceqa.reply(row, "QCM-LEA") == "L.\nE.\nThe answer is B."
    assert letter(scienceqa.reply(row, "QCM-LEA")) == "B"


def test_mmbench_rotations_show_every_option_under_every_letter() -> None:
    row = {"index": 1, "question": "q", "A": "cat", "B": "dog", "C": "cup", "D": None, "answer": "B"}
    turned = mmbench.rotations(row)
    assert [[one[name] for name in "ABC"] for one in turned] == [
        ["cat", "dog", "cup"], ["dog", "cup", "cat"], ["cup", "cat", "dog"],
    ]  # fmt: skip


def test_the_json_object_holds_the_agreed_keys_and_null_for_undefined_scores() -> None:
    found = as_json(scored("mm-vet"))
    assert list(found)[:4] == ["benchmark", "n", "failed", "scores"]
    assert found["scores"]["know"] is None
    json.dumps(found, allow_nan=False)
