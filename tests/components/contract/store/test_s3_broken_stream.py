"""A body that breaks in the middle: an S3 server that goes away while an object is read, and comes back."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from components.contract import open_store
from components.contract.store import StoreError
from components.contract.store.base import Store

SIZE = 48 << 20  # far more than the kernel holds of a connection


@contextmanager
def begun(
    own_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Store, bytes, bytes, Iterator[bytes], Callable[[], None]]]:
    """A store, the bytes of its object, the first of them, the iterator of the rest, what starts the server."""
    whole = random.Random(1).randbytes(SIZE)
    with contextlib.ExitStack() as later:
        with own_s3.running() as server:
            for name, value in server.env.items():
                monkeypatch.setenv(name, value)
            store = open_store("s3://llava-tests/streams")
            store.write("object", whole)
            chunks = store.chunks("object", 1 << 20)
            first = next(chunks) + next(chunks)
        yield store, whole, first, chunks, lambda: later.enter_context(own_s3.running())


def test_a_stream_goes_on_where_it_broke_once_the_server_is_back(
    own_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(own_s3, monkeypatch) as (_, whole, first, chunks, start):
        rest: list[bytes] = []
        reader = threading.Thread(target=lambda: rest.extend(chunks))
        reader.start()
        time.sleep(2)
        assert reader.is_alive()
        start()
        reader.join(120)
        assert first + b"".join(rest) == whole


def test_an_object_that_changed_while_it_was_read_is_an_error_that_says_so(
    own_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(own_s3, monkeypatch) as (store, whole, _, chunks, start):
        start()
        store.write("object", whole[::-1])
        with pytest.raises(StoreError, match=r"s3://llava-tests/streams/object: changed while it was read, "):
            list(chunks)


def test_a_server_that_stays_away_ends_the_stream_in_one_line(
    own_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_OUTAGE_SECONDS", "1")
    told = r"streams/object: no answer from AWS_ENDPOINT_URL="
    with begun(own_s3, monkeypatch) as (_, _, _, chunks, _), pytest.raises(StoreError, match=told):
        list(chunks)
