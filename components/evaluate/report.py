"""The evaluation for people: a page, a table, a bar chart, and sample answers under their pictures."""

from __future__ import annotations

import itertools
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from components.evaluate.scores import Answered, held_out_loss, score, score_by_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = 16
_COLUMNS = 4
_LABELS = {"right_image": "its picture", "blank_image": "blank picture", "wrong_image": "wrong picture"}
_BARS = {"right_image": "#2b6cb0", "blank_image": "#b8bcc4", "wrong_image": "#dd9a4b"}
_RIGHT, _WRONG = "#1a7f37", "#c62828"


def table(rows: Sequence[Answered]) -> dict[str, list[Any]]:
    """Columns: kind ("all" last), questions, and percent right under each condition."""
    parts = [*score_by_kind(rows).items(), ("all", score(rows))]
    columns: dict[str, list[Any]] = {
        "kind": [kind for kind, _ in parts],
        "questions": [part["n"] for _, part in parts],
    }
    for condition, label in _LABELS.items():
        columns[label] = [round(part["percent"][condition], 1) for _, part in parts]
    return columns


def answers_table(rows: Sequence[Answered]) -> dict[str, list[Any]]:
    """Columns for MLflow: every question with its answers."""
    plain: dict[str, list[Any]] = {
        name: [row[name] for row in rows] for name in ("id", "kind", "question", "expected")
    }
    for condition, label in _LABELS.items():
        plain[label] = [row["answers"][condition] for row in rows]
    return plain | {"right": [row["correct"]["right_image"] for row in rows]}


def page(rows: Sequence[Answered], samples: Sequence[int], facts: Mapping[str, str]) -> str:
    """`report.md`: what was measured, the table, and the sample answers as text."""
    loss = held_out_loss(rows)
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += [
        f"- held-out loss: {loss:.4f} nats per token" if loss is not None else "- held-out loss: not measured"
    ]
    lines += ["", "Exact match in percent, shown the question's own picture, a blank one, another one:", ""]
    lines += _markdown(table(rows))
    lines += ["", "## Samples", "", "![sample answers](samples.png)", ""]
    picked = [rows[index] for index in samples]
    shown = {"question": [row["question"] for row in picked], "expected": [row["expected"] for row in picked]}
    for condition, label in _LABELS.items():
        shown[label] = [
            f"{row['answers'][condition]} {'✓' if row['correct'][condition] else '✗'}" for row in picked
        ]
    return "\n".join([*lines, *_markdown(shown), ""])


def pick_samples(rows: Sequence[Answered], count: int = SAMPLES) -> list[int]:
    """Indices of up to `count` rows, the kinds in turn, each kind in the rows' order."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        kinds[row["kind"]].append(index)
    turns = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [index for turn in turns for index in turn if index is not None][:count]


def bar_chart(rows: Sequence[Answered]) -> Figure:
    """Percent right per kind of question, one bar per condition."""
    from matplotlib.figure import Figure

    columns = table(rows)
    figure = Figure(figsize=(max(5.0, 1.3 * len(columns["kind"]) + 2), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.27
    for offset, (condition, label) in enumerate(_LABELS.items()):
        places = [place + (offset - 1) * width for place in range(len(columns["kind"]))]
        bars = axes.bar(places, columns[label], width, label=label, color=_BARS[condition])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    names = [f"{kind}\n({n})" for kind, n in zip(columns["kind"], columns["questions"], strict=True)]
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(0, 105)
    axes.set_ylabel("exact match, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def samples_figure(rows: Sequence[Answered], pictures: Sequence[Image.Image]) -> Figure:
    """Each picture over its question, the expected answer and the three answers, green where right."""
    from matplotlib.figure import Figure

    height = -(-len(rows) // _COLUMNS)
    figure = Figure(figsize=(3.4 * _COLUMNS, 3.9 * height), layout="constrained")
    grid = figure.subplots(2 * height, _COLUMNS, squeeze=False, height_ratios=[2.2, 1.5] * height)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        line, column = divmod(index, _COLUMNS)
        grid[2 * line][column].imshow(picture, interpolation="nearest" if picture.width < 128 else None)
        _write(grid[2 * line + 1][column], row)
    return figure


def _write(axes: Any, row: Answered) -> None:
    question = textwrap.wrap(_printable(row["question"]), 40)[:3]
    lines = [(text, "black", "bold") for text in question]
    lines.append((f"expected: {_short(row['expected'])}", "black", "normal"))
    for condition, label in _LABELS.items():
        mark, colour = ("✓", _RIGHT) if row["correct"][condition] else ("✗", _WRONG)
        lines.append((f"{mark} {label}: {_short(row['answers'][condition])}", colour, "normal"))
    for number, (text, colour, weight) in enumerate(lines):
        # A question may hold a dollar sign; Matplotlib would read formulas.
        axes.text(
            0, 1 - 0.15 * number, text, color=colour, weight=weight, fontsize=9, va="top", parse_math=False,
            transform=axes.transAxes,
        )  # fmt: skip


def _short(text: str) -> str:
    return textwrap.shorten(_printable(text), 32, placeholder=" …") or "(nothing)"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _markdown(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_printable(str(cell)).replace("|", "\\|") for cell in cells) + " |"

    return [
        line(list(columns)),
        line(["---"] * len(columns)),
        *map(line, zip(*columns.values(), strict=True)),
    ]
