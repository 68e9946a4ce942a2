"""Leaving early: because the driver asks for it, or because a node is about to be taken away."""

import threading

from components.contract.pace import Due
from components.training.board import ProgressClient
from components.training.observers.base import Observer, RunState
from llava.training.loop import StepReport

ASK, STOP = 1, 2
"""Words of rank 0 to all, a bit each: ask Ray whether a node is about to be taken away; save and leave."""
_BETWEEN_ASKING = 5.0


class Stopping(Observer):
    """Rank 0 hears it and says so in the next step, so that all ranks leave after the same one."""

    def __init__(self, state: RunState) -> None:
        super().__init__(state)
        self._due = Due(_BETWEEN_ASKING)
        self._listener = StopListener(state.client) if state.chief else None

    def word(self) -> int:
        if self._listener is None:
            return 0
        if self._listener.stop.is_set():
            return STOP
        return ASK if self._due() else 0

    def leaving(self, report: StepReport) -> None:
        if report.word & STOP:
            self.state.stopped = True
        elif report.word & ASK:
            self.state.stopped = self._taken_away()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def _taken_away(self) -> bool:
        from ray import train

        # A barrier: all ranks are here, because they all heard the word.
        info = train.get_preemption_info()
        if info is not None and self.state.chief:
            self.state.client.note(f"nodes are being taken away: {', '.join(info.preempted_node_ids)}")
        return info is not None


class StopListener:
    """Hears from the driver, in a thread of rank 0, that the run shall save and leave."""

    def __init__(self, client: ProgressClient, every: float = 0.5):
        self.stop = threading.Event()
        self._client, self._every = client, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stop-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._over.set()
        self._thread.join(timeout=10)

    def _listen(self) -> None:
        while not self._over.wait(self._every):
            if self._client.stopping():
                self.stop.set()
                return
