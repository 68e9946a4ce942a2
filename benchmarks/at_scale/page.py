"""The page of `benchmarks/checkpoints.py`, and what pages of results have in common."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.at_scale.projection import FORMULAS

MIB, GB = 1 << 20, 1e9
_SECONDS = {
    "save, held up": lambda row: row["held"],
    "save, committed": lambda row: row["save"]["seconds"],
    "then to the disk": lambda row: row["flush"]["seconds"],
    "start": lambda row: row["load"]["seconds"],
    "DeepSpeed": lambda row: row["engine"]["seconds"],
    "resume": lambda row: row["resume"]["seconds"],
    "(a blank step)": lambda row: row["blank step"]["seconds"],
    "export": lambda row: row["export"]["seconds"],
}
_PHASES = {
    "save": "save",
    "start": "load",
    "DeepSpeed": "engine",
    "blank step": "blank step",
    "resume": "resume",
    "export": "export",
}
_KEYS = {"zero": "ZeRO", "ranks": "ranks", "side": "side"}

_INTRODUCTION = """\
A random LLaVA of {parameters:,.1f}M parameters, stored in {stored}, trained in bfloat16 (a layer has {layer:.2f}M); a
checkpoint holds {gb:.2f} GB of state. Medians of {rounds} rounds. *before* gathers the state on rank 0, which writes it
and exports the model.

## Seconds

Of the slowest rank. The ranks share the cores and one disk.

"""
_ABOUT_SECONDS = """
- save, held up: what training waits for
- save, committed: until the marker is there and the ranks have met. Both flush what they write; *after* also reads
  its files again for their digests
- then to the disk: an fsync of all files after that
- start: loading, placing and the digest of what is frozen; with ZeRO-3 *after* also cuts the parameters, which *before*
  leaves to DeepSpeed
- resume: with a warm page cache. It includes a blank step, which is timed alone beside it; *after* also proves the
  contents of all files
- export: *after* reads it from a checkpoint, so a training that ends between two checkpoints saves first

## CPU seconds, all ranks together

"""
_ABOUT_MEMORY = """
## Peak of a rank's own memory

MiB over the level when the phase began: median rank / largest rank. Own memory is `RssAnon` of `/proc/PID/status`,
read from outside every 20 ms; mapped files (`RssFile`) are apart. What a start keeps is the model, which a GPU would
hold. On a CPU a parameter that needs no conversion stays in the mapped file.

"""
_ABOUT_ARITHMETIC = """
## 7B and 13B, by arithmetic

Not measured: formulas with M parameters, P of them training, S = 12 P bytes of state, R ranks, G GPUs of a node, L
parameters of a layer, T of the largest tensor, W(R) bytes read ahead of R ranks' files: the sum of 128 MiB / k, each
1 to 8 MiB, over k = 1 to R. GB/s as stated: disk {disk:g} and network {network:g} of a node,
host {host:g} and link {link:g} of a GPU; sha {sha:.2f} of a core is measured here.

"""
_ABOUT_CHECK = """
### The formulas for memory against what was measured above

MiB of own memory, largest rank.

"""


def grid(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def heading(report: dict[str, Any], title: str) -> str:
    """The title, the command, and what it ran on."""
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    revisions = "".join(f", {side} = {found}" for side, found in report.get("revisions", {}).items())
    return (
        f"# {title}\n\n`{report['command']}`, {report['date']}, {report['cores']} cores, {versions}{revisions}; "
        f"{report['minutes']:.0f} minutes.\n\n"
    )


def checkpoints(report: dict[str, Any]) -> str:
    """The page of `benchmarks/checkpoints.py`."""
    rows, model = report["summary"], report["model"]
    gb = rows[0]["state"] / GB
    text = heading(report, "Checkpoints, start and export on all ranks")
    text += _INTRODUCTION.format(
        parameters=model["parameters"] / 1e6,
        stored=model["stored"],
        layer=model["layer"] / 1e6,
        gb=gb,
        rounds=report["rounds"],
    )
    text += _of_rows(rows, {name: _number(value) for name, value in _SECONDS.items()})
    text += _ABOUT_SECONDS
    text += _of_rows(rows, {name: _cpu(phase) for name, phase in _PHASES.items()})
    memory = {name: _pair(phase, "anonymous") for name, phase in _PHASES.items()}
    memory |= {
        "start, kept": _pair("load", "kept"),
        "start, mapped files": _pair("load", "mapped"),
        "resume, mapped files": _pair("resume", "mapped"),
    }
    text += _ABOUT_MEMORY + _of_rows(rows, memory)
    text += "\n## A save, per GB of state\n\n" + _of_rows(
        rows,
        {
            "s held up": lambda row: f"{row['held'] / gb:.2f}",
            "s until committed": lambda row: f"{row['save']['seconds'] / gb:.2f}",
            "CPU s": lambda row: f"{row['save']['cpu_seconds'] / gb:.2f}",
            "committed, over the fewest ranks'": lambda row: (
                f"{row['save']['seconds'] / _fewest(rows, row)['save']['seconds']:.2f}x"
            ),
        },
    )
    return text + _projected(report)


def _projected(report: dict[str, Any]) -> str:
    wide = report["projection"]
    text = _ABOUT_ARITHMETIC.format(**report["rates"])
    text += grid(
        ["figure", "side", "formula", *(f"{row['model']}, {row['ranks']} GPUs" for row in wide)],
        (
            [
                f"{figure}, {'s' if _seconds(figure) else 'GB'}",
                side,
                formula,
                *(_figure(figure, row["figures"][figure][side]) for row in wide),
            ]
            for (figure, side), formula in FORMULAS.items()
        ),
    )
    return (
        text
        + _ABOUT_CHECK
        + grid(
            ["side", "ZeRO", "ranks", "what", "formula", "measured", "measured / formula"],
            (
                [
                    *(one[key] for key in ("side", "zero", "ranks", "what")),
                    f"{one['formula'] / MIB:,.0f}",
                    f"{one['measured'] / MIB:,.0f}",
                    f"{one['measured'] / one['formula']:.2f}",
                ]
                for one in report["formulas"]
            ),
        )
    )


def _of_rows(rows: list[dict[str, Any]], columns: dict[str, Any]) -> str:
    return grid(
        [*_KEYS.values(), *columns],
        ([*(row[key] for key in _KEYS), *(column(row) for column in columns.values())] for row in rows),
    )


def _number(value: Any) -> Any:
    return lambda row: f"{value(row):.2f}"


def _cpu(phase: str) -> Any:
    return lambda row: f"{row[phase]['cpu_seconds']:.2f}"


def _pair(phase: str, kind: str) -> Any:
    return lambda row: f"{row[phase][f'{kind}_median'] / MIB:,.0f} / {row[phase][f'{kind}_max'] / MIB:,.0f}"


def _seconds(name: str) -> bool:
    return name in ("save, held", "save, committed")


def _figure(name: str, value: float) -> str:
    return f"{value if _seconds(name) else value / GB:,.2f}"


def _fewest(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    mine = [one for one in rows if (one["zero"], one["side"]) == (row["zero"], row["side"])]
    return min(mine, key=lambda one: int(one["ranks"]))
