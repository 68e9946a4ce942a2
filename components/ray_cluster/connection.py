"""The Ray cluster that components run on: the one that `RAY_ADDRESS` names, or a local one for this command."""

import atexit
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from components.contract.manifest import MANIFEST
from components.contract.printable import one_line
from components.contract.provenance import installed_root, source_digest, source_root
from components.contract.workspace import Workspace
from components.ray_cluster import starting
from components.ray_cluster.folder import ClusterFolder
from components.ray_cluster.watchdog import MARK
from llava.errors import LlavaError, RefusedInput, Terminated

PATIENT = {"health_check_failure_threshold": 1000}
"""For a cluster on one machine, which may swap or sleep. By default Ray takes a node that is silent for a minute for
dead, and ends the command. Give Ray a copy: it writes the folder of its session into what it is given."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}


@dataclass
class _Joined:
    by_us: bool = False
    """Whether this module connected the process, and nobody who uses it."""
    folder: ClusterFolder | None = None
    """Of the local cluster that it started."""


_joined = _Joined()


def prepare() -> None:
    """Set what Ray reads when it is first imported; call it before anything imports Ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Where accelerate is installed, transformers imports DeepSpeed, which would say that it found no GPU. Training
    # workers are told theirs.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray's coming default, said out loud so that it does not warn about it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_ADDRESS" not in os.environ:
        # No node of a cluster that lives and dies with the command is ever taken away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # A token of this command's own; Ray would otherwise leave one in the home folder.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def connect() -> None:
    """Join the cluster, or start a local one; nothing happens where this process is connected already.

    Raises RefusedInput where nobody answers at `RAY_ADDRESS`, LlavaError where Ray does not start.
    """
    prepare()
    import ray

    if ray.is_initialized():
        return
    _joined.by_us = True
    # Ray would warn that it cannot put a handler of SIGTERM in the place of the command's.
    logging.getLogger("ray._private.worker").addFilter(_no_word_of_handlers)
    if address := os.environ.get("RAY_ADDRESS"):
        starting.probe(address)
        starting.in_time(
            partial(ray.init, **_QUIET),
            starting.JOIN_SECONDS,
            f"RAY_ADDRESS={address}: no Ray cluster joined",
        )
        compare_code()
    else:
        _start_local()


def _start_local() -> None:
    """A cluster of this command's own, in a folder of its own, that a watchdog ends whatever becomes of the command."""
    import ray

    _joined.folder = folder = ClusterFolder()
    os.environ[MARK] = str(folder.path)
    # "local": another cluster that runs on this machine is not ours unless RAY_ADDRESS says so.
    init = partial(
        ray.init,
        **_QUIET,
        address="local",
        num_cpus=_cpus(),
        include_dashboard=False,
        _temp_dir=str(folder.ray),
        _system_config=dict(PATIENT),
    )
    starting.in_time(init, starting.START_SECONDS, "Ray does not start on this machine")


def leave(status: int) -> None:
    """Leave the process with `status` at once where it is connected or connecting; else return, for an ordinary exit.

    A thread that is inside Ray's compiled code while Ray or the interpreter is taken down ends the process with a
    segmentation fault. The cluster notices that the process is gone: a local one by its watchdog.
    """
    if starting.unfinished() or (_joined.by_us and _connected()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        if _joined.folder is not None:
            _joined.folder.told()
        os._exit(status)


def _connected() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@atexit.register
def _disconnect() -> None:
    """Leave the cluster that this process joined; end the local one and remove its folder."""
    if not _joined.by_us or starting.unfinished():
        return
    if _connected():
        sys.modules["ray"].shutdown()
    folder, _joined.folder, _joined.by_us = _joined.folder, None, False
    if folder is not None:
        os.environ.pop(MARK, None)
        folder.end()


def _no_word_of_handlers(record: logging.LogRecord) -> bool:
    return "SIGTERM handler is not set" not in record.getMessage()


def compare_code() -> None:
    """Raise RefusedInput where the code of this process is not that of the installed package, or of a node's workers.

    That comes of `ray job submit --working-dir`, whose folder stands before the image's package, in every process or
    (where PYTHONPATH is changed) in the workers alone. Nodes that join later run from the same image and folder.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ours, installed = source_digest(), installed_root()
    if installed is not None and source_digest(installed) != ours:
        raise RefusedInput(
            f"the uploaded folder ({source_root()}, code {ours[:12]}) is not the installed package ({installed}, code "
            f"{source_digest(installed)[:12]}): submit without --working-dir, or make the image anew from that folder"
        )
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    look = ray.remote(num_cpus=0)(source_digest)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    for node, answer in zip(nodes, asked, strict=True):
        try:
            theirs = ray.get(answer)
        except ray.exceptions.TaskUnschedulableError:
            continue  # the node died meanwhile
        except ray.exceptions.RayTaskError:
            theirs = "older code"  # it has no such function
        if theirs != ours:
            raise RefusedInput(
                f"driver and workers run different code: {ours[:12]} from {source_root()} here, {theirs[:12]} on node "
                f"{node[:8]}: submit without --working-dir, or leave PYTHONPATH as Ray sets it"
            )


def resources() -> str:
    """What the cluster has at this moment, such as "16 CPU, 8 GPU"."""
    import ray

    found = ray.cluster_resources()
    return ", ".join(f"{found[name]:.0f} {name}" for name in ("CPU", "GPU") if found.get(name)) or "nothing"


def require(what: str, workers: int, cpus: float, gpu: bool) -> None:
    """Raise RefusedInput where this machine can never hold `workers` processes of `cpus` CPUs (and a GPU) each.

    A cluster that `RAY_ADDRESS` names may grow: nothing is refused there.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    for name, need, count in (("CPU", workers * cpus, _cpus), ("GPU", workers * gpu, _gpus)):
        if need and need > (has := count()):
            raise RefusedInput(
                f"{what}: {workers} workers take {need:g} {name}, this machine has {has}: set fewer workers, or "
                "RAY_ADDRESS to a cluster that has them"
            )


def require_unless_made(workspace: Workspace, component: str, workers: int, cpus: float, gpu: bool) -> None:
    """`require`, but for a root that holds a finished one of the component: it may be the one that is meant."""
    if not any(entry.key.endswith(f"/{MANIFEST}") for entry in workspace.store.list(f"{component}/")):
        require(component, workers, cpus, gpu)


def _cpus() -> int:
    # A machine with one core still has to place a task beside a waiting one.
    return max(2, os.cpu_count() or 1)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextmanager
def disconnecting() -> Iterator[None]:
    """Leave the cluster at the end (a local one ends with it), unless somebody else had connected before.

    A command that was stopped keeps the connection for `leave`: its threads may still be inside Ray.
    """
    try:
        yield
    except (Terminated, SystemError):  # Ray's compiled calls wrap a Terminated
        raise
    except BaseException:
        _disconnect()
        raise
    else:
        _disconnect()


@contextmanager
def failures_told(died: str) -> Iterator[None]:
    """A LlavaError of a task or actor comes out as it is; an actor that died for good is one that says `died`."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, LlavaError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise LlavaError(f"{died} ({one_line(error)}); what was done is kept: run again") from error
