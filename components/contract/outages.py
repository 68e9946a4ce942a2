"""Services that are away for a while: every call of S3 and of MLflow waits for them in the same way.

A call that a service does not answer is tried again, after pauses that double from a quarter of a second to five,
until the service was away for `LLAVA_OUTAGE_SECONDS` (120). The console is told once, when the waiting begins. The time
is the service's, so that ten calls in a row do not wait ten times; and the call's, so that a service which answers
everything but one call does not hold that one for ever.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

from components.contract.console import say
from llava.errors import RefusedInput

SECONDS, VARIABLE = 120.0, "LLAVA_OUTAGE_SECONDS"
CUT = "the connection was cut"
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
_ONE_OUTAGE = 60.0
"""Failures that lie no further apart are of one outage: more than the longest pause and a time-out together."""
_QUIET = 30.0
"""Seconds after a line about a service in which there is no other: one that comes and goes would fill the console."""

Result = TypeVar("Result")
Errors = Sequence[BaseException]
_hurried: ContextVar[bool] = ContextVar("hurried", default=False)


def seconds() -> float:
    """How long a service may be away; RefusedInput where the variable is no such number."""
    if _hurried.get():
        return 0.0
    told = os.environ.get(VARIABLE) or str(SECONDS)
    try:
        found = float(told)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 86_400:
        raise RefusedInput(f"{VARIABLE}={told}: give seconds, from 0 to 86400")
    return found


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Nothing in here waits for a service: a first check, or what is left to do where a command ends anyway."""
    token = _hurried.set(True)
    try:
        yield
    finally:
        _hurried.reset(token)


class Service:
    """What this process knows of one service: since when it is away, and whether that was told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._since: float | None = None
        self._last = self._told = float("-inf")

    def failed(self, why: str) -> float:
        """A call was not answered: since when the service is away. The first line about it is printed here."""
        allowed, now = seconds(), time.monotonic()
        with self._lock:
            if self._since is None or now - self._last > _ONE_OUTAGE:
                self._since = now
            self._last = now
            since = self._since
            tells = since + allowed > now > self._told + _QUIET
            if tells:
                self._told = now
        if tells:
            say(f"{self.name} does not answer ({why}): trying again for {allowed:g} s")
        return since

    def answered(self) -> None:
        """A call was answered, with whatever it was."""
        self._since = None


@functools.cache
def service(name: str) -> Service:
    """The service of that name, such as "MLflow at http://host:5000", in this process."""
    return Service(name)


class Patience:
    """How long one call is tried again."""

    def __init__(self, of: Service) -> None:
        self.service = of
        self._since: float | None = None
        self._pause = FIRST_PAUSE

    def pause(self, why: str) -> float | None:
        """Seconds until the next try; None if the time is over. The last try is made when the time ends."""
        away = self.service.failed(why)
        now = time.monotonic()
        if self._since is None:
            self._since = now
        left = min(away, self._since) + seconds() - now
        if left <= 0:
            return None
        pause = min(left, self._pause * random.uniform(0.5, 1.0))
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)
        return pause

    def wait(self, why: str) -> bool:
        """Sleep until the next try; False if there is none."""
        pause = self.pause(why)
        if pause is None:
            return False
        time.sleep(pause)
        return True

    def advanced(self) -> None:
        """A part of the answer came: what fails from now on fails for the first time."""
        self.service.answered()
        self._since, self._pause = None, FIRST_PAUSE


def persist(of: Service, call: Callable[[], Result], outage: Callable[[Errors], str | None]) -> Result:
    """What `call` gives, called again while `outage` says of its error (`chain`) why the service is away.

    `call` must do no harm by being done twice.
    """
    patience, handled = Patience(of), sys.exception()
    while True:
        try:
            result = call()
        except Exception as error:
            why = outage(chain(error, handled))
            if why is None:
                of.answered()
                raise
            if not patience.wait(why):
                raise
        else:
            of.answered()
            return result


def chain(error: BaseException, handled: BaseException | None = None) -> Errors:
    """The error, then those that it came from: libraries put what happened into errors of their own.

    `handled`: an error in whose handler the call was made, and which it did not come from.
    """
    found: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and one is not handled and all(one is not other for other in found):
            found.append(one)
            waiting += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
    return found


def brief(errors: Errors) -> str:
    """What happened, in the fewest words: the system's own, where one of them was the system's."""
    for one in errors:
        if isinstance(one, OSError) and isinstance(one.errno, int):
            return os.strerror(one.errno)
    if any("timeout" in type(one).__name__.lower() for one in errors):
        return "no answer in time"
    if any(isinstance(one, ConnectionError | http.client.IncompleteRead) for one in errors):
        return CUT
    return type(errors[0]).__name__
