"""The commands `llava score` and `llava compare`: files or models in, numbers out."""

from pathlib import Path
from typing import Annotated

import typer

from llava.errors import RefusedInput
from workflows.options import Root

Answers = Annotated[
    Path | None,
    typer.Option(help="What the model answered: JSONL of question_id, prompt, text; or see above."),
]
Questions = Annotated[
    Path | None, typer.Option(help="The question file (question_id, image, text, category).")
]
Labels = Annotated[
    list[str] | None,
    typer.Option(metavar="[SPLIT=]FILE", help="The right answers; repeat with SPLIT= for pope."),
]
Splits = Annotated[Path | None, typer.Option(help="scienceqa: pid_splits.json.")]
Split = Annotated[str | None, typer.Option(help="scienceqa: which list of --splits; default: test.")]
TEST = "test"
Reviews = Annotated[
    list[Path] | None,
    typer.Option(help="A judge's reviews; repeat for several runs (mm-vet: the grade file)."),
]
MaxFailed = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of failed judgements above which there is no score (status 2); default: 0.5.",
    ),
]
Partial = Annotated[
    bool, typer.Option("--partial", help="captions: leave out annotated images without a caption.")
]


def score(
    benchmark: Annotated[str, typer.Argument(help="Which benchmark.")],
    answers: Answers = None,
    questions: Questions = None,
    labels: Labels = None,
    splits: Splits = None,
    split: Split = None,
    reviews: Reviews = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Another model's answers: scienceqa's ensembles, or what a live judge compares with."
        ),
    ] = None,
    partial: Partial = False,
    max_failed: MaxFailed = None,
    judge: Annotated[
        str | None, typer.Option(help="Ask this model for the reviews that are missing (OPENAI_API_KEY).")
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="The judge's endpoint, ending in /v1.")] = None,
    judge_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time after which a reply counts as failed.")
    ] = 60.0,
    judge_swap: Annotated[
        bool, typer.Option("--judge-swap", help="Every second --reviews file shows the candidate first.")
    ] = False,
    context: Annotated[
        Path | None, typer.Option(help="llava-bench with a judge: notes on the pictures (image, caption).")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score answers that others produced: files in, numbers out.

    BENCHMARK is vqa, pope, scienceqa, llava-bench, captions, mme, mmbench or mm-vet. Scores are unrounded and in
    percent, but for captions (the scale of pycocoevalcap) and mme, which counts points. docs/evaluation.md lists the
    files of each. Rows that are missing, doubled or unknown are refused with their numbers.
    """
    from components.scoring.benchmarks import MAX_FAILED, Files
    from components.scoring.judge import JudgeSettings
    from workflows.scores import score as scoring

    named = scoring.label_files(labels or [])
    files = Files(
        answers, questions, named, splits, split or TEST, reviews or [], reference, partial,
        MAX_FAILED if max_failed is None else max_failed, context, judge_swap, scoring.flag,
    )  # fmt: skip
    given = {**vars(files), "split": split, "max_failed": max_failed is not None, "called": None}
    scoring.refuse_foreign(benchmark, given)
    if judge is not None:
        settings = JudgeSettings(model=judge, url=judge_url, seconds=judge_seconds)
        scoring.run_judge(settings, benchmark, files)
    scored = scoring.score(benchmark, files)
    if json_:
        scoring.print_json(scoring.as_json(scored))
    else:
        scoring.show(scored)


def compare(
    names: Annotated[
        list[str], typer.Argument(metavar="MODEL_A MODEL_B ...|BENCHMARK BASE NEW", help="What is compared.")
    ],
    root: Root = "runs",
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="A score that decides (of models: BENCHMARK/SCORE); repeat. Default: the headline."
        ),
    ] = None,
    questions: Questions = None,
    labels: Labels = None,
    splits: Splits = None,
    split: Split = None,
    base_reviews: Annotated[list[Path] | None, typer.Option(help="Reviews of BASE.")] = None,
    new_reviews: Annotated[list[Path] | None, typer.Option(help="Reviews of NEW.")] = None,
    partial: Partial = False,
    max_failed: MaxFailed = None,
    minimum_difference: Annotated[float, typer.Option(min=0, help="A gain counts only above this.")] = 0.0,
    confidence: Annotated[float, typer.Option(help="Width of the interval whose lower end decides.")] = 0.95,
    floor: Annotated[
        list[str] | None, typer.Option(metavar="SCORE=VALUE", help="A score that the new one must reach.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures, for BASE and NEW.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write compare.md with changed questions there.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare models on the same questions: paired bootstrap, what changed, and whether the gate would open.

    MODEL_A MODEL_B ...: models:/NAME@ALIAS, artifacts, LLaVA folders or evaluations, each against the first; who has
    not sat the exam of the others sits it now. Or BENCHMARK BASE NEW: answers that others produced, with the files of
    `llava score`.
    """
    from components.scoring.benchmarks import BENCHMARKS, MAX_FAILED, Files
    from workflows.scores import compare as comparing
    from workflows.scores.score import flag, label_files, print_json, refuse_foreign

    rule = comparing.Rule(score or [], minimum_difference, confidence, floor or [])
    if names[0] not in BENCHMARKS:
        from workflows.scores import models

        models.command(names, root, rule, out, json_)
        return
    if len(names) != 3:
        raise RefusedInput(f"compare {names[0]}: give BASE and NEW, the answers of two models")
    named = label_files(labels or [])

    def files(answers: str, reviews: list[Path] | None) -> Files:
        found = Files(
            Path(answers), questions, named, splits, split or TEST, reviews or [], None, partial,
            MAX_FAILED if max_failed is None else max_failed, called=flag,
        )  # fmt: skip
        refuse_foreign(
            names[0], {**vars(found), "split": split, "max_failed": max_failed is not None, "called": None}
        )
        return found

    duel = comparing.of_files(names[0], files(names[1], base_reviews), files(names[2], new_reviews), rule)
    if out is not None:
        comparing.write_page({}, [duel], comparing.in_folder(images), out)
    if json_:
        print_json(comparing.as_json(duel.comparisons[names[0]], duel.verdict))
    else:
        comparing.show(duel)
