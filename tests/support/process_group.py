"""Plain processes in a gloo group: what tests of training on several workers need, without a cluster.

The processes are forked from one server that has imported torch and transformers already, so that a group starts in
a moment.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import torch
from torch import distributed

from llava.errors import LlavaError

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def run_group(function: Callable[..., Any], workers: int, *arguments: Any, seconds: float = 120) -> list[Any]:
    """`function(*arguments)` on each of `workers` processes of a group; what each returned, by rank.

    One that raises ends the group, with its LlavaError or its traceback; one not ended in `seconds` is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(workers)]
    processes = [
        _CONTEXT.Process(
            target=_member, args=(rank, workers, port, pipe[1], function, arguments), daemon=True
        )
        for rank, pipe in enumerate(pipes)
    ]
    for process, pipe in zip(processes, pipes, strict=True):
        process.start()
        pipe[1].close()
    try:
        found: dict[int, Any] = {}
        waiting = {pipe[0]: rank for rank, pipe in enumerate(pipes)}
        end = time.monotonic() + seconds
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            assert ready, f"ranks {sorted(waiting.values())} hang: no result after {seconds:.0f} s"
            for pipe in ready:
                rank = waiting.pop(pipe)
                value, error = pipe.recv()
                if isinstance(error, LlavaError):
                    raise error
                assert error is None, f"rank {rank}:\n{error}"
                found[rank] = value
        return [found[rank] for rank in range(workers)]
    finally:
        for process in processes:
            process.join(10 if not waiting else 0)
            if process.is_alive():
                process.kill()


def _member(
    rank: int, workers: int, port: int, pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # As a launcher would: DeepSpeed looks for them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    try:
        distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
        pipe.send((function(*arguments), None))
        distributed.destroy_process_group()
    except LlavaError as error:
        pipe.send((None, error))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
