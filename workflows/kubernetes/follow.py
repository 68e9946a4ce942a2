"""Following a run: its states and the log of its submitter, over cut streams, until it has ended.

What a cut stream may have missed is read anew: the object is fetched each time before it is watched, and a log begins
again at its start, with the lines that were printed left out.
"""

import itertools
import re
import threading
import time

from components.contract import say, tell
from llava.errors import AlreadyRunning, BudgetReached, LlavaError, Preempted, RefusedInput
from workflows.kubernetes.api import Cluster, ClusterError, Disconnected, RayJob
from workflows.kubernetes.rayjob import is_unfinished, state

RECONNECT_S = 2.0
PATIENCE_S = 600.0
LOG_GRACE_S = 10.0
_STATUS = {kind.exit_status: kind for kind in (RefusedInput, BudgetReached, Preempted, AlreadyRunning)}


def follow(cluster: Cluster, name: str) -> None:
    """Print states and log of the RayJob `name` until it ends.

    Raises the error with the run's own exit status where it did not succeed, and ClusterError where the cluster
    stays away for PATIENCE_S; the run itself goes on then.
    """
    log = _Log(cluster, name)
    log.start()
    job = _until_finished(cluster, name)
    log.finish()
    status = job.get("status") or {}
    if job.get("deleted"):
        raise LlavaError(f"{name}: deleted while it was {state(job)}; submit it again to go on")
    if status.get("jobStatus") == "SUCCEEDED":
        return
    message = " ".join(str(status.get("message") or status.get("reason") or "no reason given").split())[:500]
    exit_code = re.search(r"exit code (\d+)", message)
    kind = _STATUS.get(int(exit_code[1]), LlavaError) if exit_code else LlavaError
    raise kind(f"{name}: {state(job)}: {message}")


def _until_finished(cluster: Cluster, name: str) -> RayJob:
    shown, seen = "", time.monotonic()
    while True:
        try:
            now = cluster.get(name)
            for job in itertools.chain([now], cluster.watch(name, now["metadata"]["resourceVersion"])):
                seen = time.monotonic()
                if state(job) != shown:
                    shown = state(job)
                    say(shown, name)
                if job.get("deleted") or not is_unfinished(job):
                    return job
        except Disconnected as error:
            if time.monotonic() - seen > PATIENCE_S:
                raise ClusterError(
                    f"{error}; the run goes on: `kubectl -n {cluster.namespace} get rayjob {name} --watch`"
                ) from None
        time.sleep(RECONNECT_S)


class _Log(threading.Thread):
    """Prints what the submitter pods of a run print, each line once."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        super().__init__(daemon=True)
        self._cluster, self._name = cluster, name
        self._ended = threading.Event()
        self._printed: dict[str, tuple[str, int]] = {}
        """By pod: the time of the last line that was printed, and how many lines of that time were."""

    def run(self) -> None:
        """Read pod after pod, again and again, until the run has ended; where that is not allowed, say so once."""
        last_round = False
        while not last_round:
            last_round = self._ended.wait(RECONNECT_S)
            try:
                for pod in self._cluster.submitter_pods(self._name):
                    self._read(pod)
            except (Disconnected, RefusedInput):  # cut, or the pod does not stand yet
                continue
            except ClusterError as error:
                say(f"no log: {error}", self._name)
                return

    def _read(self, pod: str) -> None:
        until, skip = self._printed.get(pod, ("", 0))
        for moment, line in self._cluster.log(pod):
            if moment < until:
                continue
            if moment == until and skip:
                skip -= 1
                continue
            last, count = self._printed.get(pod, ("", 0))
            self._printed[pod] = (moment, count + 1 if moment == last else 1)
            tell(line)

    def finish(self) -> None:
        """Let the last lines come, for a while."""
        self._ended.set()
        self.join(LOG_GRACE_S)
