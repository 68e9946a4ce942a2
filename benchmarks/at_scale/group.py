"""A gloo group of forked processes: imports are done once, and a rank may die without ending the benchmark.

The caller imports what the ranks need and then forks, so that 64 ranks share one copy of the libraries.
"""

import gc
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
from torch import distributed

EVERY = 0.02
"""Seconds between two looks at the ranks' memory."""


@dataclass(frozen=True)
class Outcome:
    """What became of a rank."""

    value: Any = None
    error: str | None = None
    """The traceback of what it raised, or how it died."""


def run_group(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    seconds: float = 600.0,
    timeout: float = 120.0,
    watch: Callable[[list[int]], None] | None = None,
) -> list[Outcome]:
    """`function(*arguments)` on each of `world` ranks; what became of each, by rank.

    `timeout`: seconds until a collective gives up. `watch` is given the process ids every `EVERY` seconds. Ranks that
    have not ended after `seconds` are killed, and AssertionError names them.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Else the first full collection in each rank writes into, and so copies, all that they share.
    gc.collect()
    gc.freeze()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(
            target=_member, args=(rank, world, port, timeout, pipe[1], function, arguments), daemon=True
        )
        for rank, pipe in enumerate(pipes)
    ]
    for process, pipe in zip(processes, pipes, strict=True):
        process.start()
        pipe[1].close()
    pids = [process.pid or 0 for process in processes]
    found: dict[int, Outcome] = {}
    waiting = {pipe[0]: rank for rank, pipe in enumerate(pipes)}
    end = time.monotonic() + seconds
    try:
        while waiting:
            assert time.monotonic() < end, (
                f"ranks {sorted(waiting.values())} hang: no result in {seconds:.0f} s"
            )
            for pipe in connection.wait(list(waiting), timeout=EVERY):
                rank = waiting.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except EOFError:
                    processes[rank].join(10)
                    found[rank] = Outcome(error=f"died: {_ending(processes[rank].exitcode)}")
            if watch is not None:
                watch(pids)
        return [found[rank] for rank in range(world)]
    finally:
        for process in processes:
            process.join(0 if waiting else 10)
            if process.is_alive():
                process.kill()


def values_of(outcomes: list[Outcome]) -> list[Any]:
    """What each rank returned; AssertionError with the first traceback if one failed."""
    failed = [f"rank {rank}: {one.error}" for rank, one in enumerate(outcomes) if one.error is not None]
    assert not failed, failed[0]
    return [one.value for one in outcomes]


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


def _member(
    rank: int,
    world: int,
    port: int,
    timeout: float,
    pipe: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    # As a launcher would: DeepSpeed looks for them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    try:
        distributed.init_process_group(
            "gloo",
            f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        pipe.send(Outcome(function(*arguments)))
    except BaseException:
        pipe.send(Outcome(error=traceback.format_exc()))
    finally:
        # Threads and groups of a rank that failed may wait for others for minutes.
        pipe.close()
        os._exit(0)
