"""Models side by side on the same questions: differences with intervals, the gate's decision, what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from components.contract import say, tell
from components.contract.store import Store, open_data_store
from components.pages.markdown import Markup, escape, table
from components.scoring.benchmarks import Files, Scored, Unit, find
from components.scoring.gate import GateSettings, Verdict, decide
from components.scoring.paired import Comparison, Difference, compare
from components.scoring.table import scores_table
from llava.data.images import BadImage, Limits, decode
from llava.errors import RefusedInput, from_the_system
from workflows.scores.score import nested, score

SHOWN = 20
"""Changed questions of a benchmark on the page, half gains and half losses."""
_SIDE = 320  # pixels of a picture's longer side on the page
_ENDINGS = ("", ".jpg", ".jpeg", ".png")
Look = Callable[[str, Unit], Image.Image | None]
"""From benchmark and question to the picture, None where it is not at hand."""


@dataclass(frozen=True)
class Duel:
    """One model against the first."""

    base: str
    new: str
    comparisons: Mapping[str, Comparison]
    verdict: Verdict


def of_files(benchmark: str, base: Files, new: Files, rule: Rule) -> Duel:
    """Score both files and compare; other questions or labels are refused. `rule` names scores of `benchmark`."""
    old, latest = score(benchmark, base), score(benchmark, new)
    gate = rule.of(benchmark).gate([f"{benchmark}/{find(benchmark).headline}"])
    return duel((str(base.answers), str(new.answers)), {benchmark: old}, {benchmark: latest}, gate)


def duel(
    names: tuple[str, str], base: Mapping[str, Scored], new: Mapping[str, Scored], gate: GateSettings
) -> Duel:
    """Compare two models on every benchmark that both have, and ask the gate."""
    comparisons = {
        name: compare(base[name], new[name], gate.confidence, gate.draws) for name in base if name in new
    }
    return Duel(*names, comparisons, decide(gate, base, new))


@dataclass(frozen=True)
class Rule:
    """The gate's rule as typed; scores are BENCHMARK/SCORE, floors BENCHMARK/SCORE=VALUE."""

    scores: list[str]
    minimum_difference: float
    confidence: float
    floors: list[str]

    def gate(self, headlines: list[str]) -> GateSettings:
        """As settings; where no score was named the `headlines` decide."""
        floors: dict[str, float] = {}
        for floor in self.floors:
            name, _, value = floor.partition("=")
            try:
                floors[name] = float(value)
            except ValueError:
                raise RefusedInput(f"--floor {floor}: give SCORE=VALUE, such as accuracy=80") from None
        if not 0 < self.confidence < 1:
            raise RefusedInput(f"--confidence {self.confidence}: lies between 0 and 1, such as 0.95")
        return GateSettings(
            benchmarks=tuple(self.scores or headlines),
            minimum_difference=self.minimum_difference,
            confidence=self.confidence,
            floors=floors,
        )

    def of(self, benchmark: str) -> Rule:
        """The same for scores and floors that are named without their benchmark."""
        scores, floors = ([f"{benchmark}/{name}" for name in names] for names in (self.scores, self.floors))
        return replace(self, scores=scores, floors=floors)


