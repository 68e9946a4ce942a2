"""The page of `benchmarks/ranks.py`."""

from collections.abc import Callable
from typing import Any

from benchmarks.at_scale.page import MIB, grid, heading
from benchmarks.at_scale.stand_ins import ELEMENTS, TENSORS

_INTRODUCTION = """\
No model: a step sleeps {step:g} ms, the state is {tensors} tensors of {elements} numbers ({megabytes:.1f} MB with its
moments), of which each rank holds a piece of each. The rest is real: a `BatchPlan` of {samples:,} samples at global
batch {batch}, collator, loop, observers and checkpoints over gloo. Replaced: the far ends of the client to the driver
and of MLflow's sender, and Ray's word on nodes that are taken away (a barrier). All ranks share the cores: seconds on
the wall grow with their number whatever they do, CPU seconds and counts need not.

## A step

"""
_ABOUT_KILLS = """
A resume compares every number that it reads with what was written.

## SIGKILL on the last rank

Gloo's timeout is {timeout:g} s. Without Ray nobody tells the others: they see their connection end, or one of them
leave.

"""
_ABOUT_GROWTH = """\
## Growth

Lines a + b log2 N and a + b N by least squares, and the share of the spread that each explains.

"""


def page(report: dict[str, Any]) -> str:
    """As Markdown."""
    rows, options = report["ranks"], report["options"]
    worlds = [str(row["world"]) for row in rows]
    text = heading(report, "Many ranks, a slow one, a killed one")
    text += _INTRODUCTION.format(
        step=float(options["step_seconds"]) * 1e3,
        tensors=TENSORS,
        elements=ELEMENTS,
        megabytes=12 * TENSORS * ELEMENTS / 1e6,
        samples=int(options["samples"]),
        batch=options["global_batch"],
    )
    text += _by_world(
        worlds,
        rows,
        {
            "bookkeeping, rank 0, CPU ms": lambda row: _ms(row["bookkeeping"]["rank 0"]),
            "bookkeeping, other ranks, median, CPU ms": lambda row: _ms(row["bookkeeping"]["others"]),
            "bookkeeping, the most of the others, CPU ms": lambda row: _ms(
                row["bookkeeping"]["most of the others"]
            ),
            f"**rank 0 more than the others, CPU ms** (bound {_ms(report['bound'])})": lambda row: (
                f"**{_ms(row['bookkeeping']['extra'])}**"
            ),
            "whole process, rank 0, CPU ms": lambda row: _ms(row["process cpu"]["rank 0"]),
            "whole process, other ranks, CPU ms": lambda row: _ms(row["process cpu"]["others"]),
            "of it the plan (a thread of its own), CPU ms": lambda row: _ms(row["planning cpu"]),
            "step, ms on the wall": lambda row: _ms(row["step"]),
            "of it waiting for data": lambda row: _ms(row["data wait"]),
            f"step with a rank {float(options['late_seconds']) * 1e3:g} ms late": lambda row: _ms(
                row["slow step"]
            ),
            "collectives of a rank": lambda row: _calls(row["step collectives"], 2),
            "store: keys after joining, at the end": lambda row: (
                f"{row['store keys']['joined']}, {row['store keys']['at the end']}"
            ),
            "a rank's anonymous memory, forked (shared), MiB": lambda row: (
                f"{row['memory']['forked'] / MIB:,.0f}"
            ),
            "the same after training, MiB": lambda row: f"{row['memory']['trained'] / MIB:,.0f}",
        },
    )
    text += "\n## Collectives alone, back to back\n\n" + _by_world(
        worlds,
        rows,
        {
            f"{name}, {kind}": _primitive(name, key)
            for name in rows[0]["primitives"]
            for kind, key in (("CPU ms of a rank", "cpu_seconds"), ("ms on the wall", "seconds"))
        },
    )
    text += "\n## Leaving, saving, resuming\n\n" + _by_world(
        worlds,
        rows,
        {
            "stop: heard by rank 0 after, s (it looks every 0.5 s)": lambda row: (
                f"{row['stop']['heard after']:.2f}"
            ),
            "then until all ranks have left with a checkpoint, s": lambda row: (
                f"{row['stop']['all left after that']:.2f}"
            ),
            "save: the thread that trains, median / slowest rank, ms": lambda row: (
                f"{_ms(row['save']['median'])} / {_ms(row['save']['max'])}"
            ),
            "save: the thread that trains, rank 0 / others, CPU ms": lambda row: (
                f"{_ms(row['save']['cpu rank 0'])} / {_ms(row['save']['cpu others'])}"
            ),
            "save: first to last share, s": lambda row: f"{row['commit']['first to last share']:.2f}",
            "save: last share to the marker, s": lambda row: f"{row['commit']['last share to marker']:.2f}",
            "marker, KB": lambda row: f"{row['commit']['marker bytes'] / 1e3:,.0f}",
            "resume, s": lambda row: f"{row['resume']['seconds']:.2f}",
            "resume, rank 0 / others, CPU ms": lambda row: (
                f"{_ms(row['resume']['cpu rank 0'])} / {_ms(row['resume']['cpu others'])}"
            ),
            "resume, collectives of a rank": lambda row: _calls(row["resume"]["collectives"], 0),
            "resume on half the ranks, s": lambda row: f"{row['resume on half']['seconds']:.2f}",
            "the same, rank 0 / others, CPU ms": lambda row: (
                f"{_ms(row['resume on half']['cpu rank 0'])} / {_ms(row['resume on half']['cpu others'])}"
            ),
        },
    )
    text += _ABOUT_KILLS.format(timeout=float(options["gloo_timeout"]))
    text += _by_world(
        worlds,
        rows,
        {
            f"in a {what}: {name}": _killed(what, tell)
            for what in ("step", "save")
            for name, tell in (
                (
                    "first, middle and last rank notice after, s",
                    lambda one: ", ".join(f"{x:.2f}" for x in one["noticed"]),
                ),
                ("all have left after, s", lambda one: f"{one['left']:.2f}"),
                ("committed since", lambda one: str(one["committed"])),
                ("unfinished checkpoints that lie there", lambda one: str(one["unfinished"])),
            )
        },
    )
    text += "\nThe next group deletes what was unfinished: " + ", ".join(
        f"{row['unfinished left']} left at {row['world']} ranks" for row in rows
    )
    text += ".\n\n" + _growth(report, worlds)
    return text


