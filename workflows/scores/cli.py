"""The commands `llava score` and `llava compare`: files or models in, numbers out."""

from pathlib import Path
from typing import Annotated

import typer

from llava.errors import RefusedInput

Answers = Annotated[
    Path | None,
    typer.Option(help="What the model answered: JSONL of question_id, prompt, text; or see above."),
]
Questions = Annotated[
    Path | None, typer.Option(help="The question file (question_id, image, text, category).")
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[SPLIT=]FILE", help="The right answers; repeat with SPLIT= for a benchmark that has splits."
    ),
]
Splits = Annotated[Path | None, typer.Option(help="Which ids belong to which list: pid_splits.json.")]
Split = Annotated[str | None, typer.Option(help="Which list of --splits; default: test.")]
TEST = "test"
Reviews = Annotated[
    list[Path] | None,
    typer.Option(help="A judge's reviews, or its grade file; repeat for several runs."),
]
MaxFailed = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of failed judgements above which there is no score (status 2); default: 0.5.",
    ),
]
Partial = Annotated[bool, typer.Option("--partial", help="Leave out annotated images without a caption.")]


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
        typer.Option(help="Another model's answers: for an ensemble, or what a live judge compares with."),
    ] = None,
    partial: Partial = False,
    max_failed: MaxFailed = None,
    judge: Annotated[
        str | None, typer.Option(help="Ask this model for the reviews that are missing (OPENAI_API_KEY).")
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="The judge's endpoint, ending in /v1.")] = None,
    judge_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Time after which a reply counts as failed; default: 60.")
    ] = None,
    judge_swap: Annotated[
        bool, typer.Option("--judge-swap", help="Every second --reviews file shows the candidate first.")
    ] = False,
    context: Annotated[
        Path | None, typer.Option(help="For a live judge: notes on the pictures (image, caption).")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score answers that others produced: files in, numbers out.

    docs/evaluation.md lists the benchmarks, the files that each takes, and the scale of its scores, which are not
    rounded; options that a benchmark does not take are refused. Rows that are missing, doubled or unknown are refused
    with their numbers.
    """
    from components.scoring.benchmarks import MAX_FAILED, Files
    from components.scoring.judge import JudgeSettings
    from workflows.scores import score as scoring

    named = scoring.label_files(labels or [])
    typed = {
        "answers": answers, "questions": questions, "labels": labels, "splits": splits, "split": split,
        "reviews": reviews, "reference": reference, "partial": partial, "max_failed": max_failed,
        "judge_swap": judge_swap, "context": context,
    }  # fmt: skip
    options = [scoring.Option(scoring.flag(name), name, value) for name, value in typed.items()]
    for name, value in (("judge", judge), ("judge_url", judge_url), ("judge_seconds", judge_seconds)):
        options.append(scoring.Option(scoring.flag(name), scoring.JUDGE, value))
    scoring.refuse_foreign(benchmark, options)
    files = Files(
        answers, questions, named, splits, split or TEST, reviews or [], reference, partial,
        MAX_FAILED if max_failed is None else max_failed, context, judge_swap, scoring.flag,
    )  # fmt: skip
    if judge is not None:
        patience = {} if judge_seconds is None else {"seconds": judge_seconds}
        settings = JudgeSettings(model=judge, url=judge_url, **patience)
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
    root: Annotated[
        str | None, typer.Option(help="Where models and evaluations are and go; default: runs.")
    ] = None,
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
    from workflows.scores import score as scoring

    rule = comparing.Rule(score or [], minimum_difference, confidence, floor or [])
    typed = {
        "questions": questions, "labels": labels, "splits": splits, "split": split, "partial": partial,
        "max_failed": max_failed,
    }  # fmt: skip
    options = [scoring.Option(scoring.flag(name), name, value) for name, value in typed.items()]
    for name, value in (("base", base_reviews), ("new", new_reviews)):
        options.append(scoring.Option(scoring.side(name)("reviews"), "reviews", value))
    if names[0] not in BENCHMARKS:
        from workflows.scores import models

        options.append(scoring.Option("--images", "images", images))
        scoring.refuse_any(
            options, "belongs to BENCHMARK BASE NEW; models are asked, and bring their own files"
        )
        models.command(names, root or "runs", rule, out, json_)
        return
    if len(names) != 3:
        raise RefusedInput(f"compare {names[0]}: give BASE and NEW, the answers of two models")
    scoring.refuse_foreign(names[0], [*options, scoring.Option("--root", "root", root)])
    named = scoring.label_files(labels or [])

    def files(name: str, answers: str, reviews: list[Path] | None) -> Files:
        return Files(
            Path(answers), questions, named, splits, split or TEST, reviews or [], None, partial,
            MAX_FAILED if max_failed is None else max_failed, called=scoring.side(name),
        )  # fmt: skip

    base, new = files("base", names[1], base_reviews), files("new", names[2], new_reviews)
    duel = comparing.of_files(names[0], base, new, rule)
    if out is not None:
        comparing.write_page({}, [duel], comparing.in_folder(images), out)
    if json_:
        scoring.print_json(comparing.as_json(duel.comparisons[names[0]], duel.verdict))
    else:
        comparing.show(duel)
