"""An S3 server that refuses, answers errors, cuts bodies and loses answers: every call of the store goes on."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from components.contract import acquire, outages
from components.contract.lease import read_lease
from components.contract.store import Store, StoreError, open_store
from tests.support.faulty_proxy import CUT, GONE, LOST, FaultyProxy

pytestmark = pytest.mark.services
LARGE = random.Random(1).randbytes(3 << 20)


@pytest.fixture(scope="module")
def one_proxy(s3_server: Any) -> Iterator[FaultyProxy]:
    """One for the module: boto makes its client anew for every address."""
    with FaultyProxy(s3_server.endpoint).running() as running:
        yield running


@pytest.fixture
def proxy(s3_env: Any, one_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """A proxy before the S3 server, which the environment names; nobody is waited for longer than 20 s."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", one_proxy.url)
    monkeypatch.setenv(outages.VARIABLE, "20")
    monkeypatch.setattr(outages, "FIRST_PAUSE", 0.02)
    outages.service.cache_clear()
    one_proxy.faults([])
    return one_proxy


@pytest.fixture
def store(proxy: FaultyProxy, s3_root: str) -> Store:
    """A store behind the proxy that holds an object, a Parquet file and a folder with two files."""
    made = open_store(s3_root)
    made.write("object", LARGE)
    for key in ("some/a", "some/b"):
        made.write(key, b"x")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"pixels": [LARGE[:100_000]] * 9}), sink, row_group_size=3, compression="none")
    made.write("rows.parquet", sink.getvalue().to_pybytes())
    return made


def _parquet(store: Store, _: Path) -> Any:
    system, base = store.arrow()
    with pq.ParquetFile(f"{base}/rows.parquet", filesystem=system, pre_buffer=True) as file:
        return file.read_row_group(1)["pixels"][2].as_py() == LARGE[:100_000]


def _ranged(store: Store, _: Path) -> Any:
    with store.open("object") as file:
        file.seek(1 << 20)
        return file.read(1 << 20) == LARGE[1 << 20 : 2 << 20]


def _download(store: Store, folder: Path) -> Any:
    store.download("object", folder / "object")
    return (folder / "object").read_bytes() == LARGE


def _upload(store: Store, folder: Path) -> Any:
    (folder / "local").write_bytes(LARGE)
    store.upload(folder / "local", "uploaded")
    return store.read("uploaded") == LARGE


def _copy(store: Store, _: Path) -> Any:
    store.copy(store, "object", "copied")
    return store.read("copied") == LARGE


def _swap(store: Store, _: Path) -> Any:
    found = store.fetch("some/a")
    assert found is not None
    return store.swap("some/a", b"new", found[1]) and store.read("some/a") == b"new"


def _delete_all(store: Store, _: Path) -> Any:
    store.delete_all("some")
    return [entry.key for entry in store.list("some")] == []


READS: dict[str, Callable[[Store, Path], Any]] = {
    "fetch": lambda store, _: store.read("object") == LARGE,
    "chunks": lambda store, _: b"".join(store.chunks("object", 1 << 18)) == LARGE,
    "download": _download,
    "ranged": _ranged,
    "parquet": _parquet,
    "list": lambda store, _: [entry.key for entry in store.list("some")] == ["some/a", "some/b"],
    "folders": lambda store, _: store.folders() == ["some"],
}
OTHERS: dict[str, Callable[[Store, Path], Any]] = {
    "stat": lambda store, _: store.stat("object").size == len(LARGE),  # type: ignore[union-attr]
    "write": lambda store, _: store.write("new", b"x") is None and store.read("new") == b"x",
    "create": lambda store, _: store.create("new", b"x") and not store.create("new", b"y"),
    "swap": _swap,
    "upload": _upload,
    "copy": _copy,
    "delete": lambda store, _: store.delete("object") is None and store.stat("object") is None,
    "delete_all": _delete_all,
}


CALLS = READS | OTHERS


@pytest.mark.parametrize("call", READS.values(), ids=READS)
def test_bodies_that_are_cut_in_the_middle_are_read_again(
    store: Store, proxy: FaultyProxy, tmp_path: Path, call: Callable[[Store, Path], Any]
) -> None:
    proxy.faults([CUT] * 3, "GET")
    assert call(store, tmp_path) is True
    assert proxy.met == 3


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_goes_on_after_errors_and_lost_answers(
    store: Store, proxy: FaultyProxy, tmp_path: Path, call: Callable[[Store, Path], Any]
) -> None:
    proxy.faults([503, GONE, LOST, 500, -500, 429])
    assert call(store, tmp_path) is True
    assert proxy.met == 6


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_server_that_refuses_connections_for_a_while_is_waited_for(
    store: Store, proxy: FaultyProxy, tmp_path: Path, call: Callable[[Store, Path], Any]
) -> None:
    back = proxy.away(0.3)
    assert call(store, tmp_path) is True
    back.join()


def test_a_file_system_for_another_process_is_as_patient(store: Store, proxy: FaultyProxy) -> None:
    system, base = store.arrow()
    back = proxy.away(3.0)
    assert pickle.loads(pickle.dumps(system)).get_file_info(f"{base}/object").size == len(LARGE)
    back.join()


def test_waiting_is_told_once_and_ends_with_one_line(
    store: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(outages.VARIABLE, "2")
    proxy.manners = lambda method, path: GONE
    started = time.monotonic()
    with pytest.raises(StoreError, match=f"object: answers of AWS_ENDPOINT_URL={proxy.url} break off"):
        store.read("object")
    assert 2 <= time.monotonic() - started < 4
    for _ in range(5):  # the time is the service's: what comes after waits no more
        with pytest.raises(StoreError):
            store.stat("object")
    assert time.monotonic() - started < 6
    told = capsys.readouterr().err
    assert told == f"S3 at {proxy.url} does not answer (the connection was cut): trying again for 2 s\n"


def test_an_error_that_does_not_pass_is_not_waited_for(store: Store, proxy: FaultyProxy) -> None:
    started = time.monotonic()
    proxy.faults([403])
    with pytest.raises(StoreError, match="refuses these credentials"):
        store.read("object")
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    assert time.monotonic() - started < 2


def test_a_lease_whose_renewal_had_to_wait_is_renewed_again(store: Store, proxy: FaultyProxy) -> None:
    held = acquire(store, ttl=3.0)
    proxy.faults([503] * 6, "PUT", "lease.json")
    back = proxy.away(2.0)
    held.check()
    back.join()
    found = read_lease(store)
    assert found is not None and found.expires - time.time() > 1.0
    held.release()
