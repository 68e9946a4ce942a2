"""From what the ranks noted to figures, and how each figure grows with the ranks."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.at_scale.crowd import TOKENS_PER_ROW
from benchmarks.at_scale.stand_ins import WARM
from llava.data.plan import BatchPlan, SampleIndex


def of_training(ranks: list[dict[str, Any]], saved: int) -> dict[str, Any]:
    """Steps, bookkeeping, collectives and the save in the middle (after step `saved`) of one group."""
    last, late = WARM + ranks[0]["measured"], ranks[0]["slow_steps"]
    plain = [
        [row for number, row in enumerate(one["steps"][:last], start=1) if number > WARM and number != saved]
        for one in ranks
    ]
    cpu = [statistics.mean(row["cpu_seconds"] for row in rows) for rows in plain]
    others = cpu[1:] or cpu
    slow = [row["seconds"] for row in ranks[0]["steps"][last : last + late]]
    first_save = [one["saves"][0] for one in ranks]
    return {
        "bookkeeping": {
            "rank 0": cpu[0],
            "others": statistics.median(others),
            "most of the others": max(others),
            "extra": cpu[0] - statistics.median(others),
        },
        "process cpu": {
            "rank 0": ranks[0]["process_cpu_seconds"],
            "others": statistics.median(one["process_cpu_seconds"] for one in ranks[1:] or ranks),
        },
        "planning cpu": statistics.median(
            one["planned"]["cpu_seconds"] / one["planned"]["calls"] for one in ranks
        ),
        "step": statistics.median(row["seconds"] for row in plain[0]),
        "data wait": statistics.median(row["wait"] for row in plain[0]),
        "slow step": statistics.median(slow) if slow else None,
        "primitives": {
            name: {
                "seconds": statistics.median(one["primitives"][name]["seconds"] for one in ranks),
                "cpu_seconds": statistics.median(one["primitives"][name]["cpu_seconds"] for one in ranks),
            }
            for name in ranks[0]["primitives"]
        },
        "step collectives": _collectives(ranks, "steps", len(ranks[0]["steps"])),
        "save": {
            "median": statistics.median(one["seconds"] for one in first_save),
            "max": max(one["seconds"] for one in first_save),
            "cpu rank 0": first_save[0]["cpu_seconds"],
            "cpu others": statistics.median(one["cpu_seconds"] for one in first_save[1:] or first_save),
        },
        "store keys": {"joined": ranks[0]["store_keys"][0], "at the end": ranks[0]["store_keys"][1]},
        "memory": {
            "forked": statistics.median(one["bare"] for one in ranks),
            "trained": statistics.median(one["memory"] for one in ranks),
        },
    }


def of_stop(ranks: list[dict[str, Any]], ordered: float) -> dict[str, float]:
    """From the order to the last rank that left; rank 0 looks for an order every half second."""
    heard = float(ranks[0]["heard"])
    return {
        "heard after": heard - ordered,
        "all left after that": max(one["left"] for one in ranks) - heard,
        "steps": len(ranks[0]["steps"]),
    }


def of_resume(ranks: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """All went on from `step`."""
    found = [one["resume"] for one in ranks]
    assert all(one["step"] == step for one in found), [one["step"] for one in found]
    return {
        "ranks": len(ranks),
        "seconds": max(one["seconds"] for one in found),
        "cpu rank 0": found[0]["cpu_seconds"],
        "cpu others": statistics.median(one["cpu_seconds"] for one in found[1:] or found),
        "collectives": _collectives(ranks, "resume", 1),
    }


def _collectives(ranks: list[dict[str, Any]], phase: str, times: int) -> dict[str, dict[str, float]]:
    """Calls and bytes of a rank (the largest), over `times`."""
    kinds = sorted({kind for one in ranks for kind in one["collectives"].get(phase, {})})
    return {
        kind: {
            what: max(one["collectives"].get(phase, {}).get(kind, {}).get(what, 0) for one in ranks) / times
            for what in ("calls", "bytes")
        }
        for kind in kinds
    }


def planning(index: SampleIndex, worlds: Sequence[int], fixed: int, steps: int) -> list[dict[str, float]]:
    """CPU seconds of a step's plan, alone in this process: at a global batch of `fixed` samples, and of 4 a rank."""
    rows = []
    for world in worlds:
        row: dict[str, float] = {"world": world}
        for name, batch in (("fixed", fixed), ("4 a rank", 4 * world)):
            plan = BatchPlan(index, 0, 1.0, batch)
            plan.place(0, world, TOKENS_PER_ROW)
            began = time.process_time()
            for step in range(1, steps + 1):
                plan.place(step, world, TOKENS_PER_ROW)
            row[name] = (time.process_time() - began) / steps
        rows.append(row)
    return rows


FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "bookkeeping of a step, rank 0 (CPU s)": lambda row: row["bookkeeping"]["rank 0"],
    "bookkeeping of a step, the others (CPU s)": lambda row: row["bookkeeping"]["others"],
    "process, a step, the others (CPU s)": lambda row: row["process cpu"]["others"],
    "plan of a step (CPU s)": lambda row: row["planning cpu"],
    "all_reduce of loss and words (CPU s)": lambda row: row["primitives"]["all_reduce"]["cpu_seconds"],
    "all_reduce of loss and words (s, CPUs shared)": lambda row: row["primitives"]["all_reduce"]["seconds"],
    "broadcast of an object (CPU s)": lambda row: row["primitives"]["broadcast_object_list"]["cpu_seconds"],
    "gather of objects (CPU s)": lambda row: row["primitives"]["all_gather_object"]["cpu_seconds"],
    "save, thread that trains, rank 0 (CPU s)": lambda row: row["save"]["cpu rank 0"],
    "save, thread that trains, the others (CPU s)": lambda row: row["save"]["cpu others"],
    "last share to the marker (s)": lambda row: row["commit"]["last share to marker"],
    "marker (bytes)": lambda row: row["commit"]["marker bytes"],
    "resume, rank 0 (CPU s)": lambda row: row["resume"]["cpu rank 0"],
    "resume, the others (CPU s)": lambda row: row["resume"]["cpu others"],
    "resume, collectives' bytes of a rank": lambda row: _sum(row["resume"]["collectives"], "bytes"),
    "resume, collectives of a rank": lambda row: _sum(row["resume"]["collectives"], "calls"),
}


def _sum(collectives: dict[str, dict[str, float]], what: str) -> float:
    return sum(one[what] for one in collectives.values())


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure by number of ranks, with straight lines over log2 N and over N, and the shares that they explain."""
    worlds = [row["world"] for row in rows]
    found = []
    for name, of in FIGURES.items():
        values = [float(of(row)) for row in rows]
        row: dict[str, Any] = {"figure": name, "values": values}
        if len(rows) > 2:
            row["log2"] = _line([math.log2(world) for world in worlds], values)
            row["linear"] = _line(worlds, values)
        found.append(row)
    return found


def _line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    slope, start = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + start)
    spread = float(np.var(y))
    return {
        "start": float(start),
        "slope": float(slope),
        "explained": 1 - float(np.mean(rest**2)) / spread if spread > 0 else 1.0,
    }