def as_json(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    """The object that `--json` prints for one benchmark."""
    return {
        "benchmark": comparison.benchmark,
        "n": comparison.n,
        "left_out": comparison.left_out,
        "wins": comparison.wins,
        "ties": comparison.ties,
        "losses": comparison.losses,
        "confidence": comparison.confidence,
        "differences": nested({name: _plain(one) for name, one in comparison.differences.items()}),
        "changed": [{"id": list(before.key), "base": before.answer, "new": after.answer,
                     "gain": after.value - before.value} for before, after in comparison.changed],
        "promote": verdict.promote,
        "reason": verdict.reason,
    }  # fmt: skip


def show(one: Duel) -> None:
    """The differences as lines on standard output, then the decision."""
    for name, comparison in one.comparisons.items():
        tell(f"{name}: {comparison.n:,} questions: {comparison.wins:,} better, {comparison.ties:,} equal, "
              f"{comparison.losses:,} worse")  # fmt: skip
        for score_, found in comparison.differences.items():
            tell(f"{score_:24} {found.base:9.3f} -> {found.new:9.3f}   {found.gain:+.3f} "
                  f"[{found.low:+.3f}, {found.high:+.3f}]")  # fmt: skip
    tell(f"{'promote' if one.verdict.promote else 'keep the base'}: {one.verdict.reason}")


def write_page(models: Mapping[str, Mapping[str, Scored]], duels: list[Duel], look: Look, out: Path) -> None:
    """`compare.md` in `out`: all scores, then per pair and benchmark the changed questions with small pictures."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Models on the same questions", ""]
    if models:
        lines += [*table(scores_table(models)), ""]
    shown = changed = 0
    for one in duels:
        lines += [f"## {escape(one.new)} against {escape(one.base)}", "", escape(one.verdict.reason), ""]
        for name, comparison in one.comparisons.items():
            gains, losses = _chosen(comparison)
            shown, changed = shown + len(gains) + len(losses), changed + len(comparison.changed)
            lines += _section(name, comparison)
            for title, pairs in (("Better", gains), ("Worse", losses)):
                lines += ["", f"#### {title}", "", *_side_by_side(name, pairs, look, out)]
            lines += [""]
    (out / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"{out / 'compare.md'}: {shown:,} of {changed:,} changed questions")


def in_folder(images: Path | None) -> Look:
    """Pictures that lie in `images` under the names that the answers give them."""
    folder = None if images is None else open_data_store(images, follow_links=True)

    def look(benchmark: str, unit: Unit) -> Image.Image | None:
        return None if unit.image is None or folder is None else _picture_in(folder, str(unit.image))

    return look


def _picture_in(folder: Store, name: str) -> Image.Image | None:
    """The picture; None for a name that leads out of the folder or to nothing, and for what is no picture."""
    try:
        for ending in _ENDINGS:
            if found := folder.fetch(f"{name}{ending}", Limits().max_bytes):
                return decode(found[0])
    except (RefusedInput, BadImage):
        return None
    except OSError as error:
        if from_the_system(error):
            raise
    return None


def _section(name: str, comparison: Comparison) -> list[str]:
    differences = comparison.differences.items()
    return [
        f"### {escape(name)}: {comparison.wins} better, {comparison.ties} equal, {comparison.losses} worse",
        "",
        *table({
            "score": [score for score, _ in differences],
            "base": [f"{one.base:.2f}" for _, one in differences],
            "new": [f"{one.new:.2f}" for _, one in differences],
            "difference": [f"{one.gain:+.2f}" for _, one in differences],
            f"{100 * comparison.confidence:g} %": [f"{one.low:+.2f} to {one.high:+.2f}" for _, one in differences],
        }),
    ]  # fmt: skip


def _chosen(comparison: Comparison) -> tuple[list[tuple[Unit, Unit]], list[tuple[Unit, Unit]]]:
    half = SHOWN // 2
    gains = [pair for pair in comparison.changed if pair[1].value > pair[0].value][:half]
    losses = [pair for pair in comparison.changed if pair[1].value < pair[0].value][-half:]
    return gains, losses


def _side_by_side(name: str, pairs: list[tuple[Unit, Unit]], look: Look, out: Path) -> list[str]:
    return table({
        "picture": [_picture(name, before, look, out) for before, _ in pairs],
        "question": [before.question for before, _ in pairs],
        "expected": [before.expected for before, _ in pairs],
        "base": [before.answer for before, _ in pairs],
        "new": [after.answer for _, after in pairs],
    })  # fmt: skip


def _plain(one: Difference) -> dict[str, Any]:
    return {"base": one.base, "new": one.new, "difference": one.gain, "interval": [one.low, one.high]}


def _picture(name: str, unit: Unit, look: Look, out: Path) -> Markup | str:
    """A small copy beside the page, as Markdown; the picture's name where it is not at hand."""
    picture = look(name, unit)
    if picture is None:
        return unit.image or ""
    called = "".join(c if c.isalnum() or c in "-." else "_" for c in unit.image or str(unit.key[0]))
    small = out / "pictures" / f"{name}-{called.removesuffix('.png').removesuffix('.jpg')}.jpg"
    small.parent.mkdir(exist_ok=True)
    with picture:
        picture.thumbnail((_SIDE, _SIDE))
        picture.convert("RGB").save(small)
    return Markup(f"![]({small.relative_to(out)})")
