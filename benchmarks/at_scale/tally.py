"""Collectives: how many a rank takes part in, what reaches it, and what each takes by itself."""

import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import distributed


class Tally:
    """Counts the collectives of the thread that trains: calls, seconds, and bytes that reach this rank, by phase."""

    def __init__(self) -> None:
        self.phase = "start"
        self.found: dict[str, dict[str, dict[str, float]]] = {}
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier"):
            setattr(distributed, name, self._counted(name, getattr(distributed, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic()
            result = call(*arguments, **options)
            row = self.found.setdefault(self.phase, {}).setdefault(
                name, {"calls": 0, "seconds": 0.0, "bytes": 0}
            )
            row["calls"] += 1
            row["seconds"] += time.monotonic() - began
            row["bytes"] += _bytes(name, arguments)
            return result

        return counted


def _bytes(name: str, arguments: tuple[Any, ...]) -> int:
    """That reach a rank: a gather pads every object to the largest one's size."""
    if name == "all_reduce":
        return int(arguments[0].nbytes)
    if name == "all_gather_object":
        return len(arguments[0]) * max(len(pickle.dumps(each)) for each in arguments[0])
    return sum(len(pickle.dumps(each)) for each in arguments[0]) if name == "broadcast_object_list" else 0


def primitives(times: int) -> dict[str, dict[str, float]]:
    """What the collectives take by themselves, back to back: the median on the wall, CPU seconds as a mean."""
    words = torch.zeros(5, dtype=torch.float64)
    world = distributed.get_world_size()
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: distributed.all_reduce(words),
        "broadcast_object_list": lambda: distributed.broadcast_object_list(["x" * 100], src=0),
        "all_gather_object": lambda: distributed.all_gather_object([None] * world, "x" * 100),
    }
    found = {}
    for name, call in calls.items():
        distributed.barrier()
        cpu, each = time.process_time(), []
        for _ in range(times):
            began = time.monotonic()
            call()
            each.append(time.monotonic() - began)
        found[name] = {
            "seconds": float(np.median(each)) if each else 0.0,
            "cpu_seconds": (time.process_time() - cpu) / max(1, times),
        }
    return found


def store_keys() -> int:
    """Entries of the store in which the ranks found each other."""
    return int(distributed.distributed_c10d._get_default_store().num_keys())
