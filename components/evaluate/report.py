"""The evaluation for people: a page, tables, charts, and sample answers under their pictures."""

from __future__ import annotations

import itertools
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from components.evaluate.answering import BLANK, RIGHT, WRONG
from components.evaluate.heldout_scores import Answered, held_out_loss, score, score_by_kind
from components.pages.markdown import escape
from components.pages.markdown import table as markdown
from components.scoring import bootstrap
from components.scoring.benchmarks import Scored, find
from components.scoring.table import scores_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES = 20
LABELS = {RIGHT: "its picture", BLANK: "blank picture", WRONG: "wrong picture"}
_COLUMNS = 4
_BARS = {RIGHT: "#2b6cb0", BLANK: "#b8bcc4", WRONG: "#dd9a4b"}
_RIGHT, _WRONG, _PLAIN = "#1a7f37", "#c62828", "#333333"


@dataclass(frozen=True)
class Sample:
    """One question for the page; `group` is its benchmark, or the kind of a held-out question."""

    group: str
    question: str
    expected: str
    answers: Mapping[str, tuple[str, bool | None]]
    """By condition: the text, and whether it is right (None where no answer is simply right)."""
    index: tuple[str, int]
    """Exam and number of the question."""


def table(rows: Sequence[Answered]) -> dict[str, list[Any]]:
    """Columns: kind ("all" last), questions, and percent right under each condition."""
    parts = [*score_by_kind(rows).items(), ("all", score(rows))]
    columns: dict[str, list[Any]] = {
        "kind": [kind for kind, _ in parts],
        "questions": [part["n"] for _, part in parts],
    }
    for condition, label in LABELS.items():
        columns[label] = [round(part["percent"][condition], 1) for _, part in parts]
    return columns


def answers_table(rows: Sequence[Answered]) -> dict[str, list[Any]]:
    """Columns for MLflow: every held-out question with its answers."""
    plain: dict[str, list[Any]] = {
        name: [row[name] for row in rows] for name in ("id", "kind", "question", "expected")
    }
    for condition, label in LABELS.items():
        plain[label] = [row["answers"][condition] for row in rows]
    return plain | {"right": [row["correct"][RIGHT] for row in rows]}


def page(
    facts: Mapping[str, str],
    models: Mapping[str, Mapping[str, Scored]],
    heldout: Sequence[Answered],
    remarks: Sequence[str],
    samples: Sequence[Sample],
) -> str:
    """`report.md`: what was measured, the scores of every benchmark, and sample answers as text.

    `models`: outcomes by benchmark, by what the column is called.
    """
    lines = ["# Evaluation", "", *(f"- {escape(name)}: {escape(value)}" for name, value in facts.items())]
    loss = held_out_loss(heldout)
    lines += [f"- held-out loss: {loss:.4f} nats per token"] if loss is not None else []
    lines += ["", "Scores with their 95 % intervals (bootstrap over the questions):", ""]
    lines += [*markdown(scores_table(models)), "", "![scores](benchmarks.png)", ""]
    lines += [f"- {escape(remark)}" for remark in remarks]
    if heldout:
        lines += ["", "## Held-out questions", ""]
        lines += ["Exact match in percent, shown the question's own picture, a blank one, another one:", ""]
        lines += [*markdown(table(heldout)), "", "![by kind](by_kind.png)"]
    lines += ["", "## Samples", "", "![sample answers](samples.png)", ""]
    shown: dict[str, list[str]] = {
        "of": [sample.group for sample in samples],
        "question": [sample.question for sample in samples],
        "expected": [sample.expected for sample in samples],
    }
    for condition in [one for one in LABELS if any(one in sample.answers for sample in samples)]:
        shown[LABELS[condition]] = [
            " ".join(filter(None, _marked(sample.answers[condition]))) if condition in sample.answers else ""
            for sample in samples
        ]
    return "\n".join([*lines, *markdown(shown), ""])


