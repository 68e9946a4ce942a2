"""What `filter` tells: how many phrases and rows there were and are, why rows were left out, the plot of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from components.contract.component import Job
from components.datasets.results import ShardResult
from components.filter.choice import Postings
from components.filter.settings import FilterSettings
from components.pages import html
from llava.data.schema import SPLITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, PLOT = "report/filter.html", "report/phrases.png"
PHRASES_SHOWN = 40


@dataclass(frozen=True)
class PhraseChoice:
    """What was chosen from what. `phrases`: all, `kept`: those that count, both `phrase` and `rows` by rarity;
    `rows`: (R,) bool, whether a row was chosen."""

    phrases: pa.Table
    kept: pa.Table
    postings: Postings
    rows: np.ndarray

    def after(self) -> np.ndarray:
        """(V,) in how many chosen rows each phrase that counts stands."""
        chosen = self.postings.phrase[self.rows[self.postings.row]]
        return np.bincount(chosen, minlength=self.kept.num_rows)

    def left_out(self) -> dict[str, int]:
        """How many rows were not chosen, by reason."""
        counting = np.zeros(len(self.rows), bool)
        counting[self.postings.row] = True
        captions, phrases = self.postings.captions, self.postings.phrases
        return {
            "no caption to train on": int((~captions).sum()),
            "no noun phrase": int((captions & ~phrases).sum()),
            "only rare phrases": int((phrases & ~counting).sum()),
            "over the cap of every phrase": int((counting & ~self.rows).sum()),
        }


def report(job: Job[FilterSettings], result: ShardResult, choice: PhraseChoice) -> None:
    """Fill the job's metrics and notes; write the page and the plot, and log both."""
    after, left_out = choice.after(), choice.left_out()
    rows = {split: result.rows(split) for split in SPLITS}
    before, kept = choice.phrases.num_rows, choice.kept.num_rows
    job.metrics |= {f"rows/{split}": float(count) for split, count in rows.items()}
    job.metrics |= {
        "rows": float(sum(rows.values())),
        "rows/before": float(len(choice.rows)),
        "phrases/all": float(before),
        "phrases/counted": float(kept),
    }
    job.notes |= {
        "rows": rows,
        "rows before": len(choice.rows),
        "phrases": {"all": before, f"of at least {job.settings.min_count} captions": kept},
        "left_out": left_out,
    }
    plot = html.drawn(frequencies(choice.phrases["rows"].to_numpy(), after))
    frequent = choice.kept.num_rows - 1 - np.arange(min(PHRASES_SHOWN, kept))
    page = html.page(
        "Concept-balanced filter",
        [
            html.table(
                {
                    "": ["rows", "noun phrases", f"noun phrases of at least {job.settings.min_count} captions"],
                    "before": [len(choice.rows), before, kept],
                    "after": [int(choice.rows.sum()), "", int((after > 0).sum())],
                }
            ),
            html.section("Rows left out", html.table({"why": [*left_out], "rows": [*left_out.values()]})),
            html.section("Captions of each phrase", html.image(plot, "captions of each phrase, by rank")),
            html.section(
                "The most frequent phrases",
                html.table(
                    {
                        "phrase": choice.kept["phrase"].take(frequent).to_pylist(),
                        "captions before": choice.kept["rows"].take(frequent).to_pylist(),
                        "after": after[frequent].tolist(),
                    }
                ),
            ),
        ],
    )  # fmt: skip
    html.publish(job, PAGE, page)
    html.publish(job, PLOT, plot)
    job.say(
        f"{int(choice.rows.sum()):,} of {len(choice.rows):,} rows chosen by {kept:,} of {before:,} noun phrases; "
        f"left out: {', '.join(f'{count:,} x {why}' for why, count in left_out.items() if count) or 'none'}"
    )


def frequencies(before: np.ndarray, after: np.ndarray) -> Figure:
    """Captions of each phrase over its rank, before and after, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for values, label in ((before, "before, all"), (after[after > 0], "after, those that count")):
        axes.plot(
            np.arange(1, len(values) + 1), np.sort(values)[::-1], label=f"{label}: {len(values):,} phrases"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("noun phrases, the most frequent first")
    axes.set_ylabel("captions that hold the phrase")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