def _growth(report: dict[str, Any], worlds: list[str]) -> str:
    text = _ABOUT_GROWTH
    fitted = "log2" in report["growth"][0]
    head = ["figure", *(f"{world} ranks" for world in worlds)]
    text += grid(
        [*head, *(["b log2 N", "explains", "b N", "explains"] if fitted else [])],
        (
            [
                row["figure"],
                *(f"{value:.3g}" for value in row["values"]),
                *(
                    cell
                    for kind in ("log2", "linear")
                    if fitted
                    for cell in (f"{row[kind]['slope']:.2g}", f"{row[kind]['explained']:.0%}")
                ),
            ]
            for row in report["growth"]
        ),
    )
    return (
        text
        + "\n### The plan of a step, alone in one process, CPU ms\n\n"
        + "Every rank plans for all, ahead of time, in a thread.\n\n"
        + grid(
            ["ranks", f"global batch {report['options']['global_batch']}", "4 samples a rank"],
            ([row["world"], _ms(row["fixed"]), _ms(row["4 a rank"])] for row in report["planning"]),
        )
    )


def _by_world(
    worlds: list[str], rows: list[dict[str, Any]], figures: dict[str, Callable[[dict[str, Any]], str]]
) -> str:
    return grid(
        ["", *(f"{world} ranks" for world in worlds)],
        ([name, *(figure(row) for row in rows)] for name, figure in figures.items()),
    )


def _primitive(name: str, key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: _ms(row["primitives"][name][key])


def _killed(what: str, tell: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda row: tell(row[f"killed in a {what}"])


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.2f}"


def _calls(collectives: dict[str, dict[str, float]], digits: int) -> str:
    return ", ".join(
        f"{name} {one['calls']:.{digits}f} ({one['bytes']:,.0f} B)" for name, one in collectives.items()
    )