def pick(samples: Sequence[Sample], count: int = SAMPLES) -> list[Sample]:
    """Up to `count` samples, the groups in turn, each group in its own order."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    turns = itertools.zip_longest(*groups.values())
    return [sample for turn in turns for sample in turn if sample is not None][:count]


def bar_chart(rows: Sequence[Answered]) -> Figure:
    """Percent right per kind of held-out question, one bar per condition."""
    columns = table(rows)
    figure, axes = _axes(len(columns["kind"]))
    width = 0.27
    for offset, (condition, label) in enumerate(LABELS.items()):
        places = [index + (offset - 1) * width for index in range(len(columns["kind"]))]
        bars = axes.bar(places, columns[label], width, label=label, color=_BARS[condition])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    names = [f"{kind}\n({n})" for kind, n in zip(columns["kind"], columns["questions"], strict=True)]
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(0, 105)
    axes.set_ylabel("exact match, %")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def score_chart(models: Mapping[str, Mapping[str, Scored]]) -> Figure:
    """The headline of each benchmark with its 95 % interval, one bar per model; scales from 0 to 1 as percent."""
    benchmarks = list(dict.fromkeys(name for found in models.values() for name in found))
    figure, axes = _axes(max(1, len(benchmarks)))
    width, names = 0.8 / max(1, len(models)), []
    for offset, (model, found) in enumerate(models.items()):
        label: str | None = model.replace("$", r"\$")
        for benchmark, scored in found.items():
            index = benchmarks.index(benchmark)
            headline = find(scored.benchmark).headline
            times = find(scored.benchmark).times
            low, high = (times * end for end in bootstrap.intervals(scored.sums, scored.formula)[headline])
            value = times * scored.scores[headline]
            at = index + (offset - (len(models) - 1) / 2) * width
            axes.bar(at, value, width * 0.92, color=list(_BARS.values())[offset % len(_BARS)], label=label)
            label = None
            axes.plot([at, at], [low, high], color="black", linewidth=1)
    for benchmark in benchmarks:
        scored = next(found[benchmark] for found in models.values() if benchmark in found)
        kind = find(scored.benchmark)
        scale = f" x {kind.times:g}" if kind.times != 1 else ""
        names.append(f"{benchmark}\n{kind.headline}{scale}")
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(bottom=0)
    if len(models) > 1:
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def samples_figure(samples: Sequence[Sample], pictures: Sequence[Image.Image | None]) -> Figure:
    """Each picture over its question, the expected answer and the answers, green where right."""
    from matplotlib.figure import Figure

    height = -(-len(samples) // _COLUMNS)
    figure = Figure(figsize=(3.4 * _COLUMNS, 3.9 * height), layout="constrained")
    grid = figure.subplots(2 * height, _COLUMNS, squeeze=False, height_ratios=[2.2, 1.5] * height)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (sample, picture) in enumerate(zip(samples, pictures, strict=True)):
        line, column = divmod(index, _COLUMNS)
        if picture is not None:
            grid[2 * line][column].imshow(picture, interpolation="nearest" if picture.width < 128 else None)
        _write(grid[2 * line + 1][column], sample)
    return figure


def _axes(groups: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 1.3 * groups + 2), 4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(axes: Axes, sample: Sample) -> None:
    question = textwrap.wrap(_printable(sample.question), 40)[:3]
    lines = [(text, "black", "bold") for text in question]
    lines.append((f"expected: {_short(sample.expected)}", "black", "normal"))
    for condition, (text, right) in sample.answers.items():
        colour = _PLAIN if right is None else _RIGHT if right else _WRONG
        mark = _marked(("", right))[1]
        lines.append((f"{mark} {LABELS[condition]}: {_short(text)}".strip(), colour, "normal"))
    for number, (text, colour, weight) in enumerate(lines):
        # A question may hold a dollar sign; Matplotlib would read formulas.
        axes.text(
            0, 1 - 0.15 * number, text, color=colour, weight=weight, fontsize=9, va="top", parse_math=False,
            transform=axes.transAxes,
        )  # fmt: skip


def _marked(answer: tuple[str, bool | None]) -> tuple[str, str]:
    text, right = answer
    return text, "" if right is None else "✓" if right else "✗"


def _short(text: str) -> str:
    return textwrap.shorten(_printable(text), 32, placeholder=" …") or "(nothing)"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
