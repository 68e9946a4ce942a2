"""Chat templates from outside, rendered with a bound on time, memory and length.

A template is a program of whoever made the tokenizer. The sandbox of transformers keeps it from files and from
Python's insides, and lets it count to infinity. It is therefore rendered in a process of its own, which the kernel
ends at its limits. It must not even be compiled elsewhere: Jinja computes constants then. One process per command
renders all; it starts with the first template, in about a second.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 5
"""Processor time for one text."""
LONGEST = 1_000_000
"""Characters of one text."""
_PATIENCE = 60
"""Seconds by the clock, starting the process included: a busy machine takes longer than its processor time says."""
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV")


class RenderingError(Exception):
    """Why a template gives no text, in a few words that follow its name."""


def render(template: str, messages: Sequence[Any], tokens: Mapping[str, Any], opened: bool = False) -> str:
    """The text that the Jinja `template` writes for `messages`, as `apply_chat_template` gives it.

    `tokens`: the tokenizer's `special_tokens_map`. `opened`: up to where the assistant begins to write. Raises
    `RenderingError` for a template that fails, or passes a limit.
    """
    return _PROCESS.ask({"template": template, "messages": messages, "tokens": tokens, "opened": opened})


def literals(template: str) -> str:
    """All text that the Jinja `template` has between its tags and in quotes. Raises `RenderingError`."""
    return _PROCESS.ask({"template": template, "messages": None})


class _Process:
    """The process and its pipe; one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, question: Mapping[str, Any]) -> str:
        with self._lock:
            child = self._running()
            try:
                answer = _talk(child, {**question, "seconds": SECONDS, "longest": LONGEST})
            except BaseException:
                self.stop()
                raise
        if "error" in answer:
            raise RenderingError(answer["error"])
        return str(answer["text"])

    def stop(self) -> None:
        """End the process, if this one started it."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.communicate()

    def _running(self) -> "subprocess.Popen[bytes]":
        # A fork of this process has a pipe that it must not share.
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("rendering_process.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
                # Ctrl-C is for the command, which ends the process when it has tidied up.
                start_new_session=True,
            )
            self._owner = os.getpid()
        return self._child


def _talk(child: "subprocess.Popen[bytes]", question: Mapping[str, Any]) -> dict[str, Any]:
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(question, default=str).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        raise RenderingError(f"the process that renders it ended with status {child.wait()}") from None
    line, until = b"", time.monotonic() + _PATIENCE
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            left = until - time.monotonic()
            ready = left > 0 and selector.select(left)
            if not (part := os.read(child.stdout.fileno(), 1 << 16) if ready else b""):
                raise RenderingError(f"it is not done after {SECONDS} s of processor time")
            line += part
    found: dict[str, Any] = json.loads(line)
    return found


_PROCESS = _Process()
atexit.register(_PROCESS.stop)
