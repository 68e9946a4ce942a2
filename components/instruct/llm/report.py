"""What the teacher's part tells: what was asked, what it cost, what was rejected and why, how long answers are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from components.contract import Job
from components.instruct.llm.asking import Tally, budget_of
from components.instruct.llm.filtering import FilterVerdict, Reject, share_rejected
from components.instruct.llm.limits import Tokens
from components.instruct.llm.prompts import Prompts
from components.instruct.settings import InstructSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_OF_EACH = 5
SHOWN_LENGTH = 2000


def report_teacher(
    job: Job[InstructSettings], prompts: Prompts, tokens: Tokens, tally: Tally, verdict: FilterVerdict
) -> None:
    """Fill the job's metrics and notes, log the plot of rejects and lengths, and some rejects to read."""
    settings = job.settings
    samples = Counter(one.reason for one in verdict.rejects if one.pair is None)
    pairs = Counter(one.reason for one in verdict.rejects if one.pair is not None)
    cost = budget_of(settings).cost(tokens)
    job.metrics |= {
        "teacher/answers": float(verdict.judged.total()),
        "teacher/prompt_tokens": float(tokens.prompt),
        "teacher/completion_tokens": float(tokens.completion),
        "teacher/cost": cost,
        "teacher/rejected": share_rejected(verdict),
    }
    job.notes["teacher"] = {
        "model": settings.model,
        "prompts": {"version": prompts.version, "digest": prompts.digest},
        "answers": dict(verdict.judged),
        "tokens": tokens._asdict(),
        "cost": cost,
        "tries_without_answer_in_the_last_run": dict(tally.faults),
        "impossible_token_counts_in_the_last_run": tally.uncounted.total(),
        "rejected": {"samples": dict(samples.most_common()), "pairs": dict(pairs.most_common())},
        "contexts": {name: count for name, count in sorted(verdict.notes.items()) if count},
    }
    job.run.figure(reject_plot(samples, pairs, verdict.words), "teacher.png")
    if verdict.rejects:
        job.run.table(_some(verdict.rejects), "rejected.json")
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in samples.most_common())
    job.say(
        f"{verdict.judged.total():,} answers judged, {samples.total():,} rejected"
        + (f" ({rejected})" if rejected else "")
        + (f", of others {pairs.total():,} pairs" if pairs else "")
    )


def reject_plot(samples: Counter[str], pairs: Counter[str], words: dict[str, list[int]]) -> Figure:
    """Bars: what was rejected and why; lines: how long the answers are that were taken."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    reasons = [reason for reason, _ in (samples + pairs).most_common()][::-1]
    left.barh(reasons, [samples[reason] for reason in reasons], label="samples")
    left.barh(
        reasons,
        [pairs[reason] for reason in reasons],
        left=[samples[reason] for reason in reasons],
        label="pairs",
    )
    left.set_title("rejected")
    left.legend()
    right.set_title("length of answers")
    right.set_xlabel("words")
    if words:
        right.hist([words[kind] for kind in sorted(words)], bins=40, histtype="step", label=sorted(words))
        right.legend()
    return figure


def _some(rejects: list[Reject]) -> dict[str, list[Any]]:
    """A few of each reason, as columns."""
    seen: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {"reason": [], "id": [], "pair": [], "text": []}
    for one in rejects:
        seen[one.reason] += 1
        if seen[one.reason] <= SHOWN_OF_EACH:
            values = (
                one.reason,
                one.id,
                "all" if one.pair is None else str(one.pair),
                one.text[:SHOWN_LENGTH],
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    return columns
